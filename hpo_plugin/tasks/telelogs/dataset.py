"""TeleLogs data files for verl: the gated data set with the user's own access, local files, or synthetic cases.

The data set's card forbids sharing its rows, so this package ships none. What is written from it stays with the user.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from hpo_plugin.console import Progress
from hpo_plugin.files import check_output
from hpo_plugin.tasks.sources import (
    FILE_SUFFIXES,
    SourceUnavailableError,
    describe_file,
    read_file,
    read_hub,
)
from hpo_plugin.tasks.task import DataSet, write_data_set
from hpo_plugin.tasks.telelogs.leakage import compare_splits, scenario_key
from hpo_plugin.tasks.telelogs.prompts import LABEL_PATTERN, parse_prompt, render_prompt
from hpo_plugin.tasks.telelogs.reasoning import chain_of_thought
from hpo_plugin.tasks.telelogs.reward import DATA_SOURCE, read_answer
from hpo_plugin.tasks.telelogs.rules import diagnose
from hpo_plugin.tasks.telelogs.synthetic import SPLITS, SyntheticRows, generate
from hpo_plugin.tasks.telelogs.tables import Case, Cause
from hpo_plugin.tasks.telelogs.variants import REDUCTIONS, relabel

#: The gated data set on the Hugging Face hub, and its configuration.
PUBLIC_DATASET: Final = "netop/TeleLogs"
PUBLIC_CONFIG: Final = "troubleshooting"
#: ``data_source`` of ``test_relabeled.parquet``.
RELABELED_DATA_SOURCE: Final = f"{DATA_SOURCE}_relabeled"
#: Sizes of the published splits, and of a synthetic data set when none are given.
PUBLISHED_SIZES: Final = {"train": 2_400, "test": 864}
#: Share of the base scenarios that become the test split of a file without splits.
TEST_SHARE: Final = 0.2

#: What verl reads for RL: ``prompt`` (RLHFDataset), ``data_source``, ``reward_model.ground_truth`` and ``extra_info``.
SCHEMA: Final = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("split", pa.string()),
                    ("index", pa.int64()),
                    ("id", pa.string()),
                    ("cause", pa.string()),
                    ("scenario", pa.string()),
                ]
            ),
        ),
    ]
)
#: What verl reads for SFT: ``messages`` (MultiTurnSFTDataset).
SFT_SCHEMA: Final = pa.schema(
    [("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))), ("cause", pa.string())]
)

_SPLIT_NAMES: Final = {"train": "train", "training": "train", "test": "test", "validation": "test", "val": "test"}
_EXAMPLES = 5
#: In what the hub's libraries raise. The data set exists, so one that "doesn't exist or cannot be accessed" is refused;
#: numbers stand alone, for addresses and request numbers in hexadecimal digits hold any.
_REFUSAL: Final = re.compile(
    r"\bgated|\b40[13]\b|\bunauthorized|\bnot (?:in the )?authorized|access to .* is restricted|cannot be accessed",
    re.IGNORECASE,
)


class NoAccessError(SourceUnavailableError):
    """The gated data set exists, but this user has no access to it."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a source, read.

    Attributes:
        case: The case.
        label: The answer, one of the case's labels.
        scenario: :func:`~hpo_plugin.tasks.telelogs.leakage.scenario_key` of the unreduced case.
        identity: The source's own ``ID``; None if it has none.
    """

    case: Case
    label: str
    scenario: str
    identity: str | None = None


def to_row(row: Question, split: str, index: int, data_source: str = DATA_SOURCE) -> dict[str, Any]:
    """Return a question as one row of verl's data format.

    Args:
        row: The question.
        split: ``train`` or ``test``.
        index: Its position in the split.
        data_source: verl keeps the metrics of each apart.
    """
    cause = row.case.cause_of(row.label)
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": render_prompt(row.case)}],
        "ability": "telecom",
        "reward_model": {"style": "rule", "ground_truth": row.label},
        "extra_info": {
            "split": split,
            "index": index,
            "id": row.identity,
            "cause": None if cause is None else cause.value,
            "scenario": row.scenario,
        },
    }


def to_demonstration(row: Question) -> dict[str, Any] | None:
    """Return a question with the oracle's chain of thought as one row of verl's SFT format.

    Args:
        row: The question.

    Returns:
        The row, or None where the oracle does not agree with the label and so cannot explain it.
    """
    diagnosis = diagnose(row.case)
    if diagnosis.label != row.label or diagnosis.cause is None:
        return None
    messages = [
        {"role": "user", "content": render_prompt(row.case)},
        {"role": "assistant", "content": chain_of_thought(row.case, diagnosis)},
    ]
    return {"messages": messages, "cause": diagnosis.cause.value}


def prepare_telelogs(
    output: str | Path,
    *,
    source: str = "synthetic",
    test_source: str | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    balance: str | None = None,
    reduction: str | None = None,
    seed: int = 0,
    relabeled: bool = False,
    sft: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> DataSet:
    """Write ``train.parquet``, ``test.parquet`` and ``manifest.json``; keep identical existing data.

    Args:
        output: The directory; created if needed.
        source: ``synthetic``; ``hub``, the gated data set with the user's own token; or the path of a parquet, JSON
            (lines, array, columns or splits) or CSV file with the columns ``question`` and ``answer``, in any case,
            and perhaps ``ID`` and ``split``.
        test_source: A file with the test split, where ``source`` is a file with the training split.
        train_size: Rows of a synthetic training split; default 2,400.
        test_size: Rows of a synthetic test split; default 864.
        balance: Classes of the synthetic training split: ``train`` (default, the published shares) or ``uniform``. The
            test split is uniform.
        reduction: Of synthetic cases: ``full`` (default) or ``laptop``.
        seed: Of synthetic cases, of relabeling, and of splitting a file that has no splits.
        relabeled: Also write ``test_relabeled.parquet``: the test split under random labels, options and table order.
        sft: Also write ``sft_train.parquet`` and ``sft_test.parquet``: the oracle's chains of thought, for rows whose
            label it agrees with.
        force: Replace other data in the directory.
        progress: Receives a stage's name, the work done and the total.

    Returns:
        Paths, manifest (with ``leakage``, what the splits share), and what was written.

    Raises:
        ValueError: If an argument is invalid or has no effect with this source, or no row of a split is usable.
        FileExistsError: If the directory holds other data and ``force`` is not set.
        NoAccessError: If the hub refuses the data set to this user.
        SourceUnavailableError: If the source cannot be reached or read.
        OSError: If the directory cannot be written.
    """
    directory = Path(output)
    parameters: dict[str, Any] = {"seed": seed, "relabeled": relabeled, "sft": sft}
    counts: dict[str, Any]
    if source == "synthetic":
        if test_source is not None:
            raise ValueError(f"test_source={test_source!r} has no effect with source='synthetic'; remove it")
        sizes = {
            split: PUBLISHED_SIZES[split] if size is None else size
            for split, size in zip(SPLITS, (train_size, test_size), strict=True)
        }
        balance, reduction = "train" if balance is None else balance, "full" if reduction is None else reduction
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}")
        parameters |= {"source": source, "sizes": sizes, "balance": balance, "reduction": reduction}
        check_output(directory, parameters, force=force)
        splits, counts = _generate(sizes, balance, reduction, seed, progress)
        refused: list[dict[str, Any]] = []
    else:
        for name, value in (
            ("train_size", train_size),
            ("test_size", test_size),
            ("balance", balance),
            ("reduction", reduction),
        ):
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} applies only to synthetic cases and has no effect with source={source!r}; "
                    "remove it"
                )
        parameters |= _describe_source(source, test_source)
        check_output(directory, parameters, force=force)
        splits, counts, refused = _convert(source, test_source, seed, progress)
    leakage = compare_splits([row.scenario for row in splits["train"]], [row.scenario for row in splits["test"]])
    tables = {split: _rl_table(rows, split) for split, rows in splits.items()}
    if relabeled:
        tables["test_relabeled"] = _rl_table(_relabeled(splits["test"], seed), "test", RELABELED_DATA_SOURCE)
    if sft:
        for split, rows in splits.items():
            demonstrations = [made for row in rows if (made := to_demonstration(row)) is not None]
            tables[f"sft_{split}"] = pa.Table.from_pylist(demonstrations, schema=SFT_SCHEMA)
            counts[f"sft_{split}_without_demonstration"] = len(rows) - len(demonstrations)
    further_files = {}
    if refused:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in refused)
        further_files["refused.jsonl"] = lines.encode()
    manifest = {
        "task": "telelogs",
        "parameters": parameters,
        "counts": {**counts, "rows": {name: len(table) for name, table in tables.items()}},
        "oracle": {split: _agreement(rows) for split, rows in splits.items()},
        "leakage": asdict(leakage),
        "versions": {"numpy": np.__version__},
    }
    return write_data_set(directory, tables, manifest, further_files=further_files, force=force, progress=progress)


def _rl_table(rows: Sequence[Question], split: str, data_source: str = DATA_SOURCE) -> pa.Table:
    made = [to_row(row, split, index, data_source) for index, row in enumerate(rows)]
    return pa.Table.from_pylist(made, schema=SCHEMA)


def _relabeled(rows: Sequence[Question], seed: int) -> list[Question]:
    changed = []
    for number, row in enumerate(rows):
        cause = row.case.cause_of(row.label)
        assert cause is not None
        case = relabel(row.case, cause, random.Random(f"{seed}/relabel/{number}"))
        label = case.label_of(cause)
        assert label is not None
        changed.append(Question(case, label, row.scenario, row.identity))
    return changed


def _agreement(rows: Iterable[Question]) -> dict[str, dict[str, int]]:
    """Root cause of the label -> root cause the oracle finds -> rows."""
    found: dict[str, Counter[str]] = {cause.value: Counter() for cause in Cause}
    for row in rows:
        cause, diagnosed = row.case.cause_of(row.label), diagnose(row.case).cause
        assert cause is not None
        found[cause.value]["none" if diagnosed is None else diagnosed.value] += 1
    return {cause: dict(sorted(counter.items())) for cause, counter in found.items() if counter}


# --- synthetic -----------------------------------------------------------------------------------------------------


def _generate(
    sizes: Mapping[str, int], balance: str, reduction: str, seed: int, progress: Progress | None
) -> tuple[dict[str, list[Question]], dict[str, Any]]:
    splits: dict[str, list[Question]] = {}
    counts: dict[str, Any] = {}
    for split in SPLITS:
        made = generate(
            sizes[split],
            split=split,
            balance=balance if split == "train" else "uniform",
            seed=seed,
            reduction=REDUCTIONS[reduction],
            progress=None if progress is None else _row_progress(progress, f"generating {split} rows"),
        )
        splits[split] = [Question(row.case, row.label, row.scenario) for row in made.rows]
        counts |= {f"{split}_{name}": value for name, value in _draws(made).items()}
    return splits, counts


def _row_progress(progress: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(stage, done, total)


def _draws(made: SyntheticRows) -> dict[str, Any]:
    return {
        "scenarios": made.scenarios,
        "scenario_candidates_drawn": made.candidates_drawn,
        "scenarios_given_up": made.scenarios_given_up,
        "rows_redrawn": {
            f"{cause.value} found as {'none' if found is None else found.value}": count
            for (cause, found), count in sorted(made.redrawn.items(), key=str)
        },
    }


# --- real data -----------------------------------------------------------------------------------------------------


def _describe_source(source: str, test_source: str | None) -> dict[str, Any]:
    if source == "hub":
        if test_source is not None:
            raise ValueError(
                f"test_source={test_source!r} has no effect with source='hub', which has a test split; remove it"
            )
        return {"source": PUBLIC_DATASET, "config": PUBLIC_CONFIG}
    described: dict[str, Any] = {}
    for name, given in (("", source), ("test_", test_source)):
        if given is None:
            continue
        if not Path(given).is_file():
            raise SourceUnavailableError(
                f"{name}source={given!r} is neither synthetic, hub, nor an existing file ({', '.join(FILE_SUFFIXES)})"
            )
        described |= {f"{name}{key}": value for key, value in describe_file(Path(given)).items()}
    return described


def _read_hub_split(split: str) -> list[Any]:
    try:
        return read_hub(
            PUBLIC_DATASET,
            config=PUBLIC_CONFIG,
            split=split,
            advice=(
                "The data set is gated: request access on its page on the Hub, then log in with the account that has "
                "access (`hf auth login`, or set HF_TOKEN). Also check the network"
            ),
        )
    except SourceUnavailableError as error:
        if _is_refusal(error.__cause__):
            raise NoAccessError(
                f"no access to the gated data set {PUBLIC_DATASET} ({type(error.__cause__).__name__}). Request access "
                "on its page on the Hub; approval is manual. Then log in with that account (`hf auth login`, or set "
                "HF_TOKEN) and run the command again. Without access, use --source synthetic."
            ) from error
        raise


def _is_refusal(error: BaseException | None) -> bool:
    """Say whether what the hub's libraries raised means that the hub answered, and that the answer was no."""
    told = []
    while error is not None:
        told.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    # A proxy that answers 403 is a matter of the network.
    return any(_REFUSAL.search(text) for text in told) and not any("proxy" in text.lower() for text in told)


def _read_source(source: str, test_source: str | None) -> list[tuple[str | None, Any]]:
    """Return (split or None, raw row) in the order of the source."""
    if source == "hub":
        return [(split, row) for split in SPLITS for row in _read_hub_split(split)]
    if test_source is not None:
        pairs = zip(SPLITS, (source, test_source), strict=True)
        return [(split, row) for split, path in pairs for row in read_file(Path(path))]
    return [(_named_split(row), row) for row in read_file(Path(source))]


def _named_split(row: Any) -> str | None:
    """The split that a row names, in lower case; None if it names none."""
    named = _columns(row).get("split") if isinstance(row, Mapping) else None
    return None if named is None else str(named).strip().lower()


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row by the lower-case names of its columns."""
    return {str(name).strip().lower(): value for name, value in row.items()}


def read_row(row: Any) -> Question:
    """Read one row of a source.

    Args:
        row: A mapping with ``question`` and ``answer``, in any case, and perhaps ``ID``.

    Returns:
        The row.

    Raises:
        ValueError: If it cannot be used; the message states the reason.
    """
    if not isinstance(row, Mapping):
        raise ValueError("not a row with columns")
    columns = _columns(row)
    for name in ("question", "answer"):
        if name not in columns:
            raise ValueError(f"the column {name!r} is missing; found: {', '.join(map(str, row)) or 'no columns'}")
        if columns[name] is None:
            raise ValueError(f"the column {name!r} is empty")
    question, answer = str(columns["question"]), str(columns["answer"]).strip()
    case = parse_prompt(question)
    if render_prompt(case) != question:
        raise ValueError("the prompt parses but does not render back to the same text")
    label = answer if re.fullmatch(LABEL_PATTERN, answer) else read_answer(answer)
    labels = [option.label for option in case.options]
    if label is not None and label.isdigit() and label not in labels:
        # A bare number means the label that ends in it, if there is one such label.
        meant = [known for known in labels if known[1:] == label]
        label = meant[0] if len(meant) == 1 else label
    if label not in labels:
        raise ValueError(f"the answer is not one of the options {', '.join(labels)}: {answer[:40]!r}")
    identity = columns.get("id")
    return Question(case, label, scenario_key(case), None if identity is None else str(identity))


def _convert(
    source: str, test_source: str | None, seed: int, progress: Progress | None
) -> tuple[dict[str, list[Question]], dict[str, Any], list[dict[str, Any]]]:
    if progress is not None:
        progress("reading the source", 0, 1)
    raw = _read_source(source, test_source)
    if progress is not None:
        progress("reading the source", 1, 1)
    read: list[tuple[str | None, Question]] = []
    refused: list[dict[str, Any]] = []
    for position, (split, entry) in enumerate(raw):
        try:
            if split is not None and split not in _SPLIT_NAMES:
                raise ValueError(f"the split is not one of {', '.join(_SPLIT_NAMES)}: {split!r}")
            stated = None if test_source is None else _named_split(entry)
            if stated is not None and _SPLIT_NAMES.get(stated) != split:
                raise ValueError(f"the row names a different split than its file: {stated!r}")
            read.append((None if split is None else _SPLIT_NAMES[split], read_row(entry)))
        except ValueError as error:
            refused.append({"row": position, "split": split, "reason": str(error)[:500]})
        if progress is not None and ((position + 1) % 100 == 0 or position + 1 == len(raw)):
            progress("parsing prompts", position + 1, len(raw))
    named = [split is not None for split, _ in read]
    if any(named) and not all(named):
        raise ValueError(
            f"source={source!r}: {named.count(False)} rows have no split name, but the others do; name the split in "
            "all rows or in none"
        )
    splits = _split_by_scenario([row for _, row in read], seed) if not any(named) else _split_as_named(read)
    reasons = Counter(_kind(entry["reason"]) for entry in refused)
    for split, rows in splits.items():
        if not rows:
            first = f"; first refused row: {refused[0]['reason']}" if refused else ""
            raise ValueError(
                f"source={source!r}: the {split} split has no usable row ({len(raw)} rows, {len(refused)} "
                f"refused{first})"
            )
    counts = {
        "rows_in_source": len(raw),
        "rows_refused": len(refused),
        "refused_for": dict(reasons.most_common()),
        "refused_examples": [f"row {entry['row']}: {entry['reason']}"[:300] for entry in refused[:_EXAMPLES]],
        "splits": "as published" if any(named) else f"by base scenario, {TEST_SHARE:.0%} of them for testing",
    }
    return splits, counts, refused


def _kind(reason: str) -> str:
    """A reason without its line number and quotations, to count by."""
    return re.sub(r": ['\"].*", "", re.sub(r"^line \d+: ", "", reason))[:100]


def _split_as_named(rows: Sequence[tuple[str | None, Question]]) -> dict[str, list[Question]]:
    return {split: [row for named, row in rows if named == split] for split in SPLITS}


def _split_by_scenario(rows: Sequence[Question], seed: int) -> dict[str, list[Question]]:
    scenarios = list(dict.fromkeys(row.scenario for row in rows))
    random.Random(f"{seed}/split").shuffle(scenarios)
    tested = set(scenarios[: max(1, round(TEST_SHARE * len(scenarios)))])
    return {
        "train": [row for row in rows if row.scenario not in tested],
        "test": [row for row in rows if row.scenario in tested],
    }
