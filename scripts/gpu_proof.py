"""Shows on a machine with one GPU that this package is right there, how fast it is, and that it trains (docs/gpu.md).

    make gpu-proof ARGS="--task countdown3 --engine fsdp2"    # all of it; the same command resumes
    make gpu-proof ARGS="--device cpu --steps 4"              # a rehearsal without a GPU, with a small model
    make gpu-proof ARGS="--accept /shared/runs/acceptance"    # judges a finished run over two nodes

The stages are environment, correctness, timing and training. Each writes ``<stage>.json`` into the output directory
when it ends, and ``results.md`` is written anew after each. Exit status: 0 if nothing failed (a stage that lacks
packages is reported as not run), 1 if a stage failed, 2 if the machine lacks what all stages need, 130 or 143 if
interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.__main__ import ROOT, measure
from benchmarks._table import markdown

STUDY = ROOT / "studies" / "gpu-proof.yaml"
PAGE = "results.md"
TASKS = ("countdown3", "telelogs")
ENGINES = ("fsdp2", "megatron")
#: --model -> overrides. The architecture is config.json of the model on the hub; see hpo_plugin/configs/hpo/model.
MODELS = {
    "qwen2.5-0.5b": (
        "hpo/model=qwen2.5-1.5b",
        "recipe.model=qwen2.5-0.5b",
        "actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct",
        "recipe.architecture.layers=24",
        "recipe.architecture.hidden=896",
        "recipe.architecture.heads=14",
        "recipe.architecture.head_dim=64",
        "recipe.architecture.intermediate=4864",
    ),
    "qwen2.5-1.5b": ("hpo/model=qwen2.5-1.5b",),
}
OFFLOAD, TOKENS = "recipe.offload", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
#: From the fastest to the most frugal. The last number of tokens is the longest row of TeleLogs.
MEMORY_SETTINGS = ((False, 16384), (True, 16384), (True, 8192), (True, 6144))
#: What training needs beside this package: name -> module.
TRAINING_PACKAGES = {"verl": "verl", "vLLM": "vllm"}
MEGATRON_PACKAGES = {"megatron-core": "megatron", "mbridge": "mbridge"}
#: Seconds without a step after which a training has failed; loading the model and the first rollout count.
STALL = 3600.0
#: Seconds for the measurements of a stage.
LIMIT = 3600.0
#: Data, start model and lengths of a rehearsal on the CPU: the laptop form of the task, smaller.
REHEARSALS: dict[str, dict[str, Any]] = {
    "countdown3": {
        "prepare": {
            "task": "countdown",
            "problems": {"counts": [3], "max_number": 12},
            "train_size": 512,
            "test_size": 64,
            "start_model": {"steps": 300},
        },
        "overrides": ["data.max_prompt_length=64", "data.max_response_length=32"],
    },
    "telelogs": {
        "prepare": {"task": "telelogs", "train_size": 512, "test_size": 64},
        "overrides": ["data.max_prompt_length=192", "data.max_response_length=80"],
    },
}
REHEARSAL_OVERRIDES = (
    "+hpo/backend=cpu",
    "+hpo/cpu_rollout=hf",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
)

#: ``status`` (ok, failed or not run), ``rows``, ``error``, and what it is a result of, in ``of``.
Result = dict[str, Any]


class StageError(RuntimeError):
    """Why a stage cannot be run as asked, and what to do."""


# --- what the machine has ------------------------------------------------------------------------------------------


def installed(module: str) -> bool:
    """Whether a package can be imported; it is not."""
    return importlib.util.find_spec(module) is not None


def missing(device: str) -> str:
    """Say what every stage needs and this Python lacks, and what to do; empty if nothing."""
    other = "name the Python of your environment (make gpu-proof PYTHON=...)"
    rehearse = 'to rehearse without a GPU: make gpu-proof ARGS="--device cpu"'
    if not installed("torch"):
        return f"torch is not installed in {sys.executable}. Install a CUDA build of torch, or {other}."
    try:
        metadata.version("hpo-plugin")
    except metadata.PackageNotFoundError:
        return f'hpo-plugin is not installed in {sys.executable}. Run pip install -e ".[verl,study]" here, or {other}.'
    if device == "cpu":
        return ""
    import torch

    if torch.version.cuda is None:
        return (
            f"there is no CUDA: torch {torch.__version__} is a build without it. Install a CUDA build of torch, or "
            f"{other}; {rehearse}."
        )
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and finds no GPU. Look at nvidia-smi "
            f"(the driver) and at CUDA_VISIBLE_DEVICES; {rehearse}."
        )
    return ""


def why_not_trained(given: argparse.Namespace) -> str:
    """Say why training is left out; empty if it is not."""
    if given.skip_training:
        return "--skip-training"
    if not installed("verl"):
        return "verl is not installed"
    if given.device == "cuda":
        needed = TRAINING_PACKAGES | (MEGATRON_PACKAGES if given.engine == "megatron" else {})
        lacking = [name for name, module in needed.items() if not installed(module)]
        if lacking:
            return f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed"
    elif given.engine == "megatron":
        return "the CPU backend trains with fsdp2 only; `make test-megatron` trains a recipe with Megatron on a CPU"
    from hpo_plugin.cli.requirements import missing_packages

    extra = "study" if given.device == "cuda" else "cpu"
    if lacking := missing_packages(extra):
        return f'{", ".join(lacking)} not installed: pip install "hpo-plugin[{extra}]"'
    return ""


# --- training ------------------------------------------------------------------------------------------------------


def merged(*overrides: Sequence[str]) -> list[str]:
    """Overrides without repeated keys: of each key the last one counts."""
    return list({text.partition("=")[0].lstrip("+~"): text for part in overrides for text in part}.values())


def recipe_overrides(given: argparse.Namespace, folder: Path) -> list[str]:
    """Overrides of ``hpo_recipe`` for what is asked for, with the user's own."""
    chosen = [f"hpo/task={given.task}", *MODELS[given.model], f"hpo/engine={given.engine}"]
    if given.device == "cpu":
        return merged(chosen, REHEARSAL_OVERRIDES, REHEARSALS[given.task]["overrides"], given.overrides)
    return merged(chosen, [f"recipe.data_dir={(folder / 'data').resolve()}"], given.overrides)


def memory_overrides(overrides: Sequence[str], gpu_bytes: int) -> list[str]:
    """Settings with which a recipe on one GPU fits into its memory, by the estimate of docs/hardware.md.

    Args:
        overrides: Of ``hpo_recipe``. Where they have one of the settings, they are believed.
        gpu_bytes: Memory of the GPU.

    Returns:
        Overrides.

    Raises:
        StageError: Nothing fits, or the recipe cannot be composed.
    """
    from hpo_plugin.check.compose import compose
    from hpo_plugin.recipe.memory import GIB, Sizes

    if any(text.partition("=")[0] in (OFFLOAD, TOKENS) for text in overrides):
        return []
    one_gpu = ["trainer.nnodes=1", "trainer.n_gpus_per_node=1"]
    for offload, tokens in MEMORY_SETTINGS:
        settings = [f"{OFFLOAD}={offload}", f"{TOKENS}={tokens}"]
        config, finding = compose("hpo_recipe", merged(one_gpu, overrides, settings))
        if config is None:
            raise StageError(f"{finding.found}: {finding.remedy}")
        sizes = Sizes.of(config)
        # The estimate is made for 80 GB, of which vLLM takes a share.
        generate = sizes.rollout_peak - sizes.vllm + int(sizes.gpu_memory_utilization * gpu_bytes)
        if max(sizes.update_peak, generate) <= gpu_bytes:
            return settings
    raise StageError(
        f"the estimate is {sizes.update_peak / GIB:.0f} GiB to update and {generate / GIB:.0f} GiB to generate, and "
        f"the GPU has {gpu_bytes / GIB:.0f} GiB. Take --model qwen2.5-0.5b or a larger GPU; to try all the same, add "
        f"{' '.join(settings)}"
    )


def prepare_data(task: str, source: str, folder: Path) -> None:
    """Write the data of a recipe where it looks for them; what is there already stays.

    Raises:
        StageError: They cannot be made.
    """
    from hpo_plugin.tasks.task import load_task

    name, fields = ("countdown", {"counts": (3,)}) if task == "countdown3" else (task, {})
    found = load_task(name)
    try:
        found.prepare(folder / "data" / task, found.Options(source=source, **fields))
    except (ValueError, OSError) as error:
        raise StageError(f"data of {task}: {error}") from error


def declare_study(given: argparse.Namespace, folder: Path, memory: Sequence[str]) -> Path:
    """Write the study of this call: the committed one with task, model, engine and steps of this call.

    Returns:
        The file.
    """
    from omegaconf import OmegaConf

    study = OmegaConf.load(STUDY)
    study.steps = given.steps
    study.test_every = max(1, given.steps // 10)
    study.save_every = max(1, given.steps // 5)
    own = {text.partition("=")[0].lstrip("+~") for text in recipe_overrides(given, folder)}
    study.overrides = [text for text in study.overrides if text.partition("=")[0] not in own]
    setting = study.settings.recipe
    setting.title = f"{given.task}, {given.model}, {given.engine}, one GPU"
    setting.overrides = merged(recipe_overrides(given, folder), memory)
    if given.device == "cpu":
        setting.title = f"rehearsal of {given.task} on the CPU, small model"
        study.title = f"{study.title}: rehearsal on the CPU"
        study.environment = {"VERL_PLATFORM": "cpu"}
        setting.prepare = REHEARSALS[given.task]["prepare"]
    file = folder / "study.yaml"
    OmegaConf.save(study, file)
    return file


def run_study(file: Path, folder: Path) -> list[dict[str, Any]]:
    """Train what is not finished, collect it and write its report.

    Returns:
        A row for each training.

    Raises:
        StageError: A training failed, or another process is at it; the others are finished or can be resumed.
    """
    from rich.console import Console

    from hpo_plugin.study.cells import Workspace
    from hpo_plugin.study.collect import collect
    from hpo_plugin.study.data import read_data
    from hpo_plugin.study.inputs import prepare_in_child
    from hpo_plugin.study.report import build_report, write_report
    from hpo_plugin.study.run import StudyRun, look
    from hpo_plugin.study.spec import StudyError, load_study

    try:
        study = load_study(file)
        workspace, cells = Workspace(study, folder), study.cells()
        work = StudyRun(workspace, cells, (), stall=STALL, console=Console(highlight=False))
        if work.unfinished:
            prepare_in_child(file, folder, [], check=True)
            work.run(jobs=1)
        if work.failed:
            raise StageError("\n".join(f"{entry.cell.name}: {entry.run.failure}" for entry in work.failed))
        left = [entry.cell.name for entry in look(workspace, cells, ()) if not entry.state.done]
        if left:
            raise StageError(f"another process trains {', '.join(left)}; the same command resumes when it has ended")
        collect(workspace, file.with_suffix(".parquet"), prune=True)
        data = read_data(file.with_suffix(".parquet"))
        write_report(build_report(study, data), folder / "report")
    except StudyError as error:
        raise StageError(str(error)) from error
    return [training_row(cell.overrides, cell.steps, data[cell.key]) for cell in cells]


def training_row(overrides: Sequence[str], steps: int, run: Any) -> dict[str, Any]:
    """What the page shows of a finished training.

    Args:
        overrides: Of the training.
        steps: Their number.
        run: :class:`hpo_plugin.study.data.CellData`.
    """
    import numpy as np

    from hpo_plugin.study.data import ALPHA, HELD_OUT, REWARD, STEP_SECONDS

    held_out = run.values[HELD_OUT][~np.isnan(run.values[HELD_OUT])]
    rewards, part = run.values[REWARD][1:], max(1, steps // 10)
    return {
        "algorithm": dict(text.split("=", 1) for text in overrides)["algorithm.policy_loss"],
        "steps": steps,
        "held-out success, before": float(held_out[0]),
        "after": float(held_out[-1]),
        "mean reward, first tenth of the steps": float(rewards[:part].mean()),
        "last tenth": float(rewards[-part:].mean()),
        "α, last step": float(run.values[ALPHA][-1]),
        "seconds of a step, median": float(np.nanmedian(run.values[STEP_SECONDS][1:])),
        "attempts": run.info["attempts"],
    }


def train(given: argparse.Namespace, folder: Path, facts: Mapping[str, str]) -> Result:
    """The stage: trains, or says why not."""
    if reason := why_not_trained(given):
        return {"status": "not run", "rows": [], "error": reason}
    try:
        memory: list[str] = []
        if given.device == "cuda":
            memory = memory_overrides(recipe_overrides(given, folder), int(facts["GPU memory, bytes"]))
            prepare_data(given.task, given.source, folder)
        rows = run_study(declare_study(given, folder, memory), folder)
    except StageError as error:
        return {"status": "failed", "rows": [], "error": str(error)}
    return {"status": "ok", "rows": rows, "error": None}


# --- the stages ----------------------------------------------------------------------------------------------------


def time_it(device: str) -> Result:
    """The stage: measures, or says why not."""
    if not installed("verl"):
        return {"status": "not run", "rows": [], "error": "verl is not installed, with which to compare"}
    return measure("timing", package="benchmarks.gpu", limit=LIMIT, arguments=[device])


def check_exactness(device: str) -> Result:
    """The stage: compares, and names the worst batch of what is wrong."""
    result = measure("exactness", package="benchmarks.gpu", limit=LIMIT, arguments=[device])
    wrong = [row for row in result["rows"] if not row["met"]]
    if wrong:
        # An error that is no number is worse than any.
        worst = max(wrong, key=lambda row: row["error"] if row["error"] is not None else math.inf)
        size = "not finite" if worst["error"] is None else f"{worst['error']:.3g} times the tolerance"
        result["status"] = "failed"
        result["error"] = (
            f"{len(wrong)} of {len(result['rows'])} quantities are wrong on {device}. The worst: {worst['quantity']} "
            f"in {worst['type']}, {size}, in the batch: {worst['worst batch']}"
        )
    return result


def resumed(folder: Path, name: str, of: Mapping[str, Any], stage: Callable[[], Result]) -> Result:
    """Run a stage and write its result, or take the result that is there.

    Args:
        folder: Holds ``<name>.json``.
        name: Of the stage.
        of: What it depends on. A result of something else is not taken, nor is that of a stage that failed or was not
            run.
        stage: Runs it.
    """
    file = folder / f"{name}.json"
    try:
        before: Result = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        before = {}
    if before.get("status") == "ok" and before.get("of") == dict(of):
        print(f"{name}: done before")
        return before
    print(f"{name} ...", flush=True)
    result = {**stage(), "of": dict(of)}
    write_text(file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(f"{name}: {result['status']}" + (f": {result['error']}" if result["error"] else ""), flush=True)
    return result


def write_text(file: Path, text: str) -> None:
    """All of it or nothing."""
    from hpo_plugin.files import atomic_write

    atomic_write(file, text.encode())


def prove(given: argparse.Namespace, folder: Path) -> int:
    """Run all stages.

    Returns:
        The exit status.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = {"environment": resumed_environment(given, folder)}
    facts = {row["name"]: row["found"] for row in results["environment"]["rows"]}
    asked = {name: value for name, value in vars(given).items() if name not in ("output", "accept")}
    stages: dict[str, tuple[Mapping[str, Any], Callable[[], Result]]] = {
        "correctness": (facts, lambda: check_exactness(given.device)),
        "timing": (facts, lambda: time_it(given.device)),
        "training": (asked, lambda: train(given, folder, facts)),
    }
    for name, (of, stage) in stages.items():
        if any(result["status"] == "failed" for result in results.values()):
            break
        write_text(folder / PAGE, page(results, given, folder))
        results[name] = resumed(folder, name, of, stage)
    write_text(folder / PAGE, page(results, given, folder))
    print(f"results: {folder / PAGE}")
    return 1 if any(result["status"] == "failed" for result in results.values()) else 0


def resumed_environment(given: argparse.Namespace, folder: Path) -> Result:
    """The first stage, which is run every time: the others are repeated where something has changed."""
    (folder / "environment.json").unlink(missing_ok=True)
    run = lambda: measure("environment", package="benchmarks.gpu", arguments=[given.device])  # noqa: E731
    return resumed(folder, "environment", {"device": given.device}, run)


# --- the page ------------------------------------------------------------------------------------------------------


def page(results: Mapping[str, Result], given: argparse.Namespace, folder: Path) -> str:
    """The results as Markdown.

    Args:
        results: Of the stages so far.
        given: The arguments.
        folder: Of the page; pictures are linked relative to it.
    """
    rehearsal = given.device == "cpu"
    lines = [f"# GPU proof: {given.task}, {given.model}, {given.engine}{', rehearsed on the CPU' if rehearsal else ''}"]
    if rehearsal:
        lines.append("**A rehearsal without a GPU, with a small model: nothing here is a result of a GPU.**")
    state = {name: results[name]["status"] if name in results else "not reached" for name in STAGE_TITLES}
    lines.append("\n".join(f"- {title}: {state[name]}" for name, title in STAGE_TITLES.items()))
    lines.append(f'Written by `make gpu-proof ARGS="{shlex.join(arguments_of(given))}"`; the same command resumes.')
    for name, title in STAGE_TITLES.items():
        if name not in results:
            continue
        result = results[name]
        lines.append(f"## {title}")
        if result["status"] == "not run":
            lines.append(f"Not run: {result['error']}.")
        elif result["status"] == "failed":
            lines.append(f"**Failed.**\n\n```text\n{(result['error'] or '').strip()}\n```")
        if result["rows"]:
            lines += [STAGE_TEXTS[name], markdown(without_empty_columns(result["rows"]))]
        if name == "training" and result["status"] == "ok":
            pictures = [f"report/training/pair-{kind}.png" for kind in ("reward", "held-out", "alpha")]
            lines += [f"![{Path(name).stem}]({name})" for name in pictures if (folder / name).exists()]
            lines.append("All figures and their definitions: [report](report/training.md).")
            lines.append("Logs: `training/cells/*/attempt-*/trainer.log`.")
    return "\n\n".join(line for line in lines if line) + "\n"


def without_empty_columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the keys whose value is empty in all of them."""
    used = [key for key in rows[0] if any(row[key] not in (None, "") for row in rows)]
    return [{key: row[key] for key in used} for row in rows]


STAGE_TITLES = {
    "environment": "Environment",
    "correctness": "Correctness",
    "timing": "Timing",
    "training": "Training",
}
STAGE_TEXTS = {
    "environment": "",
    "correctness": (
        "Estimator and both losses on the device, against references in fp64 on the CPU. The error is in units of the "
        "tolerance, a multiple of the machine epsilon (`benchmarks/gpu/exactness.py`): above 1 it is wrong."
    ),
    "timing": (
        "Medians of rounds in which ours and verl's take turns; a ratio above 1 says that ours is faster. The share of "
        "the copy bandwidth is the time in which the device would copy the bytes that must at least move, divided by "
        "the measured time (`benchmarks/gpu/timing.py`)."
    ),
    "training": "One seed: a difference between the two rows is no finding about the algorithms.",
}


def arguments_of(given: argparse.Namespace) -> list[str]:
    """The command's arguments that lead to the same results."""
    words = [f"--{name}={getattr(given, name)}" for name in ("device", "task", "model", "engine", "steps", "source")]
    words += ["--skip-training"] if given.skip_training else []
    return [*words, f"--output={given.output}", *given.overrides]


# --- the run over two nodes ----------------------------------------------------------------------------------------


def acceptance(directory: Path) -> list[tuple[str, bool]]:
    """Judge a run of ``hpo-plugin launch`` over two nodes of which one was lost: criterion, and whether it is met.

    Args:
        directory: ``--run-dir`` of the launch.
    """
    from omegaconf import OmegaConf

    from hpo_plugin.runs.directory import Run
    from hpo_plugin.runs.verl_log import read_rows

    run = Run(directory)
    if not run.finished:
        return [("the run is finished (result.json)", False)]
    attempts, last = run.attempts(), int(run.result()["steps"])
    rows = read_rows(directory / "metrics.jsonl")
    config = OmegaConf.load(attempts[0].directory / "hydra" / ".hydra" / "config.yaml")
    alpha_min = float(OmegaConf.select(config, "algorithm.hpo.alpha_min", default=0.1))
    nodes = int(config.trainer.nnodes)
    training = [values for step, values in rows.items() if step > 0]

    def follows_from_shares(values: Mapping[str, float]) -> bool:
        positive, negative = values["actor/hpo/share_positive"], values["actor/hpo/share_negative"]
        expected = min(max(positive / negative, alpha_min), 1.0) if negative else 1.0
        return abs(values["actor/hpo/alpha"] - expected) <= 1e-4

    resumed_from = [attempt.resumed_from for attempt in attempts]
    return [
        (f"trainer.nnodes is 2 or more ({nodes})", nodes >= 2),
        (f"every step from 1 to {last} is logged once", [step for step in rows if step > 0] == [*range(1, last + 1)]),
        (f"a later attempt resumed from a checkpoint (attempts began from {resumed_from})", any(resumed_from[1:])),
        (
            "α of every step is clip(p̂⁺ / p̂⁻, α_min, 1) of its logged shares",
            all("actor/hpo/alpha" in values and follows_from_shares(values) for values in training),
        ),
        (
            "the gradient norm of every step is finite",
            all(math.isfinite(values.get("actor/grad_norm", math.nan)) for values in training),
        ),
    ]


# --- the command line ----------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="make gpu-proof", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses without a GPU")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="what is trained; default: %(default)s")
    parser.add_argument("--model", choices=list(MODELS), default="qwen2.5-1.5b", help="default: %(default)s")
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="verl's actor; default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="of each training; default: %(default)s")
    parser.add_argument(
        "--source",
        default="synthetic",
        help="of the data, as for `hpo-plugin prepare`; the gated TeleLogs with your token: hub; default: %(default)s",
    )
    parser.add_argument("--skip-training", action="store_true", help="correctness and timing only")
    parser.add_argument("--output", type=Path, help="default: runs/gpu-proof/<task>-<model>-<engine>, or …-cpu")
    parser.add_argument("--accept", type=Path, metavar="RUN_DIR", help="judge a launched run; nothing else is done")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of both trainings")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error(f"--steps {given.steps} must be at least 1")
    if given.output is None:
        name = f"{given.task}-{given.model}-{given.engine}{'-cpu' if given.device == 'cpu' else ''}"
        given.output = Path("runs") / "gpu-proof" / name
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status."""
    given = parse(arguments)
    if given.accept is not None:
        found = acceptance(given.accept)
        for criterion, met in found:
            print(f"{'ok  ' if met else 'FAIL'}  {criterion}")
        return 0 if all(met for _, met in found) else 1
    if problem := missing(given.device):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    from hpo_plugin.check.signals import interruptible

    try:
        with interruptible():
            return prove(given, given.output)
    except KeyboardInterrupt as ended:
        name = str(ended) or "SIGINT"
        print(f"\nStopped by {name}; the same command resumes.")
        return 128 + signal.Signals[name]


if __name__ == "__main__":
    sys.exit(main())
