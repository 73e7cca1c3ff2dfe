"""Caches as folders: what is written, in which order, and how it is checked when it is read."""
