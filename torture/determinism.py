"""What is equal bit for bit between two processes with other numbers of threads, CPU cores and hash seeds.

    python -m torture.determinism FOLDER PART...

computes the parts (:data:`PARTS`) in this process and writes the digests of their results to ``FOLDER/digests.json``.
:func:`computed` runs this command in another environment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torture.probe import Probe, Result

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
#: Shapes of batches: small, larger than the block of a thread, and with more rows than torch sums in one thread.
SHAPES = ((64, 300), (2048, 512), (40_000, 8))
GROUP = 8


# --- the parts -----------------------------------------------------------------------------------------------------


def rollout(responses: int, tokens: int, *, dense: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and mask of a batch: a reward on each token, or one of 0, 0.1, …, 1 on the last token."""
    import torch

    generator = torch.Generator().manual_seed(responses)
    lengths = torch.randint(1, tokens + 1, (responses, 1), generator=generator)
    mask = (torch.arange(tokens) < lengths).long()
    if dense:
        return torch.randn(responses, tokens, generator=generator) * mask, mask
    scores = torch.randint(0, 11, (responses, 1), generator=generator) / 10
    return torch.zeros(responses, tokens).scatter_(1, lengths - 1, scores), mask


def weighted_advantages(rewards: torch.Tensor, mask: torch.Tensor, groups: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The result of A-HPO for a batch, and the advantages of its tokens, as verl's adapter computes them."""
    from hpo_plugin import algorithm, fused

    reward, magnitude = fused.rewards_of_responses(rewards)
    result = algorithm.hysteretic_advantage(
        reward,
        groups,
        lambda counts: algorithm.adaptive_alpha(counts, 0.1),
        valid=fused.responses_with_tokens(mask),
        magnitude=magnitude,
        lengths=mask.sum(dim=1),
    )
    return result, fused.spread_over_tokens(result.weighted, mask)


def policy_loss(
    log_prob: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]]:
    """The loss, its gradient, and the sums for the metrics."""
    from hpo_plugin import fused

    leaf = log_prob.detach().clone().requires_grad_()
    loss, sums = fused.surrogate_loss(leaf, old, advantages, mask, scale=scale, clip_low=0.2, clip_high=0.28)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, sums


def update(
    responses: int, tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, older ones, advantages and mask of a micro-batch."""
    import torch

    generator = torch.Generator().manual_seed(tokens)
    new = -3 * torch.rand(responses, tokens, generator=generator)
    old = new + 0.3 * torch.randn(responses, tokens, generator=generator)
    advantages = torch.randn(responses, 1, generator=generator)
    return new.to(dtype), old.to(dtype), advantages, torch.rand(responses, tokens, generator=generator) < 0.8


def _advantages(_: Path) -> dict[str, np.ndarray]:
    import torch

    found = {}
    for responses, tokens in SHAPES:
        for dense in (False, True):
            rewards, mask = rollout(responses, tokens, dense=dense)
            result, spread = weighted_advantages(rewards, mask, torch.arange(responses) // GROUP)
            name = f"{responses}x{tokens} {'dense' if dense else 'outcome'}"
            found[f"advantages {name}"] = spread.numpy()
            found[f"statistics {name}"] = np.array(result.statistics, dtype=np.float64)
    return found


def _loss(_: Path) -> dict[str, np.ndarray]:
    import torch

    found: dict[str, np.ndarray] = {}
    for responses, tokens in SHAPES:
        batch = update(responses, tokens, torch.float32)
        loss, gradient, sums = policy_loss(*batch, scale=1 / float(batch[-1].sum()))
        name = f"{responses}x{tokens}"
        found[f"gradient {name}"] = gradient.numpy()
        found[f"loss {name}"] = loss.numpy()
        # Means over the tokens, as metrics are.
        found[f"sums {name}"] = (torch.stack(list(sums)) / tokens).numpy()
    return found


def _data(folder: Path) -> dict[str, np.ndarray]:
    from hpo_plugin.tasks.task import load_task

    found: dict[str, np.ndarray] = {}
    given: dict[str, dict[str, Any]] = {
        "countdown": {"train_size": 256, "test_size": 64, "counts": (3, 4), "max_number": 30},
        "telelogs": {"train_size": 24, "test_size": 8, "sft": True, "relabeled": True},
    }
    for name, options in given.items():
        task = load_task(name)
        task.prepare(folder / name, task.Options(**options))
        found |= _files(folder / name)
    return found


def _start_model(folder: Path) -> dict[str, np.ndarray]:
    import pyarrow.parquet as pq

    from hpo_plugin.quickstart.start_model import StartModelConfig, build_start_model
    from hpo_plugin.tasks.task import load_task

    task = load_task("countdown")
    options: dict[str, Any] = {"counts": (3,), "max_number": 12, "layout": "terse"}
    made = task.prepare(folder / "data", task.Options(train_size=200, test_size=16, **options))
    train, test = (pq.read_table(made.files[split]).to_pylist() for split in ("train", "test"))
    config = StartModelConfig(hidden_size=32, layers=1, intermediate_size=32, steps=4, batch_size=8)
    build_start_model(folder / "model", task, train, test, config=config)
    return {"model.safetensors": _bytes(folder / "model" / "model.safetensors")}


def _report(folder: Path) -> dict[str, np.ndarray]:
    from hpo_plugin.study.cells import Workspace
    from hpo_plugin.study.collect import collect
    from hpo_plugin.study.data import read_data
    from hpo_plugin.study.report import build_report, write_report
    from hpo_plugin.study.spec import load_study
    from torture.scale import write_study

    study = load_study(write_study(folder, 10, 8))
    # The file has no path of a machine.
    collect(Workspace(study, folder / "runs"), folder / "study.parquet", prune=False)
    write_report(build_report(study, read_data(folder / "study.parquet")), folder / "report", png=False)
    return {"study.parquet": _bytes(folder / "study.parquet"), **_files(folder / "report")}


def _simulated(folder: Path) -> dict[str, np.ndarray]:
    from hpo_plugin.quickstart.form import ENVIRONMENT
    from hpo_plugin.study.simulated import simulate_cell

    _start_model(folder)
    overrides = [
        *("algorithm.policy_loss=ahpo", "data.seed=3", "trainer.total_training_steps=3", "trainer.test_freq=3"),
        *("data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=4"),
        f"data.train_files={folder / 'data' / 'train.parquet'}",
        f"data.val_files={folder / 'data' / 'test.parquet'}",
        f"actor_rollout_ref.model.path={folder / 'model'}",
    ]
    simulate_cell("countdown_cpu", overrides, ENVIRONMENT, folder / "metrics.jsonl")
    rows = [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        name: np.array([row.get(name, np.nan) for row in rows])
        for name in sorted({name for row in rows for name in row if not name.startswith("timing_s/")})
    }


def _bytes(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), dtype=np.uint8)


def _files(folder: Path) -> dict[str, np.ndarray]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder.parent).as_posix(): _bytes(path) for path in paths}


#: Part -> what computes its results, by name. The argument is an empty directory.
PARTS: Mapping[str, Callable[[Path], dict[str, np.ndarray]]] = {
    "advantages": _advantages,
    "loss": _loss,
    "data": _data,
    "start-model": _start_model,
    "report": _report,
    "simulator": _simulated,
}


# --- processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """What a process is started with.

    Attributes:
        threads: ``OMP_NUM_THREADS``; None leaves the number to torch.
        cores: Number of the CPU cores that the process may use; None for all.
        hash_seed: ``PYTHONHASHSEED``.
        instructions: ``ATEN_CPU_CAPABILITY``, the instruction set of torch's kernels, as on an older CPU.
    """

    threads: int | None = None
    cores: int | None = None
    hash_seed: int = 0
    instructions: str | None = None

    def variables(self) -> dict[str, str]:
        """Its environment variables."""
        given = {
            name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        }
        given |= {"PYTHONHASHSEED": str(self.hash_seed)}
        given |= {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        given |= {} if self.instructions is None else {"ATEN_CPU_CAPABILITY": self.instructions}
        return given | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])}


ENVIRONMENTS = (
    Environment(threads=1, hash_seed=1),
    Environment(threads=4, hash_seed=2),
    Environment(cores=1, hash_seed=3),
    Environment(threads=8, cores=2, hash_seed=4),
)


def computed(
    environments: Iterable[Environment], parts: Sequence[str], folder: Path, *, save: bool = False
) -> list[dict[str, str]]:
    """The digests of the results of some parts, in processes with some environments, at the same time.

    Args:
        environments: each has a process.
        parts: names of :data:`PARTS`.
        folder: gets a directory for each process.
        save: whether to also write the results, to ``results.npz``.

    Raises:
        RuntimeError: a process failed.
    """
    started = []
    for number, environment in enumerate(environments):
        work = folder / f"process-{number}"
        work.mkdir(parents=True)
        command = [sys.executable, "-m", "torture.determinism", str(work), *parts]
        command += [] if environment.cores is None else [f"--cores={environment.cores}"]
        command += ["--save"] if save else []
        with (work / "output.log").open("wb") as log:
            process = subprocess.Popen(command, env=environment.variables(), stdout=log, stderr=subprocess.STDOUT)
        started.append((work, process))
    try:
        for work, process in started:
            if process.wait():
                raise RuntimeError(f"exit status {process.returncode}: {(work / 'output.log').read_text()[-2000:]}")
    finally:
        for _, process in started:
            process.kill()
            process.wait()
    return [json.loads((work / "digests.json").read_bytes()) for work, _ in started]


def differences(digests: Sequence[Mapping[str, str]]) -> list[str]:
    """The names of results that are not equal in all processes, or that a process does not have."""
    names = {name for found in digests for name in found}
    return sorted(name for name in names if len({found.get(name) for found in digests}) > 1)


def compare(parts: Sequence[str], folder: Path) -> Result:
    """Compute some parts in each of :data:`ENVIRONMENTS`; each result must be equal bit for bit."""
    digests = computed(ENVIRONMENTS, parts, folder)
    result = Result(inputs=len(digests[0]), counts={"processes": len(digests)})
    result.failures += [f"{name} differs between processes" for name in differences(digests)]
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute parts in this process."""
    parser = argparse.ArgumentParser(prog="python -m torture.determinism", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="+", choices=list(PARTS), metavar="PART")
    parser.add_argument("--cores", type=int, help="number of the CPU cores to use")
    parser.add_argument("--save", action="store_true", help="also write the results")
    given = parser.parse_args(arguments)
    if given.cores is not None:
        # Before torch is imported, which creates as many threads as there are cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    results: dict[str, np.ndarray] = {}
    for part in given.parts:
        work = given.folder / part
        work.mkdir()
        results |= {f"{part}: {name}": value for name, value in PARTS[part](work).items()}
    digests = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in results.items()}
    if given.save:
        np.savez(given.folder / "results.npz", **results)  # type: ignore[arg-type]
    (given.folder / "digests.json").write_text(json.dumps(digests), encoding="utf-8")
    return 0


PROBES = tuple(
    Probe(
        f"determinism-{name}",
        "determinism",
        f"{what} in processes with 1, 4 and 8 threads, one and two CPU cores, and other hash seeds",
        "equal bit for bit",
        {name: partial(compare, [name])},
    )
    for name, what in {
        "advantages": "advantages and statistics of six batches",
        "loss": "loss, gradient and metrics of three micro-batches",
        "data": "Countdown and TeleLogs data",
        "start-model": "a start model",
        "report": "collected data and report of a study",
        "simulator": "metrics of a simulated run",
    }.items()
)


if __name__ == "__main__":
    sys.exit(main())
