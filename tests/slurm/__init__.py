"""SLURM itself: two nodes of it on this machine, and what runs on them."""
