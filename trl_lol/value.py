"""
The value of a prompt under the reference policy: a small head on the frozen policy's hidden states of the prompt,
regressed on rewards (A-LoL, [Baheti et al., 2024](https://huggingface.co/papers/2305.14718)).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from accelerate.utils import tqdm
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel


class PromptValueHead(nn.Module):
    """
    Predicts the value of a prompt from the policy's last hidden states of its tokens: dropout, attention of one
    learned query over the tokens, dropout, linear.

    Hidden states and rewards are standardised with the statistics of the data that the head is fitted on; the last
    layer starts at zero, so that an unfitted head predicts the mean reward.

    Args:
        hidden_size (`int`):
            Width of the policy's hidden states.
        num_heads (`int`, *optional*, defaults to `8`):
            Number of attention heads, lowered to the greatest common divisor with `hidden_size`.
        dropout (`float`, *optional*, defaults to `0.1`):
            Dropout probability while fitting.
        value_range (`tuple[float, float]`, *optional*):
            Lowest and highest value. If given, the output is a sigmoid scaled to this range (the paper's head, for
            bounded rewards). If `None`, it is linear.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 8,
        dropout: float = 0.1,
        value_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.value_range = value_range
        self.dropout = nn.Dropout(dropout)
        self.query = nn.Parameter(torch.randn(1, 1, hidden_size) / math.sqrt(hidden_size))
        self.attention = nn.MultiheadAttention(hidden_size, math.gcd(num_heads, hidden_size), batch_first=True)
        self.output = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.register_buffer("hidden_mean", torch.zeros(hidden_size))
        self.register_buffer("hidden_std", torch.ones(hidden_size))
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`):
                Last hidden states of the prompt tokens, of shape `(batch, prompt_len, hidden_size)`.
            attention_mask (`torch.Tensor`):
                1 for prompt tokens and 0 for padding, of shape `(batch, prompt_len)`.

        Returns:
            `torch.Tensor`: Value of each prompt on the scale of the rewards, of shape `(batch,)`.
        """
        hidden_states = (hidden_states.float() - self.hidden_mean) / self.hidden_std
        # What padding holds must not reach the projections: 0 · NaN is NaN
        hidden_states = hidden_states.masked_fill(attention_mask.unsqueeze(-1) == 0, 0.0)
        hidden_states = self.dropout(hidden_states)
        query = self.query.expand(hidden_states.size(0), -1, -1)
        pooled, _ = self.attention(
            query, hidden_states, hidden_states, key_padding_mask=attention_mask == 0, need_weights=False
        )
        score = self.output(self.dropout(pooled)).view(-1)
        if self.value_range is None:
            return self.reward_mean + self.reward_std * score
        low, high = self.value_range
        # The offset makes a zero score the mean reward
        mean = ((self.reward_mean - low) / (high - low)).clamp(0.01, 0.99)
        return low + (high - low) * torch.sigmoid(score + torch.logit(mean))


def prompt_hidden_states(
    model: PreTrainedModel, prompt_ids: Sequence[list[int]], batch_size: int, desc: str | None = None
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """
    Run the policy's backbone over prompts, longest first, without the language-model head.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        prompt_ids (`Sequence[list[int]]`):
            Token ids of each prompt. A prompt without tokens is read as one padding token.
        batch_size (`int`):
            Number of prompts in a forward.
        desc (`str`, *optional*):
            What the progress bar says. No bar if `None`.

    Yields:
        `tuple[list[int], list[torch.Tensor]]`: Positions of a batch's prompts in `prompt_ids`, and the last hidden
        states of each, of shape `(prompt_len, hidden_size)`.
    """
    order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    pad_token_id = model.config.get_text_config().pad_token_id or 0
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=desc, disable=desc is None):
        batch = order[start : start + batch_size]
        sequences = [torch.tensor(prompt_ids[i] or [pad_token_id]) for i in batch]
        input_ids = pad_sequence(sequences, batch_first=True, padding_value=pad_token_id).to(model.device)
        attention_mask = pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True).to(model.device)
        with torch.no_grad():
            hidden_states = model.base_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
        yield batch, [h[: len(s)] for h, s in zip(hidden_states, sequences, strict=True)]


def predict_values(heads: Sequence[PromptValueHead], hidden_states: Sequence[Tensor], batch_size: int = 64) -> Tensor:
    """
    Values of prompts: the mean prediction of the heads.

    Args:
        heads (`Sequence[PromptValueHead]`):
            Fitted heads, which are switched to eval mode.
        hidden_states (`Sequence[torch.Tensor]`):
            Last hidden states of each prompt, of shape `(prompt_len, hidden_size)`.
        batch_size (`int`, *optional*, defaults to `64`):
            Number of prompts in a forward.

    Returns:
        `torch.Tensor`: One value per prompt on the scale of the rewards, of shape `(num_prompts,)`.
    """
    values = []
    for start in range(0, len(hidden_states), batch_size):
        batch = hidden_states[start : start + batch_size]
        mask = pad_sequence([h.new_ones(len(h)) for h in batch], batch_first=True)
        padded = pad_sequence(list(batch), batch_first=True)
        with torch.no_grad():
            values.append(torch.stack([head.eval()(padded, mask) for head in heads]).mean(0))
    return torch.cat(values)


def fit_value_head(
    hidden_states: Sequence[Tensor],
    rewards: Tensor,
    weights: Tensor | None = None,
    *,
    value_range: Sequence[float] | None = None,
    learning_rate: float = 1e-3,
    num_train_epochs: int = 10,
    batch_size: int = 16,
    validation_fraction: float = 0.2,
    seed: int = 0,
    desc: str | None = None,
) -> PromptValueHead:
    """
    Regress rewards on hidden states of prompts by mean squared error, and keep the best epoch.

    Args:
        hidden_states (`Sequence[torch.Tensor]`):
            Last hidden states of each prompt, of shape `(prompt_len, hidden_size)`.
        rewards (`torch.Tensor`):
            Mean reward of each prompt's completions, of shape `(num_prompts,)`.
        weights (`torch.Tensor`, *optional*):
            Number of completions behind each mean, of shape `(num_prompts,)`.
        value_range (`tuple[float, float]`, *optional*):
            See [`PromptValueHead`].
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of AdamW.
        num_train_epochs (`int`, *optional*, defaults to `10`):
            Number of passes over the prompts.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of prompts in a step.
        validation_fraction (`float`, *optional*, defaults to `0.2`):
            Part of the prompts that chooses the best epoch and is not fitted. The unfitted head, which predicts the
            mean, takes part in the choice. With `0.0` the prompts that are fitted choose.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initialisation, the order and the dropout. The global random state is left as it was.
        desc (`str`, *optional*):
            What the progress bar says. No bar if `None`.

    Returns:
        [`PromptValueHead`]: The fitted head, in eval mode, on the device of the hidden states.
    """
    device = hidden_states[0].device
    rewards = rewards.to(device, torch.float32)
    weights = torch.ones_like(rewards) if weights is None else weights.to(device, torch.float32)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        order = torch.randperm(len(hidden_states)).tolist()
        num_validation = int(len(order) * validation_fraction)
        validation, fitted = order[:num_validation] or order, order[num_validation:]

        head = PromptValueHead(hidden_states[0].size(-1), value_range=value_range).to(device)
        tokens = torch.cat([hidden_states[i].float() for i in fitted])
        head.hidden_mean.copy_(tokens.mean(0))
        head.hidden_std.copy_(tokens.std(0).clamp(min=1e-6))
        head.reward_mean.copy_((rewards * weights)[fitted].sum() / weights[fitted].sum())
        head.reward_std.copy_(rewards[fitted].std(correction=0).clamp(min=1e-6))
        optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate)

        def loss(rows: list[int]) -> Tensor:
            batch = [hidden_states[i] for i in rows]
            mask = pad_sequence([torch.ones(len(h), device=device) for h in batch], batch_first=True)
            errors = (head(pad_sequence(batch, batch_first=True), mask) - rewards[rows]) / head.reward_std
            return (weights[rows] * errors.square()).sum()

        def validation_loss() -> float:
            head.eval()
            with torch.no_grad():
                chunks = [validation[i : i + batch_size] for i in range(0, len(validation), batch_size)]
                return sum(loss(chunk).item() for chunk in chunks)

        best_loss, best_state = validation_loss(), {name: t.clone() for name, t in head.state_dict().items()}
        for _ in tqdm(range(num_train_epochs), desc=desc, disable=desc is None):
            head.train()
            shuffled = [fitted[i] for i in torch.randperm(len(fitted)).tolist()]
            for start in range(0, len(shuffled), batch_size):
                rows = shuffled[start : start + batch_size]
                optimizer.zero_grad()
                (loss(rows) / weights[rows].sum()).backward()
                nn.utils.clip_grad_norm_(head.parameters(), 1.0)
                optimizer.step()
            if (epoch_loss := validation_loss()) < best_loss:
                best_loss, best_state = epoch_loss, {name: t.clone() for name, t in head.state_dict().items()}
    head.load_state_dict(best_state)
    return head.eval()


def cross_fit_values(
    hidden_states: Sequence[Tensor],
    rewards: Tensor,
    weights: Tensor | None = None,
    *,
    num_folds: int = 2,
    **kwargs: Any,
) -> tuple[list[PromptValueHead], Tensor]:
    """
    Fit one head per fold of the prompts, and predict each prompt with the head that has not seen it.

    With one completion per prompt, a head that has seen a prompt knows its reward, and the advantages that follow from
    its own predictions vanish.

    Args:
        hidden_states (`Sequence[torch.Tensor]`):
            Last hidden states of each prompt, of shape `(prompt_len, hidden_size)`. Prompts must be distinct.
        rewards (`torch.Tensor`):
            Mean reward of each prompt's completions, of shape `(num_prompts,)`.
        weights (`torch.Tensor`, *optional*):
            Number of completions behind each mean, of shape `(num_prompts,)`.
        num_folds (`int`, *optional*, defaults to `2`):
            Number of folds. With `1` every prompt is predicted by a head that was fitted on it.
        **kwargs:
            Passed to [`fit_value_head`].

    Returns:
        `tuple[list[PromptValueHead], torch.Tensor]`: The heads, and one value per prompt of shape `(num_prompts,)`.
    """
    weights = torch.ones_like(rewards) if weights is None else weights
    generator = torch.Generator().manual_seed(kwargs.get("seed", 0))
    everyone = torch.randperm(len(hidden_states), generator=generator)
    values = torch.empty(len(hidden_states))
    heads = []
    folds = everyone.chunk(num_folds)
    for fold in folds:
        seen = everyone if len(folds) == 1 else everyone[~torch.isin(everyone, fold)]
        head = fit_value_head([hidden_states[i] for i in seen], rewards[seen], weights[seen], **kwargs)
        values[fold] = predict_values([head], [hidden_states[i] for i in fold]).cpu()
        heads.append(head)
    return heads, values


def r_squared(values: Tensor, rewards: Tensor) -> float:
    """
    Part of the rewards' variance that the values explain: 1 − Σ(R − V)² / Σ(R − mean R)².

    Args:
        values (`torch.Tensor`):
            Predictions, of shape `(batch,)`.
        rewards (`torch.Tensor`):
            Rewards, of shape `(batch,)`.

    Returns:
        `float`: 1 for a perfect prediction, 0 for the mean, negative for worse; NaN when the rewards are all equal.
    """
    residual = (rewards - values).square().sum()
    return (1 - residual / (rewards - rewards.mean()).square().sum()).item()
