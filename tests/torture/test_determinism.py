"""What is equal bit for bit, what within a tolerance; the table of docs/robustness.md names the test of each row."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from torture.determinism import (
    GROUP,
    Environment,
    computed,
    differences,
    policy_loss,
    rollout,
    update,
    weighted_advantages,
)

ROOT = Path(__file__).parents[2]
THREADS = (1, 2, 4)
#: Unit in the last place, relative to the value.
ULP = torch.finfo(torch.float32).eps


def bits(x):
    return x.detach().contiguous().numpy().tobytes()


@pytest.fixture
def with_threads():
    """Calls a function with each number of threads."""
    before = torch.get_num_threads()

    def call(function):
        results = []
        for number in THREADS:
            torch.set_num_threads(number)
            results.append(function())
        return results

    yield call
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(64, 300), (2048, 512), (2, 100_000), (40_000, 8)])
@pytest.mark.parametrize("dense", [False, True])
def test_advantages_are_bitwise_equal_for_any_number_of_threads(with_threads, shape, dense):
    rewards, mask = rollout(*shape, dense=dense)
    groups = torch.arange(shape[0]) // GROUP

    def values():
        result, spread = weighted_advantages(rewards, mask, groups)
        return bits(spread), bits(result.alpha), result.statistics

    first, *others = with_threads(values)
    assert all(other == first for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 300), (2048, 512), (8, 32_767)])
def test_loss_gradient_and_metrics_are_bitwise_equal_for_any_number_of_threads(with_threads, shape, dtype):
    batch = update(*shape, dtype)

    def values():
        loss, gradient, sums = policy_loss(*batch, scale=1 / float(batch[-1].sum()))
        return bits(loss), bits(gradient.float()), [bits(x) for x in sums]

    first, *others = with_threads(values)
    assert all(other == first for other in others)


@pytest.mark.parametrize("shape", [(1, 100_000), (3, 70_000)])
def test_with_longer_rows_the_gradient_is_bitwise_equal_and_the_loss_within_1e_5(with_threads, shape):
    """Torch splits a sum of 32,768 numbers or more over its threads."""
    batch = update(*shape, torch.float32)
    first, *others = with_threads(lambda: policy_loss(*batch, scale=1 / float(batch[-1].sum())))
    for loss, gradient, sums in others:
        assert bits(gradient) == bits(first[1])
        torch.testing.assert_close(loss, first[0], rtol=1e-5, atol=1e-7)
        for value, expected in zip(sums, first[2], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dense", [False, True])
def test_in_another_order_of_the_rows_alpha_is_equal_and_the_advantages_to_one_unit_in_the_last_place(seed, dense):
    rewards, mask = rollout(512, 64, dense=dense)
    groups = torch.arange(512) // GROUP
    order = torch.randperm(512, generator=torch.Generator().manual_seed(seed))
    plain, spread = weighted_advantages(rewards, mask, groups)
    # Groups also get other numbers.
    renamed = torch.randperm(512, generator=torch.Generator().manual_seed(seed + 100))[groups]
    other, permuted = weighted_advantages(rewards[order], mask[order], renamed[order])
    assert bits(other.alpha) == bits(plain.alpha)
    assert other.counts == plain.counts
    assert (plain.weighted < 0).sum() > 100
    torch.testing.assert_close(permuted, spread[order], rtol=ULP, atol=0)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_micro_batches_have_bitwise_equal_gradients_and_their_losses_add_up_to_1e_6(size):
    batch = update(64, 300, torch.float32)
    scale = 1 / float(batch[-1].sum())
    loss, gradient, _ = policy_loss(*batch, scale=scale)
    parts = [policy_loss(*(x[begin : begin + size] for x in batch), scale=scale) for begin in range(0, 64, size)]
    assert bits(torch.cat([part[1] for part in parts])) == bits(gradient)
    total = sum(float(part[0].double()) for part in parts)
    assert total == pytest.approx(float(loss), rel=1e-6, abs=1e-9)


def test_padding_columns_leave_the_gradient_bitwise_equal_and_the_loss_to_1e_6():
    batch = update(64, 300, torch.float32)
    scale = 1 / float(batch[-1].sum())
    loss, gradient, _ = policy_loss(*batch, scale=scale)
    new, old, advantages, mask = batch
    wide = [torch.nn.functional.pad(x, (0, 77), value=value) for x, value in ((new, -5.0), (old, 9.0), (mask, False))]
    padded, wider, _ = policy_loss(wide[0], wide[1], advantages, wide[2], scale=scale)
    assert bits(wider[:, :300]) == bits(gradient)
    assert not wider[:, 300:].any()
    assert float(padded) == pytest.approx(float(loss), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_have_the_loss_of_the_same_values_in_fp32_and_the_rounded_gradient(dtype):
    new, old, advantages, mask = update(64, 300, dtype)
    scale = 1 / float(mask.sum())
    loss, gradient, _ = policy_loss(new, old, advantages, mask, scale=scale)
    exact, expected, _ = policy_loss(new.float(), old.float(), advantages, mask, scale=scale)
    assert bits(loss) == bits(exact)
    assert bits(gradient.float()) == bits(expected.to(dtype).float())


# --- between processes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Digests of one process with one thread and one core, and of one with four threads and all cores."""
    environments = (Environment(threads=1, cores=1, hash_seed=1), Environment(threads=4, hash_seed=2))
    parts = ["advantages", "loss", "data", "start-model", "report"]
    return computed(environments, parts, tmp_path_factory.mktemp("processes"))


@pytest.mark.timeout(300)
def test_data_is_bitwise_equal_with_other_threads_cores_and_hash_seeds(processes):
    names = [name for name in processes[0] if name.startswith("data: ")]
    assert {"data: countdown/train.parquet", "data: telelogs/sft_train.parquet"} <= set(names)
    assert [name for name in differences(processes) if name in names] == []


@pytest.mark.timeout(300)
def test_a_start_model_is_bitwise_equal_with_other_threads_and_cores(processes):
    assert "start-model: model.safetensors" in processes[0]
    assert [name for name in differences(processes) if name.startswith("start-model")] == []


@pytest.mark.timeout(300)
def test_collected_data_and_report_are_bitwise_equal_with_other_hash_seeds(processes):
    assert {"report: study.parquet", "report: report/large.html"} <= set(processes[0])
    assert [name for name in differences(processes) if name.startswith("report")] == []


@pytest.mark.timeout(300)
def test_advantages_and_loss_are_bitwise_equal_with_other_threads_and_cores(processes):
    assert len([name for name in processes[0] if name.startswith(("advantages", "loss"))]) == 21
    assert [name for name in differences(processes) if name.startswith(("advantages", "loss"))] == []


@pytest.mark.timeout(300)
def test_with_other_instruction_sets_outcome_advantages_are_bitwise_equal_and_the_rest_to_1e_5(tmp_path):
    """Torch sums and computes exponentials with other instructions, as on another CPU."""
    environments = [Environment(threads=1, instructions=name) for name in ("default", "avx2")]
    digests = computed(environments, ["advantages", "loss"], tmp_path, save=True)
    differing = differences(digests)
    assert not any("outcome" in name for name in differing)
    one, other = (np.load(tmp_path / f"process-{number}" / "results.npz") for number in (0, 1))
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_difference_is_found():
    assert differences([{"a": "1", "b": "2"}, {"a": "1", "b": "2"}]) == []
    assert differences([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1"}]) == ["b"]


# --- the page ------------------------------------------------------------------------------------------------------


def test_every_row_of_the_page_names_tests_that_exist():
    text = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    section = text.partition("## Determinism\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "tests/" in line]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (path, name)
