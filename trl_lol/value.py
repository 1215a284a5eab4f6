"""
Values. Offline, of a prompt under the reference policy: a small head on the frozen policy's hidden states of the
prompt, regressed on rewards (A-LoL, [Baheti et al., 2024](https://huggingface.co/papers/2305.14718)). Online, of every
state of a completion: a head on the trunk of the policy that is trained.
"""

import functools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from accelerate import PartialState
from accelerate.utils import gather_object, tqdm
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ._cache import cached
from ._trl import FusedCausalLMOutput
from .engines import backbone


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
    read = backbone(model)
    for start in tqdm(starts, desc=desc, disable=desc is None):
        batch = order[start : start + batch_size]
        sequences = [torch.tensor(prompt_ids[i] or [pad_token_id]) for i in batch]
        input_ids = pad_sequence(sequences, batch_first=True, padding_value=pad_token_id).to(model.device)
        attention_mask = pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True).to(model.device)
        with torch.no_grad():
            hidden_states = read(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
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
        batch = [h.to(heads[0].query.device) for h in hidden_states[start : start + batch_size]]
        mask = pad_sequence([h.new_ones(len(h)) for h in batch], batch_first=True)
        padded = pad_sequence(batch, batch_first=True)
        with torch.no_grad(), torch.autocast(padded.device.type, enabled=False):
            values.append(torch.stack([head.eval()(padded, mask) for head in heads]).mean(0))
    return torch.cat(values)


def fit_value_head(
    hidden_states: Sequence[Tensor],
    rewards: Tensor,
    weights: Tensor | None = None,
    *,
    value_range: Sequence[float] | None = None,
    learning_rate: float | None = None,
    num_train_epochs: int = 10,
    batch_size: int = 16,
    validation_fraction: float = 0.2,
    seed: int = 0,
    device: str | torch.device | None = None,
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
        learning_rate (`float`, *optional*):
            Learning rate of AdamW. If `None`, it is 0.02 / √hidden_size: 1e-3 at a width of 400, 3e-4 at 4096.
        num_train_epochs (`int`, *optional*, defaults to `10`):
            Number of passes over the prompts.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of prompts in a step.
        validation_fraction (`float`, *optional*, defaults to `0.2`):
            Part of the prompts that chooses the best epoch and is not fitted. The unfitted head, which predicts the
            mean, takes part in the choice. With `0.0` the prompts that are fitted choose.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initialisation, the order and the dropout. The global random state is left as it was.
        device (`str` or `torch.device`, *optional*):
            Device to fit on. If `None`, it is that of the hidden states.
        desc (`str`, *optional*):
            What the progress bar says. No bar if `None`.

    Returns:
        [`PromptValueHead`]: The fitted head, in eval mode, on the device that it was fitted on.
    """
    device = hidden_states[0].device if device is None else torch.device(device)
    rewards = rewards.to(device, torch.float32)
    weights = torch.ones_like(rewards) if weights is None else weights.to(device, torch.float32)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        order = torch.randperm(len(hidden_states)).tolist()
        num_validation = int(len(order) * validation_fraction)
        validation, fitted = order[:num_validation] or order, order[num_validation:]

        head = PromptValueHead(hidden_states[0].size(-1), value_range=value_range).to(device)
        num_tokens = sum(len(hidden_states[i]) for i in fitted)
        mean = sum(hidden_states[i].float().sum(0) for i in fitted) / num_tokens
        variance = sum((hidden_states[i].float() - mean).square().sum(0) for i in fitted) / num_tokens
        head.hidden_mean.copy_(mean)
        head.hidden_std.copy_(variance.sqrt().clamp(min=1e-6))
        head.reward_mean.copy_((rewards * weights)[fitted].sum() / weights[fitted].sum())
        head.reward_std.copy_(rewards[fitted].std(correction=0).clamp(min=1e-6))
        # Measured on widths 32 to 576: the best step shrinks with the width
        learning_rate = 0.02 / math.sqrt(head.query.size(-1)) if learning_rate is None else learning_rate
        optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate)

        def loss(rows: list[int]) -> Tensor:
            batch = [hidden_states[i].to(device) for i in rows]
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


class ValueEstimator:
    """
    The reference policy's value of prompts, estimated from the rewards of logged completions.

    Works on all ranks at once: rank 0 fits the heads and everyone gets them; predictions are shared out and gathered.
    Results are cached.

    Args:
        reference (`Callable[[], AbstractContextManager[PreTrainedModel]]`):
            Makes a context whose value is the reference policy, a causal language model.
        cache_dir (`str` or `Path`, *optional*):
            Folder of the cache. If `None`, nothing is kept.
        cache_key (`Any`, *optional*):
            What the reference's hidden states depend on beside the prompts.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of prompts in a forward of the policy.
        max_prompts (`int`, *optional*, defaults to `1024`):
            Number of prompts that the heads are fitted on at most. Their hidden states are held in the host's memory
            on rank 0.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice of prompts and of the fit.
        **fit_kwargs:
            Passed to [`fit_value_head`].
    """

    def __init__(
        self,
        reference: Callable[[], AbstractContextManager[PreTrainedModel]],
        *,
        cache_dir: str | Path | None = None,
        cache_key: Any = None,
        batch_size: int = 8,
        max_prompts: int = 1024,
        seed: int = 0,
        **fit_kwargs: Any,
    ) -> None:
        self.reference = reference
        self.cache_dir = cache_dir
        self.settings = self.key = (cache_key, max_prompts, seed, fit_kwargs)
        self.batch_size = batch_size
        self.max_prompts = max_prompts
        self.fit_kwargs = {"seed": seed, **fit_kwargs}
        self.heads: list[PromptValueHead] = []
        self.cross_fitted: dict[tuple[int, ...], float] = {}

    def fit(self, prompt_ids: Sequence[list[int]], rewards: Tensor, weights: Tensor | None = None) -> None:
        """
        Fit the heads on `max_prompts` of the prompts. From then on these have the value of the head that has not seen
        them.

        Args:
            prompt_ids (`Sequence[list[int]]`):
                Token ids of distinct prompts.
            rewards (`torch.Tensor`):
                Mean reward of each prompt's completions, of shape `(num_prompts,)`.
            weights (`torch.Tensor`, *optional*):
                Number of completions behind each mean, of shape `(num_prompts,)`.
        """
        if not len(prompt_ids) or self.max_prompts < 1:
            raise ValueError(
                f"There are {len(prompt_ids)} prompts with a scored completion, of which `max_prompts="
                f"{self.max_prompts}` are to be read, so there is nothing to fit a value head on. Check the rewards: "
                "null means that a completion is not scored."
            )
        order = torch.randperm(len(prompt_ids), generator=torch.Generator().manual_seed(self.fit_kwargs["seed"]))
        fitted = order[: self.max_prompts].sort().values
        weights = torch.ones_like(rewards) if weights is None else weights
        fitted_on = [prompt_ids[i] for i in fitted], rewards[fitted].tolist(), weights[fitted].tolist()
        self.key = (self.settings, *fitted_on)

        def compute() -> dict[str, Tensor]:
            is_main = PartialState().is_main_process
            hidden_states: list[Tensor] = [torch.empty(0)] * len(fitted)
            with self.reference() as model:
                # Every rank runs the forwards, which may be collective (ZeRO-3), but only rank 0 keeps the outcome
                prompts = [prompt_ids[i] for i in fitted]
                for batch, states in prompt_hidden_states(model, prompts, self.batch_size, "Reading prompts"):
                    for position, state in zip(batch, states, strict=True):
                        # On the host: those of 1024 prompts take as much as a whole model
                        hidden_states[position] = state.cpu() if is_main else hidden_states[position]
                device = model.device
            if not is_main:
                return {}
            heads, values = cross_fit_values(
                hidden_states,
                rewards[fitted],
                weights[fitted],
                device=device,
                desc="Fitting value head",
                **self.fit_kwargs,
            )
            states = {f"{i}.{name}": t for i, head in enumerate(heads) for name, t in head.state_dict().items()}
            return {"values": values, **states}

        tensors = cached(self.cache_dir, "value_head", self.key, compute)
        values = tensors.pop("values").tolist()
        self.cross_fitted = {tuple(prompt_ids[i]): value for i, value in zip(fitted, values, strict=True)}
        self.heads = [self._head(tensors, i) for i in range(len({name.split(".")[0] for name in tensors}))]

    def _head(self, tensors: dict[str, Tensor], index: int) -> PromptValueHead:
        prefix = f"{index}."
        state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        head = PromptValueHead(state["query"].size(-1), value_range=self.fit_kwargs.get("value_range"))
        head.load_state_dict(state)
        return head.eval().requires_grad_(False)

    def predict(self, prompt_ids: Sequence[list[int]], desc: str | None = None) -> Tensor:
        """
        Predict prompts on this rank alone. One that the heads were fitted on gets its cross-fitted value.

        Args:
            prompt_ids (`Sequence[list[int]]`):
                Token ids of each prompt.
            desc (`str`, *optional*):
                What the progress bar says. No bar if `None`.

        Returns:
            `torch.Tensor`: One value per prompt, of shape `(num_prompts,)`.
        """
        values = torch.tensor([self.cross_fitted.get(tuple(ids), math.nan) for ids in prompt_ids])
        unseen = values.isnan().nonzero().view(-1).tolist()
        with self.reference() as model:
            for head in self.heads:
                head.to(model.device)
            prompts = [prompt_ids[i] for i in unseen]
            for batch, states in prompt_hidden_states(model, prompts, self.batch_size, desc):
                values[[unseen[i] for i in batch]] = predict_values(self.heads, states).cpu()
        return values

    def predict_sharded(self, prompt_ids: Sequence[list[int]], name: str) -> Tensor:
        """
        Predict prompts, each rank a part of those that the heads were not fitted on.

        Args:
            prompt_ids (`Sequence[list[int]]`):
                Token ids of each prompt, the same on all ranks.
            name (`str`):
                What the prompts are, for the progress bar and the cache.

        Returns:
            `torch.Tensor`: One value per prompt, of shape `(num_prompts,)`.
        """

        values = torch.tensor([self.cross_fitted.get(tuple(ids), math.nan) for ids in prompt_ids])
        unseen = values.isnan().nonzero().view(-1).tolist()

        def compute() -> dict[str, Tensor]:
            state = PartialState()
            order = sorted(unseen, key=lambda i: -len(prompt_ids[i]))
            # Every rank gets as many prompts, the first ones twice if need be: a forward may be collective (ZeRO-3)
            size = math.ceil(len(order) / state.num_processes) * state.num_processes
            mine = list(islice(cycle(order), state.process_index, size, state.num_processes))
            predicted = self.predict([prompt_ids[i] for i in mine], f"Estimating values of {name} dataset")
            found = dict(gather_object(list(zip(mine, predicted.tolist(), strict=True))))
            return {"values": torch.tensor([found[i] for i in unseen])}

        if unseen:
            key = self.key, [prompt_ids[i] for i in unseen]
            values[unseen] = cached(self.cache_dir, f"values_{name}", key, compute)["values"]
        return values


class StateValueHead(nn.Module):
    """
    Value of the state after each token: two layers on the policy's last hidden state. (A linear head explained less
    than a constant where this one explains a little.)

    It computes in float32, also inside autocast, and is 0 everywhere until it is trained.

    Args:
        hidden_size (`int`):
            Width of the policy.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # equal on all ranks, and the run's own state is left alone
            self.layers = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, 1))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`):
                Last hidden states, of shape `(batch, seq_len, hidden_size)`.

        Returns:
            `torch.Tensor`: Values, of shape `(batch, seq_len)`, in float32. The one at t is of the state *after* token
            t, in which token t + 1 is chosen.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            weight = self.layers[0].weight  # in another type when `bf16_full_eval` casts all of the model
            return self.layers(hidden_states.to(weight)).squeeze(-1).float()


@dataclass
class ValueCausalLMOutput(FusedCausalLMOutput):
    """
    Output of a model with a value head that is called with `return_values=True`.

    Args:
        state_values (`torch.Tensor` of shape `(batch, seq_len)`):
            Value of the state after each token.
    """

    # Declared, since DDP finds no gradients behind what is not; and not named `values`, which is a method of the dict
    # that every model output is
    state_values: Tensor | None = None


def add_value_head(model: PreTrainedModel) -> StateValueHead:
    """
    Put a [`StateValueHead`] on a causal language model that has TRL's fused LM head, as `model.value_head`. Called
    with `return_values=True`, the model then returns [`ValueCausalLMOutput`]: log-probabilities and values of one
    forward.

    The head is not saved with the model, which loads as if there had never been one.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model without its PEFT wrapper.

    Returns:
        [`StateValueHead`]: The head.
    """
    if hasattr(model, "value_head") and not isinstance(model.value_head, StateValueHead):
        raise ValueError(
            f"{type(model).__name__} has a `value_head` of its own, a {type(model.value_head).__name__}: that place "
            "is taken. Pass the causal language model without it."
        )
    head = StateValueHead(model.get_output_embeddings().in_features)  # OPT projects its hidden states to another size
    model.value_head = head.to(model.get_output_embeddings().weight.device)
    model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ())
    model._keys_to_ignore_on_save |= {f"value_head.{name}" for name in head.state_dict()}
    forward = model.forward

    # `generate` validates its arguments against the signature
    @functools.wraps(type(model).forward)
    def forward_with_values(self: PreTrainedModel, *args: Any, return_values: bool = False, **kwargs: Any) -> Any:
        if not return_values:
            return forward(*args, **kwargs)
        # The fused LM head keeps the hidden states to itself
        hidden_states: list[Tensor] = []
        hook = self.base_model.register_forward_hook(
            lambda module, inputs, output: hidden_states.append(output.last_hidden_state)
        )
        try:
            outputs = forward(*args, **kwargs)
        finally:
            hook.remove()
        return ValueCausalLMOutput(**outputs, state_values=self.value_head(hidden_states[0]))

    model.forward = types.MethodType(forward_with_values, model)
    return head
