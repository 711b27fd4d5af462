"""``python -m hpo_plugin.openrlhf``: OpenRLHF's own command, with α applied where it computes the advantages.

Two functions are wrapped in the driver. OpenRLHF's command calls ``hierarchize`` with the arguments it has parsed: here
they are checked, and ``args.hpo`` is added. ``ray.init`` gets the ``worker_process_setup_hook`` beside the runtime
environment that OpenRLHF asks for.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import ray
import wrapt
from packaging.version import Version

from hpo_plugin.errors import ConfigError
from hpo_plugin.openrlhf.experience import check_arguments
from hpo_plugin.openrlhf.hook import MAKER, METHOD
from hpo_plugin.variants import VARIANTS, resolve, settings

__all__ = ["main", "require_openrlhf"]

COMMAND = "openrlhf.cli.train_ppo_ray"
ARGUMENTS = ("openrlhf.utils.config", "hierarchize")
HOOK = "worker_process_setup_hook"
OPENRLHF_VERSIONS = ("0.11", "0.12")


def require_openrlhf() -> None:
    """Check that the installed OpenRLHF version is supported.

    Raises:
        ImportError: Another version, or one that lacks what is wrapped.
    """
    found = version("openrlhf")
    first, end = OPENRLHF_VERSIONS
    if not Version(first) <= Version(found) < Version(end):
        raise ImportError(
            f"hpo_plugin.openrlhf needs openrlhf>={first},<{end}, but openrlhf {found} is installed; run: "
            f'pip install "openrlhf>={first},<{end}"'
        )
    for module, name in ((MAKER, METHOD), ARGUMENTS):
        try:
            wrapt.resolve_path(module, name)
        except AttributeError as error:
            raise ImportError(
                f"openrlhf {found} has no {module}.{name}, which hpo_plugin.openrlhf needs. Install another "
                "version; docs/openrlhf.md lists the tested ones."
            ) from error


def main() -> None:
    """Run OpenRLHF's command with the arguments of ``sys.argv`` that are not options of HPO.

    Raises:
        ConfigError: A setting out of range, or an argument of OpenRLHF under which the loss is not HPO's.
        ImportError: See :func:`require_openrlhf`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hpo_plugin.openrlhf",
        usage=f"%(prog)s [--hpo.policy {{{','.join(VARIANTS)}}}] … <arguments of {COMMAND}>",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--hpo.policy", metavar="NAME", default="ahpo", help="variant of HPO; default ahpo")
    for name, setting in settings().items():
        text = f"{setting.description}; default {setting.default:g}"
        parser.add_argument(f"--hpo.{name}", metavar="NUMBER", type=float, help=text)
    given, sys.argv[1:] = parser.parse_known_args()
    if {"-h", "--help"} & set(sys.argv[1:]):
        parser.print_help()
    options = {name.removeprefix("hpo."): value for name, value in vars(given).items()}
    variant, values = resolve(options.pop("policy"), options, prefix="--hpo.")
    require_openrlhf()
    if ray.is_initialized():
        raise ConfigError("Ray is already initialized, without the hook that applies α. Let OpenRLHF call ray.init.")

    def checked(wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        nested = wrapped(*args, **kwargs)
        check_arguments(nested)
        nested.hpo = SimpleNamespace(variant=variant, settings=values)
        print(variant.describe(values), flush=True)
        return nested

    def with_hook(wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        environment = {**(kwargs.get("runtime_env") or {}), HOOK: "hpo_plugin.openrlhf.hook.install"}
        return wrapped(*args, **{**kwargs, "runtime_env": environment})

    wrapt.wrap_function_wrapper(*ARGUMENTS, checked)
    wrapt.wrap_function_wrapper("ray", "init", with_hook)
    runpy.run_module(COMMAND, run_name="__main__", alter_sys=True)
