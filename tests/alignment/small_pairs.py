"""A tiny reasoner and a handful of pairs, as token ids and as text, for the tests of the tuning stages."""

import copy
import random
from pathlib import Path

import numpy as np
import torch
from small_trainings import dpo

from rgalign.alignment.dpo import Pairs, reference_log_probabilities
from rgalign.reasoner.model import Reasoner, tiny
from rgalign.reasoner.tiny import build_tokenizer

TOKENIZER = build_tokenizer({f"w{number}": 2 for number in range(20)})
ASK, END = 2, 3
PROMPTS = [[4 + (7 * n + i) % 9 for i in range(2 + n % 4)] + [ASK] for n in range(24)]
CHOSEN = [[*[13 + (n + i) % 5 for i in range(1 + n % 3)], END] for n in range(24)]  # of 2 to 4 tokens
REJECTED = [[*[18 + (n + i) % 6 for i in range(1 + (n // 2) % 4)], END] for n in range(24)]  # of 2 to 5
LORA = {"rank": 2, "alpha": 4, "dropout": 0.1}
SETTINGS = dict(seed=3, epochs=8, pairs_per_batch=8, learning_rate=1e-2, progress=False)


def reasoner(seed: int = 0, *, pad_is_end: bool = False) -> Reasoner:
    tokenizer = copy.deepcopy(TOKENIZER)
    if pad_is_end:
        tokenizer.pad_token = tokenizer.eos_token
    return tiny(tokenizer, hidden=16, layers=2, heads=2, seed=seed)


def pairs(number: int = 24, **other) -> Pairs:
    parts = dict(prompts=PROMPTS, chosen=CHOSEN, rejected=REJECTED)
    parts |= dict(reward_chosen=np.linspace(0.1, 2, 24), reward_rejected=np.full(24, -0.1))
    return Pairs(**{name: value[:number] for name, value in parts.items()} | other)


def text(rows: list[list[int]]) -> list[str]:
    """As TRL takes it: it adds the end token by itself, and joins a prompt and its query without a space."""
    return [" " + " ".join(TOKENIZER.convert_ids_to_tokens([i for i in ids if i != END])) for ids in rows]


def align(folder: Path, *, of: Pairs | None = None, reference=None, **how):
    """RG-DPO of the tiny reasoner on these pairs, with its own reference unless another is given."""
    start, of = reasoner(), of or pairs()
    if reference is None:
        reference = reference_log_probabilities(start, of, progress=False)
    return dpo(start, of, reference=reference, folder=folder, **{**SETTINGS, **how})


class Onlooker:
    """Draws from every random state, as measuring may, keeps what it saw, and stops at a step."""

    def __init__(self, stop_at: int | None = None):
        self.stop_at, self.steps, self.rows = stop_at, [], {}

    def __call__(self, reasoner, step: int) -> bool:
        assert not reasoner.model.training
        random.random(), np.random.random(), torch.rand(3)
        self.steps.append(step)
        self.rows[step] = {"weights": sum(float(weight.detach().abs().sum()) for weight in reasoner.model.parameters())}
        return step == self.stop_at
