"""The model: a vision transformer whose MLPs may be mixtures of experts; knows nothing of processes."""
