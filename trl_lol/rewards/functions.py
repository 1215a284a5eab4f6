"""Reward functions, and functions that make one out of others. They also work in TRL's own trainers."""

import asyncio
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from .._cache import written_beside
from .._trl import get_callable_name, is_async_callable
from .calling import RewardFunc, Rewards, call, call_async, check_reward_funcs, weighted_nansum
from .scoring import completion_rewards, score_dataset


class ColumnReward:
    """
    Reward function that reads a column of the dataset.

    Args:
        column (`str`):
            Name of the column. It holds one number per row or, when the rows have several completions, a list with one
            number per completion. Null is "not scored".

    Example:

    ```python
    >>> score_dataset(dataset, [ColumnReward("helpfulness"), ColumnReward("verbosity")], reward_weights=[1.0, -0.2])
    ```
    """

    def __init__(self, column: str) -> None:
        self.column = column
        self.__name__ = column

    def __call__(
        self, prompts: list, completions: list, completion_index: list[int] | None = None, **columns: Any
    ) -> Rewards:
        if self.column not in columns:
            found = sorted(columns.keys() - {"completion_ids", "trainer_state", "log_extra", "log_metric"})
            raise ValueError(
                f"`ColumnReward({self.column!r})` finds no column {self.column!r}. The reward functions are given the "
                f"columns: {', '.join(found) or 'none'}. Name one of them, or keep the column in the dataset."
            )
        indices = [None] * len(completions) if completion_index is None else completion_index
        values = [self._entry(value, i) for value, i in zip(columns[self.column], indices, strict=True)]
        return [None if value is None else float(value) for value in values]

    def _entry(self, value: Any, index: int | None) -> Any:
        if not isinstance(value, list | tuple):
            return value
        if index is None or index >= len(value):
            missing = "a prompt's only completion" if index is None else f"completion number {index}, counted from 0"
            raise ValueError(
                f"Column {self.column!r} holds a list of {len(value)} numbers, which has no entry for {missing}. Give "
                "one number per completion, in the order of the completions."
            )
        return value[index]


class _Combined:
    """Reward function made of others: calls them all and combines what they return."""

    def __init__(self, reward_funcs: list[RewardFunc], combine: Callable[[list[Rewards]], Rewards], name: str) -> None:
        self.reward_funcs = reward_funcs
        self.combine = combine
        self.__name__ = f"{name}({', '.join(map(get_callable_name, reward_funcs))})"

    def __call__(self, prompts: list, completions: list, **columns: Any) -> Rewards:
        kwargs = {"prompts": prompts, "completions": completions, **columns}
        return self.combine([call(func, **kwargs) for func in self.reward_funcs])


class _AsyncCombined(_Combined):
    """The same for async functions, which wait concurrently. Callers recognise it by its async `__call__`."""

    async def __call__(self, prompts: list, completions: list, **columns: Any) -> Rewards:
        kwargs = {"prompts": prompts, "completions": completions, **columns}
        return self.combine(await asyncio.gather(*(call_async(func, **kwargs) for func in self.reward_funcs)))


def _combined(reward_funcs: list[RewardFunc], combine: Callable[[list[Rewards]], Rewards], name: str) -> _Combined:
    kind = _AsyncCombined if any(map(is_async_callable, reward_funcs)) else _Combined
    return kind(reward_funcs, combine, name)


def weighted_sum(
    reward_funcs: RewardFunc | Sequence[RewardFunc], weights: Sequence[float] | None = None
) -> RewardFunc:
    """
    Sum several reward functions into one.

    A completion that one function does not score gets the sum of the others; one that none scores stays unscored.

    Args:
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions, sync or async.
        weights (`list[float]`, *optional*):
            One weight per function. If `None`, every function weighs 1.

    Returns:
        `Callable`: A reward function; async if one of them is.

    Raises:
        `TypeError`: If something other than a reward function is given.
        `ValueError`: If there is not one weight per function.
    """
    funcs, weights = check_reward_funcs(reward_funcs, weights)
    return _combined(funcs, partial(weighted_nansum, weights=weights), "weighted_sum")


def sigmoid(reward_func: RewardFunc) -> RewardFunc:
    """
    Squash the rewards of a function into (0, 1), as A-LoL does with the logits of reward models.

    Args:
        reward_func (`Callable`):
            Reward function, sync or async.

    Returns:
        `Callable`: A reward function; async if `reward_func` is.

    Raises:
        `TypeError`: If something other than a reward function is given.
    """
    funcs, _ = check_reward_funcs([reward_func], None)
    return _combined(funcs, _sigmoid, "sigmoid")


def _sigmoid(rewards_per_func: list[Rewards]) -> Rewards:
    (rewards,) = rewards_per_func
    return [None if r is None else torch.tensor(r, dtype=torch.float64).sigmoid().item() for r in rewards]


def clip(reward_func: RewardFunc, low: float | None = None, high: float | None = None) -> RewardFunc:
    """
    Keep the rewards of a function within bounds.

    Args:
        reward_func (`Callable`):
            Reward function, sync or async.
        low (`float`, *optional*):
            Lowest reward. No bound if `None`.
        high (`float`, *optional*):
            Highest reward. No bound if `None`.

    Returns:
        `Callable`: A reward function; async if `reward_func` is.

    Raises:
        `TypeError`: If something other than a reward function is given.
        `ValueError`: If `low` is above `high`.
    """
    low, high = -torch.inf if low is None else low, torch.inf if high is None else high
    if not low <= high:
        raise ValueError(f"`low={low}` is above `high={high}`.")
    funcs, _ = check_reward_funcs([reward_func], None)
    return _combined(funcs, partial(_clip, low=low, high=high), "clip")


def _clip(rewards_per_func: list[Rewards], low: float, high: float) -> Rewards:
    (rewards,) = rewards_per_func
    return [None if r is None else min(max(r, low), high) for r in rewards]


def standardize(
    reward_func: RewardFunc,
    dataset: Dataset | None = None,
    *,
    mean: float | None = None,
    std: float | None = None,
    path: str | Path | None = None,
) -> RewardFunc:
    """
    Shift and scale the rewards of a function to zero mean and unit variance on a dataset.

    Mean and standard deviation are taken once, from the dataset, and stay what they are: a batch never has its own.

    Args:
        reward_func (`Callable`):
            Reward function, sync or async.
        dataset ([`~datasets.Dataset`], *optional*):
            Rows of any accepted format, whose completions are scored for it.
        mean (`float`, *optional*):
            Mean, in place of a dataset.
        std (`float`, *optional*):
            Standard deviation, likewise.
        path (`str` or `Path`, *optional*):
            JSON file of the run to keep both in. If it is there, it is read, and nothing is scored: a run that is
            resumed, with another dataset even, keeps its scale.

    Returns:
        `Callable`: A reward function; async if `reward_func` is.

    Raises:
        `TypeError`: If something other than a reward function is given.
        `ValueError`: If there is neither a dataset, nor mean and standard deviation, nor a file; if there is a dataset
            as well as a mean or a standard deviation, or a file that holds other ones; or if the rewards do not
            differ.

    Example:

    ```python
    >>> reward_model = RewardModel("Skywork/Skywork-Reward-V2-Qwen3-0.6B")
    >>> reward = standardize(reward_model, dataset, path="out/reward_scale.json")
    ```
    """
    funcs, _ = check_reward_funcs([reward_func], None)
    if dataset is not None and (mean, std) != (None, None):
        raise ValueError("`standardize` takes a dataset, or `mean` and `std`, and not both.")
    path = None if path is None else Path(path)
    is_main = PartialState().is_main_process
    saved = [json.loads(path.read_text()) if is_main and path is not None and path.exists() else None]
    (saved,) = broadcast_object_list(saved)  # process 0 decides: the others may not see its files
    if saved is not None:
        for name, value in (("mean", mean), ("std", std)):
            if value not in (None, saved[name]):
                raise ValueError(
                    f"`{name}={value}`, but {path} holds the {name} {saved[name]} of this run. Remove the argument to "
                    "go on with that, or the file to begin anew."
                )
        mean, std = saved["mean"], saved["std"]
    elif dataset is not None:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"`standardize` needs a `Dataset`, whose rewards it reads, and got {type(dataset)}.")
        rewards = [r for row in completion_rewards(score_dataset(dataset, reward_func)) for r in row if r is not None]
        if not rewards:
            raise ValueError("No completion of the dataset is scored, so that there is no mean.")
        mean, std = fmean(rewards), pstdev(rewards)
    if mean is None or std is None:
        raise ValueError("`standardize` needs a dataset, or `mean` and `std`, or a `path` that it was saved to.")
    if not std > 0:
        raise ValueError(f"`std={std}`: rewards that do not differ cannot be standardised.")
    if path is not None and saved is None and is_main:
        with written_beside(path) as beside:
            beside.write_text(json.dumps({"mean": mean, "std": std}) + "\n")
    PartialState().wait_for_everyone()
    return _combined(funcs, partial(_standardize, mean=mean, std=std), "standardize")


def _standardize(rewards_per_func: list[Rewards], mean: float, std: float) -> Rewards:
    (rewards,) = rewards_per_func
    return [None if r is None else (r - mean) / std for r in rewards]
