"""What every contribution shares: the texts of one, how they get into a source tree, and which trees are refused."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from contrib.upstream.edits import Anchor, AnchorError, unbound

__all__ = [
    "Contribution",
    "Insertion",
    "UnknownTreeError",
    "changed",
    "commit",
    "has_place_for",
    "in_one_line",
    "patch",
    "read",
    "refuse_others",
    "texts",
    "write",
]

ATTRIBUTION = (
    "Written with AI assistance; see the pull request. To be reviewed and signed off by the human who submits it."
)


class UnknownTreeError(ValueError):
    """The tree is not one that the contribution fits; the message names the file and what is missing there."""


@dataclass(frozen=True)
class Insertion:
    """One text, and where it goes.

    Attributes:
        file: A file of the tree.
        anchor: The place in it.
        snippet: The file that holds the text.
    """

    file: str
    anchor: Anchor
    snippet: Path

    @property
    def text(self) -> str:
        """What is inserted, without base indentation."""
        return self.snippet.read_text(encoding="utf-8")

    def is_in(self, source: str) -> bool:
        """Whether the text is there already, at any indentation."""
        return self._unindented(self.text) in self._unindented(source)

    @staticmethod
    def _unindented(text: str) -> str:
        return "\n".join(line.strip() for line in text.strip().splitlines())


@dataclass(frozen=True)
class Contribution:
    """The texts of one contribution.

    Attributes:
        package: The Python package that it is for.
        known: The versions that it was written for.
        files: A folder of whole files, each at its place in the tree with ``.in`` appended.
        insertions: Texts that go into files of the tree.
        another: A regular expression, found in those files where the tree has HPO in another form.
    """

    package: str
    known: str
    files: Path
    insertions: tuple[Insertion, ...]
    another: str


def texts(contribution: Contribution, tree: Path) -> dict[str, str]:
    """What the contribution's own files and insertions make of a tree; the tree itself is left as it is.

    A tree without the top directory of a file, such as that of a wheel, gets the rest.

    Args:
        contribution: whose texts.
        tree: a git checkout, an unpacked source distribution, or the directory that holds an installed package.

    Returns:
        Path in the tree (posix) -> the whole new text.

    Raises:
        UnknownTreeError: if an anchor is missing, or the tree has HPO in another form.
    """
    package = contribution.package
    if not (tree / package / "__init__.py").is_file():
        raise UnknownTreeError(f"{tree} is not a source tree of {package}: it holds no {package}/__init__.py")
    return _new_files(contribution, tree) | _edited_files(contribution, tree)


def changed(tree: Path, texts: dict[str, str]) -> dict[str, str]:
    """The texts that the tree does not have yet.

    Args:
        tree: a source tree.
        texts: path in the tree -> the whole text.

    Returns:
        The part of ``texts`` that differs; empty if the tree has all of it.
    """
    return {name: text for name, text in texts.items() if read(tree / name) != text}


def read(path: Path) -> str | None:
    """The text of a file of a tree, None if it does not exist.

    Raises:
        UnknownTreeError: if its lines end as on Windows; a text inserted there would make it a mixture.
    """
    if not path.is_file():
        return None
    content = path.read_bytes()
    if b"\r" in content:
        raise UnknownTreeError(f"{path} has Windows line ends: check it out with core.autocrlf=false")
    return content.decode()


def has_place_for(tree: Path, name: str) -> bool:
    """Whether the tree has the top directory of a file: a wheel is the package alone.

    Args:
        tree: a source tree.
        name: path in it.
    """
    return (tree / name.split("/")[0]).is_dir()


def _new_files(contribution: Contribution, tree: Path) -> dict[str, str]:
    found = contribution.files.rglob("*.in")
    names = {path.relative_to(contribution.files).as_posix().removesuffix(".in"): path for path in found}
    files = {name: path.read_text(encoding="utf-8") for name, path in names.items() if has_place_for(tree, name)}
    refuse_others(tree, files)
    return files


def refuse_others(tree: Path, texts: dict[str, str]) -> None:
    """Refuse a tree that has another file where one of ours belongs.

    Args:
        tree: what the files are written to.
        texts: path in the tree -> content of our own files.

    Raises:
        UnknownTreeError: naming the file.
    """
    for name, text in texts.items():
        if read(tree / name) not in (None, text):
            raise UnknownTreeError(
                f"{tree / name} exists with another content; the contribution does not replace it. Start from a tree "
                "without it."
            )


def _edited_files(contribution: Contribution, tree: Path) -> dict[str, str]:
    insertions = [insertion for insertion in contribution.insertions if has_place_for(tree, insertion.file)]
    sources: dict[str, str] = {}
    for name in {insertion.file for insertion in insertions}:
        source = read(tree / name)
        if source is None:
            raise UnknownTreeError(f"{tree} has no {name}; the contribution knows {contribution.known}")
        sources[name] = source
    there = [insertion for insertion in insertions if insertion.is_in(sources[insertion.file])]
    if len(there) == len(insertions):
        return {}
    if there or any(re.search(contribution.another, source) for source in sources.values()):
        missing = next(insertion for insertion in insertions if insertion not in there)
        raise UnknownTreeError(
            f"{tree} has HPO, but not this contribution: {missing.file} lacks the text of "
            f"{missing.snippet.name.removesuffix('.in')}. Start from a tree without HPO; a {contribution.package} that "
            "has it built in needs no contribution."
        )
    before = dict(sources)
    for insertion in insertions:
        try:
            sources[insertion.file] = insertion.anchor.insert(sources[insertion.file], insertion.text)
        except (AnchorError, SyntaxError, yaml.YAMLError) as error:
            raise UnknownTreeError(
                f"{tree / insertion.file}: {in_one_line(error)}. The contribution knows {contribution.known}; adapt "
                "its insertions in contrib/upstream to this tree."
            ) from error
    for name, source in sources.items():
        if name.endswith(".py") and (missing_names := unbound(source) - unbound(before[name])):
            raise UnknownTreeError(
                f"{tree / name} has no {', '.join(sorted(missing_names))}, which the contribution uses there; it knows "
                f"{contribution.known}."
            )
    return sources


def in_one_line(error: Exception) -> str:
    """What an error says, without line breaks.

    Args:
        error: whose text.
    """
    return " ".join(str(error).split())


def write(directory: Path, texts: dict[str, str]) -> None:
    """Write files below a directory.

    Args:
        directory: a tree, or an empty directory.
        texts: path below it -> the whole text.
    """
    for name, text in texts.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


def patch(tree: Path, texts: dict[str, str]) -> str:
    """The changes as a diff in git's format, for ``git apply``.

    Args:
        tree: the tree before.
        texts: path in it -> the whole new text.

    Returns:
        The diff; empty without changes.
    """
    with tempfile.TemporaryDirectory() as temporary:
        before, after = Path(temporary) / "a", Path(temporary) / "b"
        before.mkdir()
        after.mkdir()
        write(before, {name: source for name in texts if (source := read(tree / name)) is not None})
        write(after, texts)
        # Exit status 1 means that there are differences.
        command = ["git", "diff", "--no-index", "--no-prefix", "--no-color", "--no-ext-diff", "a", "b"]
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stderr)
        return done.stdout


def commit(tree: Path, texts: dict[str, str], branch: str, title: str) -> None:
    """Make a branch of a git checkout with the changes as one commit, and check it out.

    The commit is made in a work tree of its own: where git refuses it, the checkout stays as it was.

    Args:
        tree: a checkout without changes of its own.
        texts: path below it -> the whole text.
        branch: its name.
        title: of the commit.

    Raises:
        UnknownTreeError: if the branch exists or the checkout has changes; with git's own words, if git cannot commit,
            for want of an identity or because a hook refuses.
    """
    # Untracked files too: one that the contribution adds is in the tree then, and would be missing in the commit.
    if changed := _git(tree, "status", "--porcelain", "--untracked-files=all"):
        raise UnknownTreeError(
            f"{tree} has changes that are not committed; `git stash --include-untracked` puts them aside:\n{changed}"
        )
    if _git(tree, "for-each-ref", f"refs/heads/{branch}"):
        raise UnknownTreeError(
            f"{tree} has a branch {branch} already: look at it with `git switch {branch}`, or name another one with "
            "--branch"
        )
    with tempfile.TemporaryDirectory() as temporary:
        work_tree = Path(temporary) / "tree"
        _git(tree, "worktree", "add", "--quiet", "--detach", str(work_tree))
        try:
            write(work_tree, texts)
            _git(work_tree, "add", "--", *texts)
            _git(work_tree, "commit", "--quiet", "--message", title, "--message", ATTRIBUTION)
            made = _git(work_tree, "rev-parse", "HEAD").strip()
        finally:
            _git(tree, "worktree", "remove", "--force", str(work_tree))
    _git(tree, "switch", "--quiet", "--create", branch, made)


def _git(tree: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UnknownTreeError(f"git {arguments[0]} in {tree}: {done.stderr.strip()}")
    return done.stdout
