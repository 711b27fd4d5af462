"""The cluster scripts, recipe texts and studies of this package: where they are, and how a user gets a copy.

The repository has one copy of each, in ``recipes/`` and ``studies/``. ``setup.py`` copies them into the wheel, below
``hpo_plugin/share/``. An editable install reads them from the repository.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from hpo_plugin.files import atomic_write

#: Folder of the package that holds the files in a wheel.
SHARE = "share"
#: The folders whose files are shipped. Studies name each other's files relative to the folder above these two.
FOLDERS = ("recipes", "studies")
#: Of shipped files. The collected data of studies (.parquet) stay in the repository: with these data, `study run`
#: counts every cell as finished and trains nothing.
SUFFIXES = (".md", ".py", ".sbatch", ".yaml")


@dataclass(frozen=True)
class Copied:
    """What :func:`copy_files` did.

    Attributes:
        written: Names of the files that were written.
        unchanged: Names of the files that the directory already had, with the same content.
    """

    written: tuple[str, ...]
    unchanged: tuple[str, ...]


def shipped_files(package: Path | None = None) -> dict[str, Path]:
    """Return the shipped files: name relative to the target directory -> path.

    Args:
        package: The directory of ``hpo_plugin``; by default, that of the imported package.

    Raises:
        FileNotFoundError: If this installation does not have the files.
    """
    package = Path(str(resources.files("hpo_plugin"))) if package is None else package
    for root in (package / SHARE, package.parent):
        if all((root / folder).is_dir() for folder in FOLDERS):
            paths = (path for folder in FOLDERS for path in sorted((root / folder).rglob("*")))
            return {path.relative_to(root).as_posix(): path for path in paths if path.suffix in SUFFIXES}
    raise FileNotFoundError(
        f"{package / SHARE} does not exist: this installation of hpo-plugin lacks the recipes and studies. "
        "Install hpo-plugin from its wheel"
    )


def copy_files(files: Mapping[str, Path], directory: Path, *, force: bool = False) -> Copied:
    """Copy files to a directory. Files with the same content are left as they are.

    Args:
        files: Name -> path, as :func:`shipped_files` returns them.
        directory: The target; it is created if it does not exist.
        force: Overwrite files with other content.

    Returns:
        The names of the files.

    Raises:
        FileExistsError: If a file has other content and ``force`` is not set. Nothing is written in this case.
        OSError: If a file cannot be written.
    """
    contents = {name: path.read_bytes() for name, path in files.items()}
    unchanged = {name for name, data in contents.items() if _has(directory / name, data)}
    pending = [name for name in contents if name not in unchanged]
    _refuse_existing(directory, pending, force=force)
    for name in pending:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(directory / name, contents[name])
    return Copied(tuple(pending), tuple(name for name in contents if name in unchanged))


def _has(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _refuse_existing(directory: Path, names: Iterable[str], *, force: bool) -> None:
    existing = [name for name in names if (directory / name).exists()]
    if existing and not force:
        raise FileExistsError(
            f"{directory} has files with other content: {', '.join(existing)}. Nothing was written. "
            "Choose another directory, or overwrite these files with --force"
        )
