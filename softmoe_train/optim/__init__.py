"""Parameter groups, schedules and optimizers; knows nothing of processes."""
