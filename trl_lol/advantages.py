"""
Advantages as pure functions on tensors: sequence-level baselines, generalised advantage estimation (GAE), whitening
and priority-sampling weights.
"""

import torch
from torch import Tensor


BASELINES = ("value", "group_mean", "leave_one_out", "batch_mean", "none")


def sequence_advantages(
    rewards: Tensor, *, group_ids: Tensor | None = None, values: Tensor | None = None, baseline: str = "value"
) -> Tensor:
    """
    Advantage of each whole completion: its reward minus a baseline.

    | `baseline` | subtracted from the reward |
    | --- | --- |
    | `"value"` | `values`: the reference policy's value of the prompt, as A-LoL does |
    | `"group_mean"` | mean reward of the completions of the same prompt |
    | `"leave_one_out"` | mean reward of the *other* completions of the same prompt, as RLOO does |
    | `"batch_mean"` | mean reward of the batch |
    | `"none"` | nothing |

    A NaN reward means "not scored": its advantage is 0 and it takes part in no baseline. With `"leave_one_out"` the
    only scored member of a group has advantage 0.

    Args:
        rewards (`torch.Tensor`):
            One reward per completion, of shape `(batch,)`.
        group_ids (`torch.Tensor`, *optional*):
            Integer that is equal for the completions of one prompt, of shape `(batch,)`. Required by `"group_mean"`
            and `"leave_one_out"`.
        values (`torch.Tensor`, *optional*):
            Value of each completion's prompt, of shape `(batch,)`. Required by `"value"`.
        baseline (`str`, *optional*, defaults to `"value"`):
            One of the rows above.

    Returns:
        `torch.Tensor`: One advantage per completion, of shape `(batch,)`.

    Raises:
        `ValueError`: If `baseline` is unknown or the tensor that it needs is missing.
    """
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    scored = ~rewards.isnan()
    known = rewards.masked_fill(~scored, 0.0).double()
    if baseline == "value":
        if values is None:
            raise ValueError(
                '`baseline="value"` needs `values`, one per completion. Pass them or pick another baseline.'
            )
        subtracted = values
    elif baseline in ("group_mean", "leave_one_out", "batch_mean"):
        if baseline == "batch_mean":
            group_ids = torch.zeros_like(known, dtype=torch.long)
        elif group_ids is None:
            raise ValueError(f'`baseline="{baseline}"` needs `group_ids`, equal for the completions of one prompt.')
        _, index = group_ids.unique(return_inverse=True)
        groups = known.new_zeros(int(index.max()) + 1 if index.numel() else 0)
        # Counted from the lowest of the group, equal rewards are zeros, and their mean is one, too: a tie is no
        # advantage, whatever the rounding
        lowest = groups.scatter_reduce(0, index[scored], known[scored], "amin", include_self=False)
        known = (known - lowest[index]).masked_fill(~scored, 0.0)
        total = groups.index_add(0, index, known)[index]
        count = groups.index_add(0, index, scored.to(known))[index]
        if baseline == "leave_one_out":
            subtracted = (total - known) / (count - 1).clamp(min=1)
            scored = scored & (count > 1)
        else:
            subtracted = total / count.clamp(min=1)
    elif baseline == "none":
        subtracted = torch.zeros_like(known)
    else:
        raise ValueError(f"Unknown `baseline` {baseline!r}. Use one of {', '.join(map(repr, BASELINES))}.")
    return (known - subtracted).masked_fill(~scored, 0.0).to(rewards.dtype)


def mean_rewards(rewards: Tensor, group_ids: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """
    Mean reward of each prompt's completions.

    Args:
        rewards (`torch.Tensor`):
            Reward of each completion, NaN where it is not scored, of shape `(num_completions,)`.
        group_ids (`torch.Tensor`):
            Position of its prompt, same shape.
        num_groups (`int`):
            Number of prompts.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The means and the numbers of scored completions, of shape `(num_groups,)`.
    """
    is_scored = ~rewards.isnan()
    counts = torch.zeros(num_groups).index_add(0, group_ids, is_scored.float())
    sums = torch.zeros(num_groups).index_add(0, group_ids, rewards.nan_to_num().float())
    return sums / counts, counts


def token_rewards(rewards: Tensor, mask: Tensor, log_ratio: Tensor | None = None, *, beta: float = 0.0) -> Tensor:
    r"""
    Reward of each token of a completion that is rewarded as a whole: −β ln(π_old/π_ref) of the token, the estimate of
    the KL divergence that PPO for language models is penalised by
    ([Stiennon et al., 2020](https://huggingface.co/papers/2009.01325)), and the completion's reward at its last token.

    Args:
        rewards (`torch.Tensor`):
            One reward per completion, of shape `(batch,)`.
        mask (`torch.Tensor`):
            1 for completion tokens and 0 elsewhere, of shape `(batch, completion_len)`. A completion without tokens
            has no rewards.
        log_ratio (`torch.Tensor`, *optional*):
            ln π_old − ln π_ref of each token, in nats, of the shape of `mask`.
        beta (`float`, *optional*, defaults to `0.0`):
            KL coefficient β, in units of reward per nat.

    Returns:
        `torch.Tensor`: One reward per token, of the shape of `mask`, 0 where that is 0.
    """
    mask = mask.bool()
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    per_token = torch.where(is_last, rewards.unsqueeze(1), 0.0)
    return per_token if log_ratio is None else per_token - beta * log_ratio.masked_fill(~mask, 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """
    Generalised advantage estimation ([Schulman et al., 2016](https://huggingface.co/papers/1506.02438), Eq. 16):
    A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t, with V = 0 after the last token.

    Masked-out positions, also in the middle of a sequence, are passed over as if they were not there.

    Args:
        rewards (`torch.Tensor`):
            Reward of each token, of shape `(batch, completion_len)`.
        values (`torch.Tensor`):
            Value of the state before each token, same shape.
        mask (`torch.Tensor`):
            1 for completion tokens and 0 elsewhere, same shape.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount γ.
        lam (`float`, *optional*, defaults to `0.95`):
            Trace decay λ.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Advantages and returns (advantage + value), both of shape
        `(batch, completion_len)` and 0 where masked out. Neither carries a gradient.
    """
    mask = mask.bool()
    rewards = rewards.detach().masked_fill(~mask, 0.0)
    values = values.detach().masked_fill(~mask, 0.0)
    next_value = values.new_zeros(values.size(0))
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return advantages, advantages + values


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """
    Scale `x` to unit variance, and to zero mean unless told otherwise, over the positions of `mask`.

    Args:
        x (`torch.Tensor`):
            Values to whiten, of any shape.
        mask (`torch.Tensor`):
            1 for the positions that count and 0 elsewhere, same shape.
        shift_mean (`bool`, *optional*, defaults to `True`):
            Whether to subtract the mean. `False` keeps it, which is how rewards are whitened.

    Returns:
        `torch.Tensor`: The whitened values, 0 where masked out. The variance is Bessel-corrected. Equal values, or a
        single one, become 0 up to rounding (their mean, if it is kept).
    """
    mask = mask.bool()
    x = x.masked_fill(~mask, 0.0)
    count = mask.sum()
    mean = x.sum() / count.clamp(min=1)
    centred = (x - mean).masked_fill(~mask, 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else (whitened + mean).masked_fill(~mask, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """
    Share of the variance of the returns that the values explain, 1 − Var(returns − values) / Var(returns).

    Args:
        values (`torch.Tensor`):
            Values, of any shape.
        returns (`torch.Tensor`):
            Returns, same shape.
        mask (`torch.Tensor`):
            1 for the positions that count and 0 elsewhere, same shape.

    Returns:
        `torch.Tensor`: A scalar: 1 for a perfect critic, 0 for a constant one, negative for one that is worse; NaN
        where the returns do not vary.
    """
    values, returns = values[mask.bool()], returns[mask.bool()]
    variance, unexplained = ((x - x.mean()).square().mean() for x in (returns, returns - values))
    return 1 - unexplained / variance.masked_fill(variance == 0, torch.nan)


def priority_weights(advantages: Tensor) -> Tensor:
    """
    Unnormalised sampling weights of A-LoL's priority sampling: max(A, 0).

    Args:
        advantages (`torch.Tensor`):
            One advantage per completion, of shape `(batch,)`.

    Returns:
        `torch.Tensor`: Non-negative weights, of shape `(batch,)`.

    Raises:
        `ValueError`: If no advantage is positive, so that nothing could be drawn.
    """
    weights = advantages.clamp(min=0)
    if not (weights > 0).any():
        raise ValueError(
            f"None of the {advantages.numel()} advantages is positive, so there is nothing to train on. Check that a "
            "higher reward means a better completion, and that the baseline is on the scale of the rewards."
        )
    return weights
