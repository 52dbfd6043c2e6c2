"""Callbacks that end a training in its middle, as a kill would, and that note where a training goes on."""

from transformers import TrainerCallback


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    """Ends the training after this optimiser step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


class Steps(TrainerCallback):
    """The optimiser steps that were made."""

    def __init__(self):
        self.made: list[int] = []

    def on_step_end(self, args, state, control, **_):
        self.made.append(state.global_step)
