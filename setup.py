"""Copies recipes/ and studies/ into the wheel, for `hpo-plugin files`. pyproject.toml holds everything else."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from hpo_plugin.shipped import SHARE, shipped_files  # noqa: E402


class BuildWithSharedFiles(build_py):
    """Builds the package with the files that ``hpo-plugin files`` writes."""

    def run(self) -> None:
        """Build, and copy the files below ``hpo_plugin/share/``. An editable install reads them where they are."""
        super().run()
        if not self.editable_mode:
            for name, path in shipped_files(ROOT / "hpo_plugin").items():
                target = Path(self.build_lib, "hpo_plugin", SHARE, name)
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))

    def get_source_files(self) -> list[str]:
        """Return what a source distribution needs to build the same wheel."""
        return [*super().get_source_files(), *shipped_files(ROOT / "hpo_plugin")]


setup(cmdclass={"build_py": BuildWithSharedFiles})
