"""``hpo-plugin preview``: computes the α of HPO and A-HPO from existing rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def preview(
    rollouts: Annotated[
        list[Path],
        typer.Argument(
            help="Directory of verl's trainer.rollout_data_dir or validation_data_dir, directory of TRL's "
            "log_completions, or files (.jsonl, .parquet) with a prompt or uid, a response or its length, and a "
            "reward.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory for preview.html, preview.png and steps.jsonl.")] = Path(
        "preview"
    ),
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="Column with the reward, NAME or NAME=WEIGHT. Repeat the option to sum several columns.",
            show_default=False,
        ),
    ] = None,
    group: Annotated[str | None, typer.Option(help="Column that identifies the prompt.", show_default=False)] = None,
    length: Annotated[
        str | None, typer.Option(help="Column with the response length in tokens.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Name or directory of a tokenizer that measures response lengths.", show_default=False),
    ] = None,
    alpha: Annotated[float, typer.Option(min=0.0, max=1.0, help="α of HPO.")] = 0.6,
    alpha_min: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0, max=1.0, help="α_min of A-HPO. Repeat the option to compare several values. Default: 0.1."
        ),
    ] = None,
) -> None:
    """Show the effect that HPO and A-HPO would have had on a run, from its rollouts.

    The command reads the rollouts that the trainer wrote. It needs no GPU,
    no model and no trainer.
    """
    import dataclasses
    import json

    from hpo_plugin.cli.requirements import require
    from hpo_plugin.console import stage_bars, stopped, terminal

    require("preview", "preview")
    from hpo_plugin.check.signals import interruptible
    from hpo_plugin.files import atomic_write, check_output
    from hpo_plugin.preview.report import Preview, picture, sentences, table, web_page
    from hpo_plugin.preview.rollouts import PreviewError, open_rollouts
    from hpo_plugin.preview.steps import preview_step

    console, alpha_mins = terminal(), tuple(dict.fromkeys(alpha_min or [0.1]))
    try:
        check_output(output, {})
        with (
            interruptible(),
            stage_bars(terminal(stderr=True), transient=True) as progress,
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
    console.print(f"{read.rows:,} responses: {read.columns}", style="dim", highlight=False, soft_wrap=True)
    console.print(table(found))
    console.print()
    for sentence in sentences(found):
        console.print(sentence, highlight=False)
    if read.bad:
        console.print()
        for reason, count in read.bad.items():
            console.print(f"skipped rows, {reason}: {count:,}", style="yellow", highlight=False)
    console.print(f"\nFiles in {output}: preview.html, preview.png, steps.jsonl", soft_wrap=True)
