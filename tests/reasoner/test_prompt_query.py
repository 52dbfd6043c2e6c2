"""What reasoner.embed makes a vector of: the state at the repeated asking mark, against a direct forward pass."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rgalign.params_schema import Params, Reasoner
from rgalign.reasoner import build
from rgalign.reasoner.embed import embed
from rgalign.reasoner.generate import embedded_sessions, greedy
from rgalign.reasoner.model import load
from rgalign.reasoner.verbalize import compact_text

ASK, END, PAD = 9, 2, 0
PROMPTS = [[5, 6, 7, ASK], [8, ASK], [11, 12, 13, 14, 15, ASK]]
QUERIES = [[20, 21], [22, 23, 24], [25]]
SMALL = {"hidden": 16, "layers": 1, "heads": 2, "min_count": 1}


def padded(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), padded on the left or on the right."""
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(row)) for row in rows]
    ids = [[*gap, *row] if left else [*row, *gap] for gap, row in zip(fill, rows, strict=True)]
    return torch.tensor(ids), (torch.tensor(ids) != PAD).long()  # no row holds the pad token


def at_the_mark(model, rows: list[list[int]], left: bool) -> np.ndarray:
    """The final state of the last ASK, found by its id in the padded batch."""
    ids, mask = padded(rows, left)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        states = model(ids, attention_mask=mask, position_ids=place, output_hidden_states=True).hidden_states[-1]
    last = [(ids[row] == ASK).nonzero().max() for row in range(len(rows))]
    return np.stack([states[row, at].numpy() for row, at in enumerate(last)])


def test_the_vector_is_the_state_at_the_repeated_mark_however_it_is_padded(folder):
    reasoner = load(str(folder), device="cpu")
    rows = [[*prompt, *query, ASK] for prompt, query in zip(PROMPTS, QUERIES, strict=True)]
    found = embed(reasoner, rows, progress=False)
    for left in (False, True):
        np.testing.assert_allclose(found, at_the_mark(reasoner.model, rows, left), atol=2e-5)
    for row, vector in zip(rows, found, strict=True):
        np.testing.assert_allclose(at_the_mark(reasoner.model, [row], False)[0], vector, atol=2e-5)
    ended = embed(reasoner, [[*row[:-1], END] for row in rows], progress=False)
    assert np.abs(found - ended).max() > 0.01, "an end token's state is another one"


@pytest.fixture(scope="module")
def recipe() -> build.Recipe:
    own = Params().reasoner.model_dump()
    pretraining = {**own["pretraining"], "epochs": 0.5}
    put = {"seed": 5, "tiny": SMALL, "pretraining": pretraining, "queries": {**own["queries"], "max_new_tokens": 5}}
    return build.Recipe(Reasoner(**own | put))


@pytest.fixture(scope="module")
def models(recipe, shop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    build.build_models(recipe, shop, {"prompt"}, folder=folder / "built", work=folder / "work")
    return build.load_models(recipe, folder / "built")


def test_the_setting_and_the_control_embed_the_same(recipe, shop, models, tmp_path):
    """Prompt, what the model writes, and the mark that ends the prompt; of an intent its title for the query."""
    asked = replace(recipe, settings=recipe.settings.model_copy(update={"embed": "prompt_query"}))
    ways = {
        "setting": build.embedding("prompt", asked, models, shop),
        "control": build.embedding("prompt_query", recipe, models, shop),
        "prompt": build.embedding("prompt", recipe, models, shop),
        "alone": build.embedding("prompt_alone", asked, models, shop),
    }
    sessions = shop.sessions.head(12)
    made = {name: way.sessions(sessions, tmp_path / name).values for name, way in ways.items()}
    kb = {name: way.intents(shop.intents, tmp_path / f"{name}-kb").values for name, way in ways.items()}
    for own in (made, kb):
        assert own["setting"].tobytes() == own["control"].tobytes() != own["prompt"].tobytes()
        assert own["alone"].tobytes() == own["prompt"].tobytes()
    main, put = models["main"], recipe.prompter(shop, models["main"])
    prompts = put.sessions(sessions)
    written = greedy(main, put, prompts, max_new_tokens=5, progress=False)["query"].tolist()
    words = [main.tokenizer(compact_text(text))["input_ids"][:5] for text in written]
    assert any(words)
    sequences = [[*prompt, *query, prompt[-1]] for prompt, query in zip(prompts, words, strict=True)]
    np.testing.assert_allclose(made["setting"].astype(float), embed(main, sequences, progress=False), atol=2e-3)
    titled = shop.intents["title"].str.lower().tolist()
    titles = [
        [*p, *main.tokenizer(t)["input_ids"], p[-1]] for p, t in zip(put.intents(shop.intents), titled, strict=True)
    ]
    np.testing.assert_allclose(kb["setting"].astype(float), embed(main, titles, progress=False), atol=2e-3)


def test_nothing_is_written_where_the_prompt_alone_is_embedded(recipe, shop, models):
    put = recipe.prompter(shop, models["main"])
    prompts = put.sessions(shop.sessions.head(3))
    assert embedded_sessions(None, put, prompts) is prompts


def test_no_document_of_pretraining_has_a_longer_query_than_is_ever_written(recipe, shop, models):
    talkative = shop.transcripts.assign(typed_query=shop.transcripts["typed_query"] + " where is my parcel please")
    wordy = replace(shop, transcripts=talkative)
    put = recipe.prompter(wordy, models["main"])
    _, queries = build._documents(wordy, put)
    assert max(map(len, queries)) == 5
    cut = build.cut_queries(recipe, wordy, models["main"])
    words = talkative["typed_query"].str.findall(r"\w+|[^\w\s]").map(len)
    assert cut.loc["chats"].tolist() == [len(talkative), int((words > 4).sum())]
    assert cut.loc["KB intents", "cut"] == sum(
        len(put.tokenizer(t.lower())["input_ids"]) > 4 for t in shop.intents["title"]
    )


def test_a_model_without_room_for_the_repeated_mark_is_refused(recipe, shop, models):
    words = models["main"].tokenizer
    limit = recipe.settings.max_tokens + 5  # prompt and query fit, the mark does not
    asked = recipe.settings.model_copy(update={"embed": "prompt_query"})
    how = {"positions": limit, "drop": ()}
    build.prompter(recipe.settings, shop.meta, shop.intents, words, **how)
    with pytest.raises(ValueError, match=r"the asking mark again \(reasoner\.embed\) 1: 262 together.* to 255"):
        build.prompter(asked, shop.meta, shop.intents, words, **how)
