"""Measurements beside their physical floors: every time stands next to one taken in the same minute on the same machine."""
