"""Engines: how weights are held, differentiated and updated."""
