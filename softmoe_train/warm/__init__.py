"""Warm starts: weights from elsewhere, fitted to the model of a run, with an account of every tensor."""
