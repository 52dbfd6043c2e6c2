"""The warm-up of a pretrained model: its loss by plain torch, who may read whose words, and what a kill leaves."""

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import small_models
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rgalign.alignment.context import load_step
from rgalign.params import ParamsError
from rgalign.params import load as load_params
from rgalign.params_schema import Params, Warmup
from rgalign.params_schema import Reasoner as ReasonerSettings
from rgalign.params_training import Ranker
from rgalign.reasoner import build, warmup
from rgalign.reasoner import query_loss as learning
from rgalign.reasoner.batches import documents, right_padded
from rgalign.reasoner.model import ReasonerError, fingerprint, load, load_saved, save
from rgalign.reasoner.query_loss import learn_queries, query_log_probabilities, query_loss
from rgalign.reasoner.tiny import build_tokenizer, count_words
from rgalign.reasoner.trainer import Schedule, Setup
from rgalign.reasoner.written import write

HOW = Warmup(epochs=2, learning_rate=1e-2, documents_per_batch=8, folds=2)


def random_documents(count=24):
    """Prompts that share their first 8 ids, and queries, of the small tokenizer; id 2 ends."""
    drawn = np.random.default_rng(0)
    prompts = [[*range(3, 11), *drawn.integers(11, 40, drawn.integers(1, 6)).tolist()] for _ in range(count)]
    return prompts, [[*drawn.integers(7, 40, drawn.integers(1, 4)).tolist(), 2] for _ in range(count)]


def learnt(reasoner, how, work, head=0, documents=None):
    schedule = Schedule(how.epochs, how.learning_rate, how.documents_per_batch)
    setup = Setup(work, seed=0, lora=how.lora)
    return learn_queries(reasoner, *(documents or random_documents()), schedule, setup, title="warm-up", head=head)


def nats_by_hand(model, prompts, queries) -> float:
    """Each document by itself, without padding or cache."""
    total = 0.0
    with torch.no_grad():
        for prompt, query in zip(prompts, queries, strict=True):
            logits = model(torch.tensor([prompt + query])).logits[0].float().log_softmax(-1)
            total -= sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(query))
    return total / sum(map(len, queries))


def test_nats_per_token_are_those_of_each_document_by_itself(folder):
    reasoner, (prompts, queries) = load(str(folder)), random_documents(count=warmup.AT_ONCE + 3)
    expected = nats_by_hand(reasoner.model, prompts, queries)
    assert warmup.nats_per_token(reasoner, prompts, queries) == pytest.approx(expected, rel=1e-5)
    assert np.isnan(warmup.nats_per_token(reasoner, [], []))


def test_the_first_loss_is_that_of_the_model_and_what_is_read_gets_likelier(folder, tmp_path):
    reasoner, (prompts, queries) = load(str(folder)), random_documents()
    how = HOW.model_copy(update={"documents_per_batch": len(prompts), "epochs": 20.0})
    warm, curve = learnt(reasoner, how, tmp_path / "work", head=8)
    assert curve["loss"][0] == pytest.approx(nats_by_hand(reasoner.model, prompts, queries), rel=1e-4)
    assert isinstance(warm.model, PeftModel)
    assert nats_by_hand(warm.model, prompts, queries) < curve["loss"][0] - 0.1


def test_a_head_that_is_run_once_changes_no_gradient(folder, tmp_path):
    reasoner = load(str(folder))
    batch = right_padded(documents(*random_documents()), pad=0)
    models = [learnt(reasoner, HOW, tmp_path / f"{head}", head)[0].model.train() for head in (0, 8)]
    for model, head in zip(models, (0, 8), strict=True):
        query_loss(model, batch, head=head)[0].backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), name
        assert one.grad is None or torch.allclose(one.grad, other.grad, atol=1e-6), name


@pytest.mark.parametrize("kept", ["nothing", "by layers of another kind"])
def test_a_model_that_keeps_no_plain_cache_reads_the_head_with_every_row(folder, monkeypatch, kept):
    model, batch = load(str(folder)).model, right_padded(documents(*random_documents()), pad=0)
    expected = query_log_probabilities(model, batch)
    if kept == "nothing":
        monkeypatch.setattr(model.model, "forward", partial(_without_cache, model.model.forward))
    else:
        monkeypatch.setattr(learning, "has_plain_cache", lambda *_: False)
    assert torch.allclose(query_log_probabilities(model, batch, head=8), expected, atol=1e-5)


def _without_cache(forward, *arguments, **more):
    return forward(*arguments, **{**more, "use_cache": False, "past_key_values": None})


@pytest.fixture(scope="module")
def typed(shop):
    """The shop, each of whose users has typed a question in a session of train, and a model that knows its words."""
    sessions = shop.sessions.drop_duplicates("user_id").head(60)
    texts = [f"where is my order number {row}" for row in range(len(sessions))]
    transcripts = pd.DataFrame({"session_id": sessions["session_id"].to_numpy(), "typed_query": texts})
    return replace(shop, transcripts=transcripts)


@pytest.fixture(scope="module")
def model_folder(typed, tmp_path_factory):
    kinds = typed.meta["features"]
    shown = [name for name, kind in kinds.items() if kind == "text"]
    counts = count_words(features=shown, kinds=kinds, intents=typed.intents, sessions=typed.sessions)
    counts |= count_words(features=(), kinds=kinds, intents=typed.intents, transcripts=typed.transcripts)
    words = build_tokenizer(counts, min_count=1)
    folder = tmp_path_factory.mktemp("model") / "small"
    return small_models.qwen3(folder, words=words, vocab_size=len(words))


def recipe(folder, warm=HOW, **more) -> build.Recipe:
    own = Params().reasoner.model_dump() | {"seed": 5, "model": str(folder), "warmup": warm.model_dump(), **more}
    return build.Recipe(ReasonerSettings(**own))


def made(asked, shop, tmp_path, name="built"):
    curves = build.build_models(asked, shop, {"prompt"}, folder=tmp_path / name, work=tmp_path / "work")
    return tmp_path / name, curves


def adapters(folder):
    return {path.parent.name: load_file(path) for path in sorted(folder.glob("main/*/adapter_model.safetensors"))}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(typed, model_folder, tmp_path_factory):
    return made(recipe(model_folder), typed, tmp_path_factory.mktemp("run"))


def test_a_model_is_saved_by_its_name_and_its_adapters(run, typed, model_folder):
    folder, curves = run
    assert sorted(path.name for path in (folder / "main").iterdir()) == ["adapter", "fold-0", "fold-1", "source.json"]
    assert list(curves["model"].unique()) == ["main", "main/fold-0", "main/fold-1"]
    assert set(curves) == {"model", "step", "loss"}
    warm = build.load_models(recipe(model_folder), folder)["main"]
    assert fingerprint(warm) != fingerprint(load(str(model_folder)))
    assert fingerprint(warm) != fingerprint(load_saved(folder / "main", adapter="fold-0"))
    assert not isinstance(warm.model, PeftModel), "merged: an adapter beside the weights is slow to write with"
    put = recipe(model_folder).prompter(typed, warm)
    asked = put.transcripts(typed.transcripts, typed.sessions)
    assert warmup.nats_per_token(warm, *asked) < warmup.nats_per_token(load(str(model_folder)), *asked) - 0.1


def test_before_and_after_are_shown_on_questions_that_the_adapter_has_not_read(run, typed, model_folder):
    table, questions = build.warmed_up(recipe(model_folder), typed, run[0])
    users = typed.transcripts["session_id"].map(typed.sessions.set_index("session_id")["user_id"])
    unread = typed.transcripts[warmup.folds_of(users, HOW, 5) == 0]
    assert questions["typed"].tolist() == unread["typed_query"].tolist()
    asked = recipe(model_folder).prompter(typed, load(str(model_folder))).transcripts(unread, typed.sessions)
    models = load(str(model_folder)), load_saved(run[0] / "main", adapter="fold-0")
    assert table["perplexity"].tolist() == pytest.approx(
        [np.exp(nats_by_hand(m.model, *asked)) for m in models], rel=1e-4
    )
    assert table["perplexity"]["after"] < table["perplexity"]["before"]
    assert table["questions"].tolist() == [len(unread)] * 2
    assert not table["read"].any()
    assert build.warmed_up(recipe(model_folder), typed, run[0] / "main") is None


def test_the_adapter_of_a_fold_has_not_read_its_users(run, typed, model_folder, tmp_path):
    users = typed.transcripts["session_id"].map(typed.sessions.set_index("session_id")["user_id"])
    fold = warmup.folds_of(users, HOW, 5)
    assert 15 < fold.sum() < 45
    other = typed.transcripts.copy()
    other.loc[fold == 0, "typed_query"] = "my order number where is"  # what fold 0 typed is another text
    changed, _ = made(recipe(model_folder), replace(typed, transcripts=other), tmp_path)
    before, after = adapters(run[0]), adapters(changed)
    assert same(before["fold-0"], after["fold-0"])
    assert not same(before["fold-1"], after["fold-1"])
    assert not same(before["adapter"], after["adapter"])


def test_who_writes_for_a_session(run, typed, model_folder):
    asked, main = recipe(model_folder), build.load_models(recipe(model_folder), run[0])["main"]
    sessions = typed.sessions.assign(split=np.where(np.arange(len(typed.sessions)) % 3, "train", "valid"))
    fold = warmup.folds_of(sessions["user_id"], HOW, 5)
    fold[sessions["split"] == "valid"] = -1
    parts = list(build.by_writer(asked, {"main": main, "other": main}, sessions))
    assert [rows.tolist() for rows, _ in parts] == [(fold == number).tolist() for number in (-1, 0, 1)]
    prints = [fingerprint(own["main"]) for _, own in parts]
    assert prints == [
        fingerprint(main),
        *(fingerprint(load_saved(run[0] / "main", adapter=f"fold-{i}")) for i in (0, 1)),
    ]
    tuned = replace(main, model=load(str(model_folder)).model)  # what RG-SFT makes: no longer the run's own
    (rows, own) = next(iter(build.by_writer(asked, {"main": tuned}, sessions)))
    assert rows.all()
    assert own["main"] is tuned


def test_a_killed_warm_up_goes_on_to_the_same_bytes(run, typed, model_folder, tmp_path, monkeypatch):
    trained, calls = warmup.learn_queries, []

    def killed(*arguments, **more):
        calls.append(len(arguments[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trained(*arguments, **more)

    monkeypatch.setattr(warmup, "learn_queries", killed)
    with pytest.raises(KeyboardInterrupt):
        made(recipe(model_folder), typed, tmp_path)
    shutil.rmtree(tmp_path / "built")
    folder, curves = made(recipe(model_folder), typed, tmp_path)
    assert calls[0] == 60
    assert len(calls) == 4, "what was finished is not trained again"
    before, after = adapters(run[0]), adapters(folder)
    assert all(same(before[name], after[name]) for name in before)
    pd.testing.assert_frame_equal(curves, run[1])


def test_the_pooling_that_is_asked_for_is_that_of_every_vector(typed, model_folder, tmp_path):
    asked = recipe(model_folder, HOW.model_copy(update={"epochs": 0.0}), pooling="mean")
    folder, _ = made(asked, typed, tmp_path)
    main = build.load_models(asked, folder)["main"]
    prompt = asked.prompter(typed, main).sessions(typed.sessions.head(1))[0]
    with torch.no_grad():
        states = main.model.base_model(torch.tensor([prompt])).last_hidden_state[0]
    way = build.embedding("prompt", asked, {"main": main}, typed)
    found = way.sessions(typed.sessions.head(2), tmp_path / "vectors").values[0]
    assert np.allclose(found, states.mean(dim=0).numpy(), atol=2e-3)
    save(main, tmp_path / "step")  # as a step of the alignment that trained all weights
    assert load_step(tmp_path / "step", asked, main).pooling == "mean"


def test_a_call_that_has_ended_can_be_made_again_with_the_work_it_left(typed, model_folder, tmp_path):
    how = HOW.model_copy(update={"epochs": 0.2})
    folder, curves = made(recipe(model_folder, how), typed, tmp_path)
    before = adapters(folder)
    shutil.rmtree(folder)  # what a kill of the notebook's next cell leaves: nothing of the output, all of the work
    again, curves_again = made(recipe(model_folder, how), typed, tmp_path)
    assert all(same(before[name], own) for name, own in adapters(again).items())
    pd.testing.assert_frame_equal(curves, curves_again)


def test_an_adapter_that_is_not_there_is_refused(run):
    with pytest.raises(ReasonerError, match="has no adapter fold-7"):
        load_saved(run[0] / "main", adapter="fold-7")


def test_no_session_has_one_writer_and_no_query(run, typed, model_folder):
    asked, main = recipe(model_folder), build.load_models(recipe(model_folder), run[0])["main"]
    none = typed.sessions.head(0)
    assert [rows.tolist() for rows, _ in build.by_writer(asked, {"main": main}, none)] == [[]]
    terms = Ranker(match=("written_overlap",))
    assert build.written(asked, main, typed, terms, none, main, seed=0).queries.empty


def test_candidates_of_a_session_are_its_folds(run, typed, model_folder, tmp_path):
    asked, main = recipe(model_folder), build.load_models(recipe(model_folder), run[0])["main"]
    frame, terms = typed.sessions.head(12), Ranker(match=("written_overlap",), written={"samples": 3})
    found = build.written(asked, main, typed, terms, frame, main, seed=0).queries
    for rows, own in build.by_writer(asked, {"main": main}, frame):
        alone = write(own["main"], asked.prompter(typed, main), frame[rows], terms.written, seed=0)
        mine = found[found["session_id"].isin(frame["session_id"][rows])].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, alone.reset_index(drop=True))


@pytest.mark.parametrize("noise", ["neftune", "dropout"])
def test_with_noise_of_its_own_each_row_reads_the_head_by_itself(folder, tmp_path, monkeypatch, noise):
    monkeypatch.setattr(learning, "prefix_cache", lambda *_: pytest.fail("one draw of noise for all rows"))
    lora = HOW.lora.model_copy(update={"dropout": 0.5 if noise == "dropout" else 0.0})
    schedule = Schedule(0.3, 1e-3, 8, neftune=5.0 if noise == "neftune" else 0.0)
    setup = Setup(tmp_path / "work", seed=0, lora=lora)
    learn_queries(load(str(folder)), *random_documents(), schedule, setup, title="warm-up", head=8)


def test_chats_of_no_session_need_no_folds(shop, model_folder, tmp_path):
    folder, _ = made(recipe(model_folder, HOW.model_copy(update={"epochs": 0.2})), shop, tmp_path)
    assert sorted(path.name for path in (folder / "main").iterdir()) == ["adapter", "source.json"]


def test_the_other_model_may_stay_as_it_is(typed, model_folder, tmp_path):
    others = [{"model": str(model_folder), "warmup": False}, {"model": str(model_folder), "seed": 9}]
    asked = recipe(model_folder, HOW.model_copy(update={"epochs": 0.2}), others=others)
    folder, curves = made(asked, typed, tmp_path)
    assert {name.split("/")[0] for name in curves["model"]} == {"main", "other-2"}
    models = build.load_models(asked, folder)
    assert fingerprint(models["other-1"]) == fingerprint(load(str(model_folder)))
    assert len({fingerprint(model) for model in models.values()}) == 3


def test_without_transcripts_it_is_refused(typed, model_folder, tmp_path):
    with pytest.raises(ReasonerError, match="no transcript may be read"):
        made(recipe(model_folder), replace(typed, transcripts=None), tmp_path)


REFUSED = {
    "tiny": ({"reasoner.model": "tiny"}, "tiny is trained here"),
    "an encoder": ({"reasoner.kind": "encoder"}, "writes nothing"),
    "packed weights": ({"reasoner.quantize": "8bit", "alignment.lora.rank": 4}, "take in no adapter"),
    "a query that is embedded": ({"reasoner.embed": "prompt_query"}, "written by what has read the user's own"),
    "its control": ({"ranker.models": ["qe_rec", "qe_rec/prompt_query"]}, "what has read the user's own"),
    "a second round": ({"alignment.loop.rounds": 2}, "a second round would write for them"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_warmed_up_is_refused_by_name(kind):
    given, says = REFUSED[kind]
    with pytest.raises(ParamsError, match=says):
        load_params("params/smoke.yaml", {"reasoner.model": "some", "reasoner.warmup.epochs": 1.0, **given})
