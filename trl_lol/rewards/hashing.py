"""What tells one set of reward functions from another, to key caches with."""

import inspect
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets.fingerprint import Hasher
from transformers.utils import logging


logger = logging.get_logger(__name__)


def hash_reward_funcs(reward_funcs: Any) -> str | None:
    """
    Hash reward functions, with what they hold and the source code of the modules that define them.

    Args:
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions.

    Returns:
        `str` or `None`: Rank 0's hash, on every rank; `None` if a function cannot be hashed, so that nothing that
        depends on it should be cached.
    """
    digest = [None]
    if PartialState().is_main_process:
        try:
            digest = [Hasher.hash((_keys(reward_funcs), list(_module_sources(reward_funcs))))]
        except Exception as error:  # whatever pickling an arbitrary object raises
            logger.info(f"Rewards are not cached, because a reward function cannot be hashed: {error}")
    return broadcast_object_list(digest)[0]


def _keys(reward_func: Any) -> Any:
    """What to hash of a function: its `cache_key`, where it has one, in place of all that it holds."""
    if isinstance(reward_func, list | tuple):
        return [_keys(func) for func in reward_func]
    if isinstance(reward_func, partial):
        return _keys(reward_func.func), reward_func.args, reward_func.keywords
    if (key := getattr(reward_func, "cache_key", None)) is not None:
        return key
    if (combined := getattr(reward_func, "reward_funcs", None)) is not None:
        return _keys(combined), reward_func.combine
    return reward_func


def _module_sources(reward_func: Any) -> Iterator[str]:
    """
    The hash of a function that can be imported is that of its name. Without the source code of its module, an edited
    function would be given its former rewards.
    """
    if isinstance(reward_func, list | tuple):
        for func in reward_func:
            yield from _module_sources(func)
    elif isinstance(reward_func, partial):
        yield from _module_sources(reward_func.func)
    else:
        yield from _module_sources(getattr(reward_func, "reward_funcs", ()))
        module = inspect.getmodule(reward_func)
        if module is not None and module.__name__ != "__main__":  # there, functions are hashed by what they do
            with suppress(OSError, TypeError):  # no source code
                yield inspect.getsource(module)
