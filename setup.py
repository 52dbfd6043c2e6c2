"""The wheel carries notebooks, params, docs and benchmarks, for `python -m rgalign new`."""

from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py


class WithNotebooks(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # a checkout has them at its root
            return
        for name in ("notebooks", "params", "docs", "benchmarks"):
            put = Path(self.build_lib) / "rgalign" / "shipped" / name
            copytree(name, put, ignore=ignore_patterns("site", ".*", "__pycache__"), dirs_exist_ok=True)


setup(cmdclass={"build_py": WithNotebooks})
