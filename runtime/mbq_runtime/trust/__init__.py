"""Whose code of a bundle may run, and who made a bundle."""
