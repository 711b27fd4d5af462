"""Reads the files of a run of verl: the rows of its file logger, and the cause of a failure in its output."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Metrics of one step, by their names in verl.
Metrics = Mapping[str, float]
#: Step -> metrics. Step 0 is the evaluation before training.
Rows = dict[int, Metrics]


class LogError(ValueError):
    """A metrics file does not have the format of verl's file logger."""


class MetricsFile:
    """Follows a file of ``verl.utils.tracking.FileLogger`` while it grows: one JSON object per line."""

    def __init__(self, path: Path) -> None:
        """Start at the beginning of the file.

        Args:
            path: The file; it need not exist yet.
        """
        self.path = path
        self._offset = 0
        self._line = 0

    def new_rows(self) -> list[tuple[int, Metrics]]:
        """Return the complete rows since the last call. A later call returns an incomplete last line.

        Raises:
            LogError: A complete line does not have the format of verl's file logger.
        """
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        complete, _, _ = text.rpartition(b"\n")
        if not complete:
            return []
        self._offset += len(complete) + 1
        rows: list[tuple[int, Metrics]] = []
        for line in complete.split(b"\n"):
            self._line += 1
            try:
                row = json.loads(line)
                rows.append((int(row["step"]), _numbers(row["data"])))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise LogError(f"{self.path}, line {self._line} is not a row of verl's file logger: {error}") from error
        return rows


def _numbers(data: Mapping[str, object]) -> dict[str, float]:
    return {key: float(value) for key, value in data.items() if isinstance(value, int | float)}


def read_rows(path: Path) -> Rows:
    """Return all complete rows of a metrics file; empty if the file does not exist.

    Raises:
        LogError: See :meth:`MetricsFile.new_rows`; or the file has a step twice.
    """
    rows: Rows = {}
    for step, metrics in MetricsFile(path).new_rows():
        if step in rows:
            raise LogError(f"{path}: step {step} is logged twice")
        rows[step] = metrics
    return rows


def merge_attempts(attempts: Iterable[tuple[int | None, Rows]]) -> Rows:
    """Merge the rows of the attempts of a run, with each step once.

    Args:
        attempts: In order: the step of the checkpoint that an attempt resumed from (None for the start), and its rows.
            Rows of earlier attempts after that checkpoint are dropped, because the attempt repeats these steps.

    Returns:
        Step -> metrics, by ascending step.
    """
    merged: Rows = {}
    for resumed_from, rows in attempts:
        kept = -1 if resumed_from is None else resumed_from
        merged = {step: metrics for step, metrics in merged.items() if step <= kept} | rows
    return dict(sorted(merged.items()))


def held_out_success(metrics: Metrics) -> float | None:
    """The share of held-out problems solved; None if the step was not evaluated.

    verl's metric is ``val-core/<data source>/<acc or reward>/mean@<samples>`` (``PPOTrainer._val_metrics_update``).
    """
    found = [value for key, value in metrics.items() if re.fullmatch(r"val-core/.+/(?:acc|reward)/mean@\d+", key)]
    return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class StepView:
    """The main metrics of one step.

    Attributes:
        step: Number of the step, from 1.
        reward: Mean reward of the step's samples, before the update.
        alpha: α, the weight of responses with negative advantage.
        share_positive: p̂⁺, share of responses with positive advantage.
        share_negative: p̂⁻, share of responses with negative advantage.
        length: Mean response length in tokens.
        seconds: Wall time of the step without the evaluation.
        held_out: Share of held-out problems solved after the step; None if the step was not evaluated.
    """

    step: int
    reward: float
    alpha: float
    share_positive: float
    share_negative: float
    length: float
    seconds: float
    held_out: float | None

    @classmethod
    def of(cls, step: int, metrics: Metrics) -> StepView:
        """Read the metrics of verl; a missing metric is NaN."""

        def value(name: str) -> float:
            return metrics.get(name, math.nan)

        return cls(
            step=step,
            reward=value("critic/rewards/mean"),
            alpha=value("actor/hpo/alpha"),
            share_positive=value("actor/hpo/share_positive"),
            share_negative=value("actor/hpo/share_negative"),
            length=value("response_length/mean"),
            seconds=value("timing_s/step"),
            held_out=held_out_success(metrics),
        )

    def line(self, last_step: int) -> str:
        """The step as one line, with a dash for unknown values."""
        width = len(str(last_step))

        def shown(value: float, form: str) -> str:
            return format(value, form) if not math.isnan(value) else "-".rjust(len(format(0.0, form)))

        return (
            f"step {self.step:>{width}}/{last_step}  reward {shown(self.reward, '.3f')}  α {shown(self.alpha, '.2f')}  "
            f"p̂⁺ {shown(self.share_positive, '.2f')}  p̂⁻ {shown(self.share_negative, '.2f')}  "
            f"length {shown(self.length, '4.1f')}  {shown(self.seconds, '4.1f')} s"
        )


def step_views(rows: Rows) -> list[StepView]:
    """The training steps of a run, in order."""
    return [StepView.of(step, metrics) for step, metrics in sorted(rows.items()) if step > 0]


def evaluations(rows: Rows) -> list[tuple[int, float]]:
    """``(step, share of held-out problems solved)`` of each evaluated step, in order."""
    found = ((step, held_out_success(metrics)) for step, metrics in sorted(rows.items()))
    return [(step, success) for step, success in found if success is not None]


# --- why it failed -------------------------------------------------------------------------------------------------

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_RAY_PREFIX = re.compile(r"^\((?:[\w.:]+ )?pid=\d+(?:, ip=[\d.]+)?\) ?")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_][\w]*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Failure|Timeout)\b.*")
_TASK_ERROR = re.compile(r"^(?:ray\.exceptions\.)?RayTaskError")
_WRAPPED = re.compile(rf"{_TASK_ERROR.pattern}|^ray\.exceptions\.\w+: .*actor died")
_ACTOR = re.compile(r"\(([A-Za-z_]\w*) pid=(\d+)")
#: The report of a raylet, which Ray prints in the driver.
_DIED = re.compile(r"A worker died or was killed .*?Worker PID: (\d+) Worker exit type: (\w+)")
#: The last line of a process that Ray ends without an exception, because Ray's control service (GCS) has died.
_NO_GCS = re.compile(r"Failed to connect to GCS within .*? GCS may have been killed")
#: verl's agent loop logs an exception with this text and continues. The exception that stops the run comes later and
#: does not name it.
_AGENT_LOOP = "Error in _run_prompt"


def plain_lines(text: str) -> list[str]:
    """Lines without colors and Ray's ``(Actor pid=1)`` prefixes. Each update of a progress bar is a line."""
    return [_RAY_PREFIX.sub("", _ANSI.sub("", line)).rstrip() for line in re.split(r"[\r\n]+", text)]


def failure_cause(lines: Sequence[str]) -> str | None:
    """The exception that stopped a run, from its output.

    Args:
        lines: The result of :func:`plain_lines`.

    Returns:
        The line of an exception: the first one of the agent loop if there is one, else the last one that is not
        only passed on by Ray. Without an exception, Ray's message that its control service has died, or None.
    """
    for position, line in enumerate(lines):
        if _AGENT_LOOP in line:
            found = [text for text in lines[position + 1 : position + 200] if _EXCEPTION.match(text)]
            own = [text for text in found if not _TASK_ERROR.match(text)]
            return f"in the agent loop: {[*own, *found, line[line.index(_AGENT_LOOP) :]][0]}"
    found = [line for line in lines if _EXCEPTION.match(line)]
    own = [line for line in found if not _WRAPPED.match(line)]
    if own or found:
        return (own or found)[-1]
    lost = [match[0] for match in map(_NO_GCS.search, lines) if match]
    return lost[-1] if lost else None


def died_workers(text: str) -> list[str]:
    """The worker processes that died according to Ray, from the output of a run.

    If verl waits for such a process, its own exception does not name it, or there is none.

    Args:
        text: The output, with Ray's ``(Actor pid=1)`` prefixes.

    Returns:
        ``"<actor> (pid <number>, <Ray's exit type>)"`` for each process; without the actor if it has printed nothing.
    """
    names = {pid: name for name, pid in _ACTOR.findall(text)}
    found = dict(_DIED.findall(text))
    return [f"{names.get(pid, 'a worker')} (pid {pid}, {exit_type})" for pid, exit_type in found.items()]
