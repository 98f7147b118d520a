"""Puts `configs/` into the wheel, as `retention/configs`; everything else is said in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigs(build_py):
    """Also copies the YAML files, which lie beside the package in a checkout; an editable install reads them there."""

    def run(self) -> None:
        """Build as ever, then copy."""
        super().run()
        if not self.editable_mode:
            shipped = Path(self.build_lib, "retention", "configs")
            shutil.rmtree(shipped, ignore_errors=True)
            shutil.copytree("configs", shipped)


setup(cmdclass={"build_py": WithConfigs})
