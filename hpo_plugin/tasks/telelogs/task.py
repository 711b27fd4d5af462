r"""The TeleLogs task: options, laptop form, demonstrations and explanations."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hpo_plugin.console import Progress
from hpo_plugin.tasks.task import (
    DataOptions,
    DataSet,
    Demonstration,
    Explanation,
    LaptopForm,
    Row,
    Task,
    check_prompt,
    option,
    prompt_text,
)
from hpo_plugin.tasks.telelogs.dataset import prepare_telelogs
from hpo_plugin.tasks.telelogs.prompts import parse_prompt, table_lines
from hpo_plugin.tasks.telelogs.reasoning import chain_of_thought
from hpo_plugin.tasks.telelogs.reward import compute_score, judge, summarize
from hpo_plugin.tasks.telelogs.rules import Diagnosis, diagnose
from hpo_plugin.tasks.telelogs.synthetic import BALANCES
from hpo_plugin.tasks.telelogs.tables import Case
from hpo_plugin.tasks.telelogs.variants import REDUCTIONS

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TeleLogsOptions(DataOptions):
    """Options of TeleLogs data.

    Attributes:
        train_size: Rows of a synthetic training split.
        test_size: Rows of a synthetic test split.
        seed: Seed of cases, labels and splits.
        source: ``synthetic``, ``hub``, or a file.
        test_source: A file with the test split.
        balance: Classes of the synthetic training split.
        reduction: Size of synthetic cases.
        relabeled: Whether to write the test split under random labels too.
        sft: Whether to write demonstrations for supervised fine-tuning too.
    """

    train_size: int | None = option("Synthetic training rows. Default: 2400.", minimum=1)
    test_size: int | None = option("Synthetic test rows. Default: 864.", minimum=1)
    seed: int | None = option("Seed of cases, labels and splits. Default: 0.", minimum=0)
    source: str = option(
        "synthetic; hub: the gated data set netop/TeleLogs with your own access; or a local .parquet/.json/.jsonl/.csv "
        "file with the columns question and answer.",
        "synthetic",
    )
    test_source: str | None = option("File with the test split, if --source is a file with the training split.")
    balance: str | None = option(
        "Classes of the synthetic training split: train (default: the published shares) or uniform."
    )
    reduction: str | None = option(
        "Size of synthetic cases: full (default), or laptop (about 150 characters, 5 causes)."
    )
    relabeled: bool = option("Also write the test split with random labels, options and table order.", False)
    sft: bool = option("Also write the oracle's chains of thought, for verl's SFT trainer.", False)


class TeleLogs(Task):
    """Find the root cause of low 5G throughput from a drive test and the engineering parameters of the cells."""

    name: ClassVar[str] = "telelogs"
    title: ClassVar[str] = "TeleLogs"
    Options: ClassVar[type[DataOptions]] = TeleLogsOptions
    laptop: ClassVar[LaptopForm | None] = LaptopForm(
        config_name="telelogs_cpu",
        steps=40,
        data={"reduction": "laptop", "sft": True},
        quickstart={"train_size": 4_000},
        # A reduced case has some 300 tokens.
        start_model={"max_positions": 512},
        solution_prefix="",
        sft_config_name="telelogs_sft_cpu",
        sft_epochs=2,
    )

    def prepare(
        self, directory: Path, options: Any, *, force: bool = False, progress: Progress | None = None
    ) -> DataSet:
        """Write TeleLogs cases; by default the training and the test split share no base scenario.

        Raises:
            ValueError: An option is invalid or has no effect with this source.
            OSError: The source cannot be read, or the directory cannot be written or holds other data.
        """
        given: TeleLogsOptions = options
        arguments = {**vars(given), "seed": given.seed or 0}
        return prepare_telelogs(directory, **arguments, force=force, progress=progress)

    def validate(self, options: Any) -> None:
        """Check the class balance and the reduction."""
        given: TeleLogsOptions = options
        if given.balance not in (None, *BALANCES):
            raise ValueError(f"balance={given.balance!r} is not one of {', '.join(BALANCES)}")
        if given.reduction not in (None, *REDUCTIONS):
            raise ValueError(f"reduction={given.reduction!r} is not one of {', '.join(REDUCTIONS)}")

    def score(self, row: Row, response: str) -> Mapping[str, Any]:
        """Score a response as the reward does."""
        return compute_score(row["data_source"], response, row["reward_model"]["ground_truth"], row.get("extra_info"))

    def judge(self, row: Row, response: str) -> str:
        """Return the :class:`~hpo_plugin.tasks.telelogs.reward.TeleLogsVerdict` of a response."""
        return judge(response, row["reward_model"]["ground_truth"], row.get("extra_info")).value

    def demonstrate(self, row: Row, rng: random.Random) -> Demonstration:
        r"""Return the oracle's chain of thought, and a random label of the case in a box.

        Args:
            row: A row of ``sft_train.parquet`` in the terse wording, with ``messages``.
            rng: Source of the label.
        """
        prompt, reasoned = (turn["content"] for turn in row["messages"])
        # The first line of the terse wording holds the labels.
        labels = prompt.partition("\n")[0].split(" ")
        return Demonstration(prompt, reasoned, rf"\boxed{{{rng.choice(labels)}}}")

    def key(self, row: Row) -> Any:
        """Return the prompt, which holds the whole case."""
        return row["messages"][0]["content"] if "messages" in row else prompt_text(row)

    def explain(self, row: Row) -> Explanation:
        """Diagnose the case with the rules behind the labels.

        Raises:
            ValueError: The prompt cannot be parsed.
        """
        case = parse_prompt(prompt_text(row))
        diagnosis = diagnose(case)
        table = _table(case, diagnosis)
        if diagnosis.label is None or diagnosis.cause is None:
            return Explanation(None, "No rule holds for any of the options.", table=table)
        return Explanation(
            diagnosis.label,
            f"{diagnosis.label}: {diagnosis.cause.text}",
            text=chain_of_thought(case, diagnosis),
            evidence=_evidence(case, diagnosis),
            table=table,
        )

    def read_row(self, columns: Mapping[str, Any]) -> Row:
        """Accept a row in verl's format, or the columns ``question`` and ``answer`` of the data set."""
        prompt, truth = columns.get("prompt"), columns.get("reward_model")
        if not isinstance(prompt, list):
            if columns.get("question") is None:
                raise ValueError(
                    f"the column 'question' or 'prompt' is missing; found: {', '.join(columns) or 'no columns'}"
                )
            prompt, truth = [{"role": "user", "content": str(columns["question"])}], None
        check_prompt(prompt)
        if not isinstance(truth, Mapping):
            answer = columns.get("answer")
            truth = {"ground_truth": None if answer is None else str(answer).strip()}
        return {**columns, "prompt": prompt, "reward_model": truth}

    def group(self, ground_truth: Any) -> str | None:
        """Return the label."""
        return str(ground_truth)

    def metrics(self, prompts: Sequence[tuple[Any, Sequence[Mapping[str, Any]]]]) -> Mapping[str, float]:
        """Compute the papers' metrics from the answers alone (:func:`~hpo_plugin.tasks.telelogs.reward.summarize`).

        Raises:
            ValueError: A sample has no ``pred``, or the prompts have different numbers of samples.
        """
        if any("pred" not in sample for _, samples in prompts for sample in samples):
            raise ValueError("a sample has no 'pred'; the metrics of TeleLogs need the answer that its reward returns")
        answers = [[str(sample["pred"]) for sample in samples] for _, samples in prompts]
        return summarize(answers, [str(label) for label, _ in prompts])


def _table(case: Case, diagnosis: Diagnosis) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "rule", "finding", "rows"):
        table.add_column(column, overflow="fold")
    for check in diagnosis.results:
        label = case.label_of(check.cause)
        decided = check is diagnosis.evidence
        rows = ", ".join(str(number + 1) for number in check.rows) if check.holds else ""
        table.add_row(
            label or "not on offer",
            check.rule,
            check.sentence(),
            rows,
            style="bold" if decided else None if label else "dim",
        )
    return table


def _evidence(case: Case, diagnosis: Diagnosis) -> list[str]:
    """The rows and cells that decided, as the prompt has them."""
    evidence = diagnosis.evidence
    if evidence is None or not (evidence.rows or evidence.cells):
        return []
    shown = replace(
        case,
        drive_test=tuple(case.drive_test[number] for number in evidence.rows),
        cells=tuple(case.cells[index] for index in evidence.cells),
    )
    drive_test, cells = table_lines(shown)
    lines = [f"row {number + 1}: {line}" for number, line in zip(evidence.rows, drive_test[1:], strict=True)]
    return lines + [f"cell {cell.name}: {line}" for cell, line in zip(shown.cells, cells[1:], strict=True)]


#: The task.
TASK = TeleLogs()
