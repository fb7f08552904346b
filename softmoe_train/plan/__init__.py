"""What a run costs before it runs: the real engine and one real step of it, on shapes alone."""
