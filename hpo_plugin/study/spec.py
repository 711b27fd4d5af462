"""The declaration of a study in STUDY.yaml, and its cells: one training run each."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpo_plugin.quickstart.form import data_options
from hpo_plugin.tasks.task import DataOptions, Task, TaskError, load_task

#: Names become directories, keys of the data and words of a command line.
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
#: Names of environment variables are words of a command line, too.
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Override -> the field of STUDY.yaml that decides it; None for what the run itself decides.
_RESERVED = {
    "data.seed": "experiments.<name>.seeds",
    "trainer.total_training_steps": "steps",
    "trainer.test_freq": "test_every",
    "trainer.save_freq": "save_every",
    "trainer.logger": None,
    "trainer.experiment_name": None,
    "trainer.default_local_dir": None,
    "trainer.resume_mode": None,
    "trainer.resume_from_path": None,
    "hydra.run.dir": None,
}
_INPUTS = ("data.train_files", "data.val_files", "actor_rollout_ref.model.path")
VERL, SIMULATOR = "verl", "simulator"
#: What trains a cell: verl's own trainer, or :mod:`hpo_plugin.simulator`.
TRAINERS = (VERL, SIMULATOR)


class StudyError(ValueError):
    """A contradictory declaration, or data of another study; the message names the key and the value."""


@dataclass
class Prepare:
    """Inputs that the study makes itself, once for all cells of a setting.

    Attributes:
        task: Name of the task, or the path of its file; it has a laptop form.
        problems: Fields of the options of the task's data, such as ``counts`` of Countdown.
        train_size: Rows of the training split.
        test_size: Rows of the test split.
        seed: Seed of the start model. The seed of the data is ``problems.seed``.
        start_model: Fields of :class:`hpo_plugin.quickstart.start_model.StartModelConfig`.
    """

    task: str = MISSING
    problems: dict[str, Any] = field(default_factory=dict)
    train_size: int = MISSING
    test_size: int = MISSING
    seed: int = 0
    start_model: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the directory of the inputs; settings with equal inputs share it."""
        return f"{Path(self.task).stem}-{_digest(asdict(self))}"


@dataclass
class Setting:
    """Task and start model, the same for all arms and seeds.

    Attributes:
        title: For people.
        prepare: Inputs to make; without it, the overrides name data and model.
        overrides: Hydra overrides.
        steps: Training steps, where they differ from the study's.
        trainer: What trains, where it differs from the study's.
    """

    title: str = MISSING
    prepare: Prepare | None = None
    overrides: list[str] = field(default_factory=list)
    steps: int | None = None
    trainer: str | None = None


@dataclass
class Arm:
    """An algorithm that is compared with others.

    Attributes:
        title: For people.
        overrides: Hydra overrides that make the arm, nothing else.
        paper: What the arm is called among the paper's numbers, where that is not its name here.
    """

    title: str = MISSING
    overrides: list[str] = field(default_factory=list)
    paper: str | None = None


@dataclass
class Experiment:
    """A part of the matrix that is reported together. Cells that several experiments name are run once.

    Attributes:
        title: For people.
        setting: Name of the setting.
        arms: Names of the arms, in the order of tables and legends.
        seeds: Values of ``data.seed``.
        compare: The arm whose probability of improvement over each other arm is reported.
        paper: Key of the paper's numbers that belong beside ours (``hpo_plugin/study/paper.yaml``).
        ordered: The arms are values of one quantity: their colors are in order too.
        against: Another setting: each arm is compared with itself there.
        text: What the experiment asks, in Markdown, above its results.
    """

    title: str = MISSING
    setting: str = MISSING
    arms: list[str] = MISSING
    seeds: list[int] = MISSING
    compare: str | None = None
    paper: str | None = None
    ordered: bool = False
    against: str | None = None
    text: str = ""


@dataclass
class Sweep:
    """Experiments with the same arms and seeds that differ in one quantity, such as the learning rate.

    Attributes:
        title: For people.
        quantity: Name of the quantity.
        experiments: Experiment -> value of the quantity, a positive number.
        text: What the sweep asks, in Markdown, above its results.
    """

    title: str = MISSING
    quantity: str = MISSING
    experiments: dict[str, float] = MISSING
    text: str = ""


@dataclass
class Scores:
    """How the two scores of a run are computed.

    Attributes:
        final_evaluations: The final score is the mean of held-out success over so many last evaluations.
        early_fraction: The early score is the mean training reward over this first part of the steps, which is the
            area under its curve, normalized.
    """

    final_evaluations: int = 1
    early_fraction: float = 0.5


@dataclass
class Study:
    """The content of STUDY.yaml.

    Attributes:
        name: Names the directory of the runs.
        title: For people.
        config_name: The trainer's config.
        steps: Training steps of a cell.
        test_every: Steps between evaluations on held-out problems.
        settings: By name.
        arms: By name.
        experiments: By name.
        sweeps: By name.
        trainer: What trains the cells, of :data:`TRAINERS`.
        text: What the study asks, in Markdown, above the report.
        save_every: Steps between checkpoints: an interruption costs at most so many.
        environment: What the trainer needs beside the environment of the command.
        overrides: Hydra overrides of all cells.
        scores: See :class:`Scores`.
        submit: A command that submits a cell to a cluster. ``{arguments}`` stands for the arguments of
            ``hpo-plugin launch``, ``{name}`` for the cell's name.
    """

    name: str = MISSING
    title: str = MISSING
    config_name: str = MISSING
    steps: int = MISSING
    test_every: int = MISSING
    settings: dict[str, Setting] = MISSING
    arms: dict[str, Arm] = MISSING
    experiments: dict[str, Experiment] = MISSING
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    trainer: str = VERL
    text: str = ""
    save_every: int = 10
    environment: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    scores: Scores = field(default_factory=Scores)
    submit: str = "hpo-plugin launch {arguments}"

    def cells(self) -> list[Cell]:
        """Return each training once, ordered by seed, so that an unfinished study has equally many seeds of each arm.

        Raises:
            StudyError: Two cells are the same training under two names.
        """
        experiments = self.experiments.values()
        cells: dict[str, Cell] = {}
        named: set[tuple[str, str, int]] = set()
        for seed in sorted({seed for experiment in experiments for seed in experiment.seeds}):
            for experiment in experiments:
                for arm in experiment.arms if seed in experiment.seeds else []:
                    if (experiment.setting, arm, seed) in named:
                        continue
                    cell = self.cell(experiment.setting, arm, seed)
                    if cell.key in cells:
                        raise StudyError(
                            f"{cell.name} and {cells[cell.key].name} are the same training; use the same arm and "
                            "setting in both experiments"
                        )
                    cells[cell.key] = cell
                    named.add((experiment.setting, arm, seed))
        return list(cells.values())

    @property
    def against(self) -> dict[str, str]:
        """Setting -> the setting that it is compared with, for settings of experiments with ``against``."""
        return {e.setting: e.against for e in self.experiments.values() if e.against is not None}

    def cell(self, setting_name: str, arm: str, seed: int) -> Cell:
        """The training of an arm in a setting with a seed, whether or not an experiment names it."""
        setting = self.settings[setting_name]
        steps = self.steps if setting.steps is None else setting.steps
        overrides = [
            *self.overrides,
            *setting.overrides,
            *self.arms[arm].overrides,
            f"data.seed={seed}",
            f"trainer.total_training_steps={steps}",
            f"trainer.test_freq={self.test_every}",
        ]
        return Cell(
            setting=setting_name,
            arm=arm,
            seed=seed,
            steps=steps,
            config_name=self.config_name,
            overrides=tuple(overrides),
            environment=dict(self.environment),
            inputs=None if setting.prepare is None else asdict(setting.prepare),
            trainer=setting.trainer or self.trainer,
        )

    def validate(self) -> None:
        """Check everything that can be checked without verl.

        Raises:
            StudyError: Naming the key, its value and what to do.
        """
        for kind, named in (
            ("name", [self.name]),
            ("settings", self.settings),
            ("arms", self.arms),
            ("experiments", self.experiments),
            ("sweeps", self.sweeps),
        ):
            if not named and kind != "sweeps":
                raise StudyError(f"{kind} is empty; declare at least one")
            for name in named:
                if not _NAME.fullmatch(name):
                    raise StudyError(f"{kind}: {name!r} must consist of lowercase letters, digits, '_', '-' and '.'")
        for key in self.environment:
            if not _VARIABLE.fullmatch(key):
                raise StudyError(
                    f"environment: {key!r} is not the name of a variable; use letters, digits and '_', and do not "
                    "start with a digit"
                )
        for key in ("steps", "test_every", "save_every"):
            _at_least_one(key, getattr(self, key))
        _at_least_one("scores.final_evaluations", self.scores.final_evaluations)
        if not 0 < self.scores.early_fraction <= 1:
            raise StudyError(f"scores.early_fraction={self.scores.early_fraction} must be in (0, 1]")
        for name, setting in self.settings.items():
            self._validate_setting(name, setting)
        for name, experiment in self.experiments.items():
            self._validate_experiment(name, experiment)
        for name, sweep in self.sweeps.items():
            self._validate_sweep(name, sweep)
        for what, declared, used in (
            ("settings", self.settings, {experiment.setting for experiment in self.experiments.values()}),
            ("arms", self.arms, {arm for experiment in self.experiments.values() for arm in experiment.arms}),
        ):
            unused = sorted(set(declared) - used)
            if unused:
                raise StudyError(f"{what}.{unused[0]} is in no experiment; add it to one, or remove it")
        for experiment in self.experiments.values():
            for arm in experiment.arms:
                self._validate_overrides(experiment.setting, arm)
        if "{arguments}" not in self.submit:
            raise StudyError(f"submit={self.submit!r} must contain {{arguments}}")
        self.cells()

    def _validate_setting(self, name: str, setting: Setting) -> None:
        where = f"settings.{name}"
        for key, trainer in (("trainer", self.trainer), (f"{where}.trainer", setting.trainer)):
            if trainer is not None and trainer not in TRAINERS:
                raise StudyError(f"{key}={trainer!r} is not one of {', '.join(TRAINERS)}")
        if (setting.trainer or self.trainer) == SIMULATOR and setting.prepare is None:
            raise StudyError(
                f"{where}.prepare is missing: trainer={SIMULATOR} requires a start model that the study makes"
            )
        if setting.steps is not None:
            _at_least_one(f"{where}.steps", setting.steps)
        steps = self.steps if setting.steps is None else setting.steps
        # verl evaluates the last step in any case.
        evaluations = -(-steps // self.test_every)
        if self.scores.final_evaluations > evaluations:
            raise StudyError(
                f"scores.final_evaluations={self.scores.final_evaluations} exceeds the {evaluations} evaluations of "
                f"{where} after training starts (steps={steps}, test_every={self.test_every}); lower one of the two"
            )
        if setting.prepare is None:
            return
        for key in ("train_size", "test_size"):
            _at_least_one(f"{where}.prepare.{key}", getattr(setting.prepare, key))
        try:
            setting_data(setting.prepare)
        except TaskError as error:
            raise StudyError(f"{where}.prepare.task: {error}") from error
        except (TypeError, ValueError) as error:
            raise StudyError(f"{where}.prepare.problems: {error}") from error

    def _validate_experiment(self, name: str, experiment: Experiment) -> None:
        where = f"experiments.{name}"
        if experiment.setting not in self.settings:
            raise StudyError(
                f"{where}.setting={experiment.setting!r} is not one of the settings: {', '.join(self.settings)}"
            )
        values: tuple[tuple[str, list[Any]], ...] = (("arms", experiment.arms), ("seeds", experiment.seeds))
        for key, given in values:
            if not given:
                raise StudyError(f"{where}.{key} is empty; list at least one")
            twice = [value for value, count in Counter(given).items() if count > 1]
            if twice:
                raise StudyError(f"{where}.{key} lists {twice[0]!r} twice")
        unknown = [arm for arm in experiment.arms if arm not in self.arms]
        if unknown:
            raise StudyError(f"{where}.arms: {unknown[0]!r} is not one of the arms: {', '.join(self.arms)}")
        negative = [seed for seed in experiment.seeds if seed < 0]
        if negative:
            raise StudyError(f"{where}.seeds: {negative[0]} must not be negative")
        if experiment.compare is not None and experiment.compare not in experiment.arms:
            raise StudyError(
                f"{where}.compare={experiment.compare!r} is not one of its arms: {', '.join(experiment.arms)}"
            )
        if experiment.against is not None and not any(
            other.setting == experiment.against and set(other.arms) & set(experiment.arms)
            for other in self.experiments.values()
            if other is not experiment
        ):
            raise StudyError(
                f"{where}.against={experiment.against!r}: no other experiment with this setting shares an arm"
            )
        if experiment.paper is not None and experiment.paper not in paper_numbers():
            raise StudyError(f"{where}.paper={experiment.paper!r} is not one of {', '.join(paper_numbers())}")

    def _validate_sweep(self, name: str, sweep: Sweep) -> None:
        where = f"sweeps.{name}.experiments"
        unknown = [other for other in sweep.experiments if other not in self.experiments]
        if unknown:
            raise StudyError(f"{where}: {unknown[0]!r} is not one of the experiments: {', '.join(self.experiments)}")
        if len(sweep.experiments) < 2:
            raise StudyError(f"{where} lists {len(sweep.experiments)} experiments; list at least two")
        first, *others = (self.experiments[other] for other in sweep.experiments)
        for other in others:
            for key in ("arms", "seeds", "compare"):
                if getattr(other, key) != getattr(first, key):
                    raise StudyError(
                        f"{where}: the experiments must have the same {key}, but one has {getattr(other, key)!r}"
                    )
        wrong = [value for value in sweep.experiments.values() if not value > 0]
        if wrong or len(set(sweep.experiments.values())) < len(sweep.experiments):
            raise StudyError(f"{where}: {list(sweep.experiments.values())} must be distinct positive numbers")

    def _validate_overrides(self, setting: str, arm: str) -> None:
        """Check that no key is set twice in a cell, and none that the study sets itself."""
        seen: dict[str, tuple[str, str]] = {}
        for where, overrides in (
            ("overrides", self.overrides),
            (f"settings.{setting}.overrides", self.settings[setting].overrides),
            (f"arms.{arm}.overrides", self.arms[arm].overrides),
        ):
            for override in overrides:
                key = override.partition("=")[0].lstrip("+~")
                if key in _RESERVED:
                    instead = _RESERVED[key]
                    to_do = f"use {instead}" if instead else "remove it, because the run sets it"
                    raise StudyError(f"{where}: {override!r} cannot be set here; {to_do}")
                if key in _INPUTS and self.settings[setting].prepare is not None:
                    raise StudyError(
                        f"{where}: {override!r} conflicts with settings.{setting}.prepare, which sets this key; "
                        "remove one of the two"
                    )
                if key in seen:
                    there, first = seen[key]
                    raise StudyError(
                        f"{where}: {override!r} conflicts with {first!r} in {there}; set each key in one place"
                    )
                seen[key] = (where, override)


@dataclass(frozen=True)
class Cell:
    """One training of a study.

    Attributes:
        setting: Name of the setting.
        arm: Name of the arm.
        seed: ``data.seed``.
        steps: ``trainer.total_training_steps``.
        config_name: The trainer's config.
        overrides: All but the paths of inputs that the study makes.
        environment: Of the trainer.
        inputs: The declaration of inputs that the study makes; None if the overrides name them.
        trainer: What trains it, of :data:`TRAINERS`.
    """

    setting: str
    arm: str
    seed: int
    steps: int
    config_name: str
    overrides: tuple[str, ...]
    environment: Mapping[str, str] = field(hash=False)
    inputs: Mapping[str, Any] | None = field(hash=False)
    trainer: str = VERL

    @property
    def name(self) -> str:
        """``setting/arm/seed0``, for people and filters."""
        return f"{self.setting}/{self.arm}/seed{self.seed}"

    def request(self) -> dict[str, Any]:
        """Return everything that determines the training, as JSON values, without the names of setting and arm."""
        return {
            "config_name": self.config_name,
            "overrides": list(self.overrides),
            "environment": dict(self.environment),
            "inputs": self.inputs,
            # Absent, the trainer is verl's, as in data collected before there was another one.
            **({} if self.trainer == VERL else {"trainer": self.trainer}),
        }

    @cached_property
    def key(self) -> str:
        """Identity of the cell: a digest of :meth:`request`. A change to the training gives another key."""
        return _digest(self.request())


def load_study(path: Path) -> Study:
    """Read and check STUDY.yaml.

    Args:
        path: The file.

    Raises:
        StudyError: It is not a study, or it contradicts itself.
    """
    try:
        given = OmegaConf.load(path)
        merged = OmegaConf.merge(OmegaConf.structured(Study), given)
        study = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise StudyError(f"{path}: {' '.join(str(error).split())}") from error
    assert isinstance(study, Study)
    try:
        study.validate()
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None
    return study


def setting_data(prepare: Prepare) -> tuple[Task, DataOptions]:
    """Return the task of a setting and the options of its data.

    Raises:
        TaskError: There is no such task, or it has no laptop form.
        ValueError: A field that the options do not have, or that the study or the laptop form sets.
    """
    task = load_task(prepare.task)
    for name in ("train_size", "test_size"):
        if name in prepare.problems:
            raise ValueError(f"{name} is a key of prepare, not of problems; move it there")
    sizes = {"train_size": prepare.train_size, "test_size": prepare.test_size}
    return task, data_options(task, {**prepare.problems, **sizes})


@dataclass(frozen=True)
class PaperNumbers:
    """What a paper reports for one experiment.

    Attributes:
        title: Task, model and measure.
        source: Where they are from, and how they are read.
        values: By arm.
    """

    title: str
    source: str
    values: Mapping[str, float]


@cache
def paper_numbers() -> Mapping[str, PaperNumbers]:
    """Return all known numbers of papers, by the names that ``experiments.<name>.paper`` takes."""
    given = yaml.safe_load(resources.files("hpo_plugin.study").joinpath("paper.yaml").read_text(encoding="utf-8"))
    return {name: PaperNumbers(**entry) for name, entry in given.items()}


def select(cells: Iterable[Cell], only: Iterable[str]) -> list[Cell]:
    """Return the cells that match the filters.

    Args:
        cells: To choose from.
        only: Names of settings, arms or ``seed<k>``, several joined by ``/`` that must all hold; a cell stays if any
            filter fits, and all stay without a filter.

    Raises:
        StudyError: A filter that fits no cell.
    """
    cells, filters = list(cells), [set(text.split("/")) for text in only]
    for wanted in filters:
        if not any(wanted <= _words(cell) for cell in cells):
            raise StudyError(
                f"--only {'/'.join(sorted(wanted))} matches no cell; one of the cells is named {cells[0].name}"
            )
    return [cell for cell in cells if not filters or any(wanted <= _words(cell) for wanted in filters)]


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _words(cell: Cell) -> set[str]:
    return {cell.setting, cell.arm, f"seed{cell.seed}"}


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise StudyError(f"{key}={value} must be at least 1")
