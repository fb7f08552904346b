"""The commands of `softmoe`: parse and call."""
