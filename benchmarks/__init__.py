"""Ours against peers, a GPU against its ceilings, time and memory by the number of sessions: needs a checkout."""
