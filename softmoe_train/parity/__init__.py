"""The proof that a layout computes what one process computes: on a perturbed state, for the user's own settings."""
