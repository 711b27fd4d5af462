"""``python -m contrib.upstream``: HPO as a contribution to verl, to verl's recipe collection, or to TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def upstream(
    verl: Annotated[
        Path | None,
        typer.Option(help="A source tree of verl: a git checkout, or what a wheel holds.", show_default=False),
    ] = None,
    recipes: Annotated[
        Path | None, typer.Option(help="A checkout of verl's recipe collection, instead of verl.", show_default=False)
    ] = None,
    trl: Annotated[
        Path | None,
        typer.Option(help="A source tree of TRL, instead of verl: as for verl.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write a patch for `git apply`, and leave the tree as it is.", show_default=False),
    ] = None,
    branch: Annotated[
        str | None, typer.Option(help="In a git checkout: the branch to make; hpo if not given.", show_default=False)
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(help="With --recipes: STUDY.yaml whose report goes into the README.", show_default=False),
    ] = None,
) -> None:
    """Write HPO as a contribution: a commit on a branch of a git checkout, else into the files, or a patch with --out.

    Nothing is sent anywhere. A tree that has the contribution already is not changed; one that is not known is refused.
    """
    from contrib.upstream import contribution, recipe
    from contrib.upstream import trl as of_trl
    from contrib.upstream.tree import commit, patch, write
    from hpo_plugin.console import stopped
    from hpo_plugin.files import atomic_write

    given = [tree for tree in (verl, recipes, trl) if tree is not None]
    if len(given) != 1:
        raise typer.BadParameter("give one of --verl, --recipes and --trl")
    (tree,) = given
    if study is not None and recipes is None:
        raise typer.BadParameter("--study fills the README of --recipes")
    if branch is not None and (out is not None or not (tree / ".git").exists()):
        raise typer.BadParameter("--branch names the branch of a commit: a git checkout gets one, without --out")
    try:
        if recipes is not None:
            title, changes = recipe.TITLE, recipe.changes(tree, study)
        else:
            of = contribution if verl is not None else of_trl
            title, changes = of.TITLE, of.changes(tree)
        if not changes:
            print(f"{tree} has all of it already: nothing to do")
        elif out is not None:
            atomic_write(out, patch(tree, changes).encode())
            print(f"{out}: {len(changes)} files")
        elif (tree / ".git").exists():
            commit(tree, changes, branch or "hpo", title)
            print(f"{tree}: {len(changes)} files, one commit on branch {branch or 'hpo'}")
        else:
            write(tree, changes)
            print(f"{tree}: {len(changes)} files")
    except (ValueError, OSError) as error:
        raise stopped(error) from None


if __name__ == "__main__":
    app(prog_name="python -m contrib.upstream")
