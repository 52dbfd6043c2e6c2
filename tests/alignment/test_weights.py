"""Sessions drawn by the weights of their clicks (alignment.weights); what the alignment moves by vectors or words."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from rgalign.alignment import closed_loop
from rgalign.data.lists import Match, with_match

TERMS = ("word_overlap", "written_overlap")


def weighted(context, weight):
    """The context with alignment.weights, its clicks weighted by weight(lists) -> (lists, candidates)."""
    alignment = context.params.alignment.model_copy(update={"weights": "exposure"})
    train = context.parts.train
    parts = replace(context.parts, train=replace(train, weight=weight(train)))
    return replace(context, params=context.params.model_copy(update={"alignment": alignment}), parts=parts)


def test_sessions_are_drawn_in_proportion_to_the_weights_of_their_clicks(context):
    ids = context.clicked_lists.session_id.tolist()
    assert context.drawn(ids, "sft").tolist() == [*range(len(ids))], "without weights each session is there once"
    heavy = set(ids[::3])

    def weight(lists):
        factor = torch.tensor([4.0 if session in heavy else 1.0 for session in lists.session_id])
        return lists.clicked.float() / lists.clicked.sum(1, keepdim=True).clamp(min=1) * factor[:, None]

    own = weighted(context, weight)
    many = [ids[row % len(ids)] for row in range(20_000)]
    rows = own.drawn(many, "sft")
    assert len(rows) == len(many)
    found = sum(many[row] in heavy for row in rows)
    share = 4 * sum(each in heavy for each in many)
    share /= share + sum(each not in heavy for each in many)
    assert chisquare([found, len(rows) - found], [share * len(rows), (1 - share) * len(rows)]).pvalue > 1e-4
    assert (own.drawn(ids, "sft") == own.drawn(ids, "sft")).all()
    assert (own.drawn(ids, "sft") != own.drawn(ids, "dpo")).any(), "each step has a draw of its own"


def test_weights_that_notebook_03_did_not_write_are_asked_for(context):
    with pytest.raises(ValueError, match="tables/exposure has no weights: run notebook 03 again"):
        weighted(context, lambda lists: None).drawn(context.clicked_lists.session_id.tolist(), "sft")


def test_what_the_alignment_moves_by_vectors_or_by_words_is_told_apart(context):
    """Terms that know the click: one written by the aligned LM, one not; a ranker that reads that term alone."""
    valid, kb = context.parts.valid, len(context.parts.intents)
    clicked = torch.zeros(len(valid), kb).scatter_add_(1, valid.candidates.long().clamp(min=0), valid.clicked.float())
    nothing, knows = torch.zeros(len(valid), kb), clicked.clamp(max=1)

    def state(written):
        values = torch.stack([nothing, written], dim=2).half()
        return replace(context, parts=replace(context.parts, valid=with_match(valid, Match(values, TERMS))))

    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))  # a ranker has weights, and they are on a device

        def forward(self, lists, intents):
            return lists.match.of_candidates(lists.candidates, TERMS).sum(2)

    before, aligned = state(nothing), replace(state(knows), rankers={0: Reads()})
    params = context.params.model_copy(update={"ranker": context.params.ranker.model_copy(update={"match": TERMS})})
    found = closed_loop.by_vectors_and_words(replace(before, params=params), aligned)
    by = found.set_index(["vectors", "words"])["valid"]
    assert by["before", "before"] == by["aligned", "before"] == 0.5
    assert by["before", "aligned"] == by["aligned", "aligned"] == 1
    assert closed_loop.by_vectors_and_words(context, context).empty, "no term reads a written query"
    assert np.isfinite(found["valid"]).all()
