"""Sweeps: the points of a grid, each a run of its own, and the ledger of what became of them."""
