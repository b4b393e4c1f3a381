"""Compile a model for slicing: tie channels by tracing, plan what is sliced, and prove it by running it."""
