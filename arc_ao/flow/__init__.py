"""The way of one call: which linears, in which order, block by block, tried out at the end."""
