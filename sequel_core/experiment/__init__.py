"""Experiments as configurations: their settings, how they are composed, checked and built."""
