"""Metrics, intervals and the result tables."""
