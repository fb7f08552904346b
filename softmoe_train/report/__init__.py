"""Runs compared: tables, curves, pictures, in one HTML file that stands alone."""
