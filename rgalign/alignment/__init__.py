"""Ranking-guided alignment: the trained ranker teaches the reasoner (METHOD.md 2.3)."""
