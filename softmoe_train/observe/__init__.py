"""What a run says about itself: the metrics file, the console, W&B, and the clock behind images per second."""
