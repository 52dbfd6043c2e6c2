"""Rankers: towers, losses and the training loop."""
