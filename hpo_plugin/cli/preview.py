"""``hpo-plugin preview``: what would HPO have made of rollouts that are there already?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def preview(
    rollouts: Annotated[
        list[Path],
        typer.Argument(
            help="verl's trainer.rollout_data_dir or validation_data_dir, TRL's folder of log_completions, or files "
            "(.jsonl, .parquet) with a prompt or uid, a response or its length, and a reward.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of preview.html, preview.png and steps.jsonl.")] = Path(
        "preview"
    ),
    reward: Annotated[
        list[str] | None,
        typer.Option(help="Column of the reward, NAME or NAME=WEIGHT; more than once: their sum.", show_default=False),
    ] = None,
    group: Annotated[str | None, typer.Option(help="Column that tells the prompt.", show_default=False)] = None,
    length: Annotated[str | None, typer.Option(help="Column of lengths in tokens.", show_default=False)] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Name or folder of a tokenizer, to measure responses in its tokens.", show_default=False),
    ] = None,
    alpha: Annotated[float, typer.Option(min=0.0, max=1.0, help="α of HPO.")] = 0.6,
    alpha_min: Annotated[
        list[float] | None,
        typer.Option(min=0.0, max=1.0, help="α_min of A-HPO; more than once: compared. Default: 0.1."),
    ] = None,
) -> None:
    """Show what HPO and A-HPO would have done to a run, from the rollouts that its trainer wrote.

    No GPU, no model, no trainer is needed.
    """
    import dataclasses
    import json

    from rich.console import Console

    from hpo_plugin.cli.requirements import require
    from hpo_plugin.console import stage_bars, stopped

    require("preview", "preview")
    from hpo_plugin.check.signals import interruptible
    from hpo_plugin.files import atomic_write, check_output
    from hpo_plugin.preview.report import Preview, picture, sentences, table, web_page
    from hpo_plugin.preview.rollouts import PreviewError, open_rollouts
    from hpo_plugin.preview.steps import preview_step

    console, alpha_mins = Console(), tuple(dict.fromkeys(alpha_min or [0.1]))
    try:
        check_output(output, {})
        with (
            interruptible(),
            stage_bars(Console(stderr=True), transient=True) as progress,
            open_rollouts(
                rollouts, rewards=reward or (), group=group, length=length, tokenizer=tokenizer, progress=progress
            ) as read,
        ):
            steps, rows = [], 0
            for step in read.steps():
                steps.append(preview_step(step, alpha_mins))
                rows += steps[-1].responses
                progress("rows", rows, read.rows)
        found = Preview(read, steps, alpha, alpha_mins)
        drawn = picture(found)
        atomic_write(output / "preview.png", drawn)
        atomic_write(output / "preview.html", web_page(found, drawn, [str(path) for path in rollouts]).encode())
        # JSON has no NaN.
        lines = [
            {name: None if value != value else value for name, value in dataclasses.asdict(s).items()} for s in steps
        ]
        atomic_write(output / "steps.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    except (PreviewError, OSError) as error:
        raise stopped(error) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    console.print(
        f"{read.rows:,} responses: {read.columns}", style="dim", markup=False, highlight=False, soft_wrap=True
    )
    console.print(table(found))
    console.print()
    for sentence in sentences(found):
        console.print(sentence, markup=False, highlight=False)
    if read.bad:
        console.print()
        for reason, count in read.bad.items():
            console.print(f"rows left out, {reason}: {count:,}", style="yellow", markup=False, highlight=False)
    console.print(f"\nIn {output}: preview.html, preview.png, steps.jsonl", markup=False, soft_wrap=True)
