"""A run on disk: artifacts, stages, locks, inputs from outside, several processes."""
