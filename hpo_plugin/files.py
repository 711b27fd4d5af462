"""Data sets on disk: a few files and a manifest, each written atomically.

The manifest is written last and removed first, so where it exists it describes the files next to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Publication:
    """Result of :func:`publish`.

    Attributes:
        directory: Where the files are.
        written: Names of the files that were written.
        unchanged: Names of the files that already existed with the same bytes.
    """

    directory: Path
    written: tuple[str, ...]
    unchanged: tuple[str, ...]


def sha256(data: bytes) -> str:
    """Return the SHA-256 of some bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part, even after a power cut.

    Args:
        path: Where; its directory exists.
        data: The content.

    Raises:
        OSError: If it cannot be written; the old content is then untouched.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; data sets are as readable as any file of this user.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def check_output(directory: Path, parameters: Mapping[str, Any], *, force: bool = False) -> None:
    """Check an output directory before the work for it starts; create it if it does not exist.

    Args:
        directory: Where data will be written.
        parameters: What the data is a function of (JSON values), compared with an existing manifest's.
        force: Accept a directory that holds other data.

    Raises:
        FileExistsError: If it holds data made with other parameters and ``force`` is not set.
        OSError: If it cannot be created or written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass
    manifest_path = directory / MANIFEST_NAME
    if force or not manifest_path.exists():
        return
    try:
        existing = json.loads(manifest_path.read_bytes())["parameters"]
        differences = [
            f"{key}: found {existing.get(key)!r}, requested {parameters.get(key)!r}"
            for key in sorted({*existing, *parameters})
            if existing.get(key) != parameters.get(key)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileExistsError(
            f"{manifest_path} is not a manifest of hpo-plugin ({error}); choose another directory, or pass --force"
        ) from error
    if differences:
        raise FileExistsError(
            f"{directory} holds different data ({'; '.join(differences)}); choose another directory, or pass --force"
        )


def publish(
    directory: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any], *, force: bool = False
) -> Publication:
    """Write files and their manifest; keep existing files with the same bytes.

    Args:
        directory: Where; exists (see :func:`check_output`).
        files: Name -> content.
        manifest: JSON values; ``files`` (name -> bytes and sha256) is added to it.
        force: Replace files of the same names that differ, and remove others that the existing manifest names.

    Returns:
        The files that were written, and those that already existed.

    Raises:
        FileExistsError: If a file of the same name has other content and ``force`` is not set; nothing is written then.
        OSError: If a file cannot be written.
    """
    described = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()}
    manifest_bytes = (json.dumps({**manifest, "files": described}, indent=2, sort_keys=True) + "\n").encode()
    unchanged = [
        name
        for name in files
        if (directory / name).exists() and sha256_of_file(directory / name) == described[name]["sha256"]
    ]
    pending = [name for name in files if name not in unchanged]
    in_the_way = [name for name in pending if (directory / name).exists()]
    if in_the_way and not force:
        raise FileExistsError(
            f"{directory} holds different data: {', '.join(in_the_way)} would change; choose another directory, or "
            "pass --force"
        )
    manifest_path = directory / MANIFEST_NAME
    if not pending and manifest_path.exists() and manifest_path.read_bytes() == manifest_bytes:
        return Publication(directory, (), (*unchanged, MANIFEST_NAME))
    stale = _described_files(manifest_path) - files.keys() if force else set()
    manifest_path.unlink(missing_ok=True)
    for name in stale:
        (directory / name).unlink(missing_ok=True)
    for name in pending:
        atomic_write(directory / name, files[name])
    atomic_write(manifest_path, manifest_bytes)
    return Publication(directory, (*pending, MANIFEST_NAME), tuple(unchanged))


def _described_files(manifest_path: Path) -> set[str]:
    """The files that a manifest names, if it is one of ours; never one outside of its directory."""
    try:
        names = json.loads(manifest_path.read_bytes())["files"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in names if name == Path(name).name}


def _umask() -> int:
    # The umask can only be read by setting it.
    current = os.umask(0o022)
    os.umask(current)
    return current


def _sync_directory(directory: Path) -> None:
    # Without this the rename itself may not survive a power cut.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
