"""GRPO in RG-DPO's place: the policy draws a group of queries a session, and is moved to those above the group's mean.

On-policy reinforcement learning (Shao et al. 2024, arXiv 2402.03300; METHOD.md 2.3) with the frozen reward model. Every
round draws by (seed, session, round) and learns from that alone, so a training that was killed draws the same again.
TRL's GRPOTrainer is not the engine, but the tests' oracle: it would not resume to the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rgalign.alignment.context import Context
from rgalign.alignment.contrastive import digest_of
from rgalign.alignment.logprobs import Layout, layout_for, query_tokens
from rgalign.alignment.rewarding import Rewarder
from rgalign.params_training import Grpo
from rgalign.reasoner import generate
from rgalign.reasoner.batches import Task, documents
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.trainer import Schedule, Setup, fit
from rgalign.seeding import derived

KL_WEIGHTS = (1e-4, 10.0)  # between which the weight is steered [C]
LEFT = "kl_weight_next"  # in the trainer's log, which checkpoints keep: the weight that a round leaves to the next

# (sessions (draws,), one query each) -> nats (draws,); NaN for an empty query
Judge = Callable[[np.ndarray, Sequence[str]], np.ndarray]


# Advantages: (reward, metric (sessions, samples), between) -> (sessions, samples); a group sums to 0.


def dr(reward: np.ndarray, *_) -> np.ndarray:
    """Reward less the group's mean (Liu et al. 2025, Dr. GRPO): the policy gradient, times 1 - 1 / samples."""
    return reward - reward.mean(axis=1, keepdims=True)


def group(reward: np.ndarray, *_) -> np.ndarray:
    """By the group's standard deviation besides (Shao et al. 2024): not the gradient of any group's mean reward."""
    return dr(reward) / (reward.std(axis=1, ddof=1, keepdims=True) + 1e-4)


def rloo(reward: np.ndarray, *_) -> np.ndarray:
    """Reward less the mean of the group's others (Ahmadian et al. 2024): the policy gradient, unbiased."""
    return dr(reward) * reward.shape[1] / (reward.shape[1] - 1)


def canon(reward: np.ndarray, metric: np.ndarray, between: float) -> np.ndarray:
    """By halves of the group, low and high in a metric (CANON, arXiv 2509.23962): between * (reward less the other
    half's mean) + (1 - between) * (reward less its own half's). 0.5 and even halves are `dr`; the authors take 1.

    Equal metrics: in order of drawing, which is by chance.
    """
    half = reward.shape[1] // 2
    rank = metric.argsort(axis=1, kind="stable").argsort(axis=1)
    low = rank < half
    of_low = np.where(low, reward, 0).sum(axis=1, keepdims=True) / half
    of_high = np.where(low, 0, reward).sum(axis=1, keepdims=True) / (reward.shape[1] - half)
    own, other = np.where(low, of_low, of_high), np.where(low, of_high, of_low)
    return reward - between * other - (1 - between) * own


ADVANTAGES: dict[str, Callable[..., np.ndarray]] = {"dr": dr, "group": group, "rloo": rloo, "canon": canon}


def clipped_losses(
    log_p: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, *, low: float, high: float, kl_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token: -min(ratio A, clip(ratio) A) + kl_weight * ratio * KL; whether the clip counts; the KL.

    log_p, old, reference, advantage  of one shape: nats of the policy, of the policy that drew, of the reference
    KL, to the reference, is Schulman's k3, exp(d) - d - 1 with d = log reference - log policy: never negative, and
    unbiased on-policy. The ratio, 1 on-policy, makes its gradient that of KL(policy, reference) in place of
    KL(reference, policy) (DeepSeek-AI 2025, arXiv 2512.02556; TRL's default).
    """
    ratio, away = (log_p - old).exp(), reference - log_p
    free, bounded = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    k3 = away.exp() - away - 1
    return -torch.minimum(free, bounded) + kl_weight * ratio * k3, free > bounded, k3


def next_kl_weight(weight: float, kl: float, settings: Grpo) -> float:
    """The multiplier of the next round, after one with this KL in nats a query: larger where that is over kl_target."""
    if settings.kl_target is None or not weight:
        return weight
    return float(np.clip(weight * np.exp(settings.kl_rate * (kl / settings.kl_target - 1)), *KL_WEIGHTS))


def train_grpo(context: Context, start: Reasoner, rewarder: Rewarder, setup: Setup) -> tuple[Reasoner, pd.DataFrame]:
    """GRPO of a run, on the sessions of train with a click. Returns the reasoner and the curve of `grpo`."""
    settings, lists = context.params.alignment.grpo, context.clicked_lists
    lists = lists.take(torch.from_numpy(context.drawn(lists.session_id, "grpo")))

    def judge(own: Rewarder) -> Judge:
        return lambda sessions, texts: own.of_texts(lists.take(torch.from_numpy(sessions)), texts)

    canon_reads = settings.metric if settings.advantage == "canon" else None
    others = judge(rewarder.of_another_seed) if canon_reads == "other_reward" else None
    rewards = (value for each in (rewarder.model, *rewarder.folds) for value in each.ranker.state_dict().values())
    return grpo(
        start,
        context.prompts(start, lists),
        settings,
        setup,
        prompter=context.recipe.prompter(context.shop, start),
        most=context.params.reasoner.queries.max_new_tokens,
        judge=judge(rewarder),
        others=others,
        judged_by=f"{rewarder.form} {digest_of(rewards)}",
    )


def grpo(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    settings: Grpo,
    setup: Setup,
    *,
    prompter: Prompter,
    most: int,
    judge: Judge,
    others: Judge | None = None,
    judged_by: str = "",
) -> tuple[Reasoner, pd.DataFrame]:
    """A reasoner trained to write what is rewarded, and its curve. The reference is the reasoner itself.

    prompts    token ids, one a session;  most  tokens of a query, its end token included
    judge      sessions are places in `prompts`;  others  of another reward model, for canon's metric of that name
    judged_by  says which reward model, so that checkpoints of another are not gone on with
    Curve: step, loss, clipped (share of tokens whose ratio is clipped), equal (share of groups of one reward, which
    teach nothing), kl (k3, nats a query), kl_weight, reward (mean of the drawn, nats), tokens (a query), seconds.
    """
    pad = reasoner.tokenizer.pad_token_id
    tried = [{"documents": documents([ids] * 2, [ids[:2], ids[:3]])} for ids in map(list, prompts[:2])]
    layout = layout_for(reasoner.model, tried, pad=pad)
    rollouts = Rollouts(reasoner, prompter, settings, setup.seed, most, judge, others, layout)
    task = Task(
        "GRPO",
        [{"input_ids": list(map(int, ids)), "prompt": len(ids), "session": row} for row, ids in enumerate(prompts)],
        lambda rows: collate_groups(rows, pad, layout),
        lambda model, batch: grpo_loss(model, batch, layout=layout, settings=settings),
        weight=lambda row: 1,
        width=layout.width,
        of_step=lambda rows: {"divisor": divisor(rows, settings, most)},
        draw=rollouts,
        in_turn=settings.inner_steps,
    )
    batches = -(-len(prompts) // settings.sessions_per_step)
    epochs = settings.steps * settings.inner_steps / max(1, batches)
    schedule = Schedule(epochs, settings.learning_rate, settings.sessions_per_step, settings.weight_decay)
    identity = {"reasoner": fingerprint(reasoner), "settings": settings.model_dump(), "judge": judged_by, "most": most}
    setup = replace(setup, callbacks=[KeptWeight(rollouts), *setup.callbacks])
    return fit(reasoner, task, schedule, setup, identity=identity)


@dataclass(eq=False)
class Rollouts:
    """What a round learns from (Task.draw): the policy's own queries with their advantages, one group a session."""

    reference: Reasoner
    prompter: Prompter
    settings: Grpo
    seed: int
    most: int
    judge: Judge
    others: Judge | None
    layout: Layout

    def __post_init__(self):
        self.kl_weight, self.rows = self.settings.kl_weight, []

    def __call__(self, model: nn.Module, rows: Sequence[dict], step: int) -> list[dict]:
        """The round's rows: documents, the group's queries of one prompt; advantage, reference and, where a round has
        several steps, old (samples each); reward, equal, kl_weight. A round's later steps have those of its first."""
        number, inner = divmod(step, self.settings.inner_steps)
        if inner:
            return self.rows
        drawn = self.draw(model, rows, number)
        sessions = np.repeat([row["session"] for row in rows], self.settings.samples)
        reward = np.nan_to_num(self.judge(sessions, drawn["query"].tolist()))  # an empty query has the null query's: 0
        reward = reward.astype(float).reshape(len(rows), -1)
        metric = self.metric(drawn, sessions, number).reshape(reward.shape)
        advantage = ADVANTAGES[self.settings.advantage](reward, metric, self.settings.between)
        prompts, ids = [row["input_ids"] for row in rows], drawn["ids"].tolist()
        groups = [ids[place : place + self.settings.samples] for place in range(0, len(ids), self.settings.samples)]
        self.rows = [
            {"documents": documents([prompt] * len(own), own)} for prompt, own in zip(prompts, groups, strict=True)
        ]
        reference = self._by_token(self.reference.model)
        kl = float((drawn["log_probability"].to_numpy() - reference.sum(dim=2).flatten().double().numpy()).mean())
        for row, own in enumerate(self.rows):
            own |= {"advantage": advantage[row].tolist(), "reference": reference[row].tolist()}
            own |= {"reward": float(reward[row].mean()), "equal": float(np.ptp(reward[row]) == 0)}
            own |= {"kl_weight": self.kl_weight}
        if self.settings.inner_steps > 1:
            for own, old in zip(self.rows, self._by_token(model), strict=True):
                own["old"] = old.tolist()
        self.kl_weight = next_kl_weight(self.kl_weight, kl, self.settings)
        return self.rows

    def draw(self, model: nn.Module, rows: Sequence[dict], number: int) -> pd.DataFrame:
        """The queries of a round (generate.draws): (sessions * samples) rows."""
        how = {"samples": self.settings.samples, "max_new_tokens": self.most, "progress": False}
        how |= {"seed": derived(self.seed, f"round {number}"), "numbers": [row["session"] for row in rows]}
        policy = replace(self.reference, model=model)
        return generate.draws(policy, self.prompter, [row["input_ids"] for row in rows], **how)

    def metric(self, drawn: pd.DataFrame, sessions: np.ndarray, number: int) -> np.ndarray:
        """(draws,) what canon divides a group by."""
        if self.settings.metric == "random":
            return np.random.default_rng(derived(self.seed, f"halves {number}")).random(len(drawn))
        if self.settings.metric == "other_reward" and self.others:
            return np.nan_to_num(self.others(sessions, drawn["query"].tolist()))
        return drawn["entropy"].to_numpy() if self.settings.metric == "entropy" else drawn["ids"].map(len).to_numpy()

    def _by_token(self, model: nn.Module) -> Tensor:
        """(sessions, samples, width) nats of each token of the round's queries."""
        pad, width = self.reference.tokenizer.pad_token_id, int(query_tokens(self.rows).max())
        return self.layout.evaluate(model, self.rows, pad, "GRPO", width).transpose(0, 1)


class KeptWeight(TrainerCallback):
    """Keeps the KL weight in the trainer's log, so that a resumed training goes on with it."""

    def __init__(self, rollouts: Rollouts):
        self.rollouts = rollouts

    def on_train_begin(self, args, state, control, **_) -> None:
        for entry in state.log_history:
            self.rollouts.kl_weight = entry.get(LEFT, self.rollouts.kl_weight)

    def on_step_end(self, args, state, control, **_) -> None:
        state.log_history.append({"step": state.global_step, LEFT: self.rollouts.kl_weight})


def divisor(rows: Sequence[dict], settings: Grpo, most: int) -> Tensor:
    """By what the sum over a session's tokens is divided, its mean over the step: so the loss is a mean over tokens."""
    if settings.normaliser == "length":
        return torch.tensor(float(settings.samples * most))
    return query_tokens(rows).sum() / len(rows)


def collate_groups(rows: Sequence[dict], pad: int, layout: Layout) -> dict[str, Tensor]:
    """A batch of this layout, and beside it tokens, advantage (queries * rows,), reference and old by token (queries *
    rows, width), the first queries of all rows first; reward, equal and kl_weight (rows,)."""
    by_query = [name for name in ("advantage", "reference", "old") if name in rows[0]]
    more = {name: torch.tensor([row[name] for row in rows]).transpose(0, 1).flatten(0, 1) for name in by_query}
    more |= {name: torch.tensor([row[name] for row in rows]) for name in ("reward", "equal", "kl_weight")}
    return {**layout.collate(rows, pad), **more, "tokens": query_tokens(rows)}


def grpo_loss(
    model: nn.Module, batch: Mapping[str, Tensor], *, layout: Layout, settings: Grpo
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of a batch of `collate_groups`, and the other columns of the curve."""
    reference, tokens = batch["reference"], batch["tokens"]
    log_p = layout.by_token(model, batch, reference.shape[1])
    there = torch.arange(reference.shape[1], device=tokens.device) < tokens[:, None]
    old = batch.get("old", log_p.detach())  # a round of one step: the policy that drew is the policy
    weight = batch["kl_weight"].repeat(len(tokens) // len(batch["kl_weight"]))[:, None]
    how = {"low": settings.clip_low, "high": settings.clip_high, "kl_weight": weight}
    losses, clipped, k3 = clipped_losses(log_p, old, reference, batch["advantage"][:, None], **how)
    loss = (losses * there).sum() / len(batch["reward"]) / batch["divisor"]
    return loss, {
        "clipped": (clipped & there).sum() / tokens.sum(),
        "equal": batch["equal"].mean(),
        "kl": (k3 * there).sum() / len(tokens),
        "kl_weight": batch["kl_weight"].mean(),
        "reward": batch["reward"].mean(),
        "tokens": tokens.float().mean(),
    }
