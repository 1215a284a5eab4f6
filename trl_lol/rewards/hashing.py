"""What tells one set of reward functions from another, to key caches with."""

import inspect
import os
import sysconfig
from collections import ChainMap
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets.fingerprint import Hasher
from datasets.utils._dill import Pickler
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Libraries change with their versions, which is another matter
NOT_THE_USERS = tuple(
    f"{folder}{os.sep}"
    for folder in (
        Path(__file__).parent.parent,
        *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
    )
)


class _Pickler(Pickler):
    """The pickler that datasets hashes with, which sorts sets, and in this version frozensets, too: `x in {"a", "b"}`
    has one, and its order is another in every process."""

    dispatch = ChainMap({}, Pickler.dispatch)  # noqa: RUF012 datasets adds to its own as it meets new types


def _save_frozenset(pickler: _Pickler, value: frozenset) -> None:
    pickler.save_reduce(frozenset, (sorted(value, key=Hasher.hash),), obj=value)


_Pickler.dispatch[frozenset] = _save_frozenset


def hash_reward_funcs(reward_funcs: Any) -> str | None:
    """
    Hash reward functions: what they do, what they hold, and the source code of the modules that define them and that
    they call. (Of the modules that those call in turn, nothing is known.)

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
            file = BytesIO()
            _Pickler(file, recurse=True).dump((_keys(reward_funcs), sorted(set(_sources(reward_funcs)))))
            digest = [Hasher.hash_bytes(file.getvalue())]
        except Exception as error:  # whatever pickling an arbitrary object raises
            logger.warning(f"Rewards are not cached, because a reward function cannot be hashed: {error}")
    return broadcast_object_list(digest)[0]


def _keys(reward_func: Any) -> Any:
    """What to hash of a function: its `cache_key`, where it has one, in place of all that it holds."""
    if isinstance(reward_func, list | tuple):
        return [_keys(func) for func in reward_func]
    if isinstance(reward_func, partial):
        return _keys(reward_func.func), reward_func.args, reward_func.keywords
    if (key := getattr(reward_func, "cache_key", None)) is not None:
        # Two judges are two also where someone has called them both "v1"
        return (reward_func.__qualname__, key) if isinstance(reward_func, FunctionType) else key
    if (parts := getattr(reward_func, "reward_funcs", None)) is not None:
        return _keys(parts), getattr(reward_func, "combine", None)
    return reward_func


def _sources(reward_func: Any) -> Iterator[str]:
    """
    The hash of a function that can be imported is that of its name. Without the source code of its module, an edited
    function would be given its former rewards.
    """
    if isinstance(reward_func, list | tuple):
        for func in reward_func:
            yield from _sources(func)
    elif isinstance(reward_func, partial):
        yield from _sources(reward_func.func)
    else:
        yield from _sources(getattr(reward_func, "reward_funcs", ()))
        for module in (inspect.getmodule(reward_func), *_called_modules(reward_func)):
            if module is not None and module.__name__ != "__main__":  # there, functions are hashed by what they do
                with suppress(OSError, TypeError):  # no source code
                    yield inspect.getsource(module)


def _called_modules(reward_func: Any) -> Iterator[ModuleType | None]:
    """The user's own modules of what a function, or the methods of an object, name."""
    functions = [reward_func] if isinstance(reward_func, FunctionType) else vars(type(reward_func)).values()
    for function in filter(inspect.isfunction, functions):
        for name in _names(function.__code__):
            module = inspect.getmodule(function.__globals__.get(name))
            path = str(getattr(module, "__file__", None) or "")
            if path and not path.startswith(NOT_THE_USERS):
                yield module


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:  # functions and comprehensions within
        if isinstance(constant, CodeType):
            yield from _names(constant)
