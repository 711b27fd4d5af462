"""The checks of ``hpo-plugin check``. The functions return findings; errors of the user raise no exception."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hpo_plugin.check.cluster import Cluster
from hpo_plugin.check.compose import compose
from hpo_plugin.check.probe import CHECKED_PACKAGES, has_v1_trainer, probe
from hpo_plugin.check.report import CheckReport, Finding
from hpo_plugin.check.signals import signal_handlers_kept
from hpo_plugin.errors import ConfigError
from hpo_plugin.recipe.layout import KEY_RECIPE, check_layout
from hpo_plugin.recipe.memory import GIB, MEMORY_ENGINES, Sizes
from hpo_plugin.tasks.task import ROW_COLUMNS
from hpo_plugin.verl.selection import alpha_batch, describe_observation

if TYPE_CHECKING:
    from rich.console import Console


def run_checks(
    config_name: str | None,
    overrides: Sequence[str],
    *,
    config_dir: Path | None = None,
    timeout: float = 120.0,
    local: bool = False,
    shared: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> CheckReport:
    """Run all checks.

    Args:
        config_name: Name of the trainer config, as for ``python -m verl.trainer.main_ppo --config-name``. None checks
            only the installation.
        overrides: Hydra overrides.
        config_dir: An additional directory of configs.
        timeout: Time limit for the answer of a node, in seconds.
        local: Whether to check only this process, without Ray.
        shared: A file in a directory that all nodes must share and be able to write to.
        progress: Called with a description of the current check.

    Returns:
        The report. Its ``ok`` is True if all checks passed.
    """
    begin = time.monotonic()
    report = CheckReport()
    tell = progress or (lambda _: None)

    config: DictConfig | None = None
    composing = Finding("config", "no config given; only the installation is checked", remedy="")
    if config_name is None and overrides:
        composing = Finding("config", f"{len(overrides)} overrides, but no config", False, "add --config-name NAME")
    elif config_name is not None:
        tell(f"composing {config_name}")
        config, composing = compose(config_name, overrides, config_dir)
        if config is None and config_dir is None:
            composing = replace(composing, remedy=f"{composing.remedy}; --config-dir adds a directory of configs")

    # The nodes import verl, which takes seconds, at the same time as this process.
    tell("starting or joining Ray")
    with nullcontext(None) if local else Cluster.join(config) as cluster:
        if cluster is not None:
            cluster.ask_every_node(local_files(config) if config is not None else (), shared)
        tell("importing verl")
        here = probe()
        report.findings += check_versions()
        report.findings += check_registration(here)
        if not here["problems"]:
            report.findings.append(check_self_test())
        if cluster is not None:
            tell("waiting for the nodes")
            report.findings += cluster.check_nodes(here, timeout)
            if config is not None:
                report.findings += cluster.check_devices(config)
    report.findings.append(composing)
    if config is not None:
        tell("reading the config")
        report.findings += check_config(config)
    report.seconds = time.monotonic() - begin
    return report


@contextmanager
def quiet(log: Path, console: Console | None = None, status: str = "") -> Iterator[None]:
    """Run checks without their output, and restore the signal handlers of the caller at the end.

    Args:
        log: File for everything that is printed to standard output and standard error, including output of C++.
        console: The console on which to show ``status`` during the checks, if it is a terminal.
        status: Description of the checks.
    """
    with ExitStack() as stack:
        if console is not None and console.is_terminal:
            stack.enter_context(console.status(status))
        stack.enter_context(signal_handlers_kept())
        stack.enter_context(redirect_stdout(sys.stderr))
        stack.enter_context(_stderr_to(log))
        yield


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    sys.stderr.flush()
    kept = os.dup(2)
    with path.open("wb") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


# --- the installation ----------------------------------------------------------------------------------------------


def required_versions(name: str) -> SpecifierSet:
    """The versions of a distribution that the metadata of verl and this package require; empty for any version."""
    asked = SpecifierSet()
    for owner in ("hpo-plugin", "verl"):
        try:
            lines = metadata.requires(owner) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            # verl lists the requirements of its V1 trainer in an extra.
            extras = ("", "verl-core", "verl")
            wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras)
            if requirement.name.lower() == name.lower() and wanted:
                asked &= requirement.specifier
    return asked


def check_versions() -> list[Finding]:
    """One finding for Python and one for each package of :data:`CHECKED_PACKAGES`."""
    findings = []
    try:
        pythons = SpecifierSet(metadata.metadata("hpo-plugin")["Requires-Python"] or "")
    except metadata.PackageNotFoundError:
        pythons = SpecifierSet()
    found = platform.python_version()
    ok = found in pythons
    findings.append(
        Finding(
            "python",
            found if ok else f"{found}, but hpo-plugin requires {pythons}",
            ok,
            "" if ok else f"use Python {pythons}",
        )
    )
    for name in CHECKED_PACKAGES:
        if name == "TransferQueue" and not has_v1_trainer():
            continue
        asked = required_versions(name)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, "not installed", False, f"pip install '{name}{asked}'"))
            continue
        # check_self_test checks verl; its version number is not sufficient.
        if asked.contains(version, prereleases=True) or name == "verl":
            findings.append(Finding(name, version))
        else:
            findings.append(Finding(name, f"{version}, but {asked} is required", False, f"pip install '{name}{asked}'"))
    return findings


def check_registration(here: dict[str, Any]) -> list[Finding]:
    """The findings of :func:`probe` in this process."""
    if not here["problems"]:
        registered = "hpo and ahpo are registered as advantage estimators and policy losses"
        return [Finding("this process", here["built_in"] or registered)]
    return [Finding("this process", what, False, remedy) for what, remedy in here["problems"]]


def check_self_test() -> Finding:
    """The result of the self-test, which runs with every version of verl."""
    from verl import __version__

    from hpo_plugin.verl.self_test import TESTED_VERL, self_test

    if problem := self_test():
        return Finding("self-test", problem, False, f"install verl {' or '.join(TESTED_VERL)}")
    tested = "" if __version__ in TESTED_VERL else f"; this package was tested with verl {', '.join(TESTED_VERL)}"
    return Finding("self-test", f"advantages and gradient are correct with verl {__version__}{tested}")


# --- the config ----------------------------------------------------------------------------------------------------


def check_config(config: DictConfig) -> list[Finding]:
    """Check the algorithm, verl's own validation, the model, the data and the reward of a composed config."""
    findings = [*check_algorithm(config), *check_recipe(config)]
    # verl's validation checks the algorithm and the recipe again and would repeat the same error.
    if all(finding.ok for finding in findings):
        findings.append(check_by_verl(config))
    findings.append(check_model(config))
    findings += check_data(config)
    findings.append(check_reward(config))
    return findings


def check_algorithm(config: DictConfig) -> list[Finding]:
    """Check the algorithm that the config selects, and name the batch that α is computed from."""
    config = config.copy()
    try:
        from hpo_plugin.verl.registration import RegistrationError
        from hpo_plugin.verl.seams import prepare

        selection, lines = prepare(config)
        observed = describe_observation(config)
    except (ConfigError, RegistrationError) as error:
        return [Finding("algorithm", "contradictory config", False, str(error))]
    except ImportError as error:
        return [Finding("algorithm", f"cannot be checked: {error}", False, "correct the cause of this error")]
    observation = [Finding("observe", observed)] if observed else []
    if selection is None:
        provided = f"{config.algorithm.adv_estimator}, which verl provides and checks itself"
        return [Finding("algorithm", provided), *observation]
    low, high, both = (
        OmegaConf.select(config, f"actor_rollout_ref.actor.{key}")
        for key in ("clip_ratio_low", "clip_ratio_high", "clip_ratio")
    )
    low, high = (both if value is None else value for value in (low, high))
    name = OmegaConf.select(config, "algorithm.policy_loss")
    selected = f"{name}: " if name and selection.variant is None else ""
    findings = [
        Finding(
            "algorithm",
            f"{selected}{selection.label}; adv_estimator {config.algorithm.adv_estimator}, loss_mode "
            f"{selection.loss_mode}, aggregation {selection.loss_agg_mode}, clip range [1-{low:g}, 1+{high:g}]",
        )
    ]
    if selection.variant is not None:
        findings.append(Finding("α", alpha_batch(config)))
    return findings + observation + [Finding("set", line) for line in lines]


def check_recipe(config: DictConfig) -> list[Finding]:
    """The layout over GPUs and the memory of a config composed from ``hpo_recipe``; empty for other configs."""
    if OmegaConf.select(config, KEY_RECIPE) is None:
        return []
    try:
        layout = check_layout(config)
    except ConfigError as error:
        return [Finding("recipe", "cannot run on these GPUs", False, str(error))]
    recipe = config[KEY_RECIPE]
    named = f"{recipe.task}, {recipe.model}, {recipe.engine}"
    if layout is None:
        return [Finding("recipe", f"{named}; the parallel sizes of this engine are not checked")]
    sharded = (
        f"{named} on {layout.gpus} GPUs: {layout.ranks} data-parallel ranks, {layout.rows_of_rank} rows of a "
        "mini-batch per rank"
    )
    if recipe.engine not in MEMORY_ENGINES or layout.strategy != recipe.engine:
        return [Finding("recipe", f"{sharded}; the memory of this engine is not estimated")]
    sizes = Sizes.of(config)
    return [
        Finding(
            "recipe",
            f"{sharded}; estimated peak memory per GPU: {sizes.update_peak / GIB:.0f} GiB during the update, "
            f"{sizes.rollout_peak / GIB:.0f} GiB during the rollout",
        )
    ]


def check_by_verl(config: DictConfig) -> Finding:
    """Run the validation that ``main_ppo`` runs before it starts anything, on a copy of the config."""
    config = config.copy()
    try:
        from verl.trainer.ppo.utils import need_critic, need_reference_policy
        from verl.utils.config import validate_config
        from verl.utils.device import auto_set_device

        auto_set_device(config)
        validate_config(
            config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
        )
    except Exception as error:
        # verl asserts or raises ValueError, and OmegaConf wraps exceptions of resolvers. All of them stop the run.
        return Finding("verl's checks", "verl rejects this config", False, " ".join(str(error).split()))
    return Finding("verl's checks", "passed")


def check_model(config: DictConfig) -> Finding:
    """Check that a local model exists. A model on the hub is not checked."""
    key = "actor_rollout_ref.model.path"
    path = OmegaConf.select(config, key)
    if path is None:
        return Finding("model", f"{key} is not set", False, f"set {key}")
    local = Path(path).expanduser()
    if (local / "config.json").is_file():
        return Finding("model", str(path))
    if local.is_absolute() or str(path).startswith((".", "~")) or local.exists() or str(path).count("/") != 1:
        if "://" in str(path):
            return Finding("model", f"{path} (remote, not checked)")
        return Finding("model", f"{path} has no config.json", False, f"set {key} to the directory of a model")
    return Finding("model", f"{path} (on the hub, not checked)")


def _files(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, ListConfig | list | tuple) else [str(value)]


def local_files(config: DictConfig) -> list[tuple[str, str]]:
    """The files and directories that verl's processes read on any node: (config key, path) pairs.

    Paths that do not exist on this machine are left out, for example a model on the hub.
    """
    keys = (
        "actor_rollout_ref.model.path",
        "data.train_files",
        "data.val_files",
        "reward.custom_reward_function.path",
    )
    named = [(key, name) for key in keys for name in _files(OmegaConf.select(config, key))]
    return [(key, name) for key, name in named if Path(name).expanduser().exists()]


def check_data(config: DictConfig) -> list[Finding]:
    """Check that the data files exist, can be read, and contain at least one batch."""
    findings = []
    for kind in ("train", "val"):
        key = f"data.{kind}_files"
        files = _files(OmegaConf.select(config, key))
        label = f"{kind} data"
        if not files:
            findings.append(Finding(label, f"{key} is not set", False, f"set {key}"))
            continue
        try:
            rows, remote = _count_rows(files)
        except OSError as error:
            findings.append(Finding(label, f"{error}", False, f"correct {key}; `hpo-plugin prepare` writes data files"))
            continue
        batch = OmegaConf.select(config, "data.train_batch_size")
        if kind == "train" and batch is None:
            key = "data.train_batch_size"
            findings.append(Finding(label, f"{key} is not set", False, f"set {key}"))
            continue
        if kind == "train" and not remote and rows < batch:
            findings.append(
                Finding(
                    label,
                    f"{rows} rows, fewer than one batch (data.train_batch_size={batch})",
                    False,
                    "verl drops the last incomplete batch: add rows, or set a smaller data.train_batch_size",
                )
            )
            continue
        missing = _missing_column(config, files)
        if missing:
            remedy = "`hpo-plugin prepare` and hpo_plugin.tasks.task.write_rows write all columns"
            findings.append(Finding(label, missing, False, remedy))
            continue
        names = ", ".join(files)
        findings.append(Finding(label, f"{names} (remote, not checked)" if remote else f"{rows:,} rows in {names}"))
    return findings


def _count_rows(files: Iterable[str]) -> tuple[int, bool]:
    """The number of rows in all files, and whether a file is remote. OSError if a file cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, remote = 0, False
    for name in files:
        path = Path(name).expanduser()
        if "://" in name:
            remote = True
        elif not path.is_file():
            raise OSError(f"{name} {'is not a file' if path.exists() else 'does not exist'}")
        elif path.suffix == ".parquet":
            try:
                rows += pq.read_metadata(path).num_rows
            except (pa.ArrowException, OSError) as error:
                raise OSError(f"{name} is not a parquet file: {error}") from error
        else:
            with path.open("rb") as lines:
                rows += sum(1 for _ in lines)
    return rows, remote


def _missing_column(config: DictConfig, files: Iterable[str]) -> str:
    """The first column of :data:`ROW_COLUMNS` that the data set or reward managers of verl need and do not find."""
    import pyarrow.parquet as pq

    if OmegaConf.select(config, "data.custom_cls.path"):
        return ""
    keys = {"prompt": "data.prompt_key", "data_source": "data.reward_fn_key"}
    # verl does not need the last column; a custom reward manager may not need others.
    optional = {"extra_info"}
    if OmegaConf.select(config, "reward.reward_manager.source", default="register") != "register":
        optional |= {"data_source", "reward_model"}
    for name in files:
        path = Path(name).expanduser()
        if path.suffix != ".parquet" or not path.is_file():
            continue
        there = pq.read_schema(path).names
        for column in ROW_COLUMNS:
            key = keys.get(column)
            wanted = OmegaConf.select(config, key, default=column) if key else column
            if wanted not in there and column not in optional:
                return f"{name} has no column {wanted}{f' ({key})' if key else ''}; its columns are {', '.join(there)}"
    return ""


def _first_row(config: DictConfig) -> dict[str, Any] | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for kind in ("val", "train"):
        for name in _files(OmegaConf.select(config, f"data.{kind}_files")):
            path = Path(name).expanduser()
            if path.suffix == ".parquet" and path.is_file():
                try:
                    batch = next(pq.ParquetFile(path).iter_batches(batch_size=1), None)
                except (pa.ArrowException, OSError):
                    # check_data reports this error.
                    continue
                if batch is not None and batch.num_rows:
                    row: dict[str, Any] = batch.to_pylist()[0]
                    return row
    return None


class _EmptyAnswer:
    """A tokenizer that decodes every response to the empty string."""

    eos_token = ""

    def decode(self, *_: Any, **__: Any) -> str:
        return ""


def check_reward(config: DictConfig) -> Finding:
    """Check that verl's reward manager, with the configured function, scores an empty response to the first row."""
    import asyncio

    key = "reward.custom_reward_function"
    reward_model = OmegaConf.select(config, "reward.reward_model.enable")
    if reward_model and not OmegaConf.select(config, f"{key}.path"):
        return Finding("reward", "reward model (not checked)")
    path, name = (OmegaConf.select(config, f"{key}.{part}") for part in ("path", "name"))
    label = f"{path}:{name}" if path else "verl's reward function by data_source"
    remedy = f"correct {key}.path and {key}.name" if path else f"set {key}.path and {key}.name"
    try:
        from verl.trainer.ppo.reward import get_custom_reward_fn, load_reward_manager

        get_custom_reward_fn(config)
    except Exception as error:
        # verl wraps the exception of the module.
        cause = error.__cause__ or error
        return Finding("reward", f"{label} cannot be loaded: {type(cause).__name__}: {cause}", False, remedy)
    row = _first_row(config)
    if row is None:
        return Finding("reward", f"{label} can be loaded; not called, because there is no local row")
    if reward_model:
        return Finding("reward", f"{label} can be loaded; not called, because it uses a reward model")
    source = row.get(OmegaConf.select(config, "data.reward_fn_key", default="data_source"))

    async def scored() -> Any:
        # The constructor of the manager needs the running event loop.
        manager = load_reward_manager(config, _EmptyAnswer())
        return (await manager.run_single(_one_response(row)))["reward_score"]

    try:
        value = asyncio.run(scored())
    except Exception as error:
        what = f"{label} raises {type(error).__name__} for an empty response to a row of {source!r}: {error}"
        return Finding("reward", what, False, remedy)
    if isinstance(value, tuple | list):
        value = value[0] if value else None
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        what = f"{label} returns {value!r} for an empty response to a row of {source!r}, which is not a finite number"
        return Finding("reward", what, False, remedy)
    return Finding("reward", f"{label} returns {number:g} for an empty response to a row of {source!r}")


def _one_response(row: dict[str, Any]) -> Any:
    """A row of data with a response of one token, as verl's agent loop passes it to a reward manager."""
    import numpy as np
    import torch
    from verl import DataProto

    def column(value: Any) -> np.ndarray:
        array = np.empty(1, dtype=object)
        array[0] = value
        return array

    fields = row | {"extra_info": dict(row.get("extra_info") or {}), "__num_turns__": 2}
    token = torch.ones(1, 1, dtype=torch.long)
    return DataProto.from_dict(
        tensors={"prompts": token, "responses": token, "attention_mask": token.repeat(1, 2)},
        non_tensors={name: column(value) for name, value in fields.items()},
    )
