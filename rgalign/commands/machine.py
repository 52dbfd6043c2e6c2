"""What a run is told of its machine before a kernel starts: what cannot be done there, and how long the rest takes."""

from rgalign.data.schema import is_there
from rgalign.params import Params, ParamsError
from rgalign.params_schema import Alignment, gpu_only, refused
from rgalign.reasoner.settings import NEVER_ASKED, TINY
from rgalign.run import artifacts, distributed
from rgalign.run.external_inputs import model_folder

PLANNED_FOR = "H100"  # where there is no CUDA and no --card


def refuse(params: Params) -> None:
    """Raise ParamsError for what cannot be done here: a device that is not there, all that needs CUDA, and names of
    objectives and rewards that nobody has written."""
    if unknown := _unknown_names(params.alignment):
        raise ParamsError("these params name what is not there:\n" + "\n".join(f"  {fault}" for fault in unknown))
    device, needs = params.run.device, gpu_only(params.reasoner, params.alignment)
    if device in ("auto", "cpu") and not needs:
        return
    import torch  # late: most runs need not wait two seconds for it

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    faults = []
    if not there.get(device, True):
        faults.append(
            f"run.device is {device}, and torch finds none on this machine; set run.device to auto, which takes what "
            f"there is, or see what torch says: python -c 'import torch; print(torch.zeros(1, device=\"{device}\"))'"
        )
    if needs and not there["cuda"]:
        faults.append(refused(needs, "cpu"))
    if not faults:
        return
    lines = "\n".join(f"  {fault}" for fault in faults)
    raise ParamsError(f"these params cannot run on this machine:\n{lines}")


def _unknown_names(alignment: Alignment) -> list[str]:
    """Faults of names that the schema cannot know; most runs have the defaults and need not wait for the import."""
    usual = Alignment()
    if (alignment.dpo.objective, alignment.reward.form) == (usual.dpo.objective, usual.reward.form):
        return []
    from rgalign.alignment.context import unknown_names

    return unknown_names(alignment)


def never_asked(params: Params) -> str:
    """What is said of a tiny model that will be tuned to write and never sees a question; empty where that is not so,
    or not known before the data are read (cfpb: some complaints have a text)."""
    how, data = params.alignment, params.data
    tunes = how.loop.rounds and (how.sft.use or how.dpo.use)
    if not tunes or params.reasoner.model != TINY or params.run.warm_start:
        return ""
    if data.source == "folder":
        there = is_there(artifacts.data_path(str(data.path)), "transcripts")
    else:
        there = {"shopworld": data.world.transcripts > 0, "msweb": False}.get(data.source, True)
    return "" if there else f"note: {'; '.join(NEVER_ASKED)}"


def outlook(params: Params, card: str | None = None) -> str:
    """What people read before a run begins: the estimate (rgalign/commands/estimate.py), or why there is none.

    card  a name of estimate.CARDS; None: the one that is here, else PLANNED_FOR
    Raises ParamsError for a card that nobody knows.
    """
    room = params.reasoner
    if room.model == "tiny":
        return "the language model is tiny: seconds by stage above are all there is to say, and memory is small"
    folder = model_folder(room.model)
    if folder is None:
        return f"no estimate: {room.model} is not on this machine (hf download {room.model})"
    from transformers import AutoConfig

    from rgalign.commands import estimate
    from rgalign.commands.estimate import model_size
    from rgalign.data.sources import size_of

    found, note = _card(card, params.run.device)
    if found is None:
        return note
    try:
        size = model_size(AutoConfig.from_pretrained(folder, local_files_only=True), kind=room.kind)
    except (OSError, ValueError) as error:  # notebook 02 says all that is wrong with a model
        return f"no estimate: {room.model} has no config that can be read ({str(error).splitlines()[0]})"
    launcher = params.run.launcher
    count = (distributed.planned(launcher) if launcher else 1) or 1
    sharded = any(word in (launcher or "") for word in ("fsdp", "zero3"))
    table = estimate.work(params, size, estimate.Sessions.of(size_of(params.data).sessions))
    held = estimate.memory(params, size, processes=count, sharded=sharded)
    return "\n".join(filter(None, (note, estimate.as_text(table, held, size, params, found, count))))


def _card(name: str | None, device: str):
    """The card that an estimate is for and what must be said of it; None where there is no estimate, and why."""
    import torch

    from rgalign.commands.estimate import CARDS, Card

    if name is not None and name not in CARDS:
        raise ParamsError(f"--card is {name}; expected one of {', '.join(CARDS)}")
    if name is not None:
        return CARDS[name], ""
    if torch.cuda.is_available() and device in ("auto", "cuda"):
        here = torch.cuda.get_device_properties(0)
        known = next((card for key, card in CARDS.items() if key in here.name), None)
        if known is None:
            return None, f"no estimate: {here.name} is not in rgalign/commands/estimate.py; --card names one like it"
        return Card(here.name, known.operations, known.bandwidth, here.total_memory), ""
    if device == "cuda":
        return CARDS[PLANNED_FOR], f"no CUDA device is here: the estimate is for one {PLANNED_FOR} (--card for another)"
    return None, "no estimate on a CPU: nobody knows its peak. --card H100 says what a card would take"
