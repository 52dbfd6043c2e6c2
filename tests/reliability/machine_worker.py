"""A small pipeline, for test_machines: digests of its data and prompts, and what is trained on them.

python machine_worker.py FOLDER THREADS ..: digests-THREADS.json and results-THREADS.npz for each number of threads.
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import small_run
import torch

from rgalign.alignment.sft import sft
from rgalign.data import shards, sources, split, tables
from rgalign.data.vectors import Vectors
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.params_training import RankerSettings, Sft
from rgalign.ranker import train as rankers
from rgalign.ranker.fit import fit, score
from rgalign.reasoner import build, embed, generate
from rgalign.reasoner.trainer import Setup
from rgalign.run.artifacts import digest

PARAMS = small_run.small(
    {"data.world.sessions": 1_000, "data.world.users": 500, "data.world.transcripts": 300, "reasoner.others": []}
)


def read_data(folder: Path) -> dict[str, str]:
    """Writes the world's tables and, split and encoded, its lists; SHA-256 by file."""
    sources.write_dataset(folder / "dataset", PARAMS.data.model_copy(update={"seed": 0}))

    def development(users):
        return split.development_users(users, share=0.2, seed=0)

    space = shards.fit_folder(folder / "dataset", development=development, **PARAMS.data.features.model_dump())
    splits = ("train", "valid", "test")
    shards.encode_folder(space, folder / "dataset", folder / "encoded", splits=splits, development=development)
    return {f"{path.parent.name}/{path.name}": digest(path) for path in sorted(folder.rglob("*.*")) if path.is_file()}


def learn(folder: Path) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """The prompts' tokens; and a reasoner pre-trained, its vectors and queries, a ranker that reads them, and RG-SFT on
    those queries."""
    shop = tables.read(folder / "dataset")
    recipe = build.Recipe.of(PARAMS)
    curves = build.build_models(recipe, shop, {"prompt"}, folder=folder / "models", work=folder / "work", workers=1)
    reasoner = build.load_models(recipe, folder / "models")["main"]
    prompter = recipe.prompter(shop, reasoner)
    prompts = prompter.sessions(shop.sessions)
    read = {"prefix": len(prompter.head), "progress": False}
    sessions = Vectors(shop.sessions["session_id"], embed.embed(reasoner, prompts, **read))
    intents = Vectors(shop.intents["intent_id"], embed.embed(reasoner, prompter.intents(shop.intents), **read))
    parts = rankers.with_vectors(rankers.load_parts(folder / "encoded"), "qe_rec", sessions, intents, seed=0)
    settings = PARAMS.ranker.settings()["qe_rec"]
    ranker = rankers.build("qe_rec", parts, settings, positions=0)
    loop = RankerSettings(epochs=5)
    fitted = fit(ranker, parts.train, parts.dev, parts.intents, loop, seed=0, progress=False)
    scores = score(fitted.model, parts.valid, parts.intents)
    gauc = gauc_of_lists(scores, parts.valid.clicked.numpy(), parts.valid.shown.numpy())
    written = generate.greedy(reasoner, prompter, prompts[:60], max_new_tokens=8, progress=False)
    settings, setup = Sft(epochs=4, documents_per_batch=16), Setup(folder=folder / "sft", seed=0, progress=False)
    _, tuning = sft(reasoner, prompts[:60], prompter.queries(written["query"].tolist()), settings, setup)
    return prompts, {
        "pre-training losses": curves["loss"].to_numpy(),
        "vectors": sessions.values.astype(np.float32),
        "queries": written["query"].to_numpy(dtype=str),
        "query log-probabilities": written["log_probability"].to_numpy(),
        "ranker losses": fitted.curve["train_loss"].to_numpy(),
        "scores": np.where(parts.valid.shown.numpy(), scores, 0.0),
        "GAUC": np.array([gauc.value]),
        "RG-SFT losses": tuning["loss"].to_numpy(),
    }


def main(folder: Path, threads: list[int]) -> None:
    for number in threads:
        torch.set_num_threads(number)
        own = folder / f"threads-{number}"
        digests = read_data(own)
        prompts, results = learn(own)
        digests |= {"prompts": sha256(json.dumps(prompts).encode()).hexdigest()}
        digests |= {"instructions": torch.backends.cpu.get_cpu_capability()}
        np.savez(folder / f"results-{number}.npz", **results)
        (folder / f"digests-{number}.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(map(int, sys.argv[2:])))
