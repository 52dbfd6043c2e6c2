"""What a run reads from outside its directory, by its name in the manifest: data (`data:`), models (`model:`), and
artifacts of the run that it continues (`last:`)."""

import functools
import hashlib
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from rgalign.params import ROOT, Params, load_run
from rgalign.run import artifacts, gguf
from rgalign.run.artifacts import ArtifactError

DATA, MODEL, LAST = "data:", "model:", "last:"
ALIGNED = "08_closed_loop"  # the stage that a run must have finished for another to continue it
PICKLED = (".bin", ".pt", ".pth", ".ckpt")  # weights that are never read


def located(run: Path, name: str) -> Path | None:
    """Where an input or output of a manifest lies; None for data or a model that is not on this machine."""
    if name.startswith(MODEL):
        with suppress(gguf.GgufError):
            return model_folder(name.removeprefix(MODEL))
        return None
    if name.startswith(LAST):
        return ROOT / name.removeprefix(LAST)
    if not name.startswith(DATA):
        return run / name
    try:
        return artifacts.data_path(name.removeprefix(DATA))
    except ArtifactError:
        return None


def digest(name: str, path: Path) -> str:
    """Digest of an input or output of a manifest, as it stands there."""
    return content(path) if name.startswith(MODEL) else artifacts.digest(path)


def last_run(params: Params, run: Path) -> Path | None:
    """The run that `run` continues (run.warm_start), else None. Raises ArtifactError where that is not there, has not
    finished its alignment, is this very run, or has learnt from users held out here; ParamsError as `load_run`."""
    given = params.run.warm_start
    if given is None:
        return None
    last = ROOT / given
    if last.resolve() == run.resolve():
        raise ArtifactError(f"run.warm_start is {given}, this very run: give another --run-dir")
    if ALIGNED not in artifacts.read_manifest(last)["stages"]:
        raise ArtifactError(
            f"run.warm_start is {given}, where {ALIGNED} has not run; expected the folder of an aligned run "
            f"(python -m rgalign status {given})"
        )
    before = load_run(last)
    if before.reasoner.warmup.epochs:
        raise ArtifactError(
            f"run.warm_start is {given}, whose LLM has read in its warm-up what users of train typed, and would write "
            "for them; expected a run with reasoner.warmup.epochs 0"
        )
    here, there = params.data, before.data
    expected = {  # which users the last two take depends on the data, which have grown since
        "seed": (here.seed == there.seed, f"{there.seed}, as there"),
        "dev_users": (here.dev_users <= there.dev_users, f"at most {there.dev_users}, as there"),
        "dev_days": (not here.dev_days, "0 in a warm start"),
        "dev_new_intents": (not here.dev_new_intents, "0 in a warm start"),
    }
    wrong = {name: what for name, (fits, what) in expected.items() if not fits}
    if wrong:
        lines = "".join(f"\n  data.{name} is {getattr(here, name)}; expected {what}" for name, what in wrong.items())
        why = "whose rankers have learnt from users that are development users here"
        raise ArtifactError(f"run.warm_start is {given}, {why}:{lines}")
    return last


def models(params: Params) -> dict[str, str]:
    """{'model:<name or folder>': digest} of the pretrained models, reader and adapter that params name, without those
    that are not on this machine: loading them says how to get them."""
    reasoner = params.reasoner
    models = [reasoner.model, *(other.model for other in reasoner.others)]
    names = [name for name in models if name != "tiny"]
    names += [name for name in (reasoner.adapter, reasoner.reader) if name]
    places = {name: model_folder(name) for name in names}
    return {f"{MODEL}{name}": content(place) for name, place in places.items() if place is not None}


def given_folder(model: str) -> Path | None:
    """The folder that a model is given by, as given or below the project's root; None for a name."""
    return next((place for place in (Path(model).expanduser(), ROOT / model) if place.is_dir()), None)


def model_folder(model: str) -> Path | None:
    """Where a model lies: a folder, what a GGUF file was unpacked to, the `model/` of an installed package, or its
    snapshot in Hugging Face's cache, in this order; None where it is not on this machine. Nothing is downloaded, no
    package imported [C]. Raises GgufError."""
    if (folder := given_folder(model)) is not None:
        return folder
    if (file := gguf.file_of(model)) is not None:
        return gguf.unpacked(file, _digest(file))
    package = model.replace("-", "_")
    if package.isidentifier() and (spec := find_spec(package)) is not None:
        for place in spec.submodule_search_locations or ():
            if (Path(place) / "model").is_dir():
                return Path(place) / "model"
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def content(folder: Path) -> str:
    """SHA-256 of the names and bytes of a model folder's files, without hidden and pickled ones, which are never read.
    Within a process a file is read once, as long as its size and modification time stay the same."""
    hashed = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if path.suffix in PICKLED or any(part.startswith(".") for part in name.parts):
            continue
        hashed.update(f"{name.as_posix()}\0{_digest(path)}\n".encode())
    return hashed.hexdigest()


def _digest(path: Path) -> str:
    state = path.stat()
    return _file_digest(path.resolve(), state.st_ino, state.st_size, state.st_mtime_ns)


@functools.cache
def _file_digest(path: Path, *_state: int) -> str:
    return artifacts.digest(path)
