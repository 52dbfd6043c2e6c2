"""Jobs by the user's launcher: as many processes as it says, the same results; a lost process costs its own part."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_run
from peft import PeftModel

from rgalign.alignment import candidates, rewarding
from rgalign.alignment.context import Context
from rgalign.alignment.contrastive import train_contrastive
from rgalign.alignment.dpo import train_dpo
from rgalign.alignment.monitor import ProbeSet, RewardHackingMonitor
from rgalign.alignment.preferences import best_queries, preference_pairs
from rgalign.alignment.rewarding import write_own_shards
from rgalign.alignment.sft import train_sft
from rgalign.params import ROOT, ParamsError, load
from rgalign.reasoner.embed import embed_by_processes, gather
from rgalign.reasoner.model import Reasoner, export_reasoner, load_saved, save, tiny
from rgalign.reasoner.tiny import build_tokenizer
from rgalign.run import distributed
from rgalign.run.artifacts import digest, write_table
from rgalign.run.distributed import LABEL, ProcessesError, planned, shard_path
from rgalign.run.stages import open_stage

TORCHRUN = "torchrun --standalone --nproc_per_node {}"
KILLER = """
import pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[-1])
child = subprocess.Popen([sys.executable, *sys.argv[1:]])
if not (folder / "killed").exists():
    while not (folder.parent / "shards" / "shard-00000").is_dir():
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    (folder / "killed").touch()
sys.exit(child.wait() != 0)
"""


@pytest.mark.parametrize(
    ("launcher", "count"),
    [
        ("torchrun --nproc_per_node 4", 4),
        ("torchrun --nnodes=2 --nproc-per-node=4", 8),
        ("torchrun --nproc_per_node gpu", None),
        ("accelerate launch --num_processes 6 --num_machines 2", 6),
        ("accelerate launch --config_file params/accelerate/zero3.yaml", 8),
        ("accelerate launch --config_file=params/accelerate/fsdp.yaml --num_processes 2", 2),
        ("accelerate launch", None),
    ],
)
def test_how_many_processes_a_launcher_is_told_to_start(launcher, count):
    assert planned(launcher) == count


def test_a_config_file_that_is_not_there_is_told():
    with pytest.raises(ProcessesError, match=r"names the file none\.yaml, which is not there"):
        planned("accelerate launch --config_file none.yaml")


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_shipped_files_are_what_accelerate_reads(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "params" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 8
    assert config.mixed_precision == "bf16"
    assert config.distributed_type.value == {"fsdp": "FSDP", "zero3": "DEEPSPEED"}[name]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"run.launcher": "mpirun -n 4"}, "expected one that begins with torchrun or accelerate launch"),
        ({"run.launcher": "torchrun", "alignment.loop.rounds": 2}, "a launcher does one round"),
        ({"run.launcher": "torchrun", "alignment.cl.ranker_learns": True}, "is trained in one process"),
    ],
)
def test_what_a_launcher_cannot_do_is_refused(overrides, said):
    with pytest.raises(ParamsError, match=said):
        load(ROOT / "params" / "smoke.yaml", overrides)


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return tiny(build_tokenizer({f"w{number}": 2 for number in range(20)}), hidden=16, heads=2, seed=0)


def embedded(reasoner: Reasoner, folder: Path, launcher: str) -> Path:
    """Shards of 4,100 short sequences: three of them."""
    rows = [[4 + i % 17, 4 + i % 5, 4 + i % 13] for i in range(4_100)]
    how = {"launcher": launcher, "dtype": "float32", "device": "cpu", "prefix": 0, "pooling": None}
    embed_by_processes(folder / "shards", reasoner, [f"s{i}" for i in range(4_100)], rows, **how)
    return folder / "shards"


@pytest.fixture(scope="module")
def shards(reasoner, tmp_path_factory) -> Path:
    return embedded(reasoner, tmp_path_factory.mktemp("two"), TORCHRUN.format(2))


@pytest.mark.slow
def test_one_and_two_processes_embed_to_the_same_bytes(reasoner, shards, tmp_path):
    one = embedded(reasoner, tmp_path, TORCHRUN.format(1))
    assert digest(one) == digest(shards)
    assert len(gather(one)) == 4_100
    assert not (tmp_path / "shards-job").exists()


@pytest.mark.slow
def test_a_lost_process_costs_the_shard_that_it_was_making(reasoner, shards, tmp_path, capsys):
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    again = embedded(reasoner, tmp_path, f"{sys.executable} {script}")
    assert "a process was lost (exit 1); started once more" in capsys.readouterr().out
    assert digest(again) == digest(shards)


@pytest.mark.slow
def test_fewer_processes_than_asked_are_told(reasoner, tmp_path):
    launcher = "accelerate launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    with pytest.raises(ProcessesError, match="was to start 2 processes, and each finds itself one of 1"):
        embedded(reasoner, tmp_path, launcher)


def test_a_launcher_that_is_not_there_is_told(reasoner, tmp_path):
    with pytest.raises(ProcessesError, match="begins with no-such-launcher"):
        embedded(reasoner, tmp_path, "no-such-launcher -n 2")


@pytest.mark.slow
def test_a_reason_that_a_user_can_mend_comes_back(tmp_path):
    arguments = {"device": "cpu", "shards": str(tmp_path / "s"), "dtype": "float32", "options": {}}
    arguments["reasoner"] = {"folder": str(tmp_path / "none"), "adapter": None, "name": "n", "kind": "causal"}
    arguments["reasoner"]["pooling"] = "last"
    pd.DataFrame({"id": ["a"], "tokens": [[3]]}).to_parquet(tmp_path / "sequences.parquet")
    with pytest.raises(ProcessesError, match=r"ReasonerError: model .* is not on this machine"):
        distributed.run("embed", tmp_path, TORCHRUN.format(1), arguments, device="cpu")


def launched(context: Context) -> Context:
    return replace(context, recipe=replace(context.recipe, launcher=TORCHRUN.format(2)))


@pytest.mark.slow
def test_two_processes_write_the_draws_of_one(context, tmp_path):
    models = context.language_models()
    one, two = (rewarding.write_candidates(each, models, tmp_path) for each in (context, launched(context)))
    told = ["session_id", "source", "candidate", "query", "tokens", "count"]
    pd.testing.assert_frame_equal(two[told], one[told])
    np.testing.assert_allclose(two["log_probability"], one["log_probability"], atol=1e-3)


def with_other_text(table: pd.DataFrame, sessions: pd.DataFrame, row: int) -> pd.DataFrame:
    """The table, in which that row of `sessions` is about two items at once."""
    titles = table["item_title"].dropna()
    changed = table.copy()
    changed.loc[changed["session_id"] == sessions["session_id"].iloc[row], "item_title"] = " ".join(titles.iloc[:2])
    return changed


def test_shards_of_written_queries_are_kept_and_a_lost_one_is_written_again(context, tmp_path, monkeypatch):
    monkeypatch.setattr("rgalign.alignment.rewarding.SESSIONS_PER_SHARD", 30)
    models, sessions = context.language_models(), context.sessions(context.clicked_lists)
    prompters = {name: context.recipe.prompter(context.shop, model) for name, model in models.items()}
    how = {"samples": 2, "max_new_tokens": 5, "seed": 4}
    write_table(tmp_path / "sessions.parquet", sessions[["session_id"]])
    count = -(-len(sessions) // 30)
    assert count > 1
    assert write_own_shards(tmp_path, context, models, how) == {"shards": count}
    assert write_own_shards(tmp_path, context, models, how) == {"shards": 0}
    before = digest(tmp_path)
    shutil.rmtree(shard_path(tmp_path, 1))
    assert write_own_shards(tmp_path, context, models, how) == {"shards": 1}
    assert digest(tmp_path) == before
    (shard_path(tmp_path, 0) / LABEL).write_text("")  # a disk that was full
    assert write_own_shards(tmp_path, context, models, how) == {"shards": 1}
    assert digest(tmp_path) == before
    other = replace(context, shop=replace(context.shop, sessions=with_other_text(context.shop.sessions, sessions, 31)))
    assert write_own_shards(tmp_path, other, models, how) == {"shards": 1}, "the same session in other words"
    assert write_own_shards(tmp_path, context, models, how | {"seed": 5}) == {"shards": count}
    write_own_shards(tmp_path, context, models, how)
    shards = [shard_path(tmp_path, number) / rewarding.CANDIDATES for number in range(count)]
    parts = pd.concat(map(pd.read_parquet, shards), ignore_index=True)
    whole = candidates.generate_candidates(models, prompters, sessions, progress=False, **how)
    told = ["session_id", "source", "candidate", "query", "tokens", "count"]
    pd.testing.assert_frame_equal(parts[told], whole[told], check_dtype=False)


@pytest.fixture
def quiet(ranked, tmp_path):
    """Of that run a copy whose params draw no noise: NEFTune's differs by process."""
    shutil.copytree(ranked, tmp_path / "run")
    own = small_run.SMALL | {"alignment.sft.neftune": 0.0, "alignment.lora": {"rank": 2, "alpha": 4}}
    own |= {"alignment.dpo.looks": 1, "alignment.dpo.min_margin": 0.0, "alignment.dpo.margin_quantile": 0.0}
    return Context.of(open_stage("04_reward_model", small_run.SMOKE, tmp_path / "run", own))


@pytest.mark.slow
def test_two_processes_tune_through_a_run_as_one_does(quiet, rewarded, tmp_path):
    """RG-SFT, RG-DPO under a watch, RG-CL, each from what the one before it made."""
    scored, rewards = rewarded
    shutil.copytree(rewards, quiet.run / "models" / "reward")
    ends = {}
    for name, own in {"one": quiet, "two": launched(quiet)}.items():
        start, work = own.main(), tmp_path / name
        best = best_queries(own, scored)
        tuned, sft = train_sft(own, start, best, work / "sft")
        pairs, _ = preference_pairs(own, tuned, scored)
        monitor = RewardHackingMonitor(ProbeSet.of(own, rewarding.Rewarder.load(own, rewards)), tuned, 1.0)
        tuned, dpo, reference = train_dpo(own, tuned, pairs, work / "dpo", monitor)
        tuned, cl = train_contrastive(own, tuned, best, work / "cl")
        ends[name] = sft, dpo, cl, monitor.table(), reference
    for one, two in zip(ends["one"][:3], ends["two"][:3], strict=True):
        np.testing.assert_allclose(two["loss"], one["loss"], rtol=0.02)
    assert ends["two"][3]["step"].tolist() == ends["one"][3]["step"].tolist()
    assert list(ends["two"][4]) == list(ends["one"][4])
    assert isinstance(tuned.model, PeftModel)


def test_a_reasoner_that_was_read_from_a_folder_is_not_copied(tmp_path, reasoner):
    save(reasoner, tmp_path / "m")
    found = load_saved(tmp_path / "m")
    assert export_reasoner(found, tmp_path / "copy")["folder"] == str(tmp_path / "m")
    assert not (tmp_path / "copy").exists()
    assert export_reasoner(reasoner, tmp_path / "copy")["folder"] == str(tmp_path / "copy")
