"""Commands that recipes print are ones that verl accepts; all compositions are, and say where their values are from."""

import re
import shlex
from itertools import product
from pathlib import Path

import pytest
import yaml

pytest.importorskip("verl")

from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.utils import need_reference_policy
from verl.utils.config import omega_conf_to_dataclass

from hpo_plugin.check.checks import check_algorithm, check_by_verl, check_config, check_recipe
from hpo_plugin.check.compose import compose
from hpo_plugin.errors import ConfigError
from hpo_plugin.recipe.layout import Layout, check_layout
from hpo_plugin.study.spec import load_study

ROOT = Path(__file__).parents[2]
GROUPS = ("task", "model", "engine", "cluster")
RECIPES = ROOT / "recipes"
CONFIGS = ROOT / "hpo_plugin" / "configs"
RECIPE_FILES = [
    CONFIGS / "hpo" / "countdown.yaml",
    *sorted(path for group in GROUPS for path in (CONFIGS / "hpo" / group).glob("*.yaml")),
]
PRESETS = ("grpo", "gspo", "sapo", "hpo", "ahpo")
TASKS = ("countdown3", "countdown4", "telelogs")
MODELS = ("qwen2.5-1.5b", "llama-3.2-3b", "qwen2.5-7b")
#: Engines whose memory docs/hardware.md has.
ENGINES = ("fsdp2", "megatron")
OTHER_ENGINES = ("veomni", "torchtitan")
CLUSTERS = {"1x8": (1, 8), "2x8": (2, 8), "4x8": (4, 8), "8x8": (8, 8), "64x8": (64, 8)}

#: What names runs and does not train: names, and the folders that are called after them.
BOOKKEEPING = {
    "algorithm.policy_loss",
    "trainer.experiment_name",
    "trainer.default_local_dir",
    "trainer.validation_data_dir",
    "actor_rollout_ref.rollout.trace.experiment_name",
}


def arguments(recipe: Path, name: str = "arguments") -> list[str]:
    """The words of a bash array in a recipe's README."""
    _, _, rest = recipe.read_text().partition(f"\n{name}=(\n")
    block, end, _ = rest.partition("\n)\n")
    assert end, f"{recipe} has no array named {name}"
    return shlex.split(block, comments=True)


def composed(config_name: str, *overrides: str) -> DictConfig:
    config, finding = compose(config_name, overrides)
    assert config is not None, finding
    return config


@pytest.fixture(scope="module")
def recipes() -> dict[tuple[str, str, str], DictConfig]:
    """Every task with every model and engine, composed as verl does it. To be copied before it is changed."""
    return {
        (task, model, engine): composed("hpo_recipe", f"hpo/task={task}", f"hpo/model={model}", f"hpo/engine={engine}")
        for task, model, engine in product(TASKS, MODELS, ENGINES)
    }


def with_preset(config: DictConfig, preset: str) -> DictConfig:
    """The same recipe with another algorithm: the key is one, and the rest follows by interpolation."""
    changed = config.copy()
    changed.algorithm.policy_loss = preset
    return changed


def on_cluster(config: DictConfig, cluster: str) -> DictConfig:
    changed = config.copy()
    changed.trainer.nnodes, changed.trainer.n_gpus_per_node = CLUSTERS[cluster]
    return changed


def flat(node: object, path: str = "") -> dict[str, object]:
    """Dotted paths of a resolved config to its leaves."""
    if isinstance(node, dict) and node:
        return {key: leaf for name, child in node.items() for key, leaf in flat(child, f"{path}.{name}").items()}
    return {path.removeprefix("."): node}


def resolved(config: DictConfig) -> dict[str, object]:
    return flat(OmegaConf.to_container(config, resolve=True))


def raw_leaves(path: Path) -> dict[str, object]:
    return flat(yaml.safe_load(path.read_text()))


def test_the_groups_hold_what_is_tested_here():
    named = {group: {path.stem for path in (CONFIGS / "hpo" / group).glob("*.yaml")} for group in ("task", "model")}
    assert named == {"task": set(TASKS), "model": set(MODELS)}
    assert {path.stem for path in (CONFIGS / "hpo" / "engine").glob("*.yaml")} == {*ENGINES, *OTHER_ENGINES}
    clusters = {path.stem: raw_leaves(path) for path in (CONFIGS / "hpo" / "cluster").glob("*.yaml")}
    assert clusters == {
        name: {"trainer.nnodes": nodes, "trainer.n_gpus_per_node": gpus} for name, (nodes, gpus) in CLUSTERS.items()
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_every_recipe_passes_verls_dataclasses_and_validation(recipes, preset):
    """90 compositions, on one node."""
    for (task, model, engine), recipe in recipes.items():
        config = with_preset(recipe, preset)
        for checked in (*check_algorithm(config), *check_recipe(config), check_by_verl(config)):
            assert checked.ok, (task, model, engine, checked)
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        assert actor.strategy == actor.engine.strategy == engine
        assert config.actor_rollout_ref.ref.strategy == engine
        # docs/hardware.md counts no reference model.
        assert not need_reference_policy(config)
        assert omega_conf_to_dataclass(config.actor_rollout_ref.rollout).seed == config.data.seed == 1
        # A step has two mini-batches at least, each split evenly, and a micro-batch holds the longest row.
        batch, mini_batch = config.data.train_batch_size, actor.ppo_mini_batch_size
        assert batch % mini_batch == 0
        assert batch >= 2 * mini_batch
        parallel = 1
        if engine == "megatron":
            sizes = actor.engine
            parallel = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size
            parallel *= sizes.context_parallel_size
        assert mini_batch * config.actor_rollout_ref.rollout.n % (8 // parallel) == 0
        assert actor.ppo_max_token_len_per_gpu >= config.data.max_prompt_length + config.data.max_response_length


@pytest.mark.parametrize("engine", OTHER_ENGINES)
@pytest.mark.parametrize("cluster", ["1x8", "2x8"])
def test_engines_that_were_not_run_are_composed_and_accepted(engine, cluster):
    """What verl asserts in the driver is passed; sizes are checked, memory is not estimated."""
    config = composed("hpo_recipe", "hpo/task=countdown3", f"hpo/engine={engine}", f"hpo/cluster={cluster}")
    [recipe] = check_recipe(config)
    assert recipe.ok
    gpus = 8 * CLUSTERS[cluster][0]
    assert f"{engine} on {gpus} GPUs: {gpus} data-parallel ranks" in recipe.found
    assert "memory of this engine is not estimated" in recipe.found
    assert check_by_verl(config).ok
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert actor.strategy == actor.engine.strategy == engine
    assert not actor.engine.param_offload


def test_torchtitans_data_parallel_sizes_are_those_of_the_cluster():
    config = composed(
        "hpo_recipe", "hpo/engine=torchtitan", "actor_rollout_ref.actor.torchtitan.tensor_parallel_size=2"
    )
    with pytest.raises(ConfigError, match=r"data_parallel_replicate_size=1 x data_parallel_shard_size=8.*product is 4"):
        check_layout(config)
    config = composed("hpo_recipe", "hpo/engine=torchtitan")
    config.actor_rollout_ref.actor.torchtitan.max_seq_len = None
    with pytest.raises(ConfigError, match=r"torchtitan\.max_seq_len=2048\. Set max_seq_len to 6144"):
        check_layout(config)


def test_a_strategy_that_is_not_the_groups_has_no_estimate_of_its_memory():
    [recipe] = check_recipe(composed("hpo_recipe", "actor_rollout_ref.actor.strategy=fsdp"))
    assert "memory of this engine is not estimated" in recipe.found


@pytest.mark.parametrize(("task", "engine"), list(product(TASKS, ENGINES)))
def test_every_recipe_composes_for_sglang(task, engine):
    """SGLang is not installed here: what is checked is what verl checks in the driver."""
    name = "actor_rollout_ref.rollout.name=sglang"
    config = composed("hpo_recipe", f"hpo/task={task}", f"hpo/engine={engine}", name)
    for checked in (*check_algorithm(config), *check_recipe(config), check_by_verl(config)):
        assert checked.ok, checked
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    assert rollout.name == "sglang"
    assert rollout.n == config.actor_rollout_ref.rollout.n


def test_every_cluster_divides_every_batch_or_is_refused(recipes):
    """TeleLogs has 8 x 8 = 64 rows in a mini-batch; 64x8 has at least 128 data-parallel ranks."""
    for (task, model, engine), recipe in recipes.items():
        for cluster in CLUSTERS:
            config = on_cluster(recipe, cluster)
            if task == "telelogs" and cluster == "64x8":
                with pytest.raises(ConfigError, match=r"trainer\.nnodes=64.*ppo_mini_batch_size=8 x .*n=8 = 64 rows"):
                    check_layout(config)
                continue
            check_layout(config)
            layout = Layout.of(config)
            assert layout.mini_batch_rows == layout.ranks * layout.rows_of_rank, (task, model, engine, cluster)


@pytest.mark.parametrize("engine", ENGINES)
def test_verls_validation_in_the_driver_refuses_what_cannot_be_divided(recipes, engine):
    """Our wrapper of it, which main_ppo calls before Ray starts."""
    config = recipes["telelogs", "qwen2.5-1.5b", engine]
    assert check_by_verl(on_cluster(config, "8x8")).ok
    refused = check_by_verl(on_cluster(config, "64x8"))
    assert "trainer.nnodes=64" in refused.remedy
    (said,) = check_recipe(on_cluster(config, "64x8"))
    assert not said.ok
    assert said.remedy == refused.remedy


def test_presets_differ_in_their_row_of_hpo_yaml_and_in_nothing_else(recipes):
    """What is interpolated from the table of presets may differ, and names; all other leaves are equal."""
    keys = {
        key for key, value in raw_leaves(CONFIGS / "hpo.yaml").items() if "oc.select:policy_loss_presets" in str(value)
    }
    assert "actor_rollout_ref.actor.clip_ratio_low" in keys
    # Copies: the loss's of the estimator's name, and the critic's of the aggregation, where there is a critic.
    copies = {"actor_rollout_ref.actor.policy_loss.adv_estimator", "critic.loss_agg_mode"}
    for recipe in recipes.values():
        reference = resolved(with_preset(recipe, "ahpo"))
        for preset in PRESETS[:-1]:
            other = resolved(with_preset(recipe, preset))
            assert other.keys() == reference.keys()
            differing = {key for key in other if other[key] != reference[key]}
            assert differing >= BOOKKEEPING
            assert differing - BOOKKEEPING <= keys | copies


def test_the_key_of_the_algorithm_changes_a_composed_config_as_an_override_does(recipes):
    """So that the tests above need not compose each preset anew."""
    override = composed("hpo_recipe", "algorithm.policy_loss=gspo", "hpo/cluster=4x8")
    assert resolved(override) == resolved(
        with_preset(on_cluster(recipes["telelogs", MODELS[0], "fsdp2"], "4x8"), "gspo")
    )


def test_engines_share_task_model_and_optimizer(recipes):
    """What FSDP2 and Megatron call alike is equal, but for classes, names, and what no recipe turns on."""
    for task, model in product(TASKS, MODELS):
        fsdp2, megatron = (resolved(recipes[task, model, engine]) for engine in ENGINES)
        differing = {key for key in fsdp2.keys() & megatron.keys() if fsdp2[key] != megatron[key]}
        unexplained = {
            key
            for key in differing - BOOKKEEPING
            if not re.search(r"_target_$|strategy$|^model_engine$|^recipe\.engine$|^critic\.|\.ref\.|\.qat\.", key)
        }
        # AdamW of torch, and Megatron's, which is called adam; neither has further arguments.
        assert unexplained == {
            f"actor_rollout_ref.actor.optim.{key}" for key in ("optimizer", "override_optimizer_config")
        }


SOURCES = (
    "HPO paper",
    "RCA paper",
    "TinyZero",
    "verl's",
    "hpo/model",
    "recipe.offload",
    "config.json",
    "transformers'",
    "Estimated:",
    "Chosen:",
    "The group's name",
    "See ",
)


def values_without_source(text: str) -> list[str]:
    """Lines of a yaml file that give a value, and above which no comment begins with a source."""
    found, lines = [], text.splitlines()
    for number, line in enumerate(lines):
        if not re.match(r"\s*[\w.]+: *[^\s#]", line):
            continue
        first = number
        while first and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        indent = line[: len(line) - len(line.lstrip())]
        if first == number or not lines[first].startswith(tuple(f"{indent}# {source}" for source in SOURCES)):
            found.append(line.strip())
    return found


@pytest.mark.parametrize(
    "path",
    [CONFIGS / "hpo_recipe.yaml", *RECIPE_FILES],
    ids=lambda path: path.relative_to(CONFIGS).as_posix(),
)
def test_every_value_of_a_recipe_has_its_source_above_it(path):
    text = path.read_text()
    assert values_without_source(text) == []
    # The scan sees every value that yaml sees.
    scanned = re.findall(r"^\s*([\w.]+): *[^\s#]", text, re.MULTILINE)
    leaves = {key: value for key, value in raw_leaves(path).items() if key != "defaults"}
    assert sorted(scanned) == sorted(key.rpartition(".")[2] for key in leaves)


def test_a_value_without_a_source_is_found():
    text = "a:\n\n  # Chosen: so.\n  b: 1\n\n  # A number.\n  c: 2\n\n  d: 3\n"
    assert values_without_source(text) == ["c: 2", "d: 3"]


def test_see_points_to_a_value_of_the_same_file_that_has_a_source():
    for path in [CONFIGS / "hpo_recipe.yaml", *RECIPE_FILES]:
        names = {key.rpartition(".")[2] for key in raw_leaves(path)}
        for pointed in re.findall(r"# See ([\w.]+?)[.:;]", path.read_text()):
            assert pointed.rpartition(".")[2] in names, (path.name, pointed)


@pytest.mark.parametrize("task", ["countdown", "telelogs"])
def test_the_readmes_command_is_a_recipe_that_the_check_accepts(task, monkeypatch, tmp_path):
    """Except for the data, which do not exist here."""
    monkeypatch.chdir(tmp_path)
    stated, *overrides = arguments(RECIPES / task / "README.md")
    config = composed(stated.removeprefix("--config-name="), *overrides)
    failed = {finding.name for finding in check_config(config) if not finding.ok}
    assert failed == {"train data", "val data"}
    assert config.recipe.task.startswith(task)


def test_the_overview_command_is_a_recipe():
    words = shlex.split((RECIPES / "README.md").read_text().split("```bash")[1].split("```")[0].replace("\\\n", ""))
    assert words[:4] == ["python", "-m", "verl.trainer.main_ppo", "--config-name=hpo_recipe"]
    assert check_by_verl(composed("hpo_recipe", *words[4:])).ok


@pytest.mark.parametrize("name", ["paper-countdown", "paper-telelogs"])
def test_the_cells_of_the_papers_studies_are_recipes(recipes, name):
    """They choose among what is validated above; they set α and the seed, and else what the recipe has anyway."""
    study = load_study(ROOT / "studies" / f"{name}.yaml")
    for cell in study.cells():
        assert cell.config_name == "hpo_recipe"
        values = dict(override.split("=", 1) for override in cell.overrides)
        assert values.pop("hpo/cluster") in CLUSTERS
        assert values.pop("algorithm.policy_loss") in PRESETS
        recipe = recipes[tuple(values.pop(f"hpo/{group}") for group in ("task", "model", "engine"))]
        assert values.pop("trainer.test_freq") == str(recipe.trainer.test_freq)
        # The step at which the paper reports, or the RCA paper's number of steps.
        assert int(values.pop("trainer.total_training_steps")) == (1_500 if recipe.recipe.task == "telelogs" else 200)
        assert values.pop("data.seed") == str(cell.seed)
        assert set(values) <= {"algorithm.hpo.alpha"}
        assert study.save_every == recipe.trainer.save_freq


def test_countdown_takes_200_steps_of_the_data_there_is(recipes):
    config = recipes["countdown3", "qwen2.5-1.5b", "fsdp2"]
    # The synthetic default of `hpo-plugin prepare countdown`: 78 steps an epoch.
    assert 20_000 // config.data.train_batch_size * config.trainer.total_epochs >= 200
    assert config.trainer.total_training_steps == 200


def test_telelogs_takes_the_rca_papers_1500_steps_of_128_rows_and_four_samples(recipes):
    config = recipes["telelogs", "qwen2.5-1.5b", "fsdp2"]
    rollout = config.actor_rollout_ref.rollout
    assert config.data.train_batch_size * rollout.n == 128
    assert (rollout.val_kwargs.n, rollout.val_kwargs.do_sample) == (4, True)
    assert config.trainer.total_training_steps is None
    assert 2_400 // config.data.train_batch_size * config.trainer.total_epochs == 1_500


def test_the_sft_recipe_of_telelogs_makes_what_verls_sft_trainer_takes():
    stated, *overrides = arguments(RECIPES / "telelogs" / "README.md", "sft_arguments")
    config = composed(stated.removeprefix("--config-name="), *overrides)
    # What SFTTrainer._build_config does, but for the model, whose files it would fetch.
    for part in (config.engine, config.optim, config.checkpoint, config.profiler):
        omega_conf_to_dataclass(part)
    # Where RL starts from.
    assert "hf_model" in config.checkpoint.save_contents
    # A number of steps that the epochs do not reach ends the run without a checkpoint.
    assert config.trainer.total_training_steps is None
    assert config.trainer.save_freq == "after_each_epoch"


@pytest.mark.parametrize("config_name", ["hpo_recipe", "telelogs_cpu", "telelogs_sft", "telelogs_sft_cpu"])
def test_the_lengths_of_the_telelogs_configs_hold_the_data(config_name, tmp_path):
    """In bytes, of which no tokenizer makes more tokens than there are; Qwen's makes about half as many."""
    from hpo_plugin.tasks.telelogs import REDUCTIONS, chain_of_thought, diagnose, generate, render_prompt

    config = composed(config_name)
    laptop = config_name.endswith("_cpu")
    rows = generate(200, seed=11, reduction=REDUCTIONS["laptop" if laptop else "full"]).rows
    prompts = [len(render_prompt(row.case).encode()) for row in rows]
    answers = [len(chain_of_thought(row.case, diagnose(row.case)).encode()) + 1 for row in rows]
    if "sft" in config_name:
        assert max(map(sum, zip(prompts, answers, strict=True))) <= config.data.max_length
        return
    # Tables of numbers: a digit is a token of Qwen2.5, and a prompt of 4,999 characters has 2,700.
    tokens_per_byte = 1 if laptop else 2_700 / 4_999
    assert max(prompts) * tokens_per_byte <= config.data.max_prompt_length
    assert max(answers) * (1 if laptop else 0.75) <= config.data.max_response_length


def test_the_hardware_page_is_what_its_script_computes(recipes, load_script):
    script = load_script("hardware_page")
    page = script.PAGE.read_text()
    assert script.page(page, recipes) == page, "run scripts/hardware_page.py --write"
