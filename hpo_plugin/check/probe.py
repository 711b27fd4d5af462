"""Probes what is installed and registered in a process.

Ray workers get this module by value, because a node may not have this package, or may have another version of it.
Therefore the functions import the package when they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Distributions whose versions are compared between nodes.
CHECKED_PACKAGES = ("hpo-plugin", "verl", "torch", "ray", "tensordict", "transformers", "TransferQueue")


def probe(files: Sequence[tuple[str, str]] = (), shared: str | None = None) -> dict[str, Any]:
    """Probe this process.

    Args:
        files: Config keys and their local files or directories, all of which must exist.
        shared: A file in a directory that all nodes must share and be able to write to.

    Returns:
        A dictionary with these keys:

        - ``host`` and ``python`` (str);
        - ``versions``: distribution -> version, or None if it is not installed;
        - ``code``: a short hash of the mathematics and the adapter, because two copies of one version may differ;
        - ``problems``: (problem, remedy) pairs, empty if HPO and A-HPO can be used in this process;
        - ``built_in``: the parts of HPO that verl itself provides, in one line, or None.
    """
    import platform
    import socket

    problems = _registration_problems() + _file_problems(files, shared)
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in CHECKED_PACKAGES},
        "code": _code_hash(),
        "problems": problems,
        "built_in": None if problems else _built_in(),
    }


def _file_problems(files: Sequence[tuple[str, str]], shared: str | None) -> list[tuple[str, str]]:
    import os
    import tempfile

    problems = [
        (f"{key}={path} does not exist on this node", "use an absolute path that exists on every node")
        for key, path in files
        if not os.path.exists(os.path.expanduser(path))
    ]
    if shared is None:
        return problems
    directory = os.path.dirname(shared)
    # It contains trainer.default_local_dir: every rank writes its part of a checkpoint, and all ranks read it.
    remedy = "set --run-dir to a directory on a file system that all nodes share and can write to"
    if not os.path.exists(shared):
        return [*problems, (f"the run directory {directory} is not shared with this node, or does not exist", remedy)]
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        problems.append((f"the run directory {directory} is not writable: {_one_line(error)}", remedy))
    return problems


def _built_in() -> str | None:
    from verl.trainer.ppo import core_algos

    from hpo_plugin.verl.registration import describe_built_in

    return describe_built_in(core_algos)


def _version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _code_hash() -> str | None:
    import hashlib
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("hpo_plugin")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    digest = hashlib.sha256()
    for path in sorted([root / "algorithm.py", root / "variants.py", root / "fused.py", *root.glob("verl/*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _plugin_problems() -> list[tuple[str, str]]:
    """Why verl did not load the entry point; verl does not report it."""
    import importlib
    import os
    import sys
    from importlib import metadata

    if "hpo_plugin.verl.plugin" in sys.modules:
        failure = sys.modules["hpo_plugin.verl.plugin"].FAILURE
        return [(f"the plugin could not be loaded: {failure}", "correct the cause of this error")] if failure else []
    import verl
    from packaging.version import Version

    if Version(verl.__version__).release < (0, 9):
        module = "hpo_plugin.verl.plugin"
        return [
            (
                f"verl {verl.__version__} loads no plugins",
                f"set VERL_USE_EXTERNAL_MODULES={module} in the environment of the command, and add the override "
                f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES={module} for Ray's workers",
            )
        ]
    points = [point for point in metadata.entry_points(group="verl.plugins") if point.name == "hpo"]
    if not points:
        return [
            (
                "the installed packages declare no entry point hpo in the group verl.plugins",
                "install hpo-plugin with pip install; PYTHONPATH is not sufficient",
            )
        ]
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and "hpo" not in {name.strip() for name in policy.split(",")}:
        return [
            (
                f"VERL_USE_EXTERNAL_PLUGINS={policy} excludes the entry point hpo",
                "unset it, or add hpo to the list, in the environment of every node",
            )
        ]
    try:
        importlib.import_module(points[0].module)
    except Exception as error:
        return [(f"the plugin could not be loaded: {_one_line(error)}", "correct the cause of this error")]
    return [
        (
            "verl did not load the entry point hpo, although it can be loaded now",
            "a package may import verl before sys.path or the environment is complete; import verl later",
        )
    ]


def has_v1_trainer() -> bool:
    """Whether the installed verl has the V1 trainer, which 0.8 does not have. True if verl is not installed."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("verl")
    return spec is None or spec.origin is None or (Path(spec.origin).parent / "trainer/ppo/v1").is_dir()


def _registration_problems() -> list[tuple[str, str]]:
    import importlib

    problems: list[tuple[str, str]] = []
    # Repeated from hpo_plugin.verl.seams, because a node may not have this package.
    seams = {
        "verl.utils.config": "validate_config",
        "verl.trainer.main_ppo": "run_ppo",
        "verl.trainer.ppo.metric_utils": "compute_data_metrics",
        "verl.trainer.ppo.v1.utils": "compute_advantage_for_multi_trajectories",
    }
    if not has_v1_trainer():
        del seams["verl.trainer.ppo.v1.utils"]
    modules = {}
    for name in ("verl.trainer.ppo.core_algos", *seams):
        try:
            modules[name] = importlib.import_module(name)
        except Exception as error:
            problems.append(
                (
                    f"{name} cannot be imported: {_one_line(error)}",
                    "correct the cause of this error, or install the missing package",
                )
            )
            break
    plugin = _plugin_problems()
    if problems or plugin:
        # Report only the cause, not the errors that follow from it.
        return plugin + problems
    try:
        from hpo_plugin.verl.registration import require_registered

        for name in ("hpo", "ahpo"):
            require_registered(name, name)
    except Exception as error:
        return [(_one_line(error), "correct the cause of this error")]
    return [
        (f"another package has replaced {module}.{function}", "import hpo_plugin after that package")
        for module, function in seams.items()
        if not hasattr(getattr(modules[module], function), "__wrapped__")
    ]
