"""What is installed and registered in a process. Shipped by value to Ray workers, so it imports this package lazily.

A node may lack the package, or have another version of it: that is what the probe is there to find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Distributions whose versions are compared between nodes.
CHECKED_PACKAGES = ("hpo-plugin", "verl", "torch", "ray", "tensordict", "transformers", "TransferQueue")


def probe(files: Sequence[tuple[str, str]] = (), shared: str | None = None) -> dict[str, Any]:
    """Look at this process.

    Args:
        files: Config keys and their local files or directories, each of which has to be there.
        shared: A file in a directory that all nodes have to share, and to be able to write.

    Returns:
        ``host`` and ``python`` (str), ``versions`` (distribution -> version, None where it is not installed), ``code``
        (a short hash of the mathematics and the adapter: two copies of one version may differ), ``seconds`` (float),
        ``problems``: (what is wrong, what to do) pairs, empty if HPO and A-HPO can be used here, and ``built_in``:
        what verl itself provides of them, in one line, or None.
    """
    import platform
    import socket
    import time

    begin = time.monotonic()
    problems = _registration_problems() + _file_problems(files, shared)
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in CHECKED_PACKAGES},
        "code": _code_hash(),
        "problems": problems,
        "built_in": None if problems else _built_in(),
        "seconds": time.monotonic() - begin,
    }


def _file_problems(files: Sequence[tuple[str, str]], shared: str | None) -> list[tuple[str, str]]:
    import os
    import tempfile

    problems = [
        (f"{key}={path} is not there", "put it where every node finds it, under the same absolute path")
        for key, path in files
        if not os.path.exists(os.path.expanduser(path))
    ]
    if shared is None:
        return problems
    directory = os.path.dirname(shared)
    # trainer.default_local_dir lies in it: every rank writes its part of a checkpoint, and all of them read it again.
    remedy = "take a --run-dir on a file system that all nodes share and can write to"
    if not os.path.exists(shared):
        return [*problems, (f"the run directory {directory} is another one here, or not there", remedy)]
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        problems.append((f"the run directory {directory} cannot be written to: {_one_line(error)}", remedy))
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
    """Why verl did not load the entry point, which it does not say itself."""
    import importlib
    import os
    import sys
    from importlib import metadata

    if "hpo_plugin.verl.plugin" in sys.modules:
        failure = sys.modules["hpo_plugin.verl.plugin"].FAILURE
        return [(f"the plugin could not load: {failure}", "correct the cause named here")] if failure else []
    import verl
    from packaging.version import Version

    if Version(verl.__version__).release < (0, 9):
        module = "hpo_plugin.verl.plugin"
        return [
            (
                f"verl {verl.__version__} loads no plugins",
                f"set VERL_USE_EXTERNAL_MODULES={module} in the environment of the command, and for Ray's workers "
                f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES={module}",
            )
        ]
    points = [point for point in metadata.entry_points(group="verl.plugins") if point.name == "hpo"]
    if not points:
        return [
            (
                "the installed packages declare no entry point hpo in the group verl.plugins",
                "install hpo-plugin (pip install), rather than putting it on PYTHONPATH",
            )
        ]
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and "hpo" not in {name.strip() for name in policy.split(",")}:
        return [
            (
                f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps the entry point hpo out",
                "unset it, or add hpo to the list, in the environment of every node",
            )
        ]
    try:
        importlib.import_module(points[0].module)
    except Exception as error:
        return [(f"the plugin could not load: {_one_line(error)}", "correct the cause named here")]
    return [
        (
            "verl did not load the entry point hpo, although it loads now",
            "look for a package that imports verl before the environment is complete",
        )
    ]


def has_v1_trainer() -> bool:
    """Whether this verl has the V1 trainer: 0.8 does not. True without a verl."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("verl")
    return spec is None or spec.origin is None or (Path(spec.origin).parent / "trainer/ppo/v1").is_dir()


def _registration_problems() -> list[tuple[str, str]]:
    import importlib

    problems: list[tuple[str, str]] = []
    # The modules of hpo_plugin.verl.plugin's hooks, which a node may lack.
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
                (f"{name} cannot be imported: {_one_line(error)}", "correct the cause, or install what is missing")
            )
            break
    plugin = _plugin_problems()
    if problems or plugin:
        # The cause, once: what follows from it would only be more text.
        return plugin + problems
    try:
        from hpo_plugin.verl.registration import require_registered

        for name in ("hpo", "ahpo"):
            require_registered(name, name)
    except Exception as error:
        return [(_one_line(error), "correct the cause named here")]
    return [
        (f"{module}.{function} is not this package's", "another package replaced it; import hpo_plugin later")
        for module, function in seams.items()
        if not hasattr(getattr(modules[module], function), "__wrapped__")
    ]
