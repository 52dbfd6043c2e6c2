"""Ranking-guided alignment (METHOD.md 2.3): the reasoner is tuned by what the ranker makes of its queries."""
