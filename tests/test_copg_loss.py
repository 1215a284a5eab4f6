"""
`copg_loss` against the paper's double sum in loops, against its hand-derived gradient, and against the gradients of
TRL's own RLOO and IPO.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import cpu_args
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer

from trl_lol import CoPGConfig, CoPGTrainer
from trl_lol.losses import copg_loss


GARBAGE = (math.nan, math.inf, -math.inf, 1e30)
RAGGED = torch.tensor(
    [
        [1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0],
        [0, 1, 0, 1, 1],  # holes
        [0, 0, 0, 1, 1],
        [1, 0, 1, 1, 1],
    ]
)
MASKS = {"2": torch.ones(5, 2), "3": torch.ones(5, 3), "5": torch.ones(5, 5), "ragged": RAGGED}


def make_groups(mask: Tensor = RAGGED) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence log-probabilities under policy and reference, and rewards, in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(mask.shape, generator=generator, dtype=torch.float64)

    logps = -20 + 5 * draw()
    return logps, logps - 2 * draw(), draw()


def loss_and_gradient(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`copg_loss` and the gradient of its sum, weighted by `upstream`, with respect to `logps`."""
    leaf = logps.clone().requires_grad_()
    loss = copg_loss(leaf, ref_logps, rewards, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), leaf.grad


def by_hand(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, mask: Tensor, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    """
    Σ_{i>j} (R_β,i − R_β,j)² / ((k−1)·2β) and, with ∂R_β,i/∂ln π_i = −β,
    ∂L/∂ln π_i = Σ_{j≠i} 2 (R_β,i − R_β,j)·(−β) / ((k−1)·2β) = −(R_β,i − mean_{j≠i} R_β,j), one scalar at a time.
    """
    losses, gradient = np.zeros(len(logps)), np.zeros(tuple(logps.shape))
    for n in range(len(logps)):
        members = [i for i, keep in enumerate(mask[n].tolist()) if keep]
        regularized = {i: (rewards[n, i] - beta * (logps[n, i] - ref_logps[n, i])).item() for i in members}
        for a, i in enumerate(members):
            for j in members[:a]:
                losses[n] += (regularized[i] - regularized[j]) ** 2 / ((len(members) - 1) * 2 * beta)
            others = [regularized[j] for j in members if j != i]
            gradient[n, i] = -(regularized[i] - sum(others) / len(others))
    return losses, gradient


# --- The formula


@pytest.mark.parametrize("beta", [0.06, 0.5, 3.0])
@pytest.mark.parametrize("k", MASKS)
def test_value_and_gradient_are_those_of_the_double_sum(k: str, beta: float) -> None:
    """Every group gets an upstream factor of its own, so that a gradient that leaks from one to another shows."""
    mask = MASKS[k]
    groups = make_groups(mask)
    upstream = torch.linspace(0.5, 2.0, len(mask), dtype=torch.float64)
    expected, expected_gradient = by_hand(*groups, mask, beta)
    loss, gradient = loss_and_gradient(*groups, upstream, beta=beta, mask=mask)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-11, atol=0)
    np.testing.assert_allclose(gradient.numpy(), upstream[:, None].numpy() * expected_gradient, rtol=1e-9, atol=1e-12)
    if mask.all():
        assert torch.equal(copg_loss(*groups, beta=beta), loss)  # no mask: all are members


def test_a_group_of_three_by_arithmetic() -> None:
    """
    R = (1, 0, 2), h = (2, 0, −2), β = ½: R_β = (0, 0, 3). Pairs: 0 + 9 + 9 = 18, over (3−1)·2·½ = 2: 9. Gradient:
    −(0 − 1.5), −(0 − 1.5), −(3 − 0).
    """
    logps = torch.tensor([[-5.0, -7.0, -9.0]], dtype=torch.float64)
    h, rewards = torch.tensor([[2.0, 0.0, -2.0]]).double(), torch.tensor([[1.0, 0.0, 2.0]]).double()
    loss, gradient = loss_and_gradient(logps, logps - h, rewards, beta=0.5)
    assert loss.item() == pytest.approx(9, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), [[1.5, 1.5, -3.0]], rtol=1e-12)


@pytest.mark.parametrize("k", MASKS)
def test_gradcheck(k: str) -> None:
    mask = MASKS[k]
    logps, ref_logps, rewards = make_groups(mask)

    def loss(x: Tensor) -> Tensor:
        return copg_loss(x, ref_logps, rewards, beta=0.3, mask=mask)

    assert torch.autograd.gradcheck(loss, logps.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, logps)


def test_the_first_step_does_not_depend_on_beta() -> None:
    """At π_θ = π_ref h = 0, so the gradient is −(R_i − mean_{j≠i} R_j). Control: it does as soon as h is not 0."""
    logps, ref_logps, rewards = make_groups(MASKS["3"])
    first = [loss_and_gradient(logps, logps, rewards, beta=beta)[1] for beta in (0.06, 3.0)]
    leave_one_out = (rewards.sum(1, keepdim=True) - rewards) / 2
    for gradient in first:
        torch.testing.assert_close(gradient, leave_one_out - rewards, rtol=1e-12, atol=1e-12)
    later = [loss_and_gradient(logps, ref_logps, rewards, beta=beta)[1] for beta in (0.06, 3.0)]
    assert (later[0] - later[1]).abs().max() > 1


def test_only_contrasts_count() -> None:
    """A constant per group in R or in h, as a value baseline or ln Z would be, changes nothing. Control: one that is
    not the same for the group does."""
    logps, ref_logps, rewards = make_groups()
    options = {"beta": 0.35, "mask": RAGGED}
    loss, gradient = loss_and_gradient(logps, ref_logps, rewards, **options)
    shift = torch.tensor([[1.0], [-2.0], [0.5], [3.0], [-1.0]], dtype=torch.float64)
    for shifted in ((logps, ref_logps, rewards + shift), (logps, ref_logps + shift, rewards)):
        shifted_loss, shifted_gradient = loss_and_gradient(*shifted, **options)
        torch.testing.assert_close(shifted_loss, loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(shifted_gradient, gradient, rtol=1e-10, atol=1e-12)
    tilted = copg_loss(logps, ref_logps, rewards + shift * torch.arange(5), **options)
    assert ((tilted - loss).abs() > 1e-3).all()


def test_beta_must_be_positive() -> None:
    for beta in (0.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"`beta=.*` must be positive"):
            copg_loss(*make_groups(), beta=beta)
    assert copg_loss(*make_groups(), beta=1e-3).isfinite().all()


# --- Groups of different sizes


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_entries_never_reach_value_or_gradient(garbage: float) -> None:
    logps, ref_logps, rewards = make_groups()
    options = {"beta": 0.35, "mask": RAGGED}
    padding = RAGGED == 0
    clean, clean_gradient = loss_and_gradient(logps, ref_logps, rewards, **options)
    inputs = (logps, ref_logps, rewards)

    def spoil(where: Tensor, spoilt: tuple[int, ...]) -> list[Tensor]:
        return [x.masked_fill(where, garbage) if i in spoilt else x for i, x in enumerate(inputs)]

    for spoilt in ((0,), (1,), (2,), (0, 1), (0, 1, 2)):  # together, too: ∞ − ∞ is no number
        loss, gradient = loss_and_gradient(*spoil(padding, spoilt), **options)
        assert torch.equal(loss, clean) and torch.equal(gradient, clean_gradient)
    assert (clean_gradient[padding] == 0).all() and (clean_gradient[~padding] != 0).all()

    # Control: the same value in a member is felt, and by its group alone.
    member = torch.zeros_like(padding)
    member[2, 3] = True
    others = torch.arange(len(RAGGED)) != 2
    for spoilt in ((0,), (1,), (2,)):
        loss = copg_loss(*spoil(member, spoilt), **options)
        assert loss[2] != clean[2]
        assert torch.equal(loss[others], clean[others])


def test_order_of_members_and_groups_padding_and_mask_dtype_do_not_matter() -> None:
    groups = make_groups()
    loss, gradient = loss_and_gradient(*groups, beta=0.35, mask=RAGGED)

    members, rows = torch.tensor([3, 0, 4, 2, 1]), torch.tensor([2, 0, 4, 1, 3])
    for order in ((slice(None), members), (rows,)):
        moved, moved_gradient = loss_and_gradient(*(x[order] for x in groups), beta=0.35, mask=RAGGED[order])
        torch.testing.assert_close(moved, loss[order[:1]], rtol=1e-12, atol=0)
        torch.testing.assert_close(moved_gradient, gradient[order], rtol=1e-12, atol=1e-12)
    # Control: rewards that belong to other members are another loss
    wrong = copg_loss(*groups[:2], groups[2][:, members], beta=0.35, mask=RAGGED)
    assert not torch.allclose(wrong, loss, rtol=1e-3)

    def widen(x: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(x, (2, 3), value=fill)

    wide = [widen(x, fill) for x, fill in zip(groups, (-1.0, -2.0, 7.0), strict=True)]
    wide_loss, wide_gradient = loss_and_gradient(*wide, beta=0.35, mask=widen(RAGGED, 0))
    torch.testing.assert_close(wide_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(wide_gradient, widen(gradient, 0.0), rtol=1e-12, atol=1e-12)
    counted = copg_loss(*wide, beta=0.35, mask=widen(RAGGED, 1))
    assert not torch.allclose(counted, loss, rtol=1e-3)  # control: the columns matter once the mask counts them

    for dtype in (torch.bool, torch.float64):
        assert torch.equal(copg_loss(*groups, beta=0.35, mask=RAGGED.to(dtype)), loss)


def test_groups_of_one_and_none_give_nothing() -> None:
    """There is no pair. Control: a second member of the same group does give a loss."""
    logps, ref_logps, rewards = make_groups(torch.ones(3, 2))
    mask = torch.tensor([[1, 0], [0, 1], [0, 0]])
    loss, gradient = loss_and_gradient(logps, ref_logps, rewards, beta=0.35, mask=mask)
    assert (loss == 0).all() and (gradient == 0).all()
    loss, gradient = loss_and_gradient(logps[:, :1], ref_logps[:, :1], rewards[:, :1], beta=0.35)
    assert (loss == 0).all() and (gradient == 0).all()
    loss, gradient = loss_and_gradient(logps, ref_logps, rewards, beta=0.35)
    assert (loss > 0).all() and (gradient != 0).all()


# --- What carries a gradient


@pytest.mark.parametrize("k", MASKS)
def test_ties_keep_their_pull_toward_the_reference(k: str) -> None:
    """
    With equal rewards the gradient is −(−βh_i + β mean_{j≠i} h_j) = β (h_i − mean_{j≠i} h_j): a step against it
    lowers the log-ratios that are above the others'. It is 0 when the log-ratios tie as well.
    """
    mask, beta = MASKS[k].bool(), 0.35
    logps, ref_logps, rewards = make_groups(mask)
    tied = rewards[:, :1].expand_as(rewards)
    loss, gradient = loss_and_gradient(logps, ref_logps, tied, beta=beta, mask=mask)
    h = (logps - ref_logps).masked_fill(~mask, 0.0)
    others = (h.sum(1, keepdim=True) - h) / (mask.sum(1, keepdim=True) - 1)
    torch.testing.assert_close(gradient, (beta * (h - others)).masked_fill(~mask, 0.0), rtol=1e-9, atol=1e-12)
    assert (loss > 0).all() and (gradient[mask].abs() > 1e-3).all()

    constant = torch.full_like(logps, 0.25)  # exact in binary, so that nothing is left over
    logps = logps.round()
    loss, gradient = loss_and_gradient(logps, logps - constant, torch.ones_like(logps), beta=0.5, mask=mask)
    np.testing.assert_allclose(loss.numpy(), 0, atol=1e-28)
    np.testing.assert_allclose(gradient.numpy(), 0, atol=1e-14)


def test_rewards_and_reference_carry_no_gradient() -> None:
    leaves = [x.requires_grad_() for x in make_groups()]
    loss = copg_loss(*leaves, beta=0.35, mask=RAGGED)
    of_policy, of_reference, of_rewards = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    assert of_policy.abs().sum() > 0
    assert of_reference is None and of_rewards is None


# --- TRL's own losses


@pytest.fixture
def models(tmp_path: Path, tiny_model: Callable) -> Callable[[], tuple[PreTrainedModel, PreTrainedModel]]:
    """
    Makes a policy and another reference. RLOOTrainer loads its reference from the policy's `_name_or_path`: the policy
    is loaded from the reference's files and then moved.
    """
    tiny_model().save_pretrained(tmp_path / "reference")

    def make() -> tuple[PreTrainedModel, PreTrainedModel]:
        policy, reference = (AutoModelForCausalLM.from_pretrained(tmp_path / "reference") for _ in range(2))
        move(policy, 0.02)
        # A fifth of the vocabulary ends a completion, so that sampled ones are of different lengths
        policy.generation_config.eos_token_id = list(range(0, policy.config.vocab_size, 5))
        return policy, reference

    return make


def move(model: PreTrainedModel, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def gradients(trainer: Any, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """The loss of a trainer in training mode, and its gradient with respect to all parameters, as one vector."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().flatten() for p in trainer.model.parameters()])


def fit(gradient: Tensor, other: Tensor) -> tuple[float, float]:
    """The factor that brings `other` closest to `gradient`, and what then is left of `gradient`, relative to it."""
    factor = gradient @ other / (other @ other)
    return factor.item(), ((gradient - factor * other).norm() / gradient.norm()).item()


@pytest.mark.parametrize("k", [2, 4])
def test_on_policy_gradient_is_k_times_that_of_rloo(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, dialogues: Dataset, pairs: Dataset, models: Callable, k: int
) -> None:
    """
    TRL's RLOOTrainer samples k completions of each of 3 prompts from the policy, scores them, takes β KL off each
    reward and the mean of the others as the baseline: A_i = R_β,i − mean_{j≠i} R_β,j. Its first step, where the ratio
    to the sampling policy is 1, has the gradient −1/(3k) Σ A_i ∇ln π_i, an average over completions. CoPG's is
    −1/3 Σ A_i ∇ln π_i, an average over groups: k times as much, for every k.

    Both trainers compute log-probabilities in float32, and pad on different sides, which leaves 2e-6.
    """
    beta, rewards = 0.25, []

    def score(prompts: list, completions: list, **kwargs: Any) -> list[float]:
        rewards[:] = [len(c[0]["content"]) % 7 / 4 for c in completions]
        return rewards

    prompts = dialogues.select(range(3)).select_columns("prompt")
    policy, reference = models()
    copg = CoPGTrainer(
        copy.deepcopy(policy),
        reference,
        args=cpu_args(CoPGConfig, tmp_path / "copg", beta=beta),
        train_dataset=pairs.take(4),
        processing_class=tokenizer,
    )
    rloo_args = cpu_args(
        RLOOConfig,
        tmp_path / "rloo",
        beta=beta,
        normalize_advantages=False,
        num_generations=k,
        max_completion_length=12,
        per_device_train_batch_size=3 * k,
    )
    rloo = RLOOTrainer(policy, score, rloo_args, train_dataset=prompts, processing_class=tokenizer)
    rloo.model.train()
    sampled = rloo._generate_and_score_completions([row for row in prompts for _ in range(k)])
    prompt_ids, completion_ids = (
        [row[kept].tolist() for row, kept in zip(sampled[f"{n}_ids"], sampled[f"{n}_mask"].bool(), strict=True)]
        for n in ("prompt", "completion")
    )
    assert len({len(ids) for ids in completion_ids}) > 2 and len(set(rewards)) > 2
    groups = [slice(i, i + k) for i in range(0, 3 * k, k)]
    batch = copg.data_collator(
        [
            {"prompt_ids": prompt_ids[g.start], "completion_ids": completion_ids[g], "rewards": rewards[g]}
            for g in groups
        ]
    )

    def compare() -> tuple[float, float]:
        return fit(gradients(copg, batch)[1], gradients(rloo, sampled)[1])

    factor, left = compare()
    assert factor == pytest.approx(k, rel=1e-5) and left < 1e-5

    # Controls: the β term is part of it; and it holds where the data is the policy's own. One move further RLOO weighs
    # with a ratio and keeps its advantages, CoPG takes them anew.
    copg.args.beta = 2 * beta
    assert compare()[1] > 1e-2
    copg.args.beta = beta
    for trainer in (rloo, copg):
        move(trainer.model, 0.02)
    assert compare()[1] > 1e-2


def test_rewards_of_a_quarter_give_sum_form_ipo() -> None:
    """
    R = ±¼: R_β,w − R_β,l = ½ − β (h_w − h_l) = −β (h_w − h_l − 1/(2β)), squared and over 2β: β/2 times IPO's
    (h_w − h_l − 1/(2β))², in value and gradient. Control: R = ±½ is not, by any factor.
    """
    logps, ref_logps, _ = make_groups(torch.ones(50, 2))
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(50, 2)
    for beta in (0.06, 0.5, 3.0):
        leaf = logps.clone().requires_grad_()
        h = leaf - ref_logps
        ipo = (h[:, 0] - h[:, 1] - 1 / (2 * beta)).square()
        (ipo_gradient,) = torch.autograd.grad(ipo.sum(), leaf)
        loss, gradient = loss_and_gradient(logps, ref_logps, signs / 4, beta=beta)
        np.testing.assert_allclose(loss / ipo.detach(), beta / 2, rtol=1e-8)
        np.testing.assert_allclose(gradient / ipo_gradient, beta / 2, rtol=1e-8)
        ratio = loss_and_gradient(logps, ref_logps, signs / 2, beta=beta)[1] / ipo_gradient
        assert ratio.std() > 0.01 * beta


@pytest.mark.parametrize(("lengths", "divisor"), [((1, 1), 1), ((3, 3), 3), ((2, 5), None)])
def test_trl_divides_ipo_by_the_length(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Dataset,
    models: Callable,
    lengths: tuple[int, int],
    divisor: int | None,
) -> None:
    """
    TRL's `ipo` takes means over tokens: (h_w/T_w − h_l/T_l − 1/(2β))². Where all completions have T tokens it is the
    sum form of β/T, over T²: CoPG with β/T on R = ±¼ is T²·(β/T)/2 = Tβ/2 times TRL's loss. So it is the same loss as
    CoPG with β for one token, another for T = 3, and the sum form of no β for 2 and 5 tokens.
    """
    beta = 0.25
    rows = [
        {"prompt_ids": [7, 8], "chosen_ids": [9, 10, 11], "rejected_ids": [40] * 5},
        {"prompt_ids": [9], "chosen_ids": [50] * 3, "rejected_ids": [60, 61, 62, 63, 64]},
    ]
    for row in rows:
        row["chosen_ids"], row["rejected_ids"] = row["chosen_ids"][: lengths[0]], row["rejected_ids"][: lengths[1]]
    groups = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": [row["chosen_ids"], row["rejected_ids"]]} for row in rows
    ]

    def build(trainer_class: type, config_class: type, **kwargs: Any) -> Any:
        args = cpu_args(config_class, tmp_path / "out", beta=beta, **kwargs)
        return trainer_class(*models(), args=args, train_dataset=pairs.take(4), processing_class=tokenizer)

    ipo, copg = build(DPOTrainer, DPOConfig, loss_type=["ipo"]), build(CoPGTrainer, CoPGConfig)
    ipo_loss, ipo_gradient = gradients(ipo, ipo.data_collator(rows))
    batch = copg.data_collator([{**group, "rewards": [0.25, -0.25]} for group in groups])
    for candidate in (1, 2, 3, 3.5, 5):
        copg.args.beta = beta / candidate
        loss, gradient = gradients(copg, batch)
        factor, left = fit(gradient, ipo_gradient)
        if candidate == divisor:
            assert left < 1e-5
            assert factor == pytest.approx(divisor * beta / 2, rel=1e-5)
            assert loss == pytest.approx(divisor * beta / 2 * ipo_loss, rel=1e-5)
        else:
            assert left > 1e-3
