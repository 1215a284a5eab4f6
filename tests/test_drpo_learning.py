"""
Where resets to reference prefixes lead: the two-step problem with exact expectations, and a code word that the policy
would not find by itself.
"""

import math
import sys
from pathlib import Path

import pytest
import torch
from test_online_losses import EPSILON, LAMBDA, PAIRS, TWO_STEP_REWARDS, trajectories
from torch import Tensor

from trl_lol.advantages import gae, token_rewards
from trl_lol.losses import ppo_policy_loss


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import drpo_code_word as code_word


# Rows: the policy of the first token, of the second one after 0, and after 1. It does not start as the uniform π_ref
START = torch.tensor([[-0.5, 0.3], [-0.2, 0.1], [-0.4, 0.3]], dtype=torch.float64)  # logits
OPTIMUM = torch.tensor([[0.7161, 0.2839], [0.9820, 0.0180], [0.5, 0.5]]).double()
REFERENCES = torch.tensor([0.3, 0.7], dtype=torch.float64)  # how often a reference begins with each token


def solve(reset_prob: float, min_roll_in: int, *, train_on_roll_in: bool = False) -> Tensor:
    """
    The policy that DR-PO's losses end in, `(3, 2)`, with references of L = 2 tokens: each of the 4 completions counts
    by its probability, once from the prompt and once with its first token as a roll-in. The values are the true ones.
    """
    lengths = range(min_roll_in, 2)
    at_prompt = 1 - reset_prob + reset_prob * (0 in lengths) / len(lengths)  # a roll-in of no tokens, too
    first, second = PAIRS.unbind(1)
    mask = torch.tensor([[1, 1]] * 4 + [[int(train_on_roll_in), 1]] * 4)
    rewards = TWO_STEP_REWARDS[first, second].repeat(2)
    logits = START.clone().requires_grad_()
    for _ in range(1000):
        logps = logits.log_softmax(-1)
        policy, log_ratio = logps.detach().exp(), logps.detach() - math.log(0.5)
        value_of_second = (policy[1:] * (TWO_STEP_REWARDS - LAMBDA * log_ratio[1:])).sum(-1)
        value_of_first = policy[0] @ (value_of_second - LAMBDA * log_ratio[0])
        values = torch.stack([value_of_first.expand(4), value_of_second[first]], dim=1).repeat(2, 1)
        per_token = token_rewards(rewards, mask, trajectories(log_ratio).repeat(2, 1), beta=LAMBDA)
        advantages, _ = gae(per_token, values, mask)
        chosen = trajectories(logps).repeat(2, 1)
        losses = ppo_policy_loss(chosen, chosen.detach(), mask, advantages, epsilon=EPSILON)
        begin = torch.cat([at_prompt * policy[0, first], (1 - at_prompt) * REFERENCES[first]])
        weights = begin * policy[1 + first, second].repeat(2)
        (gradient,) = torch.autograd.grad((weights[:, None] * losses).sum(), logits)
        with torch.no_grad():
            logits -= 10 * gradient
    return logits.detach().softmax(-1)


@pytest.mark.parametrize(
    ("reset_prob", "min_roll_in"),
    [(0.0, 0), (0.5, 0), (0.5, 1), (1.0, 0)],
    ids=["PPO", "half the time", "half the time, the paper's code", "always"],
)
def test_two_steps_reach_the_soft_optimum(reset_prob: float, min_roll_in: int) -> None:
    """
    π* ∝ π_ref e^{Q_soft/β}, β = ¼. Second step: after 0 softmax(1/β, 0) = (.9820, .0180), after 1 (½, ½). Their soft
    values are β ln ½(e⁴ + 1) = .8313 and .6, so p(a1 = 0) = σ((.8313 − .6)/β) = .7161. Where a rollout begins changes
    how often a state is seen, and at the optimum no state has an advantage: it is the same for any references.
    """
    torch.testing.assert_close(solve(reset_prob, min_roll_in), OPTIMUM, rtol=0, atol=1e-4)


def test_two_steps_that_always_begin_with_a_roll_in_leave_the_first_token_alone() -> None:
    """With `reset_prob=1` and `min_roll_in=1`: not by a bit. What follows is learned. Control: the mask does it."""
    policy = solve(1.0, 1)
    assert torch.equal(policy[0], START[0].softmax(-1))
    torch.testing.assert_close(policy[1:], OPTIMUM[1:], rtol=0, atol=1e-4)
    assert (START[0].softmax(-1) - OPTIMUM[0]).abs().max() > 0.1
    assert (solve(1.0, 1, train_on_roll_in=True)[0] - START[0].softmax(-1)).abs().max() > 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_code_word_is_found_with_resets_and_not_without(seed: int) -> None:
    """
    5 tokens out of 8 symbols, 3072 completions: PPO expects to meet the word 3072/8⁵ = .09 times, so that there is
    nothing to learn from. A rollout that restarts before the last token meets it with probability 1/8.
    """
    found = {method: code_word.train(method, 5, seed, num_completions=3072) for method in ("DR-PO", "PPO")}
    assert all(result["curve"][0][1] == pytest.approx(8**-5) for result in found.values())
    assert found["DR-PO"]["success"] > 0.8
    assert found["PPO"]["success"] < 0.01
