"""Each formula that a notebook displays, worked out in plain numpy on a tiny case, against the code that claims it."""

import json
import re
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from ranker.small_lists import QUERY_DIM, SMALL, make_lists, make_query_intents, make_query_lists
from torch import nn

from rgalign.alignment import dpo as rg_dpo
from rgalign.alignment.contrastive import ranker_nce
from rgalign.alignment.logprobs import SEPARATE
from rgalign.alignment.reward import RewardModel
from rgalign.evaluation import metrics, off_policy
from rgalign.evaluation.bootstrap import over_worlds
from rgalign.experiment import ab_test
from rgalign.params import ROOT
from rgalign.params_training import Dpo, RankerSettings
from rgalign.ranker.losses import listnet_kl, listnet_loss
from rgalign.ranker.towers import Branches, ThreeTower, ThreeTowerConfig, TwoTower, TwoTowerConfig
from rgalign.reasoner import query_loss
from rgalign.reasoner.tiny import ahead_loss, next_token_loss

DISPLAYED = defaultdict(list)  # notebook -> formulae that a test of this file works out
DRAW = np.random.default_rng(5)


def displays(notebook: str, formula: str):
    """Says which formula a test works out."""

    def noted(test):
        DISPLAYED[notebook].append(formula)
        return test

    return noted


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


def test_every_displayed_formula_is_worked_out_here():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        shown = [" ".join(formula.split()) for formula in re.findall(r"\$\$(.*?)\$\$", prose, re.S)]
        assert shown == DISPLAYED[path.stem], path.stem


@displays(
    "02_reasoner",
    r"L = -\frac{1}{n+1} \sum_{t=1}^{n+1} \log p(y_t \mid x, y_{<t}) \;-\; "
    r"\frac{\lambda}{n} \sum_{t=1}^{n} \log \text{softmax}(E A h)_{y_t}.",
)
def test_pretraining():
    prompt, query, words, width = 3, [4, 1, 0], 6, 5  # two words and the end token
    states, embeddings, ahead = (DRAW.normal(size=size) for size in ((6, width), (words, width), (width, width)))
    write = [log_softmax(embeddings @ states[prompt - 1 + t])[y] for t, y in enumerate(query)]
    look = [log_softmax(embeddings @ ahead @ states[prompt - 1])[y] for y in query[:-1]]
    expected = -sum(write) / 3 - 0.7 / 2 * sum(look)

    batch = {"ids": torch.tensor([[2, 5, 3, *query]]), "prompt": torch.tensor([prompt]), "length": torch.tensor([6])}
    head, through = linear(embeddings), linear(ahead)
    put = torch.tensor(states, dtype=torch.float32)[None]
    found = next_token_loss(put, head, **batch, prompt_weight=0) + 0.7 * ahead_loss(put, head, through, **batch)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def linear(weight: np.ndarray) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float32))
    return layer


@displays("03_rankers", r"s(x, i) = \frac{u(x) \cdot v(i)}{\sqrt d} + b_i \;\;(+\; p_k \text{ while training}),")
def test_two_tower():
    ranker = TwoTower(TwoTowerConfig.of(RankerSettings(id_dropout=0, dropout=0), **SMALL))
    lists, intents = make_lists("train", 4, seed=0), make_query_intents()
    with torch.no_grad():
        ranker.position.copy_(torch.linspace(1, -1, len(ranker.position)))
        u, (v, b) = ranker.user(lists).numpy(), (part.numpy() for part in ranker.intent(intents))
        shown = lists.candidates.numpy()
        expected = np.array([[u[x] @ v[i] / np.sqrt(SMALL["dim"]) + b[i] for i in shown[x]] for x in range(4)])
        np.testing.assert_allclose(ranker.eval()(lists, intents).numpy(), expected, atol=1e-5)
        in_training = ranker.train()(lists, intents).numpy()
    np.testing.assert_allclose(in_training, expected + np.linspace(1, -1, shown.shape[1]), atol=1e-5)


@displays(
    "03_rankers",
    r"L = L_{\text{ListNet}}(s) + \lambda\, \text{KL}(\text{softmax}(s) \,\|\, \text{softmax}(q \cdot v)),",
)
def test_qe_rec():
    """The KL is of the score without position bias, ListNet of what is trained on, with it."""
    lists = make_query_lists("train", 3, seed=1)
    scores, relevance, query = DRAW.normal(size=(3, *lists.candidates.shape))
    p, q = log_softmax(relevance), log_softmax(query)
    listnet = -np.mean([log_softmax(row)[click].mean() for row, click in zip(scores, lists.clicked, strict=True)])
    expected = listnet + 0.2 * (np.exp(p) * (p - q)).sum(axis=1).mean()
    said = Branches(*(torch.tensor(part) for part in (scores, relevance, query)))
    found = listnet_kl(0.2)(lambda *_, branches: said, lists, None)
    assert float(found) == pytest.approx(expected)


@displays("03_rankers", r"L = -\sum_i y_i \log \frac{e^{s_i}}{\sum_j e^{s_j}}.")
def test_listnet():
    s, clicked = np.array([0.3, -1.0, 2.0, 0.5]), np.array([1, 0, 0, 1])
    y = clicked / clicked.sum()
    expected = -sum(y[i] * np.log(np.exp(s[i]) / sum(np.exp(s))) for i in range(4))
    found = listnet_loss(torch.tensor(s)[None], torch.tensor(clicked)[None].bool(), torch.ones(1, 4).bool())
    assert float(found) == pytest.approx(expected)


@displays(
    "04_reward_model",
    r"r(q \mid x) = \log p_{\text{RM}}(\text{clicked} \mid x, q) - "
    r"\log p_{\text{RM}}(\text{clicked} \mid x, \varnothing)",
)
@pytest.mark.parametrize("form", ["list", "kb"])
def test_reward(form):
    ranker = ThreeTower(
        ThreeTowerConfig.of(RankerSettings(query_hidden=8, interaction_hidden=8), **SMALL | {"query_dim": QUERY_DIM})
    ).eval()
    lists, intents = make_query_lists("train", 5, seed=2), make_query_intents()
    null = torch.zeros(QUERY_DIM, dtype=torch.float16)
    with torch.no_grad():
        vectors = ranker.intent(intents)[0].numpy()

    def log_p(query) -> np.ndarray:
        asked = type(lists)(**{**vars(lists), "query": query})
        with torch.no_grad():
            scores = ranker(asked, intents).numpy()
            branch = ranker.query(asked).numpy() @ vectors.T / np.sqrt(SMALL["dim"])
        own = log_softmax(scores) if form == "list" else log_softmax(branch)
        at = lists.candidates.numpy()
        places = np.broadcast_to(np.arange(at.shape[1]), at.shape) if form == "list" else at
        return np.array([own[x, places[x][lists.clicked[x].numpy()]].mean() for x in range(5)])

    expected = log_p(lists.query) - log_p(null.expand(5, -1))
    found = RewardModel(ranker, intents, null, form).reward(lists)
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Bigrams(nn.Module):
    """A language model whose next word depends on the last one alone: log p is a look into a table."""

    def __init__(self, words: int):
        super().__init__()
        table = np.random.default_rng(words).normal(size=(words, words))
        self.log_p, self.states, self.head = log_softmax(table), nn.Embedding(words, words), linear(table.T)
        self.states.weight = nn.Parameter(torch.eye(words))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, use_cache):
        return type("Output", (), {"logits": self.head(self.states(input_ids))})

    def of(self, prompt: list[int], query: list[int]) -> float:
        """log p(query | prompt)."""
        told = [prompt[-1], *query]
        return sum(self.log_p[before, after] for before, after in pairwise(told))


MODEL = Bigrams(7)
DOCUMENTS = [([2, 3], [4, 0]), ([5], [1, 6, 0]), ([1, 1], [3, 2, 0]), ([4], [0])]


def batch_of(documents) -> dict:
    rows = [[*prompt, *query] for prompt, query in documents]
    ids = torch.tensor([row + [0] * (5 - len(row)) for row in rows])
    return {
        "ids": ids,
        "prompt": torch.tensor([len(prompt) for prompt, _ in documents]),
        "length": torch.tensor(list(map(len, rows))),
    }


@displays("05_rg_sft", r"L_{\text{SFT}} = -\frac{1}{\sum_{x \in B} |q^*_x|} \sum_{x \in B} \log \pi(q^*_x \mid x).")
def test_rg_sft():
    tokens = sum(len(query) for _, query in DOCUMENTS)
    expected = -sum(MODEL.of(*document) for document in DOCUMENTS) / tokens
    assert query_loss.query_loss(MODEL, batch_of(DOCUMENTS))[0].item() == pytest.approx(expected, rel=1e-5)


def dpo_loss(sft_weight: float) -> float:
    """Of two pairs: the first half of DOCUMENTS is chosen, the second rejected; every reference is 1.5 lower."""
    batch = batch_of(DOCUMENTS) | {"reward": torch.zeros(4)}
    batch["tokens"] = batch["length"] - batch["prompt"]
    batch["reference"] = torch.tensor([MODEL.of(*document) - shift for document, shift in shifted()])
    settings = Dpo(objective="dpo", beta=0.3, sft_weight=sft_weight, length_normalised=False)
    return rg_dpo.dpo_loss(MODEL, batch, layout=SEPARATE, settings=settings)[0].item()


def shifted():
    return zip(DOCUMENTS, (1.5, -0.5, 0.25, 2.0), strict=True)  # log pi - log pi_ref of each


@displays(
    "06_rg_dpo",
    r"L = -\log \sigma\left(\beta \left[\log\frac{\pi(q^+|x)}{\pi_{\text{ref}}(q^+|x)} - "
    r"\log\frac{\pi(q^-|x)}{\pi_{\text{ref}}(q^-|x)}\right]\right)",
)
def test_rg_dpo():
    ratios = np.array([shift for _, shift in shifted()])
    expected = np.mean([-np.log(1 / (1 + np.exp(-0.3 * (ratios[i] - ratios[i + 2])))) for i in (0, 1)])
    assert dpo_loss(0) == pytest.approx(expected, rel=1e-5)


@displays("06_rg_dpo", r"L_{\text{total}} = L + w\, L_{\text{SFT}}(q^+).")
def test_rg_dpo_with_sft():
    chosen = DOCUMENTS[:2]
    sft = -sum(MODEL.of(*document) for document in chosen) / sum(len(query) for _, query in chosen)
    assert dpo_loss(0.8) == pytest.approx(dpo_loss(0) + 0.8 * sft, rel=1e-5)


@displays("07_rg_cl", r"L = -\log \frac{e^{s(x, i^+)/\tau}}{\sum_{i \in \{i^+\} \cup N(x)} e^{s(x, i)/\tau}}")
def test_info_nce():
    s, clicked, negatives, tau = DRAW.normal(size=(2, 5)), [1, 4], [[0, 3], [2]], 0.5
    rows = [np.exp(s[x, [clicked[x], *negatives[x]]] / tau) for x in range(2)]
    expected = np.mean([-np.log(row[0] / row.sum()) for row in rows])
    none = torch.zeros(0, dtype=torch.long)
    rows = torch.tensor(clicked), torch.tensor([[0, 3], [2, -1]]), none.expand(2, 0)
    found = ranker_nce(lambda columns: torch.tensor(s)[:, columns], 5, *rows, negatives=none, temperature=tau)
    assert float(found) == pytest.approx(expected)


SCORES, CLICKS = np.array([3.0, 1, 2, 0, 5, 4, 1]), np.array([1, 0, 0, 0, 0, 1, 0])
GROUPS = np.array([0, 0, 0, 0, 1, 1, 1])


@displays("09_evaluation", r"\text{GAUC} = \frac{\sum_g w_g\, \text{AUC}_g}{\sum_g w_g}.")
def test_gauc():
    """The first list's click stands above all of three, the second's above one of two."""
    expected = (4 * 1 + 3 * 0.5) / (4 + 3)
    assert metrics.gauc(SCORES, CLICKS, GROUPS).value == pytest.approx(expected)


@displays("09_evaluation", r"\text{relative} = 1 - \frac{1 - \text{GAUC}_{\text{new}}}{1 - \text{GAUC}_{\text{old}}}.")
def test_relative_error_reduction():
    assert metrics.relative_error_reduction(0.9, 0.8) == pytest.approx(1 - 0.1 / 0.2)


@displays(
    "10_ab_test",
    r"\text{Var}(\text{CTR}) = \frac{N}{N-1} \cdot "
    r"\frac{\sum_u (c_u - \text{CTR}\, n_u)^2}{\left(\sum_u n_u\right)^2}.",
)
def test_delta_method():
    c, n = np.array([1, 0, 2, 3]), np.array([3, 3, 6, 9])
    ctr = c.sum() / n.sum()
    expected = 4 / 3 * ((c - ctr * n) ** 2).sum() / n.sum() ** 2
    assert ab_test.arm_of(c, n, np.ones(4, dtype=bool)).variance == pytest.approx(expected)


@displays(
    "10_ab_test",
    r"\text{IPS} = \frac{1}{J} \sum_j w_j c_j, \quad \text{SNIPS} = \frac{\sum_j w_j c_j}{\sum_j w_j}, \quad "
    r"\text{DR} = \frac{1}{J} \sum_j \left(\hat c_j + w_j (c_j - \hat c_j)\right).",
)
def test_off_policy():
    shown, target = np.array([[0, 1], [2, 0], [1, 2]]), np.array([[0, 2], [2, 0], [0, 2]])
    p, clicked = np.array([[0.5, 0.2], [0.4, 0.8], [0.9, 0.25]]), np.array([[1, 0], [0, 1], [1, 0]], dtype=bool)
    predicted = np.array([[0.3, 0.1], [0.2, 0.6], [0.4, 0.5]])
    w = np.where(shown == target, 1 / p, 0)
    expected = {
        "ips": (w * clicked).sum() / 6,
        "snips": (w * clicked).sum() / w.sum(),
        "dr": (predicted + w * (clicked - predicted)).sum() / 6,
    }
    found = off_policy.estimates(off_policy.Log(shown, clicked, p, np.arange(3)), target, predicted)
    assert found.set_index("estimator").value[list(expected)].to_dict() == pytest.approx(expected)


@displays(
    "90_ablation",
    r"\bar d \pm t_{0.975,\, W-1}\, \sqrt{\max\left(\frac{s_d^2}{W},\, \frac{1}{W^2} \sum_w e_w^2\right)}.",
)
@pytest.mark.parametrize("e", [[0.01, 0.01, 0.02], [0.03, 0.05, 0.02]], ids=["worlds differ", "floor"])
def test_interval_over_worlds(e):
    """With three worlds t is 4.302653 (any table of Student's distribution)."""
    d, e = np.array([0.01, 0.02, 0.06]), np.array(e)
    half = 4.302653 * np.sqrt(max(((d - 0.03) ** 2).sum() / 2 / 3, (e**2).sum() / 9))
    found = over_worlds(d, e)
    assert (found.low, found.high) == pytest.approx((0.03 - half, 0.03 + half))
