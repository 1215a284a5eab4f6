"""
The online losses against their definitions, one scalar at a time, and the policies that they are known to end in: a
bandit and a problem of two steps, with exact expectations.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trl_lol.losses import apa_loss, awr_loss, ppo_policy_loss, value_loss


MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
EPSILON, BETA = 0.2, 0.25


def draw(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGPS = -2 + 0.3 * draw(0)
OTHER_LOGPS = LOGPS + 0.3 * draw(1)
ADVANTAGES = draw(2)
VALUES, OLD_VALUES, RETURNS = draw(3), draw(4, 0.3) + draw(3), draw(5)

# Loss as a function of what is trained and of the advantages or returns, and the same for one token
LOSSES: dict[str, tuple[Tensor, Tensor, Callable, Callable]] = {
    "ppo": (
        LOGPS,
        ADVANTAGES,
        lambda logps, a: ppo_policy_loss(logps, OTHER_LOGPS, MASK, a, epsilon=EPSILON),
        lambda logp, other, a: (
            -min(math.exp(logp - other) * a, min(max(math.exp(logp - other), 1 - EPSILON), 1 + EPSILON) * a)
        ),
    ),
    "apa": (
        LOGPS,
        ADVANTAGES,
        lambda logps, a: apa_loss(logps, OTHER_LOGPS, MASK, a, beta=BETA),
        lambda logp, other, a: (logp - a / BETA - other) ** 2,
    ),
    "awr": (
        LOGPS,
        ADVANTAGES,
        lambda logps, a: awr_loss(logps, MASK, a, beta=BETA),
        lambda logp, other, a: -math.exp(a / BETA) * logp,
    ),
    "value": (
        VALUES,
        RETURNS,
        lambda values, r: value_loss(values, OLD_VALUES, r, MASK),
        lambda value, old, r: 0.5 * (value - r) ** 2,
    ),
    "clipped value": (
        VALUES,
        RETURNS,
        lambda values, r: value_loss(values, OLD_VALUES, r, MASK, epsilon=EPSILON),
        lambda value, old, r: 0.5 * max((value - r) ** 2, (min(max(value, old - EPSILON), old + EPSILON) - r) ** 2),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_token_has_the_loss_of_the_definition(name: str) -> None:
    trained, target, loss, by_hand = LOSSES[name]
    other = OLD_VALUES if "value" in name else OTHER_LOGPS
    expected = torch.zeros(MASK.shape, dtype=torch.float64)
    for row, column in MASK.nonzero().tolist():
        expected[row, column] = by_hand(*(x[row, column].item() for x in (trained, other, target)))
    torch.testing.assert_close(loss(trained, target), expected, rtol=1e-12, atol=0)


def test_the_batch_reaches_every_branch() -> None:
    """Ratios are clipped and not, for both signs of the advantage; so are values."""
    ratio, kept = (LOGPS - OTHER_LOGPS).exp(), MASK.bool()
    clipped = (ratio - 1).abs() > EPSILON
    assert {(bool(c), bool(a)) for c, a in zip(clipped[kept], ADVANTAGES[kept] > 0, strict=True)} == {
        (c, a) for c in (True, False) for a in (True, False)
    }
    assert {bool(x) for x in ((VALUES - OLD_VALUES).abs() > EPSILON)[kept]} == {True, False}


@pytest.mark.parametrize("name", ["ppo", "apa", "awr"])
def test_one_advantage_per_sequence_is_that_of_all_its_tokens(name: str) -> None:
    _, _, loss, _ = LOSSES[name]
    per_sequence = ADVANTAGES[:, 0]
    assert torch.equal(loss(LOGPS, per_sequence), loss(LOGPS, per_sequence[:, None].expand(MASK.shape)))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_masked_positions_never_reach_value_or_gradient(name: str, garbage: float) -> None:
    trained, target, loss, _ = LOSSES[name]
    results = []
    for fill in (0.0, garbage):
        leaf = trained.masked_fill(MASK == 0, fill).requires_grad_()
        value = loss(leaf, target.masked_fill(MASK == 0, fill))
        value.sum().backward()
        results.append((value.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert (results[1][0][MASK == 0] == 0).all() and (results[1][1][MASK == 0] == 0).all()
    assert results[1][1].abs().sum() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_targets_carry_no_gradient(name: str) -> None:
    trained, target, loss, _ = LOSSES[name]
    leaves = [trained.clone().requires_grad_(), target.clone().requires_grad_()]
    of_trained, of_target = torch.autograd.grad(loss(*leaves).sum(), leaves, allow_unused=True)
    assert of_trained.abs().sum() > 0 and of_target is None


def test_a_clipped_ratio_has_no_gradient_where_it_has_gone_far_enough() -> None:
    """PPO's minimum, unlike A-LoL's clamp: up with A > 0 and down with A < 0 stop at the clip, ways back do not."""
    log_ratio = torch.tensor([[0.5, 0.5, -0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    loss = ppo_policy_loss(log_ratio, torch.zeros(1, 4), torch.ones(1, 4), advantages, epsilon=EPSILON)
    loss.sum().backward()
    assert (log_ratio.grad != 0).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_temperatures_are_positive(beta: float) -> None:
    for loss in (
        lambda: apa_loss(LOGPS, LOGPS, MASK, ADVANTAGES, beta=beta),
        lambda: awr_loss(LOGPS, MASK, ADVANTAGES, beta=beta),
    ):
        with pytest.raises(ValueError, match="must be positive"):
            loss()


# --- Where they end


def descend(loss: Callable[[Tensor], Tensor], shape: tuple[int, ...], steps: int = 4000, rate: float = 0.3) -> Tensor:
    """Log-probabilities, by plain gradient descent on the logits from the uniform policy. `loss` may hold on to a
    policy without its gradient, so that this follows a gradient that need not be that of any function."""
    logits = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(logits.log_softmax(-1)), logits)
        with torch.no_grad():
            logits -= rate * gradient
    assert gradient.abs().max() < 1e-8
    return logits.detach().log_softmax(-1)


ARMS = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64)
UNIFORM = torch.full((3, 1), math.log(1 / 3), dtype=torch.float64)
ALL = torch.ones(3, 1)


def test_apa_on_policy_bandit() -> None:
    """Completions from the policy itself: π_init e^{R/λ}/Z, R/λ = (5, 4, 2): e^5, e^4, e^2 over 210.40."""

    def loss(logps: Tensor) -> Tensor:
        policy = logps.exp().detach()
        advantages = ARMS - policy @ ARMS
        return (policy[:, None] * apa_loss(logps[:, None], UNIFORM, ALL, advantages, beta=0.5)).sum()

    policy = descend(loss, (3,)).exp()
    torch.testing.assert_close(policy, (ARMS / 0.5).softmax(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(policy, torch.tensor([0.7054, 0.2595, 0.0351]).double(), rtol=0, atol=1e-4)


def test_apa_with_fixed_data_is_not_the_optimum() -> None:
    """With fixed weights and advantages R − E_{π_init} R: ln π = ln π_init + A/λ − κ π/w."""
    advantages = ARMS - ARMS.mean()
    policy = descend(lambda logps: apa_loss(logps[:, None], UNIFORM, ALL, advantages, beta=0.5).mean(), (3,)).exp()
    torch.testing.assert_close(policy, torch.tensor([0.6198, 0.3214, 0.0588]).double(), rtol=0, atol=1e-4)
    kappa = (UNIFORM[:, 0] + advantages / 0.5 - policy.log()) / policy
    assert (kappa - kappa[0]).abs().max() < 1e-6


def test_awr_with_fixed_data_is_the_exponential_tilt() -> None:
    """−Σ w e^{A/λ} ln π is smallest at π ∝ w e^{A/λ}."""
    weights = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    policy = descend(lambda logps: weights @ awr_loss(logps[:, None], ALL, ARMS - 2.0, beta=1.0)[:, 0], (3,)).exp()
    torch.testing.assert_close(policy, (weights.log() + ARMS).softmax(-1), rtol=0, atol=1e-6)


# Two steps of two actions: the first one's policy is row 0, the second's after first action i is row 1 + i
TWO_STEP_REWARDS = torch.tensor([[1.0, 0.0], [0.6, 0.6]], dtype=torch.float64)
LAMBDA = 0.25
PAIRS = torch.cartesian_prod(torch.arange(2), torch.arange(2))


def trajectories(table: Tensor) -> Tensor:
    """What a table over states and actions, `(3, 2)`, holds for both steps of the four trajectories: `(4, 2)`."""
    first, second = PAIRS.unbind(1)
    return torch.stack([table[0, first], table[1 + first, second]], dim=1)


def advantages_of(policy: Tensor, step_rewards: Tensor) -> Tensor:
    """Exact advantages under a policy, `(3, 2)`, of rewards for state and action, `(3, 2)`, with no bootstrapping."""
    values = (policy * step_rewards).sum(-1)
    q = torch.cat([(step_rewards[0] + values[1:])[None], step_rewards[1:]])
    return q - (policy * q).sum(-1, keepdim=True)


def test_apa_two_steps_tilts_by_the_policys_own_values() -> None:
    """π(a|s) ∝ π_init e^{Q^π/λ} with hard Q: p(a1) = (.8217, .1783), p(a2|a1 = 0) = (.982, .018)."""
    rewards = torch.cat([torch.zeros(1, 2), TWO_STEP_REWARDS])
    uniform = torch.full((4, 2), math.log(0.5), dtype=torch.float64)

    def loss(logps: Tensor) -> Tensor:
        policy = logps.exp().detach()
        weights = trajectories(policy).prod(1)
        advantages = trajectories(advantages_of(policy, rewards))
        return (
            weights[:, None] * apa_loss(trajectories(logps), uniform, torch.ones(4, 2), advantages, beta=LAMBDA)
        ).sum()

    policy = descend(loss, (3, 2)).exp()
    torch.testing.assert_close(policy[0], torch.tensor([0.8217, 0.1783]).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(policy[1], torch.tensor([0.982, 0.018]).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(policy[2], torch.tensor([0.5, 0.5]).double(), rtol=0, atol=1e-6)


def test_ppo_two_steps_with_the_kl_in_the_reward_reaches_the_soft_optimum() -> None:
    """
    Rewards less β (ln π − ln π_ref) of every token: π* ∝ π_ref e^{Q_soft/β}. Soft values of the second step:
    β ln ½(e⁴ + 1) = .8313 and .6, so p(a1 = 0) = σ((.8313 − .6)/.25) = .7161. Control: without the KL it is greedy.
    """

    def solve(beta: float, steps: int) -> Tensor:
        rewards = torch.cat([torch.zeros(1, 2), TWO_STEP_REWARDS])

        def loss(logps: Tensor) -> Tensor:
            policy = logps.exp().detach()
            advantages = trajectories(advantages_of(policy, rewards - beta * (logps.detach() - math.log(0.5))))
            old = trajectories(logps.detach())
            losses = ppo_policy_loss(trajectories(logps), old, torch.ones(4, 2), advantages, epsilon=EPSILON)
            return (trajectories(policy).prod(1)[:, None] * losses).sum()

        logits = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(loss(logits.log_softmax(-1)), logits)
            with torch.no_grad():
                logits -= gradient
        return logits.detach().softmax(-1)

    policy = solve(LAMBDA, 6000)
    torch.testing.assert_close(policy[0], torch.tensor([0.7161, 0.2839]).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(policy[1], torch.tensor([4.0, 0.0]).double().softmax(-1), rtol=0, atol=1e-4)
    assert solve(0.0, 1000)[0, 0] > 0.95
