"""Files cut short, of another format or encoding, in the wrong place; and dataset.yaml written wrongly."""

import pyarrow as pa
import pyarrow.parquet as pq
from small_shop import SESSIONS, good_shop
from table_case import damaged, kept, noted, refused
from table_changes import declare, more_columns, put, undeclare
from type_faults import constant


def written(name, content):
    """A file with another content, bytes."""

    def damage(folder):
        (folder / name).write_bytes(content)

    return damage


def cut(name, share):
    def damage(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(share * len(whole))])

    return damage


def zeroed(name, column):
    """The pages of a column overwritten."""

    def damage(folder):
        path = folder / name
        chunk = pq.read_metadata(path).row_group(0).column(column)
        start, content = chunk.data_page_offset, bytearray(path.read_bytes())
        content[start : start + 40] = b"\xff" * 40
        path.write_bytes(content)

    return damage


def gone(name):
    return lambda folder: (folder / name).unlink()


def a_folder(name):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def a_link(name, to):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(folder / to)

    return damage


def renamed(name, to):
    return lambda folder: (folder / name).rename(folder / to)


def as_csv(folder):
    text = good_shop()[0]["intents"].to_pandas().to_csv(index=False)
    (folder / "intents.parquet").write_text(text, encoding="utf-8")


def yaml_as(encoding, extra=""):
    def damage(folder):
        path = folder / "dataset.yaml"
        path.write_bytes((path.read_text(encoding="utf-8") + extra).encode(encoding))

    return damage


def with_index(tables, meta):
    """What pandas writes beside the columns after rows were picked or sorted."""
    tables["sessions"] = tables["sessions"].append_column("__index_level_0__", pa.array(range(SESSIONS)))


def yaml_with(line):
    return yaml_as("utf-8", line + "\n")


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
LATIN = pa.array(["caf\xe9".encode("latin-1")] * SESSIONS, pa.binary()).view(pa.string())
CORRUPT = "corrupt or cut short"
FILES = {
    **{f"{name} cut to {share:.1%}": damaged(cut(f"{name}.parquet", share), f"{name}.parquet", CORRUPT)
       for name in ("intents", "sessions", "impressions", "truth") for share in (0, 0.5, 0.999)},
    "a few bytes": damaged(written("sessions.parquet", b"PAR1 and no more PAR1"), "sessions.parquet", CORRUPT),
    "a zip": damaged(written("impressions.parquet", b"PK\x03\x04" + b"\0" * 99), "impressions.parquet", CORRUPT),
    "a CSV under another name": damaged(as_csv, "intents.parquet", CORRUPT),
    "damaged pages": damaged(zeroed("impressions.parquet", 1), "impressions.intent_id", "cannot be read"),
    "damaged pages of a text": damaged(zeroed("sessions.parquet", 9), "sessions.", "cannot be read"),
    "text in latin-1": refused(put("sessions", "event_text", LATIN), "sessions.event_text", "cannot be read"),
    **{f"no {name}": damaged(gone(name), name, "is missing; expected")
       for name in ("intents.parquet", "sessions.parquet", "impressions.parquet", "dataset.yaml")},
    **{f"{name} a folder": damaged(a_folder(name), name, "is a folder; expected")
       for name in ("sessions.parquet", "labels.parquet", "dataset.yaml")},
    "a link to nowhere": damaged(a_link("sessions.parquet", "elsewhere"), "sessions.parquet", "is missing"),
    "a link to itself": damaged(a_link("sessions.parquet", "sessions.parquet"), "sessions.parquet"),
    "an optional table misspelt": damaged(
        renamed("transcripts.parquet", "transcript.parquet"), "transcript.parquet", "is not read", "did you mean",
        outcome="noted"),
}  # fmt: skip
YAML = {
    "yaml in latin-1": damaged(yaml_as("latin-1", "owner: café\n"), "dataset.yaml", "is not YAML"),
    "yaml in UTF-16": damaged(yaml_as("utf-16"), "dataset.yaml", "is not YAML"),
    "yaml with a byte order mark": damaged(yaml_as("utf-8-sig"), outcome="kept"),
    "yaml with a NUL": damaged(yaml_with("owner: a\0b"), "dataset.yaml", "is not YAML"),
    "yaml with a tab": damaged(yaml_with("owner:\n\t- a"), "dataset.yaml", "is not YAML"),
    "yaml with an object": damaged(yaml_with("owner: !!python/object/apply:os.getcwd []"), "dataset.yaml", "not YAML"),
    "yaml with a key twice": damaged(yaml_with("name: again"), "dataset.yaml", "the key name stands twice"),
    "yaml with an impossible date": damaged(yaml_with("owner: 2026-13-45"), "dataset.yaml", "is not YAML"),
    "yaml of a billion laughs": damaged(
        yaml_with(LAUGHS + "sampled_negatives: *a11"), "sampled_negatives", "expected popularity"),
    "yaml with a number of 5,000 digits": damaged(yaml_with("owner: " + "9" * 5000), "dataset.yaml", "is not YAML"),
    "yaml with a number too long to print": damaged(
        yaml_with("sampled_negatives: 0x" + "f" * 5000), "sampled_negatives", "expected popularity"),
    "yaml empty": damaged(written("dataset.yaml", b""), "dataset.yaml", "holds a NoneType"),
    "yaml a list": damaged(written("dataset.yaml", b"- a\n- b\n"), "dataset.yaml", "holds a list"),
    "no name": refused(undeclare("name"), "dataset.yaml name", "expected a short name"),
    "no features": refused(undeclare("features"), "dataset.yaml features", "declares no feature column"),
    "a path as a name": kept(declare(name="../../x")),
    "a name of 1 MB": refused(declare(name="n" * 1_000_000), "dataset.yaml name", "longer than"),
    "prompt_features unknown": refused(
        declare(prompt_features=["devise"]), "dataset.yaml prompt_features", "'devise'", "did you mean 'device'?"),
    "prompt_features no list": refused(declare(prompt_features="device"), "yaml prompt_features", "is 'device'"),
    "a key misspelt": noted(declare(position_is_reel=True), "position_is_reel", "did you mean 'position_is_real'?"),
    "files that are no dictionary": kept(declare(files=["a"])),
    "files outside": kept(declare(files={"../../etc/passwd": {"sha256": "0"}})),
    "a checksum that differs": noted(
        declare(files={"intents.parquet": {"sha256": "0" * 64}}), "intents.parquet", "has the sha256"),
    "real positions in words": refused(declare(position_is_real="yes"), "position_is_real", "is 'yes'"),
    "columns not declared": noted(more_columns(7), "sessions", "7 columns are not declared", "'extra0', 'extra1'"),
    "pandas' index": noted(with_index, "sessions.__index_level_0__", "to_parquet(.., index=False) leaves it out"),
    "every split empty": noted(constant("sessions", "split", None, pa.string()), "sessions.split", "split by time"),
}  # fmt: skip
CASES = FILES | YAML
