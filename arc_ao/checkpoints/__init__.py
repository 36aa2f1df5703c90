"""NVFP4 checkpoints of other libraries: export to them, import from them, checks of any of them."""
