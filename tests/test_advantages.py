"""Baselines, GAE, whitening and priority weights against their definitions, written out one scalar at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trl_lol.advantages import (
    BASELINES,
    explained_variance,
    gae,
    masked_whiten,
    mean_rewards,
    priority_weights,
    sequence_advantages,
    token_rewards,
)


NAN = math.nan
GARBAGE = (math.nan, math.inf, -math.inf, 1e30)


def tensor(x: list | np.ndarray) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


# --- Sequence-level baselines


# Group 7 = {1, NaN, 5, 3}, group −3 = {2, NaN}, group 100 = {4}, group 0 = {NaN}; interleaved.
REWARDS = tensor([1.0, 2.0, NAN, 4.0, 5.0, NAN, 3.0, NAN])
GROUPS = torch.tensor([7, -3, 7, 100, 7, 0, 7, -3])
VALUES = tensor([0.5, 0.5, 0.5, -1.0, 7.0, 0.0, 2.0, NAN])


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("value", [0.5, 1.5, 0.0, 5.0, -2.0, 0.0, 1.0, 0.0]),
        ("group_mean", [-2.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0]),
        ("leave_one_out", [-3.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0]),
        ("batch_mean", [-2.0, -1.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0]),
        ("none", [1.0, 2.0, 0.0, 4.0, 5.0, 0.0, 3.0, 0.0]),
    ],
)
def test_baselines(baseline: str, expected: list[float]) -> None:
    """
    Unscored rows get 0 under every baseline, whatever the others get. Group 7 has scored rewards 1, 5, 3: mean 3,
    leave-one-out 1 − (5 + 3)/2 = −3, 5 − (1 + 3)/2 = 3, 3 − (1 + 5)/2 = 0. The only scored members of groups −3 and
    100 equal their group's mean, and get 0 from leave-one-out by definition. Batch: (1 + 2 + 4 + 5 + 3)/5 = 3.
    Values: 3 − 2 = 1 at row 6; the unscored row 7 has no value either, and still gets 0.
    """
    advantages = sequence_advantages(REWARDS, group_ids=GROUPS, values=VALUES, baseline=baseline)
    torch.testing.assert_close(advantages, tensor(expected), rtol=0, atol=1e-12)


def test_default_baseline_is_the_value() -> None:
    rewards, values = tensor([1.0, 0.0]), tensor([0.25, 0.5])
    assert torch.equal(sequence_advantages(rewards, values=values), rewards - values)


@pytest.mark.parametrize("baseline", BASELINES)
def test_nothing_scored_gives_zeros(baseline: str) -> None:
    unscored = tensor([NAN, NAN, NAN])
    group_ids = torch.tensor([0, 0, 1])
    advantages = sequence_advantages(unscored, group_ids=group_ids, values=unscored, baseline=baseline)
    assert torch.equal(advantages, tensor([0.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("baseline", "named"), [("value", "values"), ("group_mean", "group_ids"), ("leave_one_out", "group_ids")]
)
def test_a_missing_argument_is_named(baseline: str, named: str) -> None:
    other = {"group_ids": GROUPS} if named == "values" else {"values": REWARDS}
    with pytest.raises(ValueError, match=f"`{named}`"):
        sequence_advantages(REWARDS, baseline=baseline, **other)


def test_an_unknown_baseline_names_the_accepted_ones() -> None:
    with pytest.raises(ValueError, match="'mean'") as error:
        sequence_advantages(REWARDS, group_ids=GROUPS, values=VALUES, baseline="mean")
    for baseline in BASELINES:
        assert repr(baseline) in str(error.value)


def advantages_by_hand(rewards: list[float], group_ids: list[int], values: list[float], baseline: str) -> list[float]:
    """The table of baselines, one completion at a time."""
    scored = [i for i, reward in enumerate(rewards) if not math.isnan(reward)]
    advantages = [0.0] * len(rewards)
    for i in scored:
        if baseline == "value":
            subtracted = [values[i]]
        elif baseline == "group_mean":
            subtracted = [rewards[j] for j in scored if group_ids[j] == group_ids[i]]
        elif baseline == "leave_one_out":
            others = [rewards[j] for j in scored if group_ids[j] == group_ids[i] and j != i]
            subtracted = others or [rewards[i]]
        elif baseline == "batch_mean":
            subtracted = [rewards[j] for j in scored]
        else:
            subtracted = [0.0]
        advantages[i] = rewards[i] - math.fsum(subtracted) / len(subtracted)
    return advantages


# Few distinct group numbers, far apart, so that groups of every size occur, interleaved.
ROWS = st.lists(
    st.tuples(
        st.floats(-10, 10) | st.just(NAN),
        st.sampled_from([-3, 0, 5, 2**40]),
        st.floats(-10, 10),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(ROWS)
def test_any_grouping_follows_the_definition(rows: list[tuple[float, int, float]]) -> None:
    rewards, group_ids, values = (list(column) for column in zip(*rows, strict=True))
    arguments = {"group_ids": torch.tensor(group_ids), "values": tensor(values)}
    for baseline in BASELINES:
        advantages = sequence_advantages(tensor(rewards), baseline=baseline, **arguments)
        expected = advantages_by_hand(rewards, group_ids, values, baseline)
        np.testing.assert_allclose(advantages.numpy(), expected, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(ROWS)
def test_leave_one_out_is_the_group_mean_rescaled(rows: list[tuple[float, int, float]]) -> None:
    """r − (S − r)/(k − 1) = (kr − S)/(k − 1) and r − S/k = (kr − S)/k: the ratio is k/(k − 1), k scored members."""
    rewards, group_ids, _ = zip(*rows, strict=True)
    size = [sum(g == own and not math.isnan(r) for r, g in zip(rewards, group_ids, strict=True)) for own in group_ids]
    arguments = {"rewards": tensor(rewards), "group_ids": torch.tensor(group_ids)}
    leave_one_out = sequence_advantages(**arguments, baseline="leave_one_out")
    group_mean = sequence_advantages(**arguments, baseline="group_mean")
    shrink = tensor([(k - 1) / max(k, 1) for k in size])
    torch.testing.assert_close(leave_one_out * shrink, group_mean, rtol=0, atol=1e-12)


# --- Rewards of tokens


def test_token_rewards_by_hand() -> None:
    """β = ½ and log-ratios 2, 4, 6: −1, −2, −3, and the completion's reward on top at its last token. Without any
    token there is no reward."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    rewards = tensor([10.0, 20.0, -30.0, 40.0])
    log_ratio = tensor([[2.0, 4.0, 6.0, 9.0], [9.0, 2.0, 9.0, 4.0], [6.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    last = tensor([[0.0, 0.0, 10.0, 0.0], [0.0, 0.0, 0.0, 20.0], [-30.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    penalty = tensor([[1.0, 2.0, 3.0, 0.0], [0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for m in (mask, mask.bool(), mask.double()):
        assert torch.equal(token_rewards(rewards, m, log_ratio, beta=0.5), last - penalty)
        assert torch.equal(token_rewards(rewards, m, log_ratio), last)
        assert torch.equal(token_rewards(rewards, m), last)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_token_rewards_ignore_what_padding_holds(garbage: float) -> None:
    """Also the reward of a completion without tokens, which is how an unscored one looks."""
    rewards, _ = gae_inputs()
    of_completion, padding = rewards[:, 0].clone(), GAE_MASK == 0
    clean = token_rewards(of_completion, GAE_MASK, rewards, beta=0.5)
    of_completion[~GAE_MASK.bool().any(dim=1)] = garbage
    assert torch.equal(token_rewards(of_completion, GAE_MASK, rewards.masked_fill(padding, garbage), beta=0.5), clean)
    assert clean.isfinite().all() and (clean[padding] == 0).all()
    of_completion[0] = garbage  # control
    assert not torch.equal(token_rewards(of_completion, GAE_MASK, rewards, beta=0.5), clean)


def test_token_rewards_add_up() -> None:
    """R − β Σ_t ln(π_old/π_ref), which is what leave-one-out takes for the reward of the completion."""
    log_ratio, noise = gae_inputs()
    total = token_rewards(noise[:, 0], GAE_MASK, log_ratio, beta=0.3).sum(dim=1)
    expected = noise[:, 0] - 0.3 * (log_ratio * GAE_MASK).sum(dim=1)
    expected[~GAE_MASK.bool().any(dim=1)] = 0.0
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_explained_variance_by_hand(garbage: float) -> None:
    """
    Returns 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9)/4 = 14/4. Values 1, 1, 4, 4 leave 0, 1, −1, 2: mean ½,
    variance (1 + 1 + 9 + 9)/16 = 20/16, so 1 − 20/56 = 9/14. An error that is the same everywhere costs nothing.
    """
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    returns = tensor([[1.0, 2.0, garbage], [3.0, garbage, 6.0]])
    values = tensor([[1.0, 1.0, garbage], [4.0, garbage, 4.0]])
    for v, expected in (
        (values, 9 / 14),
        (values + 5, 9 / 14),
        (returns, 1.0),
        (torch.full_like(values, 2.5), 0.0),
        (-returns, -3.0),  # the residual is twice the return
    ):
        assert explained_variance(v, returns, mask).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_explained_variance_of_returns_that_do_not_vary(count: int) -> None:
    mask = torch.arange(6).view(2, 3) < count
    assert explained_variance(torch.rand(2, 3), torch.full((2, 3), 0.5), mask).isnan()


# --- Generalised advantage estimation


GAE_MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],  # left padding
        [1, 1, 1, 1, 0, 0, 0],  # right padding
        [0, 1, 1, 0, 1, 0, 0],  # both, and a gap
        [1, 0, 1, 0, 1, 0, 1],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
)


def gae_inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rewards and values of `GAE_MASK`'s shape."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, *GAE_MASK.shape, generator=generator, dtype=torch.float64)
    return rewards, values


def gae_by_hand(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> np.ndarray:
    """A_t = Σ_{l≥0} (γλ)^l (r_{t+l} + γV_{t+l+1} − V_{t+l}) over the kept positions of each row, V = 0 at its end."""
    advantages = np.zeros(tuple(mask.shape))
    for b, row in enumerate(mask.tolist()):
        kept = [t for t, keep in enumerate(row) if keep]
        r, v = rewards[b, kept].tolist(), [*values[b, kept].tolist(), 0.0]
        for i, t in enumerate(kept):
            advantages[b, t] = sum(
                (gamma * lam) ** (j - i) * (r[j] + gamma * v[j + 1] - v[j]) for j in range(i, len(kept))
            )
    return advantages


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_gae_follows_the_definition(gamma: float, lam: float) -> None:
    """Also over random masks, where almost every row has gaps."""
    random_mask = torch.rand(40, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    random_rewards, random_values = torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(2)).double()
    for rewards, values, mask in ((*gae_inputs(), GAE_MASK), (random_rewards, random_values, random_mask)):
        advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
        expected = gae_by_hand(rewards, values, mask, gamma, lam)
        np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-9, atol=1e-12)
        kept = mask.bool()
        torch.testing.assert_close(returns[kept], (advantages + values)[kept], rtol=1e-12, atol=1e-12)
        assert (advantages[~kept] == 0).all() and (returns[~kept] == 0).all()


def test_gae_defaults() -> None:
    rewards, values = gae_inputs()
    assert torch.equal(gae(rewards, values, GAE_MASK)[0], gae(rewards, values, GAE_MASK, gamma=1.0, lam=0.95)[0])


def test_lambda_one_returns_the_discounted_rewards_to_go() -> None:
    """
    The values telescope out at λ = 1. Kept rewards 1, 2, 4 of a row with a gap, γ = ½: 4; 2 + 4/2 = 4; 1 + 4/2 = 3.
    Control: at λ < 1 other values give other returns.
    """
    mask = torch.tensor([[0, 1, 0, 1, 1, 0]])
    rewards = tensor([[9.0, 1.0, 9.0, 2.0, 4.0, 9.0]])
    values, other_values = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = tensor([[0.0, 3.0, 0.0, 4.0, 4.0, 0.0]])
    for v in (values, other_values):
        torch.testing.assert_close(gae(rewards, v, mask, gamma=0.5, lam=1.0)[1], expected, rtol=0, atol=1e-12)
    one, other = (gae(rewards, v, mask, gamma=0.5, lam=0.9)[1] for v in (values, other_values))
    assert not torch.allclose(one, other)


def test_lambda_zero_is_the_one_step_td_error() -> None:
    """
    δ_t = r_t + γV_{t+1} − V_t across the gap, γ = ½, kept r = 1, 2, 4 and V = 10, 20, 40:
    1 + 10 − 10 = 1; 2 + 20 − 20 = 2; 4 + 0 − 40 = −36. The position after the last token is not bootstrapped from.
    """
    mask = torch.tensor([[0, 1, 0, 1, 1, 0]])
    rewards = tensor([[9.0, 1.0, 9.0, 2.0, 4.0, 9.0]])
    values = tensor([[7.0, 10.0, 7.0, 20.0, 40.0, 7.0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.0)
    assert torch.equal(advantages, tensor([[0.0, 1.0, 0.0, 2.0, -36.0, 0.0]]))
    assert torch.equal(returns, tensor([[0.0, 11.0, 0.0, 22.0, 4.0, 0.0]]))
    # Control: once the mask counts the next position, the last advantage includes its value: 4 + 7/2 − 40.
    extended, _ = gae(rewards, values, torch.tensor([[0, 1, 0, 1, 1, 1]]), gamma=0.5, lam=0.0)
    assert extended[0, 4] == -32.5


@pytest.mark.parametrize("garbage", GARBAGE)
def test_gae_ignores_what_padding_holds(garbage: float) -> None:
    rewards, values = gae_inputs()
    padding = GAE_MASK == 0
    clean = gae(rewards, values, GAE_MASK)
    dirty = gae(rewards.masked_fill(padding, garbage), values.masked_fill(padding, garbage), GAE_MASK)
    assert torch.equal(dirty[0], clean[0]) and torch.equal(dirty[1], clean[1])
    assert clean[0].isfinite().all()
    # Control: on a token it is felt, by the tokens before it in its row (γλ > 0) and by nobody else.
    token = torch.zeros_like(padding)
    token[3, 2] = True
    spoilt, _ = gae(rewards.masked_fill(token, garbage), values, GAE_MASK)
    felt = torch.zeros_like(padding)
    felt[3, 1:3] = True
    assert torch.equal(spoilt != clean[0], felt)


def test_gae_carries_no_gradient() -> None:
    rewards, values = (x.requires_grad_() for x in gae_inputs())
    advantages, returns = gae(rewards, values, GAE_MASK)
    assert not advantages.requires_grad and not returns.requires_grad


# --- Whitening


def whiten_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return 3.0 + 2.0 * torch.randn(GAE_MASK.shape, generator=generator, dtype=torch.float64), GAE_MASK


@pytest.mark.parametrize("garbage", [0.0, *GARBAGE])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_uses_the_mask_alone(shift_mean: bool, garbage: float) -> None:
    """
    Over the mask: variance 1 with Bessel's correction, mean 0 or the old one, order and spacing kept (an affine map).
    The 1e-8 under the root moves the variance, about 4 here, by 1e-8/4.
    """
    x, mask = whiten_inputs()
    kept = mask.bool()
    whitened = masked_whiten(x, mask, shift_mean=shift_mean)
    mean, std = x[kept].mean(), x[kept].std(correction=1)
    torch.testing.assert_close(whitened[kept].std(correction=1), tensor(1.0), rtol=0, atol=1e-7)
    expected_mean = torch.zeros_like(mean) if shift_mean else mean
    torch.testing.assert_close(whitened[kept].mean(), expected_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(whitened[kept], (x[kept] - mean) / std + expected_mean, rtol=0, atol=1e-7)
    assert (whitened[~kept] == 0).all()
    assert torch.equal(masked_whiten(x.masked_fill(~kept, garbage), mask, shift_mean=shift_mean), whitened)
    # Control: statistics that count the padding are different ones.
    everywhere = masked_whiten(x.masked_fill(~kept, 0.0), torch.ones_like(mask), shift_mean=shift_mean)
    assert not torch.allclose(everywhere[kept], whitened[kept], atol=1e-2)


def test_whitening_by_hand() -> None:
    """1, 2, 3 and 6: mean 3, deviations −2, −1, 0, 3, variance 14/3 (14/4 without Bessel's correction)."""
    x, mask = tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 6.0]]), torch.tensor([[1, 1, 0], [1, 0, 1]])
    expected = tensor([[-2.0, -1.0, 0.0], [0.0, 0.0, 3.0]]) / math.sqrt(14 / 3)
    torch.testing.assert_close(masked_whiten(x, mask), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("value", [0.0, 0.7, -1000.1])
def test_equal_values_do_not_blow_up(value: float, count: int) -> None:
    """Zero variance: 0 everywhere, or the common value where the mean is kept; likewise for one value or none."""
    mask = (torch.arange(10) < count).view(2, 5)
    x = torch.full((2, 5), value, dtype=torch.float64)
    torch.testing.assert_close(masked_whiten(x, mask), torch.zeros_like(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(masked_whiten(x, mask, shift_mean=False), x * mask, rtol=0, atol=1e-6)


# --- Priority sampling


def test_priority_weights() -> None:
    advantages = tensor([0.6, -0.4, 0.0, 1e-3, -5.0])
    assert torch.equal(priority_weights(advantages), tensor([0.6, 0.0, 0.0, 1e-3, 0.0]))
    assert torch.equal(advantages, tensor([0.6, -0.4, 0.0, 1e-3, -5.0]))  # the argument is left as it was


@pytest.mark.parametrize("advantages", [[-1.0, -0.5, -2.0], [0.0, 0.0, -1.0], []])
def test_priority_weights_need_a_positive_advantage(advantages: list[float]) -> None:
    with pytest.raises(ValueError, match=f"None of the {len(advantages)} advantages is positive"):
        priority_weights(tensor(advantages))
    priority_weights(tensor([*advantages, 1e-9]))  # control: one is enough


def test_integer_rewards_have_fractional_advantages():
    """Rewards 0, 1, 1 over their mean 2/3."""
    advantages = sequence_advantages(torch.tensor([0, 1, 1]), baseline="batch_mean")
    torch.testing.assert_close(advantages, torch.tensor([-2 / 3, 1 / 3, 1 / 3]))


def test_ties_are_no_advantage_in_single_precision():
    """The float32 mean of 0.7, seven times, is not 0.7; a completion that is as good as all others has advantage 0."""
    rewards = torch.full((7,), 0.7)
    assert rewards.sum() / 7 != rewards[0]  # Control
    for baseline in ("group_mean", "leave_one_out", "batch_mean"):
        assert (sequence_advantages(rewards, group_ids=torch.zeros(7), baseline=baseline) == 0).all()


def test_gae_of_empty_completions():
    advantages, returns = gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0))
    assert advantages.shape == returns.shape == (2, 0)


def test_mean_rewards():
    """Prompt 0 has 1 and 2, prompt 1 one reward of two, prompt 2 none."""
    rewards = torch.tensor([1.0, 4.0, 2.0, torch.nan, torch.nan])
    means, counts = mean_rewards(rewards, torch.tensor([0, 1, 0, 1, 2]), 3)
    assert means[:2].tolist() == [1.5, 4.0] and means[2].isnan() and counts.tolist() == [2, 1, 0]


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out", "batch_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tie_is_no_advantage_whatever_the_rounding(baseline, dtype):
    """The sum of three times 0.7 divided by 3 is 0.7 and a bit; a 4th, unscored member changes nothing."""
    for reward in (0.7, 0.1, -4.95, 1e6 + 0.3):
        for size in (3, 6, 7):
            rewards = torch.tensor([reward] * size + [float("nan")], dtype=dtype)
            group_ids = torch.zeros(size + 1, dtype=torch.long)
            assert (sequence_advantages(rewards, group_ids=group_ids, baseline=baseline) == 0).all()
    assert sum([0.7] * 3) / 3 != 0.7  # Control: what a plain mean gives
