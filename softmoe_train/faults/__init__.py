"""What goes wrong around a run, and how it is kept from harming it."""
