"""Reproduce InternLM training on NPUs, GPUs or a plain CPU, and prove what came out."""

__version__ = "0.1.0"
