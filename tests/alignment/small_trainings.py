"""The training steps with settings as keywords: those of the step's params section, and those of trainer.Setup."""

from dataclasses import fields

from rgalign.alignment import closed_loop
from rgalign.alignment import contrastive as rg_cl
from rgalign.alignment import dpo as rg_dpo
from rgalign.alignment import sft as rg_sft
from rgalign.alignment.monitor import EarlyStopping
from rgalign.params_training import Contrastive, Dpo, Lora, Sft
from rgalign.reasoner.trainer import Setup

SESSIONS = {field.name for field in fields(rg_cl.ClickedSessions)} - {"prompts"}


def split(section: type, how: dict) -> tuple:
    """(the section, the set-up) of these settings; an adapter's are given as a dictionary."""
    own = {name: how.pop(name) for name in {field.name for field in fields(Setup)} & set(how)}
    lora = own.pop("lora", None)
    return section(**how), Setup(**own, lora=lora and Lora(**lora))


def sft(reasoner, prompts, queries, **how):
    return rg_sft.sft(reasoner, prompts, queries, *split(Sft, how))


def dpo(reasoner, pairs, *, reference, watch=None, watch_steps=50, callbacks=(), **how):
    watched = [EarlyStopping(reasoner, watch, watch_steps)] if watch else []
    section, setup = split(Dpo, {**how, "callbacks": [*callbacks, *watched]})
    return rg_dpo.dpo(reasoner, pairs, section, setup, reference=reference)


def contrastive(reasoner, prompts, *, spaces, **how):
    given = {name: how.pop(name) for name in SESSIONS & set(how)}
    return rg_cl.contrastive(reasoner, rg_cl.ClickedSessions(prompts, **given), spaces, *split(Contrastive, how))


def end_to_end(reasoner, prompts, *, rankers, lists, intents, loss, **how):
    given = {"rankers": rankers, "lists": lists, "intents": intents, "loss": loss}
    return closed_loop.end_to_end(reasoner, prompts, *split(Contrastive, how), **given)
