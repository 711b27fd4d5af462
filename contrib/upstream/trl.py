"""What the contribution to TRL consists of: ``trl/experimental/hpo``, its tests, and its documentation.

Whole files are in ``trl_files/`` (at their place in TRL with ``.in`` appended), texts for TRL's own files in
``trl_snippets/``. A tree without ``docs`` or ``tests``, such as that of TRL's wheel, gets the rest.
"""

from __future__ import annotations

from pathlib import Path

from contrib.upstream.edits import AfterLine, AfterSection
from contrib.upstream.tree import Contribution, Insertion, changed, texts

__all__ = ["TITLE", "changes"]

#: Of the commit and of the pull request.
TITLE = "Add HPO (Hysteretic Policy Optimization) experimental trainer"

HERE = Path(__file__).parent
FILES = HERE / "trl_files"
SNIPPETS = HERE / "trl_snippets"

BASE_TRAINER = "trl/trainer/base_trainer.py"

#: Lists that are sorted by name get HPO below the last name with a G.
INSERTIONS = (
    Insertion(BASE_TRAINER, AfterLine('    "G'), SNIPPETS / "base_trainer.py.in"),
    Insertion("docs/source/_toctree.yml", AfterLine("    title: G"), SNIPPETS / "_toctree.yml.in"),
    Insertion(
        "docs/source/paper_index.md",
        AfterSection("## Group Relative Policy Optimization"),
        SNIPPETS / "paper_index.md.in",
    ),
)

CONTRIBUTION = Contribution(
    package="trl",
    known="trl 1.10.0, 1.16.0 and its main branch as of July 2026",
    files=FILES,
    insertions=INSERTIONS,
    another=r"\bHPO(Trainer|Config)?\b|\bhpo(_trainer)?\b|2605\.30201",
)


def changes(tree: Path) -> dict[str, str]:
    """What the contribution changes in a source tree of TRL; the tree itself is left as it is.

    Args:
        tree: a git checkout, an unpacked source distribution, or the directory that holds an installed ``trl``.

    Returns:
        Path in the tree (posix) -> the whole new text; empty if the tree has the contribution already.

    Raises:
        UnknownTreeError: if an anchor is missing, or the tree has HPO in another form.
    """
    return changed(tree, texts(CONTRIBUTION, tree))
