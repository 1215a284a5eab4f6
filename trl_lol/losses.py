"""
The papers' objectives as pure functions on tensors.

Each function returns per-example losses, without reducing over the batch. Positions where `mask` is 0 never reach the
result or a gradient, whatever they hold (padding, NaN, infinities). Log-probabilities are in nats, and a sequence's
log-probability is the sum over its completion tokens.
"""

import torch
from torch import Tensor


ALOL_LOSS_TYPES = ("alol", "alol_seq", "alol_ref_free", "alol_kl", "wbc", "r_gold", "r_lol", "nll")


def importance_ratio(log_ratio: Tensor, epsilon: float | None = None) -> Tensor:
    """
    Importance ratio ρ = π_θ/π_ref from its logarithm, without gradient, clamped to [1−ε, 1+ε].

    This is the plain clamp of the A-LoL paper, not PPO's minimum: an example whose ratio is clamped keeps its
    gradient.

    Args:
        log_ratio (`torch.Tensor`):
            ln π_θ − ln π_ref in nats, of any shape.
        epsilon (`float`, *optional*):
            Clamping range ε. If `None`, the ratio is not clamped.

    Returns:
        `torch.Tensor`: The ratio, of the shape of `log_ratio`.
    """
    ratio = log_ratio.detach().exp()
    return ratio if epsilon is None else ratio.clamp(1 - epsilon, 1 + epsilon)


def alol_loss(
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    loss_type: str = "alol",
    epsilon: float | None = 0.9,
    beta: float = 0.0,
    clamp: bool = True,
) -> Tensor:
    r"""
    Advantage-Leftover Lunch loss of each sequence ([Baheti et al., 2024](https://huggingface.co/papers/2305.14718)):
    A⁺ · Σ_t ρ_t · (−ln π_θ(y_t|x,y_<t)), where A⁺ = max(A, 0), ρ and π_ref carry no gradient.

    | `loss_type` | ρ | weight | extra term |
    | --- | --- | --- | --- |
    | `"alol"` | one per sequence, clamp(π_θ(y)/π_ref(y), 1−ε, 1+ε) | A⁺ | |
    | `"alol_seq"` | one per token, clamp(π_θ(y_t)/π_ref(y_t), 1−ε, 1+ε) | A⁺ | |
    | `"alol_ref_free"` | 1 | A⁺ | |
    | `"alol_kl"` | 1 | A⁺ | β · ln(π_θ(y)/π_ref(y)) |
    | `"wbc"` | 1 | R | |
    | `"r_gold"` | per token, max(π_θ(y_t), 0.1) | R | |
    | `"r_lol"` | as `"alol"` | R | |
    | `"nll"` | 1 | 1 | |

    Args:
        logps (`torch.Tensor`):
            Per-token log-probabilities of the policy, of shape `(batch, completion_len)`.
        ref_logps (`torch.Tensor`):
            Per-token log-probabilities of the reference, same shape. Used by `"alol"`, `"alol_seq"`, `"alol_kl"` and
            `"r_lol"` only.
        mask (`torch.Tensor`):
            1 for completion tokens and 0 elsewhere, same shape.
        advantages (`torch.Tensor`):
            One advantage per sequence, of shape `(batch,)`; the raw reward R for `"wbc"`, `"r_gold"` and `"r_lol"`.
        loss_type (`str`, *optional*, defaults to `"alol"`):
            One of the rows above. The last four are the baselines of the paper.
        epsilon (`float`, *optional*, defaults to `0.9`):
            Clamping range ε of the importance ratio. If `None`, the ratio is not clamped.
        beta (`float`, *optional*, defaults to `0.0`):
            KL coefficient β of `"alol_kl"`.
        clamp (`bool`, *optional*, defaults to `True`):
            Whether the `"alol*"` types clamp the advantage at 0. `False` is the paper's ablation without the filter.

    Returns:
        `torch.Tensor`: One loss per sequence, of shape `(batch,)`.

    Raises:
        `ValueError`: If `loss_type` is unknown.
    """
    if loss_type not in ALOL_LOSS_TYPES:
        raise ValueError(f"Unknown `loss_type` {loss_type!r}. Use one of {', '.join(map(repr, ALOL_LOSS_TYPES))}.")
    ignored = mask == 0
    logps = logps.masked_fill(ignored, 0.0)
    ref_logps = ref_logps.detach().masked_fill(ignored, 0.0)
    log_ratio = logps - ref_logps

    if loss_type == "nll":
        weight = torch.ones_like(advantages)
    elif loss_type in ("wbc", "r_gold", "r_lol"):
        weight = advantages  # R in place of A⁺
    else:
        weight = advantages.clamp(min=0) if clamp else advantages  # A⁺

    if loss_type in ("alol", "r_lol"):
        ratio = importance_ratio(log_ratio.sum(dim=1, keepdim=True), epsilon)  # ρ = π_θ(y|x) / π_ref(y|x)
    elif loss_type == "alol_seq":
        ratio = importance_ratio(log_ratio, epsilon)  # ρ_t = π_θ(y_t|x,y_<t) / π_ref(y_t|x,y_<t)
    elif loss_type == "r_gold":
        ratio = logps.detach().exp().clamp(min=0.1)  # GOLD's approximate ratio, lower-bounded
    else:
        ratio = torch.ones_like(logps)  # ρ = 1: `alol_ref_free`, `alol_kl`, `wbc`, `nll`

    weight = weight.detach()
    ratio = ratio.masked_fill(weight.unsqueeze(1) == 0, 0.0)  # an unclamped ρ may be infinite, and 0 · ∞ is no number
    loss = weight * (ratio * -logps).sum(dim=1)  # A⁺ · Σ_t ρ_t · (−ln π_θ(y_t|x,y_<t))
    if loss_type == "alol_kl":
        loss = loss + beta * log_ratio.sum(dim=1)  # + β · h(y), on the data's own completions
    return loss


def copg_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, mask: Tensor | None = None) -> Tensor:
    r"""
    Contrastive Policy Gradient loss of each group of completions ([Flet-Berliac et al.,
    2024](https://huggingface.co/papers/2406.19185); for more than two completions as in the report on Command A):
    Σ_{i>j} (R_β,i − R_β,j)² / ((k−1) · 2β), where R_β = R − β · (ln π_θ(y|x) − ln π_ref(y|x)) and k is the size of the
    group. π_ref and R carry no gradient.

    This is the squared distance of Eq. 38 in the normalisation of Eq. 7-9, in which the step size does not depend on
    β: the gradient is −Σ_i (R_β,i − mean_{j≠i} R_β,j) ∇ln π_θ(y_i|x), the leave-one-out policy gradient made valid for
    completions that others wrote. The loss is smallest where R_β is the same for all completions, that is at
    π_θ ∝ π_ref e^{R/β} (Theorem 1).

    Args:
        logps (`torch.Tensor`):
            Log-probabilities of the completions under the policy, in nats, of shape `(num_groups, k)`: sums over
            tokens. Means over tokens would have another optimum.
        ref_logps (`torch.Tensor`):
            Log-probabilities of the completions under the reference, same shape.
        rewards (`torch.Tensor`):
            Rewards of the completions, same shape.
        beta (`float`):
            KL coefficient β, in units of reward per nat. Must be positive.
        mask (`torch.Tensor`, *optional*):
            1 for the members of a group and 0 elsewhere, same shape, for groups of different sizes. If `None`, all
            are members.

    Returns:
        `torch.Tensor`: One loss per group, of shape `(num_groups,)`, 0 for a group with less than two members.

    Raises:
        `ValueError`: If `beta` is not positive.
    """
    if not beta > 0:
        raise ValueError(f"`beta={beta}` must be positive: without the KL term the loss has no finite optimum.")
    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask.bool()
    log_ratio = logps - ref_logps.detach()  # h(y)
    regularized = rewards.detach() - beta * log_ratio  # R_β(y) = R(y) − β h(y)
    regularized = regularized.masked_fill(~mask, 0.0)
    k = mask.sum(dim=1)
    mean = regularized.sum(dim=1, keepdim=True) / k.clamp(min=1).unsqueeze(1)
    # Σ_{i>j} (R_β,i − R_β,j)² = k Σ_i (R_β,i − mean R_β)², and only the members count
    squares = (regularized - mean).masked_fill(~mask, 0.0).square().sum(dim=1)
    return k * squares / (k - 1).clamp(min=1) / (2 * beta)


def ppo_policy_loss(logps: Tensor, old_logps: Tensor, mask: Tensor, advantages: Tensor, *, epsilon: float) -> Tensor:
    r"""
    Clipped surrogate loss of each token ([Schulman et al., 2017](https://huggingface.co/papers/1707.06347), Eq. 7):
    −min(ρ_t A_t, clamp(ρ_t, 1−ε, 1+ε) A_t) with ρ_t = π_θ(y_t|x,y_<t) / π_old(y_t|x,y_<t).

    Args:
        logps (`torch.Tensor`):
            Per-token log-probabilities of the policy, of shape `(batch, completion_len)`.
        old_logps (`torch.Tensor`):
            Per-token log-probabilities of the policy that wrote the completions, same shape.
        mask (`torch.Tensor`):
            1 for completion tokens and 0 elsewhere, same shape.
        advantages (`torch.Tensor`):
            Advantages, of shape `(batch, completion_len)`, or `(batch,)` for one per sequence.
        epsilon (`float`):
            Clipping range ε.

    Returns:
        `torch.Tensor`: One loss per token, of shape `(batch, completion_len)`, 0 where `mask` is.
    """
    ignored = mask == 0
    advantages = _per_token(advantages, ignored)
    ratio = (logps.masked_fill(ignored, 0.0) - old_logps.detach().masked_fill(ignored, 0.0)).exp()  # ρ_t
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratio * advantages, clipped * advantages).masked_fill(ignored, 0.0)


def apa_loss(logps: Tensor, ref_logps: Tensor, mask: Tensor, advantages: Tensor, *, beta: float) -> Tensor:
    r"""
    Advantage-Induced Policy Alignment loss of each token ([Zhu et al., 2023](https://huggingface.co/papers/2306.02231)):
    (ln π_θ(y_t|x,y_<t) − A_t/λ − ln π_init(y_t|x,y_<t))², the squared distance to π_init e^{A/λ}.

    Args:
        logps (`torch.Tensor`):
            Per-token log-probabilities of the policy, of shape `(batch, completion_len)`.
        ref_logps (`torch.Tensor`):
            Per-token log-probabilities of the initial policy π_init, same shape.
        mask (`torch.Tensor`):
            1 for completion tokens and 0 elsewhere, same shape.
        advantages (`torch.Tensor`):
            Advantages under the policy that wrote the completions, of shape `(batch, completion_len)`, or `(batch,)`
            for one per sequence.
        beta (`float`):
            The paper's λ, in units of advantage per nat. Must be positive.

    Returns:
        `torch.Tensor`: One loss per token, in squared nats, of shape `(batch, completion_len)`, 0 where `mask` is.

    Raises:
        `ValueError`: If `beta` is not positive.
    """
    _check_temperature(beta)
    ignored = mask == 0
    log_ratio = logps.masked_fill(ignored, 0.0) - ref_logps.detach().masked_fill(ignored, 0.0)
    return (log_ratio - _per_token(advantages, ignored) / beta).square()


def awr_loss(logps: Tensor, mask: Tensor, advantages: Tensor, *, beta: float) -> Tensor:
    r"""
    Advantage-weighted regression loss of each token ([Peng et al., 2019](https://huggingface.co/papers/1910.00177)),
    the baseline of the APA paper: −e^{A_t/λ} ln π_θ(y_t|x,y_<t).

    Args:
        logps (`torch.Tensor`):
            Per-token log-probabilities of the policy, of shape `(batch, completion_len)`.
        mask (`torch.Tensor`):
            1 for completion tokens and 0 elsewhere, same shape.
        advantages (`torch.Tensor`):
            Advantages, of shape `(batch, completion_len)`, or `(batch,)` for one per sequence.
        beta (`float`):
            Temperature λ, in units of advantage. Must be positive; the paper uses 1 and finds that 0.1 explodes.

    Returns:
        `torch.Tensor`: One loss per token, of shape `(batch, completion_len)`, 0 where `mask` is.

    Raises:
        `ValueError`: If `beta` is not positive.
    """
    _check_temperature(beta)
    ignored = mask == 0
    weight = (_per_token(advantages, ignored) / beta).exp()
    return -weight * logps.masked_fill(ignored, 0.0)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, epsilon: float | None = None
) -> Tensor:
    r"""
    Squared error of each token's value, ½ (V_t − R_t)². With `epsilon`, the larger of it and
    ½ (clamp(V_t, V_old,t − ε, V_old,t + ε) − R_t)², as PPO implementations clip it.

    Args:
        values (`torch.Tensor`):
            Values of the critic, of shape `(batch, completion_len)`.
        old_values (`torch.Tensor`):
            Values when the completions were written, same shape. Used with `epsilon` only.
        returns (`torch.Tensor`):
            Returns R_t, same shape.
        mask (`torch.Tensor`):
            1 for completion tokens and 0 elsewhere, same shape.
        epsilon (`float`, *optional*):
            Clipping range ε, in units of reward. If `None`, values are not clipped.

    Returns:
        `torch.Tensor`: One loss per token, of shape `(batch, completion_len)`, 0 where `mask` is.
    """
    ignored = mask == 0
    values = values.masked_fill(ignored, 0.0)
    old_values, returns = (x.detach().masked_fill(ignored, 0.0) for x in (old_values, returns))
    error = (values - returns).square()
    if epsilon is not None:
        clipped = values.clamp(old_values - epsilon, old_values + epsilon)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error


def _per_token(advantages: Tensor, ignored: Tensor) -> Tensor:
    """One advantage per token, without gradient, 0 where there is no token."""
    advantages = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
    return advantages.detach().expand(ignored.shape).masked_fill(ignored, 0.0)


def _check_temperature(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"`beta={beta}` must be positive: advantages are divided by it.")
