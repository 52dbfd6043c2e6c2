"""RGAlign-Rec: ranking-guided alignment of latent queries for zero-query intent prediction (arXiv 2602.12968)."""
