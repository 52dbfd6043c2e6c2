"""What the language models of a run may learn from: train without development users, and no words of users judged."""

from dataclasses import replace
from pathlib import Path

from rgalign.data import shards, tables
from rgalign.data.parquet import Table, is_there
from rgalign.data.tables import Dataset


def learnable(dataset: Dataset, folder: Path, encoded: Path) -> tuple[Dataset, dict[str, int]]:
    """The data set with nothing else in it, and how many transcripts that leaves and takes away; empty without any.

    dataset  with its transcripts, of train and valid;  folder  it was read from;  encoded  tables/encoded
    Sessions stay where they are of train and no development user's. A transcript that names a session stays where that
    session does and its user has none in valid or test either [C]: what she typed earlier may tell what she will want.
    Test is asked for its users' ids alone. A transcript that names no session is of nobody whom the run judges (other
    shops' chats, say); whoever gives it answers for that.
    """
    developing = set(shards.load_lists(encoded, "dev").user_id)
    sessions = dataset.sessions
    learners = sessions[sessions["split"].eq("train") & ~sessions["user_id"].isin(developing)]
    transcripts = dataset.transcripts
    if transcripts is not None and "session_id" in transcripts:
        judged = tables.user_ids(folder, ("valid", "test"))
        allowed = learners["session_id"][~learners["user_id"].isin(judged)]
        transcripts = transcripts[transcripts["session_id"].isna() | transcripts["session_id"].isin(allowed)]
    every = Table(folder, "transcripts").rows if is_there(folder, "transcripts") else 0
    kept = 0 if transcripts is None else len(transcripts)
    told = {"transcripts": kept, "of development, valid or test users, left out": every - kept} if every else {}
    return replace(dataset, sessions=learners, transcripts=transcripts), told
