"""``hpo-plugin score``: the papers' metrics from the samples of a validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Compute the papers' metrics from a validation's samples.")


@app.callback()
def _score() -> None:
    """Compute the papers' metrics from a validation's samples."""


@app.command()
def telelogs(
    file: Annotated[
        Path, typer.Argument(help="<step>.jsonl of verl's trainer.validation_data_dir: one sample a line.")
    ],
) -> None:
    """Print pass@1 and maj@k of a validation, with k samples a prompt, and the answers by label.

    verl logs pass@1 as val-core/telelogs/acc/mean@k. Its own maj@k is a bootstrap estimate; this is the plain majority.
    """
    from rich.console import Console
    from rich.table import Table

    from hpo_plugin.cli._errors import stopped
    from hpo_plugin.tasks.telelogs import summarize

    try:
        answers = _read(file)
        metrics = summarize([predictions for _, predictions in answers], [label for label, _ in answers])
    except (ValueError, OSError) as error:
        raise stopped(error) from None
    console = Console(highlight=False)
    samples = len(answers[0][1])
    console.print(f"{len(answers):,} prompts, {samples} samples each")
    for name, value in metrics.items():
        console.print(f"{name:<8}{100 * value:.2f} %", style="bold")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("label", "samples", "right", "most frequent answers"):
        table.add_column(column, justify="left" if column in ("label", "most frequent answers") else "right")
    for label in sorted({label for label, _ in answers}):
        given = Counter(answer for truth, predictions in answers if truth == label for answer in predictions)
        total = sum(given.values())
        shown = "  ".join(f"{answer or 'none'} {100 * count / total:.0f} %" for answer, count in given.most_common(4))
        right = sum(count for answer, count in given.items() if _same(answer, label))
        table.add_row(label, f"{total:,}", f"{100 * right / total:.1f} %", shown)
    console.print(table)


def _same(answer: str, label: str) -> bool:
    return answer == label or (label[:1].isalpha() and answer == label[1:])


def _read(file: Path) -> list[tuple[str, list[str]]]:
    """Return (label, answers) of each prompt, in the order of the file."""
    from hpo_plugin.tasks._sources import read_file

    rows: Sequence[Any] = read_file(file)
    prompts: dict[tuple[str, str], list[str]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not {"pred", "gts"} <= row.keys() or not {"uid", "input"} & row.keys():
            raise ValueError(
                f"{file}, line {number + 1}: not a sample of a validation of verl's, with pred, gts, and uid or input"
            )
        # verl's default trainer names samples <prompt>_<session>_<index>.
        prompt = str(row["uid"]).rsplit("_", 2)[0] if "uid" in row else str(row["input"])
        prompts.setdefault((prompt, str(row["gts"])), []).append(str(row["pred"]))
    if not prompts:
        raise ValueError(f"{file} has no samples")
    return [(label, answers) for (_, label), answers in prompts.items()]
