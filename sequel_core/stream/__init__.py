"""Streams of tasks: the samples, the plan of every random choice, replay memories."""
