"""Advantages of a dataset's completions, without a trainer: to look at, to filter by, or to weight with."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ._cache import model_key
from ._trl import get_config_model_id
from .advantages import mean_rewards, sequence_advantages
from .data import as_group, check_columns, check_row, prompt_key, tokenize_prompt, tokenize_row
from .engines import loading_whole
from .generation import evaluating, sample_completions
from .rewards import ColumnReward, RewardFunc, score_dataset
from .rewards.calling import Rewards, parts_of
from .rewards.scoring import reward_columns, write_rewards
from .value import ValueEstimator


def estimate_advantages(
    dataset: Dataset,
    model: "str | PreTrainedModel | Any | None" = None,
    reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    baseline: str = "value",
    value_source: str = "dataset",
    reward_weights: Sequence[float] | None = None,
    batch_size: int = 8,
    cache_dir: str | Path | None = None,
    max_prompts: int = 1024,
    num_generations: int = 1,
    max_completion_length: int = 256,
    value_range: Sequence[float] | None = None,
    learning_rate: float | None = None,
    num_train_epochs: int = 10,
    seed: int = 0,
) -> Dataset:
    """
    Advantage of each completion over what a policy would get, as A-LoL takes it before it trains ([Baheti et al.,
    2024](https://huggingface.co/papers/2305.14718), Eq. 3): its reward minus the value of its prompt.

    In a distributed run every rank reads its share of the prompts, and all ranks get the same dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of any accepted format. See the README.
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The policy: a causal language model as it is, or its id. It is not changed, and reads each prompt once. A
            baseline that needs no value needs no model.
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Reward functions, which take precedence over rewards in the dataset.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded from the model's name, where there is a model.
        baseline (`str`, *optional*, defaults to `"value"`):
            What is subtracted: `"value"`, or `"group_mean"`, `"leave_one_out"`, `"batch_mean"` and `"none"`, for
            which the model is not loaded (see [`sequence_advantages`]).
        value_source (`str`, *optional*, defaults to `"dataset"`):
            Where the rewards come from that the value head is fitted on: `"dataset"`, or `"rollouts"` for completions
            that are sampled from the model and scored with `reward_funcs`. See [`ALoLConfig`].
        reward_weights (`list[float]`, *optional*):
            One weight per reward function. If `None`, every function weighs 1.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of prompts in a forward.
        cache_dir (`str` or `Path`, *optional*):
            Folder to keep rewards, rollouts and values in. If `None`, nothing is kept.
        max_prompts (`int`, *optional*, defaults to `1024`):
            Number of prompts that the value head is fitted on, and that `"rollouts"` completes, at most.
        num_generations (`int`, *optional*, defaults to `1`):
            Number of completions per prompt that `"rollouts"` samples.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Maximum length of these, in tokens.
        value_range, learning_rate, num_train_epochs:
            Of the value head, see [`~trl_lol.value.fit_value_head`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the fit and of the rollouts.

    Returns:
        [`~datasets.Dataset`]: The same rows with `reward`, `value` and `advantage`; groups have lists, `rewards` and
        `advantages`, and preferences `chosen_reward`, `rejected_reward`, `chosen_advantage` and `rejected_advantage`.
        The advantage of a completion that is not scored is null. There is no `value` with another baseline.

    Raises:
        `ValueError`: If the rows have none of the accepted formats, or no rewards, or if `"rollouts"` are asked for
            without reward functions that could score them.

    Example:

    ```python
    >>> scored = estimate_advantages(dataset, "Qwen/Qwen3-0.6B", reward_funcs=helpful)
    >>> better = scored.filter(lambda row: row["advantage"] > 0)  # for SFTTrainer
    ```
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`estimate_advantages` needs a `Dataset`, which it reads twice, and got {type(dataset)}.")
    check_columns(dataset.column_names)
    if value_source not in ("dataset", "rollouts"):
        raise ValueError(f'`value_source={value_source!r}` is unknown. Use "dataset" or "rollouts".')
    if value_source == "rollouts":
        if baseline != "value":
            raise ValueError(f'`value_source="rollouts"` is for a value, and `baseline={baseline!r}` has none.')
        check_scores_rollouts(reward_funcs)
    if baseline == "value" and model is None:
        raise ValueError('`baseline="value"` needs a `model`, whose value it is. Pass it, or pick another baseline.')
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"The model has a {model.active_peft_config.peft_type.value} adapter, whose virtual tokens are no part of "
            "the prompts that are read here. Merge it, pass a LoRA, or pick a baseline that needs no model."
        )
    if processing_class is None and model is not None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        processing_class = AutoTokenizer.from_pretrained(model_id)
    if reward_funcs is not None:
        dataset = score_dataset(dataset, reward_funcs, reward_weights, processing_class, cache_dir=cache_dir)

    keys, rewards = [], []
    eos_token = getattr(processing_class, "tokenizer", processing_class).eos_token if baseline == "value" else None
    for i, row in enumerate(dataset.with_format(None)):
        group = check_row(row, i)
        rewards.append(group.rewards)
        if baseline == "value":
            keys.append(tokenize_row(row, i, processing_class, eos_token)["prompt_ids"])
        else:
            keys.append([prompt_key(group.prompt, row)])
    prompts, group_ids, flat = group_by_prompt_ids(keys, _with_nan(rewards))
    values = None
    if baseline == "value":
        if isinstance(model, str):
            with loading_whole():
                model = AutoModelForCausalLM.from_pretrained(model).to(PartialState().device)
        estimator = ValueEstimator(
            partial(_as_policy, model),
            cache_dir=cache_dir,
            cache_key=model_key(model),
            batch_size=batch_size,
            max_prompts=max_prompts,
            seed=seed,
            value_range=value_range,
            learning_rate=learning_rate,
            num_train_epochs=num_train_epochs,
        )
        rewarded = prompts, *mean_rewards(flat, group_ids, len(prompts))
        if value_source == "rollouts":
            with _as_policy(model) as policy:
                rewarded = score_rollouts(
                    dataset,
                    policy,
                    reward_funcs,
                    processing_class,
                    reward_weights=reward_weights,
                    num_prompts=max_prompts,
                    num_generations=num_generations,
                    max_completion_length=max_completion_length,
                    batch_size=batch_size,
                    seed=seed,
                    cache_dir=cache_dir,
                )
        estimator.fit(*with_rewards(*rewarded))
        values = estimator.predict_sharded(prompts, "train")[group_ids]
    advantages = sequence_advantages(flat, group_ids=group_ids, values=values, baseline=baseline)
    advantages = advantages.masked_fill(flat.isnan(), math.nan)

    dataset = write_rewards(dataset, rewards)
    sizes = [len(row) for row in rewards]
    by_row = [[None if math.isnan(x) else x for x in part.tolist()] for part in advantages.split(sizes)]
    columns = {name.replace("reward", "advantage"): x for name, x in reward_columns(dataset, by_row).items()}
    if values is not None:
        columns["value"] = [part[0].item() if len(part) else None for part in values.split(sizes)]
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    for name, column in columns.items():
        dataset = dataset.add_column(name, column)
    return dataset


def score_rollouts(
    dataset: Dataset,
    model: PreTrainedModel,
    reward_funcs: RewardFunc | Sequence[RewardFunc] | None,
    processing_class: PreTrainedTokenizerBase,
    *,
    reward_weights: Sequence[float] | None = None,
    num_prompts: int,
    num_generations: int,
    max_completion_length: int,
    max_length: int | None = None,
    batch_size: int,
    seed: int,
    cache_dir: str | Path | None,
) -> tuple[list[list[int]], Tensor, Tensor]:
    """
    Let a policy complete prompts and score that: what a value head learns to foresee.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of any accepted format. Their completions are not read.
        model ([`~transformers.PreTrainedModel`]):
            The policy, in eval mode.
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        reward_weights, num_generations, max_completion_length, batch_size, seed, cache_dir:
            See [`estimate_advantages`].
        num_prompts (`int`):
            Number of distinct prompts to complete at most, chosen at random.
        max_length (`int`, *optional*):
            Prompts of so many tokens or more are left out, as in training.

    Returns:
        `tuple[list[list[int]], torch.Tensor, torch.Tensor]`: The tokens of the distinct prompts, the mean reward of
        each one's completions, and the number of those that are scored, of shape `(num_prompts,)`.

    Raises:
        `ValueError`: If there are no reward functions, or if one of them reads the rewards of other completions.
    """
    check_scores_rollouts(reward_funcs)
    rows = dataset.with_format(None)
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(prompt_key(as_group(row).prompt, row), i)
    positions = torch.tensor(list(first.values()))
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
    rows = rows.select(positions[order[:num_prompts].sort().values].tolist())
    if "prompt" not in rows.column_names:
        rows = rows.add_column("prompt", [as_group(row).prompt for row in rows])
    # The prompts have the tokens that they have in training
    prompt_ids = [tokenize_prompt(row["prompt"], row, processing_class) for row in rows]
    if max_length is not None:
        kept = [i for i, ids in enumerate(prompt_ids) if len(ids) < max_length]
        rows, prompt_ids = rows.select(kept), [prompt_ids[i] for i in kept]
    rows = sample_completions(
        rows,
        model,
        processing_class,
        num_generations,
        max_new_tokens=max_completion_length,
        batch_size=batch_size,
        seed=seed,
        cache_dir=cache_dir,
    )
    rows = score_dataset(rows, reward_funcs, reward_weights, processing_class, cache_dir=cache_dir)
    prompts, group_ids, rewards = group_by_prompt_ids(prompt_ids, _with_nan(rows["rewards"]))
    return prompts, *mean_rewards(rewards, group_ids, len(prompts))


def check_scores_rollouts(reward_funcs: RewardFunc | Sequence[RewardFunc] | None) -> None:
    """Check that there are reward functions, and that they can score completions that are not in the dataset."""
    if reward_funcs is None:
        raise ValueError(
            '`value_source="rollouts"` scores completions of the policy, and there are no `reward_funcs` to do it '
            'with: the rewards in the dataset are of other completions. Pass them, or set `value_source="dataset"`.'
        )
    if logged := [func.column for func in parts_of(reward_funcs) if isinstance(func, ColumnReward)]:
        raise ValueError(
            f"`ColumnReward({logged[0]!r})` has rewards for the completions in the dataset, and none for the policy's "
            'own, which `value_source="rollouts"` scores. Pass a reward function that can score any completion, or '
            'set `value_source="dataset"`.'
        )


def _with_nan(rewards: Iterable[Rewards]) -> list[list[float]]:
    return [[math.nan if reward is None else float(reward) for reward in row] for row in rewards]


def with_rewards(prompts: list[list[int]], means: Tensor, counts: Tensor) -> tuple[list[list[int]], Tensor, Tensor]:
    """The prompts that have a scored completion, with their mean rewards and the numbers of those."""
    scored = counts > 0
    return [*compress(prompts, scored.tolist())], means[scored], counts[scored]


@contextmanager
def _as_policy(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model without a PEFT wrapper, in eval mode."""
    with evaluating(model):
        yield model.get_base_model() if is_peft_model(model) else model


def group_by_prompt_ids(
    prompt_ids: Iterable[list[int]], rewards: Iterable[list[float]]
) -> tuple[list[list[int]], Tensor, Tensor]:
    """
    Put the completions of all rows with the same prompt into one group, whichever format the rows came in.

    Args:
        prompt_ids (`list[list[int]]`):
            Tokens of each row's prompt, or whatever tells it from others.
        rewards (`list[list[float]]`):
            Rewards of each row's completions.

    Returns:
        `tuple[list[list[int]], torch.Tensor, torch.Tensor]`: The distinct prompts, and for every completion the
        position of its prompt and its reward.
    """
    positions: dict[tuple[int, ...], int] = {}
    group_ids, flat = [], []
    for ids, row in zip(prompt_ids, rewards, strict=True):
        group_ids += [positions.setdefault(tuple(ids), len(positions))] * len(row)
        flat += row
    group_ids = torch.tensor(group_ids, dtype=torch.long)
    return [list(ids) for ids in positions], group_ids, torch.tensor(flat, dtype=torch.float64)
