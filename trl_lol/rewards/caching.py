"""Rewards kept on disk, by function and text."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher

from .._cache import JsonLines
from .._trl import get_callable_name, is_async_callable
from .calling import RewardFunc, Rewards, call, call_async, check_reward_funcs, parts_of
from .functions import ColumnReward
from .hashing import hash_reward_funcs
from .scoring import REWARD_FEATURES


# What differs between two places that the same text stands in
NOT_TEXT = {"completion_ids", "completion_index", *REWARD_FEATURES}


class _CachedReward:
    """Reward function that asks another one only for what is not in the cache."""

    def __init__(self, reward_func: RewardFunc, cache: JsonLines, columns: Sequence[str] | None) -> None:
        self.reward_funcs = [reward_func]
        self.cache, self.columns = cache, columns
        self.scores: dict[str, float] = {key: score for batch in cache.read() for key, score in batch.items()}
        self.__name__ = get_callable_name(reward_func)

    def __call__(self, prompts: list, completions: list, **columns: Any) -> Rewards:
        keys, missing = self._look_up(prompts, completions, columns)
        rewards = call(self.reward_funcs[0], **self._select(missing, prompts, completions, columns)) if missing else []
        return self._keep(keys, missing, rewards)

    def _look_up(self, prompts: list, completions: list, columns: dict[str, Any]) -> tuple[list[str], dict[str, int]]:
        """The key of each completion, and where those are that are not known."""
        names = self.columns
        if names is None:
            names = sorted(n for n, values in columns.items() if isinstance(values, list) and n not in NOT_TEXT)
        elif absent := set(names) - columns.keys():
            raise ValueError(
                f"Rewards are kept by the columns {', '.join(names)}, and {', '.join(sorted(absent))} is not there; "
                f"the columns are {', '.join(sorted(columns)) or 'none'}."
            )
        asked = zip(prompts, completions, *(columns[name] for name in names), strict=True)
        texts = [json.dumps([names, row], sort_keys=True, default=Hasher.hash) for row in asked]
        keys = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]
        return keys, {key: i for i, key in enumerate(keys) if key not in self.scores}

    def _select(
        self, missing: dict[str, int], prompts: list, completions: list, columns: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments for these completions alone."""
        columns = {"prompts": prompts, "completions": completions, **columns}
        if columns.get("log_extra"):  # it takes a value for every completion of the batch
            columns["log_extra"] = lambda column, values: None
        return {
            name: [values[i] for i in missing.values()] if isinstance(values, list) else values
            for name, values in columns.items()
        }

    def _keep(self, keys: list[str], missing: dict[str, int], rewards: Rewards) -> Rewards:
        # What is not scored, be it that a judge did not answer, is asked for again
        scores = {key: reward for key, reward in zip(missing, rewards, strict=True) if reward is not None}
        if scores:
            self.cache.write(scores)
            self.scores |= scores
        return [self.scores.get(key) for key in keys]


class _AsyncCachedReward(_CachedReward):
    """The same of an async function. Callers recognise it by its async `__call__`."""

    async def __call__(self, prompts: list, completions: list, **columns: Any) -> Rewards:
        keys, missing = self._look_up(prompts, completions, columns)
        arguments = self._select(missing, prompts, completions, columns)
        rewards = await call_async(self.reward_funcs[0], **arguments) if missing else []
        return self._keep(keys, missing, rewards)


def cache_rewards(reward_func: RewardFunc, cache_dir: str | Path, columns: Sequence[str] | None = None) -> RewardFunc:
    """
    Keep the rewards of a function on disk, so that no text is scored twice: for judges that are slow or cost money, in
    [`score_dataset`] and in online trainers, from one run to the next.

    They are found again as long as the function, the modules that define it and that it calls, and the weights that
    its model has when it is wrapped are the same. Where the function only sends a text elsewhere, give it an attribute
    `cache_key` that names what is there (`judge.cache_key = "judge-2024-05"`), which then stands for what the function
    of that name does.

    Args:
        reward_func (`Callable`):
            Reward function, sync or async. Its reward for a completion must not depend on the rest of the batch.
        cache_dir (`str` or `Path`):
            Folder, which several functions, processes and runs may share.
        columns (`list[str]`, *optional*):
            Columns of the dataset that the rewards depend on, beside prompt and completion. If `None`, all of them but
            rewards: then a row with another ID is another row.

    Returns:
        `Callable`: A reward function of the same name; async if `reward_func` is. What is not scored is not kept. The
        function is not given a `log_extra` that does anything, since it sees a part of the batch only.

    Raises:
        `TypeError`: If something other than a reward function is given.
        `ValueError`: If the function cannot be told from another one, or if it reads a column of scores.

    Example:

    ```python
    >>> reward = cache_rewards(RewardModel("Skywork/Skywork-Reward-V2-Qwen3-0.6B"), "reward_cache", columns=[])
    ```
    """
    (reward_func,), _ = check_reward_funcs([reward_func], None)
    if isinstance(columns, str):
        raise TypeError(f"`columns={columns!r}` is one name. Give a list of them: `columns=[{columns!r}]`.")
    if read := [func.column for func in parts_of(reward_func) if isinstance(func, ColumnReward)]:
        raise ValueError(
            f"`ColumnReward({read[0]!r})` reads what is in the dataset already. Cache the functions that compute "
            "something, and combine it with those."
        )
    digest = hash_reward_funcs(reward_func)
    if digest is None:
        raise ValueError(
            f"The reward function '{get_callable_name(reward_func)}' holds something that cannot be hashed, so that "
            "nothing tells its rewards from another function's. Give it an attribute `cache_key` with a name for "
            "what it computes, or keep such things (clients, locks, generators) out of it."
        )
    kind = _AsyncCachedReward if is_async_callable(reward_func) else _CachedReward
    return kind(reward_func, JsonLines(Path(cache_dir) / f"rewards-{digest}"), columns)
