"""What the contribution to verl consists of.

Two kinds of text, both written by this project: whole files (``files/``, at their place in verl with ``.in`` appended)
and texts that are inserted into verl's own files (``snippets/``, :data:`INSERTIONS`). The flattened configs
``verl/trainer/config/_generated_*.yaml`` are composed anew. A tree without ``docs``, ``examples`` or ``tests``, such as
that of verl's wheel, gets the rest.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import yaml

from contrib.upstream.edits import AfterDefinition, AfterField, AfterKey, AfterLine
from contrib.upstream.tree import Contribution, Insertion, UnknownTreeError, changed, in_one_line, texts

__all__ = ["TITLE", "changes"]

#: Of the commit and of the pull request, in the form that verl's tests/special_sanity/check_pr_title.py asks for.
TITLE = "[algo, cfg, doc] feat: add HPO and A-HPO advantage estimators"

HERE = Path(__file__).parent
FILES = HERE / "files"
SNIPPETS = HERE / "snippets"
CONFIGS = "verl/trainer/config"

CORE_ALGOS = "verl/trainer/ppo/core_algos.py"

INSERTIONS = (
    Insertion(CORE_ALGOS, AfterField("AdvantageEstimator"), SNIPPETS / "enum.py.in"),
    Insertion(CORE_ALGOS, AfterDefinition("compute_grpo_vectorized_outcome_advantage"), SNIPPETS / "estimator.py.in"),
    Insertion(f"{CONFIGS}/algorithm.py", AfterField("AlgoConfig"), SNIPPETS / "algo_field.py.in"),
    Insertion(
        f"{CONFIGS}/ppo_trainer.yaml", AfterKey("algorithm.norm_adv_by_std_in_grpo"), SNIPPETS / "algorithm.yaml.in"
    ),
    Insertion("docs/index.rst", AfterLine("   algo/"), SNIPPETS / "index.rst.in"),
    Insertion("examples/README.md", AfterLine("| `sapo_trainer/`"), SNIPPETS / "examples.md.in"),
)

CONTRIBUTION = Contribution(
    package="verl",
    known="verl 0.9.0, 0.9.1 and its main branch as of August 2026",
    files=FILES,
    insertions=INSERTIONS,
    another=r"""["']a?hpo["']""",
)


def changes(tree: Path) -> dict[str, str]:
    """What the contribution changes in a source tree of verl; the tree itself is left as it is.

    Args:
        tree: a git checkout, an unpacked source distribution, or the directory that holds an installed ``verl``.

    Returns:
        Path in the tree (posix) -> the whole new text; empty if the tree has the contribution already.

    Raises:
        UnknownTreeError: if an anchor is missing, or the tree has HPO in another form.
    """
    made = texts(CONTRIBUTION, tree)
    return changed(tree, made | _generated_configs(tree, made))


_HEADER = re.compile(r"print_cfg\.py --cfg job ?(?P<overrides>[^']*)' to flatten the '[^']*/(?P<config>\w+)\.yaml'")


def _generated_configs(tree: Path, texts: dict[str, str]) -> dict[str, str]:
    """The flattened configs, as verl's scripts/generate_trainer_config.sh writes them; each names its own command."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    generated = {}
    with tempfile.TemporaryDirectory() as temporary:
        configs = Path(temporary) / "config"
        shutil.copytree(tree / CONFIGS, configs)
        for name, text in texts.items():
            if name.startswith(f"{CONFIGS}/"):
                (configs / name.removeprefix(f"{CONFIGS}/")).write_text(text, encoding="utf-8")
        for path in sorted(configs.glob("_generated_*.yaml")):
            header = path.read_text(encoding="utf-8").partition("\n\n")[0]
            command = _HEADER.search(header)
            if command is None:
                raise UnknownTreeError(f"{tree / CONFIGS / path.name} does not say how it was generated")
            GlobalHydra.instance().clear()
            try:
                with initialize_config_dir(str(configs), version_base=None):
                    config = compose(command["config"], overrides=command["overrides"].split())
            except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
                raise UnknownTreeError(
                    f"{tree / CONFIGS / command['config']}.yaml, of which {path.name} is made, cannot be composed: "
                    f"{in_one_line(error)}"
                ) from error
            body = OmegaConf.to_yaml(config)
            generated[f"{CONFIGS}/{path.name}"] = f"{header}\n\n{body[body.index('actor_rollout_ref:') :]}"
    return generated
