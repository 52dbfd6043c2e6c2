"""RGAlign-Rec: ranking-guided alignment of latent queries for zero-query intent prediction (arXiv 2602.12968)."""

__version__ = "0.2.0"


def load(run_dir, **how):
    """A finished run, ready to rank sessions it has never seen: rgalign.serve.load, which says more."""
    from rgalign.serve import load as load_scorer  # late: most of the package needs none of the models

    return load_scorer(run_dir, **how)
