"""Number formats. `nvfp4` is the bit-level contract that every backend reproduces."""
