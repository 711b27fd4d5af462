"""Running the cells of a study, one after another or several at a time, in one process that follows their trainers."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hpo_plugin.console import listed
from hpo_plugin.runs.directory import Attempt, Run, RunBusyError
from hpo_plugin.runs.process import end_leftovers
from hpo_plugin.runs.training import Training, TrainingError, outcome, train_in_turns, write_metrics
from hpo_plugin.runs.verl_log import MetricsFile, StepView, held_out_success
from hpo_plugin.study.cells import CellStatus, State, Workspace, status, submitted_file
from hpo_plugin.study.inputs import full_overrides
from hpo_plugin.study.simulated import simulate_cell, simulators
from hpo_plugin.study.spec import SIMULATOR, Cell, Study, StudyError

#: Seconds between two looks at all running cells.
INTERVAL = 0.5
#: Maximum number of seeds that have a column each in :func:`state_table`.
SEED_COLUMNS = 16

_STYLES = {
    State.WAITING: "dim",
    State.SUBMITTED: "cyan",
    State.INTERRUPTED: "yellow",
    State.RUNNING: "bold cyan",
    State.FAILED: "bold red",
    State.FINISHED: "green",
    State.COLLECTED: "green",
}


def look(workspace: Workspace, cells: Sequence[Cell], collected: Collection[str]) -> list[CellStatus]:
    """The state of every cell."""
    return [status(workspace, cell, collected) for cell in cells]


# --- running -------------------------------------------------------------------------------------------------------


class CellScreen:
    """Progress of a running cell, for the table, or as lines without a terminal."""

    def __init__(self, cell: Cell, begin: int, tell: Callable[[str], None]) -> None:
        """Begin an attempt.

        Args:
            cell: The cell.
            begin: Steps that are done already.
            tell: Takes a line.
        """
        self.cell = cell
        self.view: StepView | None = None
        self._tell = tell
        self._begin, self._step = begin, begin
        self._first_at: float | None = None

    @property
    def step(self) -> int:
        """Steps done."""
        return self._step

    def __enter__(self) -> CellScreen:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave what was shown."""

    def show(self, metrics: MetricsFile) -> bool:
        """Take what is new; say whether anything is."""
        rows = metrics.new_rows()
        for step, values in rows:
            self._step, held_out = step, held_out_success(values)
            if step:
                self.view = StepView.of(step, values)
                if self._first_at is None:
                    self._begin, self._first_at = step, time.monotonic()
            if held_out is not None:
                line = self.view.line(self.cell.steps) if self.view else f"step 0/{self.cell.steps}"
                self._tell(f"{self.cell.name}: {line}; held-out success {100 * held_out:.1f} %")
        return bool(rows)

    def seconds_left(self) -> float | None:
        """Until its last step; None as long as there is nothing to judge by."""
        if self._first_at is None or self._step <= self._begin:
            return None
        pace = (time.monotonic() - self._first_at) / (self._step - self._begin)
        return pace * (self.cell.steps - self._step)


class StudyRun:
    """Runs cells, and shows their progress."""

    def __init__(
        self, workspace: Workspace, cells: Sequence[Cell], collected: Collection[str], *, stall: float, console: Console
    ) -> None:
        """Read the status of all cells; this starts nothing.

        Args:
            workspace: Where the runs are.
            cells: All that are asked for.
            collected: Keys of the cells whose data are collected.
            stall: Seconds without progress after which a trainer is given up.
            console: Where to show it.
        """
        self._workspace, self._console, self._stall = workspace, console, stall
        self._statuses = {entry.cell: entry for entry in look(workspace, cells, collected)}
        self._collected = collected
        self._screens: dict[Cell, CellScreen] = {}
        self._seconds: list[float] = []
        self.failed: list[CellStatus] = []

    @property
    def unfinished(self) -> list[Cell]:
        """The cells to run, in order, without those that another process runs."""
        return [
            cell for cell, entry in self._statuses.items() if not entry.state.done and entry.state is not State.RUNNING
        ]

    def run(self, jobs: int) -> None:
        """Run the unfinished cells. A cell that fails does not stop the others; see :attr:`failed`.

        Args:
            jobs: Cells at a time.
        """
        waiting = deque(self.unfinished)
        active: dict[Cell, Generator[None, None, None]] = {}
        with self._shown() as show, simulators(jobs) as pool, contextlib.ExitStack() as stack:
            while waiting or active:
                while waiting and len(active) < jobs:
                    cell = waiting.popleft()
                    active[cell] = self._turns(cell, pool)
                    # Ends its trainer when this call is interrupted.
                    stack.callback(active[cell].close)
                for cell, turns in list(active.items()):
                    if self._ended(cell, turns):
                        del active[cell]
                        self._screens.pop(cell, None)
                        self._statuses[cell] = status(self._workspace, cell, self._collected)
                        if self._statuses[cell].state is State.FAILED:
                            self.failed.append(self._statuses[cell])
                show(jobs)
                time.sleep(INTERVAL)

    def _ended(self, cell: Cell, turns: Generator[None, None, None]) -> bool:
        """Give a cell its turn; say whether it was the last."""
        try:
            next(turns)
            return False
        except StopIteration:
            pass
        except RunBusyError:
            self._tell(f"{cell.name}: skipped, because another process is running it")
        except (RuntimeError, OSError, ValueError) as error:
            run = self._workspace.run(cell)
            run.directory.mkdir(parents=True, exist_ok=True)
            known = isinstance(error, TrainingError | StudyError)
            run.fail(str(error) if known else f"{type(error).__name__}: {error}")
            self._tell(f"{cell.name}: failed: {_cause(str(error))}")
        return True

    def _screen(self, cell: Cell, attempt: Attempt) -> CellScreen:
        self._screens[cell] = CellScreen(cell, attempt.resumed_from or 0, self._tell)
        return self._screens[cell]

    def _trained(self, cell: Cell, run: Run, overrides: list[str]) -> Generator[None, None, None]:
        """Train a cell with verl's trainer."""
        training = Training(
            config_name=cell.config_name,
            overrides=tuple(overrides),
            steps=cell.steps,
            environment=cell.environment,
            save_every=self._workspace.study.save_every,
        )
        tell = lambda text: self._tell(f"{cell.name}: {text}")  # noqa: E731
        yield from train_in_turns(
            run, training, stall=self._stall, screen=lambda attempt: self._screen(cell, attempt), tell=tell
        )

    def _simulated(
        self, cell: Cell, run: Run, overrides: list[str], pool: ProcessPoolExecutor
    ) -> Generator[None, None, None]:
        """Train a cell with the simulator, from its start: it takes seconds, and there are no checkpoints."""
        attempt = run.new_attempt(None)
        metrics = MetricsFile(attempt.metrics)
        work = pool.submit(simulate_cell, cell.config_name, overrides, cell.environment, attempt.metrics)
        with self._screen(cell, attempt) as screen:
            while not work.done():
                screen.show(metrics)
                yield
            try:
                work.result()
            except BrokenProcessPool as error:
                raise TrainingError("the simulator's process was killed, often because it ran out of memory") from error
            screen.show(metrics)

    def _turns(self, cell: Cell, pool: ProcessPoolExecutor) -> Generator[None, None, None]:
        begin = time.monotonic()
        run, _ = self._workspace.start(cell)
        overrides = full_overrides(self._workspace, cell)
        with run.locked():
            left = end_leftovers(run.processes)
            if left:
                self._tell(f"{cell.name}: stopped {left} processes that an earlier command left running")
            # It may have been finished since this call looked.
            if not run.finished:
                done = (run.resume_step() or 0) / cell.steps
                if cell.trainer == SIMULATOR:
                    yield from self._simulated(cell, run, overrides, pool)
                else:
                    yield from self._trained(cell, run, overrides)
                write_metrics(run, cell.steps)
                run.finish(outcome(run, cell.steps))
                if done < 1:
                    self._seconds.append((time.monotonic() - begin) / (1 - done) / cell.steps)
                self._tell(f"{cell.name}: finished")

    # --- showing it ---

    @contextlib.contextmanager
    def _shown(self) -> Iterator[Callable[[int], None]]:
        """Yield what shows the present state: the table on a terminal, and nothing elsewhere, where lines are told."""
        if not self._console.is_terminal:
            yield lambda jobs: None
            return
        # Drawn by this thread: starting processes and threads do not go together.
        with Live(console=self._console, auto_refresh=False) as live:
            yield lambda jobs: live.update(self._picture(jobs), refresh=True)

    def _tell(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _picture(self, jobs: int) -> Group:
        running = {cell: f"{screen.step}/{cell.steps}" for cell, screen in self._screens.items()}
        return Group(
            state_table(self._workspace.study, list(self._statuses.values()), running),
            self._running_table(),
            Text(self._summary(jobs)),
        )

    def _running_table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for title in ("running", "step", "reward", "α", "length", "s/step", "left"):
            table.add_column(title, justify="left" if title == "running" else "right")
        for cell, screen in self._screens.items():
            view, left = screen.view, screen.seconds_left()
            shown = (
                [f"{view.reward:.3f}", f"{view.alpha:.2f}", f"{view.length:.1f}", f"{view.seconds:.1f}"]
                if view
                else ["starting", "", "", ""]
            )
            table.add_row(cell.name, f"{screen.step}/{cell.steps}", *shown, duration(left) if left is not None else "")
        return table

    def _summary(self, jobs: int) -> str:
        entries = self._statuses.values()
        done = sum(entry.state.done for entry in entries)
        text = f"{done} of {len(entries)} cells done"
        if self._seconds:
            steps = sum(entry.cell.steps - entry.step for entry in entries if entry.cell not in self._screens)
            steps += sum(cell.steps - screen.step for cell, screen in self._screens.items())
            pace = sum(self._seconds) / len(self._seconds)
            text += f", about {duration(pace * steps / jobs)} left"
        return text


def _cause(text: str) -> str:
    """The line of a failure that says why."""
    lines = text.splitlines() or [""]
    return next((line for line in lines if line.startswith("Cause: ")), lines[0])


def state_table(study: Study, entries: Sequence[CellStatus], running: dict[Cell, str] | None = None) -> Table:
    """A row per arm in each setting, and a column per seed; with many seeds, a column per state with numbers of cells.

    Args:
        study: For titles.
        entries: The cells.
        running: What to show of cells that run in this process.
    """
    seeds = sorted({entry.cell.seed for entry in entries})
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    if len(seeds) > SEED_COLUMNS:
        counts: dict[tuple[str, str], Counter[State]] = {}
        for entry in entries:
            state = State.RUNNING if running and entry.cell in running else entry.state
            counts.setdefault((entry.cell.setting, entry.cell.arm), Counter())[state] += 1
        states = [state for state in State if any(count[state] for count in counts.values())]
        for title in ("setting", "arm", *(state.value for state in states)):
            table.add_column(title, no_wrap=True)
        for (setting, arm), count in counts.items():
            table.add_row(setting, arm, *(Text(str(count[state]), _STYLES[state]) for state in states))
        return table
    for title in ("setting", "arm", *(f"seed {seed}" for seed in seeds)):
        table.add_column(title, no_wrap=True)
    rows: dict[tuple[str, str], dict[int, Text]] = {}
    for entry in entries:
        cell, state = entry.cell, entry.state
        if running and cell in running:
            text = Text(running[cell], _STYLES[State.RUNNING])
        elif state in (State.RUNNING, State.INTERRUPTED, State.FAILED):
            text = Text(f"{state.value} {entry.step}/{cell.steps}", _STYLES[state])
        else:
            text = Text(state.value, _STYLES[state])
        rows.setdefault((cell.setting, cell.arm), {})[cell.seed] = text
    for (setting, arm), by_seed in rows.items():
        table.add_row(setting, arm, *(by_seed.get(seed, Text("")) for seed in seeds))
    return table


def show_failures(entries: Sequence[CellStatus], console: Console) -> None:
    """Print why cells failed, with the end of their logs; of cells with the same cause, only the first in full."""
    by_cause: dict[str, list[CellStatus]] = {}
    for entry in entries:
        # The same cause can have other ids, times and numbers.
        cause = re.sub(r"[0-9a-f]{8,}|\d+", "#", _cause(entry.run.failure or ""))
        by_cause.setdefault(cause, []).append(entry)
    for first, *others in by_cause.values():
        console.print()
        console.print(f"{first.cell.name} failed:", style="bold red", markup=False, highlight=False)
        console.print(first.run.failure or "", markup=False, highlight=False, soft_wrap=True)
        if others:
            names = listed(entry.cell.name for entry in others)
            line = f"{len(others)} other cells failed with the same cause: {names}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Format a duration in h, min and s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


# --- submitting cells to a cluster ------------------------------------------------------------------------------------


def submit_command(workspace: Workspace, cell: Cell) -> str:
    """Return the shell command that submits a cell to a cluster: the study's ``submit`` with the cell's arguments.

    The run directory records the cell, so that its run can be collected, whoever executes the command.

    Raises:
        StudyError: The cell started from other inputs, or the simulator trains it.
    """
    if cell.trainer == SIMULATOR:
        raise StudyError(
            f"{cell.name} has trainer={SIMULATOR}, which runs on this machine only; remove --print and --submit"
        )
    study, (run, _) = workspace.study, workspace.start(cell)
    words = [f"--run-dir={run.directory.resolve()}", f"--config-name={cell.config_name}"]
    words += [*full_overrides(workspace, cell), f"trainer.save_freq={min(study.save_every, cell.steps)}"]
    environment = "".join(f"{key}={shlex.quote(value)} " for key, value in cell.environment.items())
    name = f"{study.name}-{cell.setting}-{cell.arm}-seed{cell.seed}"
    return environment + study.submit.replace("{arguments}", shlex.join(words)).replace("{name}", name)


def submit_cell(workspace: Workspace, cell: Cell) -> str:
    """Submit a cell to a cluster.

    Returns:
        The output of the command.

    Raises:
        StudyError: The command failed.
    """
    command = submit_command(workspace, cell)
    # The study's `submit` is a command for a shell. submit_command quotes the arguments.
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)  # nosec B602
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise StudyError(f"{cell.name}: the submit command failed (exit status {done.returncode}): {said}\n  {command}")
    submitted_file(workspace.run(cell)).write_text(f"{command}\n", encoding="utf-8")
    return done.stdout.strip()
