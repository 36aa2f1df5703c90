"""Codes and norms of a quantized model trained against what the unquantized one says."""
