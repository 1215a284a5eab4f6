"""
`alol_loss` against the paper's formulas written out in loops, against hand-derived gradients, and against the
policies that its objectives are known to end in.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trl_lol.advantages import priority_weights
from trl_lol.losses import ALOL_LOSS_TYPES, alol_loss, importance_ratio


FILTERED = ("alol", "alol_seq", "alol_ref_free", "alol_kl")  # weight A⁺; the other four are the paper's baselines
USES_REFERENCE = ("alol", "alol_seq", "alol_kl", "r_lol")
GARBAGE = (math.nan, math.inf, -math.inf, 1e30)

MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
        [1, 1, 1, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],  # an empty completion
        [1, 1, 0, 1, 0, 1],  # holes
        [0, 0, 0, 0, 1, 1],
    ]
)
ADVANTAGES = torch.tensor([0.7, 0.3, -0.5, 0.0, 1.2, 0.25, 0.4, 0.9, 0.6], dtype=torch.float64)
# ln π_θ − ln π_ref of every token of the row, before noise: the sequence ratios fall on both sides of both clamps.
DRIFT = torch.tensor([0.5, -2.5, 0.3, -0.2, 1.5, -0.1, 0.0, 0.02, -0.9], dtype=torch.float64)


def make_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy and reference log-probabilities, mask and advantages, in float64."""
    generator = torch.Generator().manual_seed(0)
    logps = -0.05 - 4.0 * torch.rand(MASK.shape, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(MASK.shape, generator=generator, dtype=torch.float64)
    return logps, logps - DRIFT[:, None] - noise, MASK, ADVANTAGES


def loss_and_gradient(
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    upstream: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`alol_loss` and the gradient of its sum, weighted by `upstream`, with respect to `logps`."""
    leaf = logps.clone().requires_grad_()
    loss = alol_loss(leaf, ref_logps, mask, advantages, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), leaf.grad


def by_hand(
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    loss_type: str,
    epsilon: float | None,
    beta: float,
    clamp: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """
    The table of losses and, since neither the weight w nor ρ carries a gradient, ∂L/∂ln π_θ(y_t) = −w·ρ_t (+ β for
    `alol_kl`), one scalar at a time.
    """

    def clipped(ratio: float) -> float:
        return ratio if epsilon is None else min(max(ratio, 1 - epsilon), 1 + epsilon)

    losses, gradient = np.zeros(logps.shape[0]), np.zeros(tuple(logps.shape))
    for b, (policy_row, ref_row, mask_row) in enumerate(
        zip(logps.tolist(), ref_logps.tolist(), mask.tolist(), strict=True)
    ):
        kept = [t for t, keep in enumerate(mask_row) if keep]
        log_ratio = sum(policy_row[t] - ref_row[t] for t in kept)
        weight = advantages[b].item()
        if loss_type == "nll":
            weight = 1.0
        elif loss_type in FILTERED and clamp:
            weight = max(weight, 0.0)
        for t in kept:
            if loss_type in ("alol", "r_lol"):
                ratio = clipped(math.exp(log_ratio))
            elif loss_type == "alol_seq":
                ratio = clipped(math.exp(policy_row[t] - ref_row[t]))
            elif loss_type == "r_gold":
                ratio = max(math.exp(policy_row[t]), 0.1)
            else:
                ratio = 1.0
            losses[b] -= weight * ratio * policy_row[t]
            gradient[b, t] = -weight * ratio
            if loss_type == "alol_kl":
                gradient[b, t] += beta
        if loss_type == "alol_kl":
            losses[b] += beta * log_ratio
    return losses, gradient


# --- The formulas


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("epsilon", [0.9, 0.2, None])
@pytest.mark.parametrize("loss_type", ALOL_LOSS_TYPES)
def test_value_and_gradient_are_those_of_the_formulas(loss_type: str, epsilon: float | None, clamp: bool) -> None:
    """
    Every sequence gets an upstream factor of its own, so that a gradient that leaks from one row to another shows.
    β = 0.35 everywhere: only `alol_kl` may react to it.
    """
    batch = make_batch()
    upstream = torch.linspace(0.5, 2.0, len(ADVANTAGES), dtype=torch.float64)
    options = {"loss_type": loss_type, "epsilon": epsilon, "beta": 0.35, "clamp": clamp}
    expected, expected_gradient = by_hand(*batch, **options)
    loss, gradient = loss_and_gradient(*batch, upstream=upstream, **options)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-9, atol=0)
    np.testing.assert_allclose(gradient.numpy(), upstream[:, None].numpy() * expected_gradient, rtol=1e-9, atol=0)


def test_the_batch_reaches_every_branch() -> None:
    """
    Control of the test above: under both clamps some sequence ratios and some token ratios of positive-advantage rows
    are cut at the bottom, some at the top, some not at all; token probabilities lie on both sides of GOLD's 0.1; and
    no two losses agree, so that one formula cannot stand in for another.
    """
    logps, ref_logps, mask, advantages = make_batch()
    kept = mask.bool() & (advantages > 0)[:, None]
    log_ratio = (logps - ref_logps).masked_fill(~kept, 0.0)
    for ratio in (log_ratio.sum(dim=1)[kept.any(dim=1)].exp(), log_ratio[kept].exp()):
        assert (ratio < 0.1).any() and (ratio > 1.9).any()  # outside both clamps
        assert ((ratio > 0.1) & (ratio < 0.8)).any() and ((ratio > 0.8) & (ratio < 1.2)).any()
    assert (logps[kept].exp() < 0.1).any() and (logps[kept].exp() > 0.1).any()

    losses = [by_hand(*make_batch(), loss_type=t, epsilon=0.9, beta=0.35, clamp=True)[0] for t in ALOL_LOSS_TYPES]
    for i, one in enumerate(losses):
        for other in losses[:i]:
            assert not np.allclose(one, other, rtol=1e-3)


def test_defaults_are_alol_with_the_papers_epsilon() -> None:
    batch = make_batch()
    explicit = alol_loss(*batch, loss_type="alol", epsilon=0.9, clamp=True)
    assert torch.equal(alol_loss(*batch), explicit)
    assert not torch.equal(alol_loss(*batch, epsilon=0.2), explicit)


def test_unknown_loss_type_names_the_accepted_ones() -> None:
    with pytest.raises(ValueError, match="'alol_kll'") as error:
        alol_loss(*make_batch(), loss_type="alol_kll")
    for loss_type in ALOL_LOSS_TYPES:
        assert repr(loss_type) in str(error.value)


def test_importance_ratio() -> None:
    """ε = 0.9 leaves [0.1, 1.9]: e^−∞ = 0 and 0.05 rise to 0.1, 3 and e^∞ fall to 1.9; without ε nothing moves."""
    log_ratio = torch.tensor([-math.inf, math.log(0.05), 0.0, math.log(3.0), math.inf], requires_grad=True)
    clipped, plain = importance_ratio(log_ratio, 0.9), importance_ratio(log_ratio)
    torch.testing.assert_close(clipped, torch.tensor([0.1, 0.1, 1.0, 1.9, 1.9]))
    torch.testing.assert_close(plain, torch.tensor([0.0, 0.05, 1.0, 3.0, math.inf]))
    assert not clipped.requires_grad and not plain.requires_grad


# --- Padding


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("loss_type", ALOL_LOSS_TYPES)
def test_masked_positions_never_reach_value_or_gradient(loss_type: str, garbage: float) -> None:
    logps, ref_logps, mask, advantages = make_batch()
    options = {"loss_type": loss_type, "beta": 0.35}
    padding = mask == 0
    clean, clean_gradient = loss_and_gradient(logps, ref_logps, mask, advantages, **options)
    dirty, dirty_gradient = loss_and_gradient(
        logps.masked_fill(padding, garbage), ref_logps.masked_fill(padding, garbage), mask, advantages, **options
    )
    assert torch.equal(dirty, clean) and clean.isfinite().all()
    assert torch.equal(dirty_gradient, clean_gradient)
    assert (dirty_gradient[padding] == 0).all()

    # Control: the same value in one completion token (row 7: A > 0, ratio unclamped) is felt, and by that row alone.
    row, others = 7, torch.arange(len(mask)) != 7
    token = torch.zeros_like(padding)
    token[row, 1] = True
    spoilt = alol_loss(logps.masked_fill(token, garbage), ref_logps, mask, advantages, **options)
    assert spoilt[row] != clean[row]
    assert torch.equal(spoilt[others], clean[others])

    # The types that need no reference may be given any; the others feel it.
    spoilt = alol_loss(logps, ref_logps.masked_fill(token, garbage), mask, advantages, **options)
    assert (spoilt[row] != clean[row]).item() == (loss_type in USES_REFERENCE)


@pytest.mark.parametrize("loss_type", ALOL_LOSS_TYPES)
def test_extra_columns_batch_order_and_mask_dtype_do_not_matter(loss_type: str) -> None:
    logps, ref_logps, mask, advantages = make_batch()
    options = {"loss_type": loss_type, "beta": 0.35}
    loss, gradient = loss_and_gradient(logps, ref_logps, mask, advantages, **options)

    def widen(x: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(x, (2, 3), value=fill)

    wide_loss, wide_gradient = loss_and_gradient(
        widen(logps, -1.0), widen(ref_logps, -2.0), widen(mask, 0), advantages, **options
    )
    torch.testing.assert_close(wide_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(wide_gradient, widen(gradient, 0.0), rtol=1e-12, atol=0)
    counted = alol_loss(widen(logps, -1.0), widen(ref_logps, -2.0), widen(mask, 1), advantages, **options)
    assert not torch.allclose(counted, loss)  # control: the columns matter once the mask counts them

    order = torch.tensor([4, 7, 0, 8, 2, 6, 1, 5, 3])
    shuffled_loss, shuffled_gradient = loss_and_gradient(
        logps[order], ref_logps[order], mask[order], advantages[order], **options
    )
    torch.testing.assert_close(shuffled_loss, loss[order], rtol=1e-12, atol=0)
    torch.testing.assert_close(shuffled_gradient, gradient[order], rtol=1e-12, atol=0)

    for dtype in (torch.bool, torch.float64):
        assert torch.equal(alol_loss(logps, ref_logps, mask.to(dtype), advantages, **options), loss)


# --- What carries a gradient


@pytest.mark.parametrize("loss_type", FILTERED)
def test_only_positive_advantages_train(loss_type: str) -> None:
    """A⁺ = 0 wherever A ≤ 0. Control: with A > 0 every completion token of the same rows gets a gradient."""
    logps, ref_logps, mask, advantages = make_batch()
    for dropped in (torch.zeros_like(advantages), -1 - advantages.abs()):
        loss, gradient = loss_and_gradient(logps, ref_logps, mask, dropped, loss_type=loss_type)
        assert (loss == 0).all() and (gradient == 0).all()
    _, gradient = loss_and_gradient(logps, ref_logps, mask, torch.ones_like(advantages), loss_type=loss_type)
    assert torch.equal(gradient != 0, mask.bool())


@pytest.mark.parametrize("loss_type", FILTERED)
def test_without_the_clamp_the_sign_of_the_advantage_counts(loss_type: str) -> None:
    logps, ref_logps, mask, advantages = make_batch()
    positive = 0.1 + advantages.abs()
    options = {"loss_type": loss_type, "clamp": False}
    loss, gradient = loss_and_gradient(logps, ref_logps, mask, positive, **options)
    negated_loss, negated_gradient = loss_and_gradient(logps, ref_logps, mask, -positive, **options)
    assert torch.equal(negated_loss, -loss)
    assert torch.equal(negated_gradient, -gradient)
    assert torch.equal(gradient != 0, mask.bool())
    zero_loss, zero_gradient = loss_and_gradient(logps, ref_logps, mask, torch.zeros_like(positive), **options)
    assert (zero_loss == 0).all() and (zero_gradient == 0).all()


@pytest.mark.parametrize("loss_type", ALOL_LOSS_TYPES)
def test_advantages_and_reference_carry_no_gradient(loss_type: str) -> None:
    logps, ref_logps, mask, advantages = make_batch()
    leaves = [x.clone().requires_grad_() for x in (logps, ref_logps, advantages)]
    loss = alol_loss(leaves[0], leaves[1], mask, leaves[2], loss_type=loss_type, beta=0.35)
    of_policy, of_reference, of_advantages = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    assert of_policy.abs().sum() > 0
    assert of_reference is None and of_advantages is None


def test_ratio_carries_no_gradient() -> None:
    """
    The gradient of A·ρ·(−ln π) is −A·ρ where ρ is a constant and −A·ρ·(1 + ln π) where it is not. One token,
    A = 0.5, ln π = −2, ln π_ref = −2.5, no clipping: ρ = e^0.5, so −0.824 against the control's +0.824.
    """
    logps, ref_logps, advantages = (torch.tensor(x, dtype=torch.float64) for x in ([[-2.0]], [[-2.5]], [0.5]))
    rho = math.exp(0.5)
    for loss_type in ("alol", "alol_seq", "r_lol"):
        _, gradient = loss_and_gradient(
            logps, ref_logps, torch.ones(1, 1), advantages, loss_type=loss_type, epsilon=None
        )
        assert gradient.item() == pytest.approx(-0.5 * rho, rel=1e-12)

    leaf = logps.clone().requires_grad_()
    attached = advantages * (leaf - ref_logps).exp() * -leaf
    assert torch.autograd.grad(attached.sum(), leaf)[0].item() == pytest.approx(0.5 * rho, rel=1e-12)


@pytest.mark.parametrize("loss_type", ["alol", "alol_seq"])
def test_clamped_examples_keep_their_gradient(loss_type: str) -> None:
    """
    One token each, A = 1, ε = 0.2. At ρ = 2 the plain clamp leaves −A·1.2 of gradient, at ρ = 0.5 −A·0.8. PPO's
    −min(ρA, clamp(ρ)A) picks the constant 1.2 at ρ = 2 (gradient 0) and ρ itself at 0.5 (gradient −0.5).
    """
    logps = torch.tensor([[-1.0], [-1.0]], dtype=torch.float64)
    ref_logps = logps - torch.tensor([[2.0], [0.5]], dtype=torch.float64).log()
    _, gradient = loss_and_gradient(
        logps, ref_logps, torch.ones(2, 1), torch.ones(2).double(), loss_type=loss_type, epsilon=0.2
    )
    np.testing.assert_allclose(gradient[:, 0].numpy(), [-1.2, -0.8], rtol=1e-12)

    leaf = logps.clone().requires_grad_()
    ratio = (leaf - ref_logps).exp()
    ppo = -torch.minimum(ratio, ratio.clamp(0.8, 1.2))
    np.testing.assert_allclose(torch.autograd.grad(ppo.sum(), leaf)[0][:, 0].numpy(), [0.0, -0.5], atol=1e-12)


# --- The policies that the objectives end in


def optimise(
    row_weights: list[float], advantages: list[float], reference: list[float], steps: int = 4000, **options: Any
) -> Tensor:
    """
    Log-probabilities of a tabular softmax over the arms after gradient descent, from π_ref, on the exact expectation
    of `alol_loss`: one row per arm, one token per row, weighted by how often the data holds that arm.

    With w_i = −(row weight · ∂L_i/∂ln π_i) the logits move by η(w_i − π_i Σw), so at rest π = w/Σw. While w does not
    depend on π, the linearised step there is 1 − η·Σw·(diag π − ππᵀ), whose matrix has eigenvalues of at most 1/2:
    η = 3 is stable for Σw < 4/3. An arm with w_i = 0 dies only as 1/(η t Σw), 4·10⁻⁴ after 4000 steps at Σw = .22,
    which sets the tolerance where there is such an arm.
    """
    weights, advantage, ref = (torch.tensor(x, dtype=torch.float64) for x in (row_weights, advantages, reference))
    ref_logps = ref.log()[:, None]
    logits = ref.log().requires_grad_()
    for _ in range(steps):
        loss = alol_loss(logits.log_softmax(dim=0)[:, None], ref_logps, torch.ones(len(ref), 1), advantage, **options)
        (gradient,) = torch.autograd.grad(weights @ loss, logits)
        with torch.no_grad():
            logits -= 3.0 * gradient
    return logits.detach().log_softmax(dim=0)


MU = [0.2, 0.3, 0.1, 0.4]
ARMS = [0.6, 0.3, 0.1, -0.4]


@pytest.mark.parametrize(
    ("loss_type", "priority", "expected"),
    [
        ("alol_ref_free", False, [0.12 / 0.22, 0.09 / 0.22, 0.01 / 0.22, 0.0]),
        ("alol_ref_free", True, [0.072 / 0.1, 0.027 / 0.1, 0.001 / 0.1, 0.0]),
        ("nll", True, [0.12 / 0.22, 0.09 / 0.22, 0.01 / 0.22, 0.0]),
        ("nll", False, MU),
    ],
)
def test_reference_free_fixed_points(loss_type: str, priority: bool, expected: list[float]) -> None:
    """
    w = μA⁺ = (.12, .09, .01, 0), of sum .22, ends in π ∝ μA⁺. Drawing rows with probability μA⁺/.22 and weighting
    them by A⁺ as well gives w ∝ μ(A⁺)² = (.072, .027, .001, 0), of sum .1. Controls: priority sampling alone (`nll`
    weighs every row 1) is μA⁺ again, and with neither the policy stays at μ.
    """
    rows = torch.tensor(MU, dtype=torch.float64)
    if priority:
        rows = rows * priority_weights(torch.tensor(ARMS, dtype=torch.float64))
        rows = rows / rows.sum()
    policy = optimise(rows.tolist(), ARMS, MU, loss_type=loss_type).exp()
    np.testing.assert_allclose(policy.numpy(), expected, atol=1e-3)


def test_clipped_alol_fixed_point() -> None:
    """
    μ = π_ref, ε = .9. Here w_i = μ_i A⁺_i ρ_i with ρ_i = clamp(π_i/μ_i), and at rest π_i = w_i/c, c = Σ w. Unclamped,
    w_i = A⁺_i π_i, so an arm grows while A⁺_i > c and shrinks while A⁺_i < c: it stops at ρ = 1.9 or at ρ = .1, except
    where A⁺_i = c, which any π_i satisfies and which takes what the others leave.
    With c = .3 (arm 1): arm 0 (.6 > .3): .2·.6·1.9/.3 = .76; arm 2 (.1 < .3): .1·.1·.1/.3 = .00333; arm 3: 0; arm 1
    the remainder .23667, whose ratio .789 is indeed inside the clamp, and then c = .228 + .3·.23667 + .001 = .3.

    ρ follows the policy without a gradient, yet w is a continuous function of π, and c rises with π_1, which pulls
    arm 1 back: the point attracts plain gradient descent, and nothing has to be averaged. What is left is arm 3's
    1/t tail, 3·10⁻⁴ here.
    """
    policy = optimise(MU, ARMS, MU, loss_type="alol", epsilon=0.9).exp()
    np.testing.assert_allclose(policy.numpy(), [0.76, 0.71 / 3, 0.01 / 3, 0.0], atol=1e-3)
    # Control: the same problem without the clamp ends elsewhere, on argmax A⁺.
    collapsed = optimise(MU, ARMS, MU, loss_type="alol", epsilon=None).exp()
    np.testing.assert_allclose(collapsed.numpy(), [1.0, 0.0, 0.0, 0.0], atol=1e-3)


def test_unclipped_alol_collapses() -> None:
    """
    Without a clamp w_i = m_i π_i, m = (μ/π_ref)A⁺: the logits move by η·π_i(m_i − Σ π m), replicator dynamics, which
    end on argmax m. m = (.1/.3·.9, .3/.1·.6, .5/.4·.5, 0) = (.3, 1.8, .625, 0): arm 1, though A is largest at arm 0
    and μA⁺ = (.09, .18, .25, 0) at arm 2. Control: the ratio does it; ρ = 1 on the same data ends in μA⁺/.52.
    """
    mu, advantages, reference = [0.1, 0.3, 0.5, 0.1], [0.9, 0.6, 0.5, -0.4], [0.3, 0.1, 0.4, 0.2]
    policy = optimise(mu, advantages, reference, loss_type="alol", epsilon=None).exp()
    np.testing.assert_allclose(policy.numpy(), [0.0, 1.0, 0.0, 0.0], atol=1e-3)
    spread = optimise(mu, advantages, reference, loss_type="alol_ref_free").exp()
    np.testing.assert_allclose(spread.numpy(), [0.09 / 0.52, 0.18 / 0.52, 0.25 / 0.52, 0.0], atol=1e-3)


def test_kl_fixed_point_and_the_arms_that_it_pushes_down() -> None:
    """
    w = μ(A⁺ − β). μ = (.5, .3, .2), A = (.6, .4, .1).

    β = .05: w = (.275, .105, .01) is positive, so π = w/.39 and stays there; every arm is reached exponentially fast.
    β = .2: w = (.2, .06, −.02). Once π_2 ≈ 0 its logit falls by η·.02 a step; the logits' sum is conserved, so the
    other two each rise by η·.01 for ever, their ratio at rest, and ln π_2 falls by η·(.02 + .01) = .09 a step at
    η = 3: by 90 in 1000 steps, without end.
    """
    mu, advantages = [0.5, 0.3, 0.2], [0.6, 0.4, 0.1]

    def end(beta: float, steps: int) -> Tensor:
        return optimise(mu, advantages, mu, steps, loss_type="alol_kl", beta=beta)

    np.testing.assert_allclose(end(0.05, 1000).exp().numpy(), np.array([0.275, 0.105, 0.01]) / 0.39, rtol=1e-6)
    settled, falling = end(0.05, 2000) - end(0.05, 1000), end(0.2, 2000) - end(0.2, 1000)
    assert settled.abs().max() < 1e-6
    assert falling[2].item() == pytest.approx(-90, rel=1e-6)
    assert falling[:2].abs().max() < 1e-6
