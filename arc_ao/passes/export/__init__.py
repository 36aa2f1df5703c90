"""Exported programs: observers and quantized operators in their graphs, packages for deployment."""
