"""Meshes, the slot exchange, and how weights are laid over ranks; works on the model from outside."""
