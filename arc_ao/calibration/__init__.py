"""Statistics of the inputs of linears: observing, sharing, merging."""
