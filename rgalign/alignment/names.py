"""The functions that params call by name: which names there are is known where the functions are."""

from rgalign.alignment.objectives import OBJECTIVES
from rgalign.alignment.reward import REWARDS
from rgalign.data.faults import nearest, quote
from rgalign.rooms_alignment import Alignment


def unknown_names(alignment: Alignment) -> list[str]:
    """What is wrong with the names of an objective and of a form of reward; empty where both are there."""
    asked = {"dpo.objective": alignment.dpo.objective, "reward.form": alignment.reward.form}
    known = {"dpo.objective": [*OBJECTIVES], "reward.form": ["auto", *REWARDS]}
    return [
        f"alignment.{key} is {quote(name)}; expected {' | '.join(known[key])}{nearest(name, known[key])}"
        for key, name in asked.items()
        if name not in known[key]
    ]
