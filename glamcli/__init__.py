"""glam: train, evaluate and plan GLaM-style mixture-of-experts language models."""

__version__ = "0.1.0"
