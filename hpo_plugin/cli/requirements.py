"""Finds the missing packages of a command, from the metadata of this package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hpo_plugin.console import stopped

DISTRIBUTION = "hpo-plugin"


def require(command: str, *extras: str) -> None:
    """Stop a command if packages that it needs are not installed. ``hpo-plugin check`` checks their versions.

    Args:
        command: Name of the command.
        *extras: The extras of this package that contain its packages.

    Raises:
        SystemExit: Packages are missing: status 1, after a line that names them and the command that installs them.
    """
    missing = [name for extra in extras for name in missing_packages(extra)]
    if missing:
        names = ", ".join(dict.fromkeys(missing))
        install = f"pip install '{DISTRIBUTION}[{','.join(extras)}]'"
        raise stopped(RuntimeError(f"`hpo-plugin {command}` needs packages that are not installed: {names}. {install}"))


def missing_packages(extra: str) -> list[str]:
    """Return the distributions of an extra that are not installed, in the order of the requirements."""
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
        # The package is imported from a source tree and has no metadata.
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
