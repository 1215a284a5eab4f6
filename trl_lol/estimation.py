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
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ._cache import model_key
from ._trl import get_config_model_id
from .advantages import mean_rewards, sequence_advantages
from .data import as_group, check_columns, tokenize_row
from .rewards import RewardFunc, score_dataset
from .rewards.scoring import reward_columns, write_rewards
from .value import ValueEstimator


def estimate_advantages(
    dataset: Dataset,
    model: "str | PreTrainedModel | Any",
    reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    baseline: str = "value",
    reward_weights: Sequence[float] | None = None,
    batch_size: int = 8,
    cache_dir: str | Path | None = None,
    max_prompts: int = 1024,
    seed: int = 0,
    **value_kwargs: Any,
) -> Dataset:
    """
    Advantage of each completion over what a policy would get, as A-LoL takes it before it trains ([Baheti et al.,
    2024](https://huggingface.co/papers/2305.14718), Eq. 3): its reward minus the value of its prompt.

    In a distributed run every rank reads its share of the prompts, and all ranks get the same dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of any accepted format. See the README.
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy: a causal language model as it is, or its id. It is not changed, and reads each prompt once.
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Reward functions, which take precedence over rewards in the dataset.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded from the model's name.
        baseline (`str`, *optional*, defaults to `"value"`):
            What is subtracted: `"value"`, or `"group_mean"`, `"leave_one_out"`, `"batch_mean"` and `"none"`, for
            which the model is not loaded (see [`sequence_advantages`]).
        reward_weights (`list[float]`, *optional*):
            One weight per reward function. If `None`, every function weighs 1.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of prompts in a forward.
        cache_dir (`str` or `Path`, *optional*):
            Folder to keep rewards and values in. If `None`, nothing is kept.
        max_prompts (`int`, *optional*, defaults to `1024`):
            Number of prompts that the value head is fitted on at most.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the fit.
        **value_kwargs:
            Passed to [`~trl_lol.value.fit_value_head`]: `value_range`, `learning_rate`, `num_train_epochs`.

    Returns:
        [`~datasets.Dataset`]: The same rows with `reward`, `value` and `advantage`; groups have lists, `rewards` and
        `advantages`, and preferences `chosen_reward`, `rejected_reward`, `chosen_advantage` and `rejected_advantage`.
        The advantage of a completion that is not scored is null. There is no `value` with another baseline.

    Raises:
        `ValueError`: If the rows have none of the accepted formats, or no rewards.

    Example:

    ```python
    >>> scored = estimate_advantages(dataset, "Qwen/Qwen3-0.6B", reward_funcs=helpful)
    >>> better = scored.filter(lambda row: row["advantage"] > 0)  # for SFTTrainer
    ```
    """
    check_columns(dataset.column_names)
    if processing_class is None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        processing_class = AutoTokenizer.from_pretrained(model_id)
    if reward_funcs is not None:
        dataset = score_dataset(dataset, reward_funcs, reward_weights, processing_class, cache_dir=cache_dir)

    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    prompt_ids, rewards = [], []
    for i, row in enumerate(dataset.with_format(None)):
        # Says what is wrong with a row, too
        prompt_ids.append(tokenize_row(row, i, processing_class, tokenizer.eos_token)["prompt_ids"])
        rewards.append(as_group(row).rewards)
    as_floats = [[math.nan if reward is None else float(reward) for reward in row] for row in rewards]
    prompts, group_ids, flat = group_by_prompt_ids(prompt_ids, as_floats)
    values = None
    if baseline == "value":
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model).to(PartialState().device)
        means, counts = mean_rewards(flat, group_ids, len(prompts))
        is_scored = (counts > 0).tolist()
        estimator = ValueEstimator(
            partial(_evaluating, model),
            cache_dir=cache_dir,
            cache_key=model_key(model),
            batch_size=batch_size,
            max_prompts=max_prompts,
            seed=seed,
            **value_kwargs,
        )
        values = torch.empty(len(prompts))
        values[is_scored] = estimator.fit([*compress(prompts, is_scored)], means[is_scored], counts[is_scored])
        if not all(is_scored):
            others = [not x for x in is_scored]
            values[others] = estimator.predict_sharded([*compress(prompts, others)], "unscored")
        values = values[group_ids]
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


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model without a PEFT wrapper, in eval mode."""
    base_model = model.get_base_model() if is_peft_model(model) else model
    was_training = base_model.training
    try:
        yield base_model.eval()
    finally:
        base_model.train(was_training)


def group_by_prompt_ids(
    prompt_ids: Iterable[list[int]], rewards: Iterable[list[float]]
) -> tuple[list[list[int]], Tensor, Tensor]:
    """
    Put the completions of all rows with the same prompt into one group, whichever format the rows came in.

    Args:
        prompt_ids (`list[list[int]]`):
            Tokens of each row's prompt.
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
    return [list(ids) for ids in positions], torch.tensor(group_ids), torch.tensor(flat, dtype=torch.float64)
