"""
Calling reward functions the way TRL does.

A reward function is `f(prompts, completions, **columns) -> list[float | None]`, sync or async, where `None` means "not
scored".
"""

import asyncio
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from itertools import islice
from reprlib import repr as shortened
from time import perf_counter
from typing import Any

from torch import nn
from transformers import TrainerState

from .._trl import get_callable_name, is_async_callable, start_event_loop_in_daemon
from ..data import LARGEST_REWARD, is_reward


RewardFunc = Callable[..., Any]  # returns `Rewards`, or a coroutine of it
Rewards = list[float | None]

# Arguments of reward functions that are no columns
PASSED_BY_TRL = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


def call_reward_funcs(
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    reward_weights: Sequence[float] | None,
    prompts: list,
    completions: list,
    completion_ids: list[list[int]] | None = None,
    **columns: Any,
) -> Rewards:
    """
    Call reward functions on a batch and sum what they return.

    Args:
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions. Each is called once, with everything that TRL's online trainers pass; outside a trainer
            `trainer_state` is a fresh one, and `log_extra` and `log_metric` do nothing. Async functions wait
            concurrently.
        reward_weights (`list[float]` or `None`):
            One weight per function. If `None`, every function weighs 1.
        prompts (`list[str]` or `list[list[dict]]`):
            Prompt of each completion.
        completions (`list[str]` or `list[list[dict]]`):
            Completions.
        completion_ids (`list[list[int]]`, *optional*):
            Token IDs of the completions.
        **columns (`list`):
            Other columns of the dataset, one entry per completion.

    Returns:
        `list[float | None]`: One weighted sum per completion. A `None` of one function drops out of the sum; where all
        functions return `None`, so does this.

    Raises:
        `TypeError`: If something other than a reward function is given.
        `ValueError`: If a function returns a wrong number of rewards, NaN or infinity, or if there is not one weight
            per function.
        `RuntimeError`: If a function raises; it names the function, and the original error is its cause.
    """
    funcs, weights = check_reward_funcs(reward_funcs, reward_weights)
    called = call_each(funcs, prompts, completions, completion_ids, **columns)
    return weighted_nansum([rewards for rewards, _ in called], weights)


def call_each(
    reward_funcs: Sequence[RewardFunc],
    /,
    prompts: list,
    completions: list,
    completion_ids: list[list[int]] | None = None,
    **columns: Any,
) -> list[tuple[Rewards, float]]:
    """
    Call reward functions on a batch, as [`call_reward_funcs`] does.

    Returns:
        `list[tuple[list[float | None], float]]`: What each function returned, and the seconds that it took.
    """
    kwargs = {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
        "trainer_state": TrainerState(),
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
        **columns,
    }

    def timed(func: RewardFunc) -> tuple[Rewards, float]:
        start = perf_counter()
        return call(func, **kwargs), perf_counter() - start

    async def timed_async(func: RewardFunc) -> tuple[Rewards, float]:
        start = perf_counter()
        return await call_async(func, **kwargs), perf_counter() - start

    async def call_async_funcs() -> list[tuple[Rewards, float]]:
        return await asyncio.gather(*(timed_async(func) for func in reward_funcs if is_async_callable(func)))

    called = [None if is_async_callable(func) else timed(func) for func in reward_funcs]
    if None in called:
        loop = _event_loop(os.getpid())
        awaited = iter(asyncio.run_coroutine_threadsafe(call_async_funcs(), loop).result())
        called = [next(awaited) if result is None else result for result in called]
    return called


@cache
def _event_loop(pid: int) -> asyncio.AbstractEventLoop:
    """
    A loop in a thread of its own, so that it also runs below a notebook's. It stays, so that a client session that a
    reward function opened for one batch serves the next. Threads do not survive a fork, hence one per process.
    """
    _, loop, ready = start_event_loop_in_daemon(name="reward-functions")
    ready.wait()
    return loop


def check_reward_funcs(
    reward_funcs: RewardFunc | Sequence[RewardFunc], weights: Sequence[float] | None
) -> tuple[list[RewardFunc], list[float]]:
    """Reward functions and their weights as two lists of the same length. Without weights, every function weighs 1."""
    funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not funcs:
        raise ValueError("`reward_funcs` is empty. Give at least one reward function.")
    for func in funcs:
        if isinstance(func, nn.Module) or not callable(func):
            what = repr(func) if isinstance(func, str) else f"a {type(func).__name__}"
            raise TypeError(
                f"`reward_funcs` holds {what}, but a reward function is called as f(prompts, completions, **columns) "
                "and returns one float, or None, per completion. For a reward model pass `RewardModel(...)`."
            )
    weights = [1.0] * len(funcs) if weights is None else _as_list(weights, len(funcs))
    if not isinstance(weights, list) or not all(map(is_reward, weights)):
        raise ValueError(f"The reward weights are {shortened(weights)}. Give a list of finite numbers, one each.")
    if len(weights) != len(funcs):
        raise ValueError(f"Got {len(weights)} reward weights for {len(funcs)} reward functions. Give one weight each.")
    return funcs, [float(weight) for weight in weights]


def parts_of(reward_funcs: RewardFunc | Sequence[RewardFunc]) -> Iterator[RewardFunc]:
    """The functions, and those that they are made of."""
    for func in reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]:
        yield func
        yield from parts_of(getattr(func, "reward_funcs", []))


def call(reward_func: RewardFunc, /, **kwargs: Any) -> Rewards:
    """Call a sync reward function and check what it returns."""
    count = len(kwargs["completions"])
    try:
        rewards = _as_list(reward_func(**_own_lists(kwargs)), count)
    except Exception as error:
        raise RuntimeError(_what_it_raised(reward_func, error)) from error
    return _check_rewards(reward_func, rewards, count)


async def call_async(reward_func: RewardFunc, /, **kwargs: Any) -> Rewards:
    """Call a reward function, sync or async, and check what it returns."""
    count = len(kwargs["completions"])
    try:
        rewards = reward_func(**_own_lists(kwargs))
        rewards = _as_list(await rewards if inspect.isawaitable(rewards) else rewards, count)
    # The last three would end the event loop, and whoever waits for the rewards would wait for ever
    except (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling():
            raise  # someone does not want to wait any more
        raise RuntimeError(_what_it_raised(reward_func, error)) from error
    return _check_rewards(reward_func, rewards, count)


def _own_lists(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments whose lists a function may change: others are given the same ones."""
    return {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}


def _what_it_raised(reward_func: RewardFunc, error: BaseException) -> str:
    return f"The reward function '{get_callable_name(reward_func)}' raised {type(error).__name__}: {error}"


def _as_list(values: Any, count: int) -> Any:
    """What a function returned as a list, if it is a collection with an order. Of an iterator, one value too many."""
    if hasattr(values, "tolist"):  # tensors and arrays
        return values.tolist()
    if isinstance(values, Iterator):
        return list(islice(values, count + 1))
    is_ordered = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set)
    return list(values) if is_ordered else values


def _check_rewards(reward_func: RewardFunc, rewards: Any, count: int) -> Rewards:
    """What a reward function returned for `count` completions, as a list of finite floats and `None`."""
    name = get_callable_name(reward_func)
    if not isinstance(rewards, list):
        if inspect.iscoroutine(rewards):
            rewards.close()  # or Python says that nobody has waited for it
        raise ValueError(
            f"The reward function '{name}' returned {type(rewards).__name__}. Return a list with one float, or None "
            "for 'not scored', per completion. A function that returns a coroutine must be `async def` itself."
        )
    if len(rewards) != count:
        raise ValueError(
            f"The reward function '{name}' returned {len(rewards)} rewards for {count} completions. Return exactly "
            "one per completion, None for a completion that is not scored."
        )
    for index, reward in enumerate(rewards):
        if reward is not None and not is_reward(reward):
            raise ValueError(
                f"The reward function '{name}' returned {shortened(reward)} at index {index} of its batch. Return "
                "finite numbers, and None for a completion that is not scored. Beyond "
                f"{LARGEST_REWARD:g} losses overflow: scale or clip what is."
            )
    return [None if reward is None else float(reward) for reward in rewards]


def weighted_nansum(rewards_per_func: Sequence[Rewards], weights: Sequence[float]) -> Rewards:
    """Weighted sum over the functions, as TRL sums: a `None` drops out, only `None` stays `None`."""
    sums: Rewards = []
    for rewards in zip(*rewards_per_func, strict=True):
        scored = [weight * reward for weight, reward in zip(weights, rewards, strict=True) if reward is not None]
        sums.append(sum(scored) if scored else None)
    return sums
