"""RG-CL: its loss is that of the embeddings, only the reasoner learns, a killed run goes on to the same bytes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from interrupted import Kill, Killed, Steps
from small_trainings import contrastive
from torch.nn import functional
from transformers import BertConfig, BertModel

from rgalign.alignment.contrastive import RankingSpace, alignment, effective_rank, info_nce, session_nce, uniformity
from rgalign.data.lists import Bag, QueryIntents, QueryLists
from rgalign.params_training import RankerSettings
from rgalign.ranker.losses import listnet_loss
from rgalign.ranker.towers import ThreeTower, ThreeTowerConfig
from rgalign.reasoner.embed import embed
from rgalign.reasoner.model import Reasoner, fingerprint, tiny
from rgalign.reasoner.tiny import build_tokenizer
from rgalign.seeding import seeded

KB, HIDDEN = 6, 16
TOKENIZER = build_tokenizer({f"w{number}": 2 for number in range(20)})
PROMPTS = [[4 + n % KB, *(4 + (7 * n + i) % 13 for i in range(n % 4)), 2] for n in range(48)]
QUERIES = [[prompt[0] + 9, *prompt[1:2], 3] for prompt in PROMPTS]
CLICKED = np.arange(48) % KB  # the prompt's first token says which
HARD = np.array([[(n + 1) % KB, -1 if n % 3 else n % KB] for n in range(48)])
ALSO = np.array([[(n + 2) % KB if n % 5 == 0 else -1] for n in range(48)])  # a second click
ROWS = {"clicked": CLICKED, "hard": HARD}
SETTINGS = dict(
    seed=3, epochs=4, documents_per_batch=8, progress=False, similarity="cosine", temperature=0.2, in_batch=True,
    learning_rate=1.5e-3, lm_weight=1.0,
)  # fmt: skip
LORA = {"rank": 2, "alpha": 4, "dropout": 0.1, "targets": r".*\.(q|v)_proj"}


def reasoner(seed=0):
    return tiny(TOKENIZER, hidden=HIDDEN, layers=2, heads=2, seed=seed)


def encoder(pooling, normalize):
    """Without dropout, so that training sees what embedding sees."""
    config = BertConfig(
        vocab_size=len(TOKENIZER), hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    with seeded(1):
        model = BertModel(config)
    return Reasoner("bert", "encoder", model.eval(), TOKENIZER, pooling, normalize)


def ranker(query_dim=HIDDEN, seed=5):
    """Left in training mode, with dropout: the space must be without."""
    sizes = dict(field_sizes=(3,), history_sizes=(), word_buckets=1, intent_ids=KB + 2, categories=3, positions=0)
    model = ThreeTower(
        ThreeTowerConfig.of(RankerSettings(), **sizes, text=False, dim=8, query_dim=query_dim, query_hidden=12),
        seed=seed,
    )
    model.query.layers[0].set(torch.randn(50, query_dim, generator=torch.Generator().manual_seed(0)) / 4 + 0.1)
    return model.train()


def knowledge_base(query_dim=HIDDEN):
    text = torch.randn(KB, query_dim, generator=torch.Generator().manual_seed(2))
    ids, none = torch.arange(KB), Bag(torch.empty(0, dtype=torch.int32), torch.zeros(KB + 1, dtype=torch.long))
    return QueryIntents(ids.numpy().astype(str), np.full(KB, "NaT", "datetime64[us]"), ids + 2, ids % 3, none, text)


SPACE = RankingSpace.of(ranker(), knowledge_base())


def one_step(given, tmp_path, **more):
    """The curve of a single step over all sessions at once: of the reasoner as it was given."""
    how = {**ROWS, **SETTINGS, "spaces": [SPACE], "epochs": 1, "documents_per_batch": 48, **more}
    _, curve = contrastive(given, PROMPTS, folder=tmp_path, **how)
    (row,) = curve.to_dict("records")
    return row


def in_space(given):
    with torch.no_grad():
        return SPACE.queries(torch.tensor(embed(given, PROMPTS, progress=False)))


GIVEN = {
    "causal": reasoner,
    "mean": lambda: encoder("mean", True),
    "cls": lambda: encoder("cls", False),
    "last": lambda: encoder("last", False),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_the_loss_is_info_nce_of_the_embeddings_that_will_be_served(kind, tmp_path):
    given = GIVEN[kind]()
    query, clicked, hard, also = in_space(given), torch.tensor(CLICKED), torch.tensor(HARD), torch.tensor(ALSO)
    texts = QUERIES if kind == "causal" else None  # what follows the prompt must not be read
    found = one_step(given, tmp_path, queries=texts, temperature=0.3, symmetric=0.5, also=ALSO)
    forth = info_nce(query, SPACE.intents, clicked, hard, also, negatives=clicked, temperature=0.3)
    back = session_nce(query, SPACE.intents, clicked, query, torch.cat([clicked[:, None], also], 1), temperature=0.3)
    assert found["contrastive"] == pytest.approx(float(forth + 0.5 * back), abs=1e-5)
    assert found["effective_rank"] == pytest.approx(float(effective_rank(query)), abs=1e-4)
    assert found["uniformity"] == pytest.approx(float(uniformity(query)), abs=1e-4)
    assert found["alignment"] == pytest.approx(float(alignment(query, SPACE.intents[clicked])), abs=1e-4)


def test_without_the_batch_only_hard_negatives_count(tmp_path):
    query, hard = in_space(reasoner()), torch.tensor(HARD)
    expected = info_nce(
        *(query, SPACE.intents, torch.tensor(CLICKED), hard, hard[:, :0]),
        negatives=hard[:0, 0],
        similarity="dot",
        temperature=1.0,
    )
    found = one_step(reasoner(), tmp_path, in_batch=False, similarity="dot", temperature=1.0)
    assert found["loss"] == found["contrastive"] == pytest.approx(float(expected), abs=1e-5)


def lists_of(given) -> QueryLists:
    """Every session with its clicked intent first, and the shown ones behind it that are its hard negatives."""
    shown = torch.cat([torch.tensor(CLICKED)[:, None], torch.tensor(HARD)], dim=1)
    shown[(shown == shown[:, :1]) & (torch.arange(3) > 0)] = -1  # the click is no negative of its own
    none = Bag(torch.empty(0, dtype=torch.int32), torch.zeros(len(shown) + 1, dtype=torch.long))
    names, fields = np.arange(len(shown)).astype(str), torch.arange(len(shown))[:, None] % 3
    clicked = torch.arange(3).expand(shown.shape) == 0
    query = torch.tensor(embed(given, PROMPTS, progress=False))
    return QueryLists("train", names, names, fields, (), none, shown, clicked, query)


def test_by_the_rankers_score_it_is_the_mean_of_the_frozen_rankers_own_losses(tmp_path):
    given, kb = reasoner(), knowledge_base()
    lists, rankers = lists_of(given), [ranker(), ranker(seed=6)]
    spaces = [RankingSpace.of(each, kb, lists) for each in rankers]
    how = {"similarity": "ranker", "temperature": 1.0, "in_batch": False, "lm_weight": 0.0}
    with torch.no_grad():
        losses = [listnet_loss(each.eval()(lists, kb), lists.clicked, lists.shown) for each in rankers]
    found = one_step(given, tmp_path, spaces=spaces, **how)
    assert found["loss"] == pytest.approx(float(sum(losses)) / 2, abs=1e-5)
    whole_kb = one_step(given, tmp_path, spaces=spaces[:1], **how | {"in_batch": True})
    everything = replace(
        lists, candidates=torch.arange(KB).expand(48, -1), clicked=torch.tensor(CLICKED)[:, None] == torch.arange(KB)
    )
    with torch.no_grad():
        expected = listnet_loss(rankers[0](everything, kb), everything.clicked, everything.shown)
    assert whole_kb["loss"] == pytest.approx(float(expected), abs=1e-5)  # all intents are clicked in the batch


def test_the_rankers_score_teaches_the_reasoner_and_leaves_the_ranker_alone(tmp_path):
    given, kb = reasoner(), knowledge_base()
    space = RankingSpace.of(ranker(), kb, lists_of(given))
    before = space.digest()
    how = {**ROWS, **SETTINGS, "similarity": "ranker", "epochs": 20, "learning_rate": 5e-3}
    _, curve = contrastive(given, PROMPTS, spaces=[space], folder=tmp_path, **how)
    assert curve["contrastive"].iloc[-1] < curve["contrastive"].iloc[0] / 2
    assert space.digest() == before


def test_the_language_term_is_the_mean_over_the_queries_tokens_alone(tmp_path):
    given, losses = reasoner(), []
    for prompt, query in zip(PROMPTS, QUERIES, strict=True):
        with torch.no_grad():
            logits = given.model(input_ids=torch.tensor([[*prompt, *query]])).logits[0, len(prompt) - 1 : -1]
        losses += functional.cross_entropy(logits, torch.tensor(query), reduction="none").tolist()
    found = one_step(given, tmp_path, queries=QUERIES, lm_weight=0.25)
    assert found["language"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["loss"] == pytest.approx(found["contrastive"] + 0.25 * found["language"], abs=1e-5)
    half = one_step(given, tmp_path, queries=[*QUERIES[:24], *[[]] * 24], lm_weight=0.25)
    assert half["language"] == pytest.approx(np.mean(losses[: sum(map(len, QUERIES[:24]))]), abs=1e-5)
    assert half["contrastive"] == pytest.approx(found["contrastive"], abs=1e-5), "a click counts without a query"
    without = one_step(given, tmp_path, queries=QUERIES, lm_weight=0)
    assert "language" not in without
    assert without["loss"] == without["contrastive"] == pytest.approx(found["contrastive"], abs=1e-5)


def test_where_the_query_is_embedded_too_what_is_written_after_the_prompt_is_learnt_beside_it(tmp_path):
    """reasoner.embed prompt_query: e_q is the state at the asking mark behind the query (2), the language term is that
    of the best query behind the prompt, the very figure that the prompts alone give."""
    embedded = [[*prompt, *query[:-1], 2] for prompt, query in zip(PROMPTS, QUERIES, strict=True)]
    queries = [query if n % 4 else [] for n, query in enumerate(QUERIES)]  # some sessions have no best query
    how = {**ROWS, **SETTINGS, "epochs": 1, "documents_per_batch": 48, "spaces": [SPACE], "queries": queries}
    _, curve = contrastive(reasoner(), embedded, query_prompts=PROMPTS, folder=tmp_path, **how)
    (found,) = curve.to_dict("records")
    alone = one_step(reasoner(), tmp_path, queries=queries)
    assert found["language"] == pytest.approx(alone["language"], abs=1e-5)
    with torch.no_grad():
        query = SPACE.queries(torch.tensor(embed(reasoner(), embedded, progress=False)))
    clicked = torch.tensor(CLICKED)
    expected = info_nce(
        query, SPACE.intents, clicked, torch.tensor(HARD), torch.tensor(HARD)[:, :0], negatives=clicked, temperature=0.2
    )
    assert found["contrastive"] == pytest.approx(float(expected), abs=1e-5)
    assert found["contrastive"] != pytest.approx(alone["contrastive"], abs=1e-3)


def test_the_space_is_the_rankers_own_and_the_ranker_stays_as_it_was():
    model, intents = ranker(), knowledge_base()
    vectors = torch.randn(5, HIDDEN, requires_grad=True)
    space = RankingSpace.of(model, intents)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in space.ranker.parameters())
    assert not space.intents.requires_grad
    assert space.queries(vectors).requires_grad
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(space.queries(vectors), model.query.layers(vectors))
        torch.testing.assert_close(space.intents, model.intent(intents)[0])


@pytest.mark.parametrize("kind", ["causal", "mean"])
def test_queries_move_to_the_clicked_intents_and_only_the_reasoner_learns(kind, tmp_path):
    given = GIVEN[kind]()
    before, space_before = fingerprint(given), SPACE.digest()
    texts = QUERIES if kind == "causal" else None
    how = {**ROWS, **SETTINGS, "epochs": 20, "learning_rate": 5e-3, "queries": texts}
    found, curve = contrastive(given, PROMPTS, spaces=[SPACE], folder=tmp_path, **how)
    assert fingerprint(given) == before
    assert SPACE.digest() == space_before
    assert all(parameter.grad is None for parameter in SPACE.ranker.parameters())
    assert not found.model.training

    def top(model):
        """Share of sessions whose nearest intent is the clicked one."""
        cosine = functional.cosine_similarity(in_space(model)[:, None], SPACE.intents[None], dim=2)
        return float((cosine.argmax(dim=1).numpy() == CLICKED).mean())

    assert top(given) < 0.5
    assert top(found) > 0.95
    assert curve["alignment"].iloc[-1] < curve["alignment"].iloc[0] / 2
    language = ["language"] if texts else []
    watched = ["alignment", "contrastive", "effective_rank", *language, "uniformity"]
    assert list(curve) == ["step", "loss", *watched, "seconds"]


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    def run(folder, *callbacks):
        how = {**ROWS, **SETTINGS, "queries": QUERIES, "lora": LORA, "neftune": 5.0, "callbacks": callbacks}
        return contrastive(reasoner(), PROMPTS, spaces=[SPACE], folder=tmp_path / folder, **how)

    whole, curve = run("whole")
    with pytest.raises(Killed):
        run("work", Kill(13))
    assert list((tmp_path / "work").glob("checkpoint-*"))
    steps = Steps()
    resumed, again = run("work", steps)
    assert steps.made[0] > 1
    assert fingerprint(resumed) == fingerprint(whole) != fingerprint(reasoner())
    repeatable = curve.columns.drop("seconds")
    assert again[repeatable].equals(curve[repeatable])
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.3}, {"clicked": CLICKED[::-1].copy()}, {"spaces": [replace(SPACE, intents=-SPACE.intents)]}],
    ids=["settings", "data", "ranker"],
)
def test_checkpoints_of_another_call_are_not_used(change, tmp_path):
    how = {**ROWS, **SETTINGS, "spaces": [SPACE], "folder": tmp_path}
    with pytest.raises(Killed):
        contrastive(reasoner(), PROMPTS, **{**how, **change}, callbacks=[Kill(20)])
    steps = Steps()
    with pytest.raises(Killed):
        contrastive(reasoner(), PROMPTS, **how, callbacks=[steps, Kill(1)])
    assert steps.made == [1]


def test_all_faults_at_once(tmp_path):
    how = {"spaces": [SPACE], "folder": tmp_path, "seed": 0, "similarity": "cosine"}
    wide = Reasoner("wide", "encoder", tiny(TOKENIZER, hidden=24, seed=0).model, TOKENIZER, "mean")
    with pytest.raises(ValueError, match="cannot begin") as error:
        contrastive(wide, [[]], clicked=[0], hard=[[-1]], queries=[[]], in_batch=False, **how)
    for part in ["vectors of 24, the ranker reads 16", "no session has a query", "no row has a negative"]:
        assert part in str(error.value)
    with pytest.raises(ValueError, match="there is nothing to learn from"):
        contrastive(encoder("mean", True), [], clicked=[], hard=np.zeros((0, 2)), lm_weight=0, **how)
