"""Bridges to Hugging Face transformers, safetensors and lm-eval."""
