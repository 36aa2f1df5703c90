"""CUDA implementations of `arc::*`; nothing here imports triton before a CUDA tensor arrives."""
