"""The Python of ``docs/frameworks.md`` computes what the page says, with stand-ins for the frameworks."""

import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hpo_plugin.algorithm import group_relative_advantage, hpo_loss

PAGE = (Path(__file__).parents[1] / "docs" / "frameworks.md").read_text()


def functions(first_words):
    """What the block of the page that contains the words defines."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if first_words in block)
    names = {}
    exec(compile(code, "docs/frameworks.md", "exec"), names)
    return SimpleNamespace(**names)


@dataclasses.dataclass
class LossInputs:
    """Of one sequence (src/prime_rl/trainer/rl/loss.py)."""

    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclasses.dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict


@pytest.fixture
def prime_rl(monkeypatch):
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl", "prime_rl.trainer.rl.loss"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["prime_rl.trainer.rl.loss"].LossInputs = LossInputs
    sys.modules["prime_rl.trainer.rl.loss"].LossOutputs = LossOutputs


def test_prime_rls_loss_summed_over_sequences_is_hpos(prime_rl):
    hpo = functions("hpo_loss.py").hpo
    torch.manual_seed(0)
    new, old = torch.randn(8, 6, requires_grad=True), torch.randn(8, 6)
    advantages = group_relative_advantage(torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0]), torch.arange(8) // 4).advantage
    advantages = advantages.unsqueeze(-1).expand(8, 6)
    mask = torch.arange(6) < torch.tensor([6, 5, 4, 3, 6, 2, 1, 6]).unsqueeze(-1)
    for alpha in (0.0, 0.6):
        rows = [LossInputs(new[i], old[i], advantages[i], mask[i]) for i in range(8)]
        (sum(hpo(row, alpha=alpha).loss for row in rows) / mask.sum()).backward()
        found, new.grad = new.grad, None
        hpo_loss(new, old, advantages, mask, alpha=alpha).backward()
        torch.testing.assert_close(found, new.grad)
        new.grad = None


def test_prime_rls_token_weights_scale_the_loss(prime_rl):
    hpo = functions("hpo_loss.py").hpo
    row = LossInputs(torch.zeros(3), torch.zeros(3), -torch.ones(3), torch.tensor([True, True, False]))
    assert hpo(row, alpha=0.5).loss == 1.0
    assert hpo(dataclasses.replace(row, loss_weights=torch.full((3,), 0.1)), alpha=0.5).loss == pytest.approx(0.1)


def test_arts_advantage_balance_is_one_minus_alpha_of_the_step():
    balance = functions("def ahpo_balance").ahpo_balance
    group = [[SimpleNamespace(reward=reward) for reward in rewards] for rewards in ([1, 0, 0, 0], [0.1] * 8)]
    # One positive response, three negative ones; the second group has no signal.
    assert balance(group) == pytest.approx(1 - 1 / 3)
    assert balance([group[1]]) == 0
    assert balance([[SimpleNamespace(reward=r) for r in [1.0] + [0.0] * 19]]) == pytest.approx(0.9)
