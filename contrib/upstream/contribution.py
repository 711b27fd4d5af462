"""What the contribution to verl consists of, and how it gets into a source tree of verl.

Two kinds of text, both written by this project: whole files (``files/``, at their place in verl with ``.in`` appended)
and texts that are inserted into verl's own files (``snippets/``, :data:`INSERTIONS`). The flattened configs
``verl/trainer/config/_generated_*.yaml`` are composed anew. A tree without ``docs``, ``examples`` or ``tests``, such as
that of verl's wheel, gets the rest.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from contrib.upstream.edits import (
    AfterDefinition,
    AfterField,
    AfterKey,
    AfterLine,
    Anchor,
    AnchorError,
    unbound,
)

__all__ = ["TITLE", "UnknownTreeError", "changes", "commit", "patch", "read", "refuse_others", "write"]

#: Of the commit and of the pull request, in the form that verl's tests/special_sanity/check_pr_title.py asks for.
TITLE = "[algo, cfg, doc] feat: add HPO and A-HPO advantage estimators"

ATTRIBUTION = (
    "Written with AI assistance; see the pull request. To be reviewed and signed off by the human who submits it."
)

HERE = Path(__file__).parent
FILES = HERE / "files"
SNIPPETS = HERE / "snippets"
CONFIGS = "verl/trainer/config"


class UnknownTreeError(ValueError):
    """The tree is not one that the contribution fits; the message names the file and what is missing there."""


@dataclass(frozen=True)
class Insertion:
    """One text, and where it goes."""

    file: str
    anchor: Anchor
    snippet: str

    @property
    def text(self) -> str:
        """What is inserted, without base indentation."""
        return (SNIPPETS / f"{self.snippet}.in").read_text(encoding="utf-8")

    def is_in(self, source: str) -> bool:
        """Whether the text is there already, at any indentation."""
        return self._unindented(self.text) in self._unindented(source)

    @staticmethod
    def _unindented(text: str) -> str:
        return "\n".join(line.strip() for line in text.strip().splitlines())


KNOWN = "verl 0.9.0, 0.9.1 and its main branch as of August 2026"

CORE_ALGOS = "verl/trainer/ppo/core_algos.py"

INSERTIONS = (
    Insertion(CORE_ALGOS, AfterField("AdvantageEstimator"), "enum.py"),
    Insertion(CORE_ALGOS, AfterDefinition("compute_grpo_vectorized_outcome_advantage"), "estimator.py"),
    Insertion(f"{CONFIGS}/algorithm.py", AfterField("AlgoConfig"), "algo_field.py"),
    Insertion(f"{CONFIGS}/ppo_trainer.yaml", AfterKey("algorithm.norm_adv_by_std_in_grpo"), "algorithm.yaml"),
    Insertion("docs/index.rst", AfterLine("   algo/"), "index.rst"),
    Insertion("examples/README.md", AfterLine("| `sapo_trainer/`"), "examples.md"),
)


def changes(tree: Path) -> dict[str, str]:
    """What the contribution changes in a source tree of verl; the tree itself is left as it is.

    Args:
        tree: a git checkout, an unpacked source distribution, or the directory that holds an installed ``verl``.

    Returns:
        Path in the tree (posix) -> the whole new text; empty if the tree has the contribution already.

    Raises:
        UnknownTreeError: if an anchor is missing, or the tree has HPO in another form.
    """
    if not (tree / "verl/__init__.py").is_file():
        raise UnknownTreeError(f"{tree} is not a source tree of verl: it holds no verl/__init__.py")
    texts = _new_files(tree) | _edited_files(tree)
    texts |= _generated_configs(tree, texts)
    return {name: text for name, text in texts.items() if read(tree / name) != text}


def read(path: Path) -> str | None:
    """The text of a file of a tree, None if it is not there.

    Raises:
        UnknownTreeError: if its lines end as on Windows; a text inserted there would make it a mixture.
    """
    if not path.is_file():
        return None
    content = path.read_bytes()
    if b"\r" in content:
        raise UnknownTreeError(
            f"{path} has Windows line ends, and verl has none: check it out with core.autocrlf=false"
        )
    return content.decode()


def _has_place_for(tree: Path, name: str) -> bool:
    """Whether the tree has the top directory of a file: verl's wheel is ``verl`` alone."""
    return (tree / name.split("/")[0]).is_dir()


def _new_files(tree: Path) -> dict[str, str]:
    names = {path.relative_to(FILES).as_posix().removesuffix(".in"): path for path in FILES.rglob("*.in")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in names.items() if _has_place_for(tree, name)}
    refuse_others(tree, texts)
    return texts


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


def _edited_files(tree: Path) -> dict[str, str]:
    insertions = [insertion for insertion in INSERTIONS if _has_place_for(tree, insertion.file)]
    sources: dict[str, str] = {}
    for name in {insertion.file for insertion in insertions}:
        source = read(tree / name)
        if source is None:
            raise UnknownTreeError(f"{tree} has no {name}; the contribution knows {KNOWN}")
        sources[name] = source
    there = [insertion for insertion in insertions if insertion.is_in(sources[insertion.file])]
    if len(there) == len(insertions):
        return {}
    if there or re.search(r"""["']a?hpo["']""", sources[CORE_ALGOS]):
        missing = next(insertion for insertion in insertions if insertion not in there)
        raise UnknownTreeError(
            f"{tree} has HPO, but not this contribution: {missing.file} lacks the text of {missing.snippet}. "
            "Start from a tree without HPO; a verl that has it built in needs no contribution."
        )
    before = dict(sources)
    for insertion in insertions:
        try:
            sources[insertion.file] = insertion.anchor.insert(sources[insertion.file], insertion.text)
        except (AnchorError, SyntaxError, yaml.YAMLError) as error:
            raise UnknownTreeError(
                f"{tree / insertion.file}: {_in_one_line(error)}. The contribution knows {KNOWN}; adapt INSERTIONS in "
                "contrib/upstream/contribution.py to this tree."
            ) from error
    for name, source in sources.items():
        if name.endswith(".py") and (missing_names := unbound(source) - unbound(before[name])):
            raise UnknownTreeError(
                f"{tree / name} has no {', '.join(sorted(missing_names))}, which the contribution uses there; it knows "
                f"{KNOWN}."
            )
    return sources


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


_HEADER = re.compile(r"print_cfg\.py --cfg job ?(?P<overrides>[^']*)' to flatten the '[^']*/(?P<config>\w+)\.yaml'")


def _generated_configs(tree: Path, texts: dict[str, str]) -> dict[str, str]:
    """The flattened configs, as verl's scripts/generate_trainer_config.sh writes them; each names its own command."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    generated = {}
    with tempfile.TemporaryDirectory() as temporary:
        configs = Path(temporary) / "config"
        shutil.copytree(tree / CONFIGS, configs)
        for name, text in texts.items():
            if name.startswith(f"{CONFIGS}/"):
                (configs / name.removeprefix(f"{CONFIGS}/")).write_text(text, encoding="utf-8")
        for path in sorted(configs.glob("_generated_*.yaml")):
            header = path.read_text(encoding="utf-8").partition("\n\n")[0]
            command = _HEADER.search(header)
            if command is None:
                raise UnknownTreeError(f"{tree / CONFIGS / path.name} does not say how it was generated")
            GlobalHydra.instance().clear()
            try:
                with initialize_config_dir(str(configs), version_base=None):
                    config = compose(command["config"], overrides=command["overrides"].split())
            except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
                raise UnknownTreeError(
                    f"{tree / CONFIGS / command['config']}.yaml, of which {path.name} is made, cannot be composed: "
                    f"{_in_one_line(error)}"
                ) from error
            body = OmegaConf.to_yaml(config)
            generated[f"{CONFIGS}/{path.name}"] = f"{header}\n\n{body[body.index('actor_rollout_ref:') :]}"
    return generated


def write(directory: Path, texts: dict[str, str]) -> None:
    """Write files below a directory.

    Args:
        directory: a tree, or an empty directory.
        texts: what :func:`changes` returned.
    """
    for name, text in texts.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


def patch(tree: Path, texts: dict[str, str]) -> str:
    """The changes as a diff in git's format, for ``git apply``.

    Args:
        tree: the tree before.
        texts: what :func:`changes` returned for it.

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


def commit(tree: Path, texts: dict[str, str], branch: str, title: str = TITLE) -> None:
    """Make a branch of a git checkout with the changes as one commit, and check it out.

    The commit is made in a work tree of its own: where git refuses it, the checkout stays as it was.

    Args:
        tree: a checkout without changes of its own.
        texts: what :func:`changes` returned.
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
        work_tree = Path(temporary) / "verl"
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
