"""Sluice: gated attention and live activation metrics for vLLM."""

__version__ = "0.1.0"
