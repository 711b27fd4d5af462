"""Which packages a command lacks, from this package's own metadata."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hpo_plugin.console import stopped

DISTRIBUTION = "hpo-plugin"


def require(command: str, *extras: str) -> None:
    """Stop a command whose packages are not installed. Versions are what ``hpo-plugin check`` looks at.

    Args:
        command: Name of the command.
        *extras: The extras of this package that have its packages.

    Raises:
        SystemExit: With status 1, after a line that names the packages and the command that installs them.
    """
    missing = [name for extra in extras for name in missing_packages(extra)]
    if missing:
        names = ", ".join(dict.fromkeys(missing))
        install = f"pip install '{DISTRIBUTION}[{','.join(extras)}]'"
        raise stopped(RuntimeError(f"`hpo-plugin {command}` lacks {names}: {install}"))


def missing_packages(extra: str) -> list[str]:
    """Return the distributions of an extra that are not installed, in the order of its requirements."""
    return [name for name in dict.fromkeys(_names(extra)) if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _names(extra: str) -> Iterator[str]:
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        # Imported from a source tree: nothing is known.
        return
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        if canonicalize_name(requirement.name) == DISTRIBUTION:
            for other in sorted(requirement.extras):
                yield from _names(other)
        else:
            yield requirement.name
