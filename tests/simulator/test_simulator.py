"""The simulator computes what transformers, verl's registries and AdamW compute, and refuses what it cannot."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import Qwen2ForCausalLM

verl = pytest.importorskip("verl")

from hpo_plugin import algorithm  # noqa: E402
from hpo_plugin.check.compose import compose  # noqa: E402
from hpo_plugin.errors import ConfigError  # noqa: E402
from hpo_plugin.quickstart.start_model import StartModelConfig, build_start_model  # noqa: E402
from hpo_plugin.simulator.gradients import compare_gradients  # noqa: E402
from hpo_plugin.simulator.loop import SIMULATED, check_simulated, simulate  # noqa: E402
from hpo_plugin.simulator.model import SmallQwen2  # noqa: E402
from hpo_plugin.study.simulated import simulate_cell  # noqa: E402
from hpo_plugin.tasks.task import load_task  # noqa: E402

STEPS = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Data and a start model that has learned little, in seconds."""
    directory = tmp_path_factory.mktemp("simulator")
    task = load_task("countdown")
    options = task.Options(train_size=64, test_size=16, counts=(3,), max_number=12, layout="terse")
    made = task.prepare(directory / "data", options)
    import pyarrow.parquet as pq

    train, test = (pq.read_table(made.files[split]).to_pylist() for split in ("train", "test"))
    build_start_model(directory / "model", task, train, test, config=StartModelConfig(steps=60, calculated_share=0.3))
    # Half of the responses are right: a model that has learned as little as this one would find no signal.
    reward = (
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return len(solution_str) % 2"
    )
    (directory / "reward.py").write_text(f"{reward}\n", encoding="utf-8")
    return directory


def config_of(inputs, *overrides):
    config, finding = compose(
        "countdown_cpu",
        [
            "data.train_batch_size=8",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4",
            "actor_rollout_ref.actor.optim.lr=1e-3",
            f"trainer.total_training_steps={STEPS}",
            "trainer.test_freq=2",
            f"data.train_files={inputs}/data/train.parquet",
            f"data.val_files={inputs}/data/test.parquet",
            f"actor_rollout_ref.model.path={inputs}/model",
            f"reward.custom_reward_function.path={inputs}/reward.py",
            *overrides,
        ],
    )
    assert config is not None, finding
    return config


@pytest.fixture(scope="module")
def models(inputs):
    reference = Qwen2ForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    return SmallQwen2.load(inputs / "model"), reference


PROMPTS = [[52, 33, 54, 30, 21], [50, 51], [40, 41, 42, 43, 44, 45, 46]] * 5


def test_log_probs_and_gradients_are_those_of_transformers(models):
    model, reference = models
    samples = model.sample(PROMPTS, 12, torch.Generator().manual_seed(0))
    assert len(set(samples.mask.sum(dim=1).tolist())) > 1, "responses of one length test no padding"
    weights = torch.arange(1.0, len(PROMPTS) + 1)
    ours = model.log_probs(PROMPTS, samples.tokens, samples.mask)
    theirs = []
    for prompt, tokens, mask in zip(PROMPTS, samples.tokens, samples.mask, strict=True):
        ids = torch.tensor([prompt + tokens[mask].tolist()])
        scores = torch.log_softmax(reference(ids).logits[0], dim=-1)
        theirs.append(scores[len(prompt) - 1 : -1].gather(1, tokens[mask][:, None])[:, 0])
    for row, (mine, mask) in enumerate(zip(ours, samples.mask, strict=True)):
        torch.testing.assert_close(mine[mask], theirs[row], rtol=0, atol=1e-5)
        assert (mine[~mask] == 0).all()
    gradients = torch.autograd.grad((ours.sum(dim=1) * weights).sum(), model.parameters)
    sum(row.sum() * weight for row, weight in zip(theirs, weights, strict=True)).backward()
    expected = [reference.model.embed_tokens.weight.grad, reference.model.norm.weight.grad]
    for layer in reference.model.layers:
        attention = [getattr(layer.self_attn, f"{x}_proj") for x in "qkv"]
        expected += [
            layer.input_layernorm.weight.grad,
            torch.cat([x.weight.grad for x in attention]),
            torch.cat([x.bias.grad for x in attention]),
            layer.self_attn.o_proj.weight.grad,
            layer.post_attention_layernorm.weight.grad,
            torch.cat([layer.mlp.gate_proj.weight.grad, layer.mlp.up_proj.weight.grad]),
            layer.mlp.down_proj.weight.grad,
        ]
    for mine, his in zip(gradients, expected, strict=True):
        assert (mine - his).norm() <= 1e-5 * his.norm()


def test_samples_carry_the_log_probs_and_the_entropy_of_the_policy(models):
    model, _ = models
    samples = model.sample(PROMPTS, 12, torch.Generator().manual_seed(1))
    recomputed = model.log_probs(PROMPTS, samples.tokens, samples.mask)
    torch.testing.assert_close(samples.log_probs, recomputed.detach(), rtol=0, atol=1e-4)
    assert ((samples.entropy > 0) == samples.mask).all()
    last = samples.tokens[torch.arange(len(PROMPTS)), samples.mask.sum(dim=1) - 1]
    assert ((last == model.eos) == samples.finished).all()
    assert (~samples.finished == (samples.mask.sum(dim=1) == 12) & (last != model.eos)).all()


def test_the_first_tokens_follow_the_distribution_of_the_policy(models):
    model, reference = models
    count = 20_000
    samples = model.sample([PROMPTS[0]] * count, 1, torch.Generator().manual_seed(2))
    expected = torch.softmax(reference(torch.tensor([PROMPTS[0]])).logits[0, -1], dim=-1).detach()
    found = torch.bincount(samples.tokens[:, 0], minlength=len(expected)) / count
    # Four standard errors of each share, and one sample for the rarest.
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt() + 1 / count).all()


def test_a_sample_depends_on_its_seed(models):
    model, _ = models
    one, same, other = (model.sample(PROMPTS, 12, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one.tokens, same.tokens)
    assert one.tokens.shape != other.tokens.shape or not torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize(("key", "value"), [("num_key_value_heads", 1), ("tie_word_embeddings", False)])
def test_a_checkpoint_of_another_form_is_refused(inputs, key, value):
    config = json.loads((inputs / "model/config.json").read_bytes())
    with pytest.raises(ValueError, match=f"{key}={value}"):
        SmallQwen2({**config, key: value}, {})


@pytest.mark.parametrize("policy_loss", ["grpo", "gspo", "sapo", "hpo", "ahpo"])
def test_a_step_is_adamw_on_the_loss_of_verls_registry(inputs, policy_loss):
    """One mini-batch, so that one step can be computed again from what the observer saw."""
    config = config_of(inputs, f"algorithm.policy_loss={policy_loss}", "actor_rollout_ref.actor.ppo_mini_batch_size=8")
    seen = {}

    def observe(update):
        if not seen:
            before = [parameter.detach().clone() for parameter in update.model.parameters]
            seen.update(update=update, before=before)
        return {}

    loop = simulate(config, observe)
    assert next(loop)[0] == 0
    _, metrics = next(loop)
    update, after = seen["update"], [parameter.detach().clone() for parameter in seen["update"].model.parameters]
    assert (update.advantages != 0).any(), "a step without a signal tests nothing"
    with torch.no_grad():
        for parameter, value in zip(update.model.parameters, seen["before"], strict=True):
            parameter.copy_(value)
    samples = update.samples
    log_probs = update.model.log_probs(update.prompts, samples.tokens, samples.mask)
    weighted = torch.where(update.advantages < 0, update.alpha * update.advantages, update.advantages)
    # At ratio 1 each of these losses has the gradient of the weighted log-probabilities; SAPO's gate has slope 1 there.
    surrogate = weighted[:, None] * log_probs
    if policy_loss in ("hpo", "ahpo"):
        loss = -surrogate.sum() / samples.mask.sum()
    else:
        loss = -(surrogate.sum(dim=1) / samples.mask.sum(dim=1)).mean()
    gradients = torch.autograd.grad(loss, update.model.parameters)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert float(norm) == pytest.approx(metrics["actor/grad_norm"], rel=1e-4)
    for value, gradient, new in zip(seen["before"], gradients, after, strict=True):
        # AdamW's first step is the learning rate times the sign, where the gradient is well above eps.
        large = gradient.abs() > 1e-4
        moved = (new - value) / -1e-3
        torch.testing.assert_close(moved[large], gradient[large].sign(), rtol=0, atol=2e-3)


def test_metrics_have_verls_names_and_alpha_is_that_of_the_batch(inputs):
    steps = dict(simulate(config_of(inputs, "algorithm.policy_loss=ahpo")))
    assert list(steps) == [0, 1, 2, 3]
    evaluated = [step for step, metrics in steps.items() if "val-core/countdown_terse/reward/mean@1" in metrics]
    assert evaluated == [0, 2, 3]
    for step in (1, 2, 3):
        metrics = steps[step]
        positive, negative = metrics["actor/hpo/share_positive"], metrics["actor/hpo/share_negative"]
        expected = min(1.0, max(0.1, positive / negative)) if negative else 1.0
        assert metrics["actor/hpo/alpha"] == pytest.approx(expected)
        assert 0 <= metrics["critic/rewards/mean"] <= 1
        assert metrics["response_length/min"] <= metrics["response_length/mean"] <= metrics["response_length/max"]


def test_the_same_seed_gives_the_same_run_and_algorithms_see_the_same_problems(inputs):
    def run(*overrides):
        shown = []
        rows = dict(simulate(config_of(inputs, *overrides), lambda update: shown.append(update.prompts) or {}))
        return shown, [rows[step]["critic/rewards/mean"] for step in (1, 2, 3)], rows[3]["actor/grad_norm"]

    first, again = (run("algorithm.policy_loss=ahpo", "data.seed=5") for _ in range(2))
    assert first == again
    other = run("algorithm.policy_loss=grpo", "data.seed=5")
    assert other[0] == first[0]
    assert run("algorithm.policy_loss=ahpo", "data.seed=6")[0] != first[0]


def test_a_cell_is_the_same_for_any_number_of_threads_before(inputs, tmp_path):
    """A study's processes set one thread themselves; only the times of two runs differ."""
    overrides = [
        *("data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=4", "algorithm.policy_loss=ahpo"),
        *(f"trainer.total_training_steps={STEPS}", "trainer.test_freq=2"),
        *(f"data.train_files={inputs}/data/train.parquet", f"data.val_files={inputs}/data/test.parquet"),
        *(f"actor_rollout_ref.model.path={inputs}/model", f"reward.custom_reward_function.path={inputs}/reward.py"),
    ]
    before, found = torch.get_num_threads(), []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        simulate_cell("countdown_cpu", overrides, {}, tmp_path / "metrics.jsonl")
        rows = [json.loads(line)["data"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        found.append([{k: v for k, v in row.items() if not k.startswith("timing_s/")} for row in rows])
    torch.set_num_threads(before)
    assert found[0] == found[1]
    assert found[0][1]["actor/grad_norm"] > 0


REFUSED = {
    "algorithm.use_kl_in_reward": True,
    "actor_rollout_ref.actor.use_kl_loss": True,
    "actor_rollout_ref.actor.entropy_coeff": 0.01,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
    "actor_rollout_ref.rollout.temperature": 0.7,
    "actor_rollout_ref.model.lora_rank": 8,
    "algorithm.adv_estimator": "rloo",
    "actor_rollout_ref.actor.policy_loss.loss_mode": "clip_cov",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_the_loop_does_not_have_is_refused(inputs, key):
    config = config_of(inputs)
    check_simulated(config)
    OmegaConf.update(config, key, REFUSED[key])
    with pytest.raises(ConfigError, match=f"{key}={REFUSED[key]}"):
        next(simulate(config))


def test_every_key_that_is_checked_exists(inputs):
    config = config_of(inputs)
    missing = object()
    assert [key for key in SIMULATED if OmegaConf.select(config, key, default=missing) is missing] == []


def test_gradients_split_by_sign_add_up_and_alpha_turns_them(inputs):
    found = []

    def observe(update):
        metrics = compare_gradients(update)
        if metrics:
            found.append((update, metrics))
        return metrics

    for _ in simulate(config_of(inputs, "algorithm.policy_loss=hpo", "algorithm.hpo.alpha=0.5"), observe):
        pass
    assert found
    for update, metrics in found:
        ratio, cosine, alpha = (metrics[f"gradients/{name}"] for name in ("ratio", "cosine", "alpha"))
        counts = algorithm.count_signs(update.advantages.sign())
        assert alpha == float(algorithm.adaptive_alpha(counts, 0.1))
        # With |g⁺| = 1: the law of cosines gives norms and angle of g⁺ + α g⁻ and g⁺ + g⁻.
        ours = 1 + 2 * alpha * ratio * cosine + (alpha * ratio) ** 2
        plain = 1 + 2 * ratio * cosine + ratio**2
        assert metrics["gradients/length"] == pytest.approx(np.sqrt(ours / plain), rel=1e-4)
        inner = 1 + (1 + alpha) * ratio * cosine + alpha * ratio**2
        turn = np.degrees(np.arccos(min(1.0, inner / np.sqrt(ours * plain))))
        assert metrics["gradients/turn"] == pytest.approx(turn, abs=0.05)
        assert metrics["gradients/step"] > 0
    if alpha < 1:
        assert metrics["gradients/adamw_turn"] > 0
