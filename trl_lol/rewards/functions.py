"""Reward functions, and functions that make one out of others. They also work in TRL's own trainers."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .._trl import get_callable_name, is_async_callable
from .calling import RewardFunc, Rewards, call, call_async, check_reward_funcs, weighted_nansum


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
