"""What each of two processes does in test_tuning_processes: trains a tiny reasoner, and the first one saves it."""

import json
import sys
from pathlib import Path

import small_pairs
import test_contrastive as cl
import torch
from accelerate import PartialState
from small_trainings import contrastive, sft

from rgalign.reasoner.model import save
from rgalign.reasoner.trainer import Engine
from rgalign.run import distributed

# 22 documents in steps of 8: the last step of an epoch has 6, and of 5 it has 2
LOOP = dict(epochs=3, learning_rate=1e-2, progress=False, seed=1)


def train(
    step: str, folder: Path, *, lora: bool = False, batch: int = 8, budget: int | None = None, looks: bool = False
):
    """(reasoner, curve) of one of the three steps, without noise: dropout and NEFTune draw by process."""
    start, engine = small_pairs.reasoner(), Engine(tokens_per_batch=budget)
    how = dict(folder=folder, engine=engine, lora={"rank": 2, "alpha": 4} if lora else None)
    if step == "sft":
        prompts, queries = small_pairs.PROMPTS[:22], small_pairs.CHOSEN[:22]
        return sft(start, prompts, queries, documents_per_batch=batch, neftune=0.0, **LOOP, **how)
    if step == "dpo":
        onlooker = small_pairs.Onlooker(stop_at=6 if looks else None)
        own = dict(pairs_per_batch=batch, watch=onlooker, watch_steps=2)
        return small_pairs.align(of=small_pairs.pairs(22), **LOOP, **how, **own)
    first = {name: rows[:22] for name, rows in {**cl.ROWS, "also": cl.ALSO, "queries": cl.QUERIES}.items()}
    own = cl.SETTINGS | LOOP | first | dict(documents_per_batch=batch, symmetric=0.5, spaces=[cl.SPACE])
    return contrastive(cl.reasoner(), cl.PROMPTS[:22], **own, **how)


def main(folder: Path) -> None:
    PartialState(cpu=True)
    torch.set_num_threads(1)
    assert distributed.count() == 2, distributed.count()
    for name, how in json.loads((folder / "jobs.json").read_text()).items():
        reasoner, curve = train(**how, folder=folder / f"work {name}")
        if distributed.index() == 0:
            save(reasoner, folder / name)
            curve.to_parquet(folder / f"{name}.parquet")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
