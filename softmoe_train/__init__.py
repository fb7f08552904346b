"""Distributed pretraining of Soft Mixture-of-Experts vision transformers (arXiv 2308.00951)."""

__version__ = "0.1.0"
