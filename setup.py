"""The wheel carries notebooks, params and docs, for `python -m rgalign new`; all else is in pyproject.toml."""

from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py


class WithNotebooks(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # a checkout has them at its root
            return
        for name in ("notebooks", "params", "docs"):
            put = Path(self.build_lib) / "rgalign" / "shipped" / name
            copytree(name, put, ignore=ignore_patterns("site", ".*"), dirs_exist_ok=True)


setup(cmdclass={"build_py": WithNotebooks})
