"""Scoring a dataset with reward functions, before any training."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, tqdm
from datasets import Dataset, Features, IterableDataset, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .._cache import cached, content_key
from .._trl import get_dataset_column_names
from ..data import Group, as_group, check_columns, tokenize_row
from .calling import RewardFunc, Rewards, call_reward_funcs, check_reward_funcs
from .hashing import hash_reward_funcs


# What a reward function is given in another form, or must not see: the other completions of the row
NOT_PASSED_ON = {"prompt", "completion", "completions", "chosen", "rejected", "completion_ids", "completion_index"}

REWARD_FEATURES = {
    "reward": Value("float64"),
    "rewards": List(Value("float64")),
    "chosen_reward": Value("float64"),
    "rejected_reward": Value("float64"),
}

Row = Mapping[str, Any]


def score_dataset(
    dataset: Dataset | IterableDataset,
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    reward_weights: Sequence[float] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
) -> Dataset | IterableDataset:
    """
    Score every completion of a dataset and write the rewards into it.

    In a distributed run every rank scores its share of the rows, and all ranks get all rewards.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows of any accepted format, not tokenised. The rows of an [`~datasets.IterableDataset`] are scored when
            they are read.
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions: `f(prompts, completions, **columns) -> list[float | None]`, sync or async. The columns
            are the other columns of the dataset, repeated for each completion of a row, `completion_index` (the
            position of the completion in its row) and what TRL's online trainers pass.
        reward_weights (`list[float]`, *optional*):
            One weight per function. If `None`, every function weighs 1.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If given, the functions get `completion_ids`, tokenised as for training. If `None`, they get
            `completion_ids=None`.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of completions per call, at least: the completions of one row are not parted. For an
            [`~datasets.IterableDataset`], number of rows.
        cache_dir (`str` or `Path`, *optional*):
            Folder to keep the rewards in. They are found again as long as the rows, the functions, the modules that
            define the functions, and the weights are the same. If `None`, nothing is kept.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The same rows with the column `reward`, `rewards` (one
        list per row), or `chosen_reward` and `rejected_reward`, in place of earlier rewards. Null is "not scored".

    Raises:
        `ValueError`: If the dataset has none of the accepted row formats, or a function returns a wrong number of
            rewards, NaN or infinity.
        `TypeError`: If something other than a reward function is given.
        `RuntimeError`: If a reward function raises. Nothing is written to the cache then.
    """
    columns = get_dataset_column_names(dataset)
    check_columns(columns)
    check_reward_funcs(reward_funcs, reward_weights)
    score = partial(
        _score_rows, reward_funcs=reward_funcs, reward_weights=reward_weights, processing_class=processing_class
    )
    names = _reward_columns(columns)
    outdated = [name for name in {*names, "score_chosen", "score_rejected"} if name in columns]

    if isinstance(dataset, IterableDataset):
        features = dataset.features
        if features is not None:  # left unknown, finding the columns later on would score a batch
            kept = {name: feature for name, feature in features.items() if name not in outdated}
            features = Features({**kept, **{name: REWARD_FEATURES[name] for name in names}})
        score_batch = partial(_score_batch, score=score, names=names)
        return dataset.map(
            score_batch, batched=True, batch_size=batch_size, remove_columns=outdated, features=features
        )

    rows = dataset.with_format(None)
    key = None
    if cache_dir is not None:
        key = (
            content_key(rows, columns),
            hash_reward_funcs(reward_funcs),
            reward_weights,
            _identity(processing_class),
        )
        cache_dir = None if key[1] is None else cache_dir
    rewards = cached(cache_dir, "rewards", key, partial(_score_all, rows, score, batch_size))
    rewards = _as_columns(names, _split(rewards["rewards"], rewards["sizes"]))
    dataset = dataset.remove_columns(outdated)
    for name in names:
        dataset = dataset.add_column(name, rewards[name], feature=REWARD_FEATURES[name])
    return dataset


def _identity(processing_class: PreTrainedTokenizerBase | None) -> Any:
    """What decides the tokens. The tokenizer object itself would not do: it changes when it is used."""
    if processing_class is None:
        return None
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return sorted(tokenizer.get_vocab().items()), processing_class.chat_template


def _score_all(rows: Dataset, score: Callable[..., list[Rewards]], batch_size: int) -> dict[str, Tensor]:
    """All rewards on every rank: `rewards` of shape `(num_completions,)`, NaN for None, and `sizes` per row."""
    with PartialState().split_between_processes(rows) as mine:
        scores: list[Rewards] = []
        with tqdm(total=len(mine), desc="Scoring", unit=" rows") as progress:
            for batch in _batches(mine, batch_size):
                scores += score(batch)
                progress.update(len(batch))
    scores = gather_object(scores)
    return {
        "rewards": torch.tensor([math.nan if r is None else r for row in scores for r in row], dtype=torch.float64),
        "sizes": torch.tensor([len(row) for row in scores], dtype=torch.int64),
    }


def _batches(rows: Iterable[Row], batch_size: int) -> Iterator[list[tuple[Row, Group]]]:
    """Whole rows, with at least `batch_size` completions together."""
    batch: list[tuple[Row, Group]] = []
    size = 0
    for row in rows:
        group = as_group(row)
        batch.append((row, group))
        size += len(group.completions)
        if size >= batch_size:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _score_rows(
    batch: list[tuple[Row, Group]],
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    reward_weights: Sequence[float] | None,
    processing_class: PreTrainedTokenizerBase | None,
) -> list[Rewards]:
    """The rewards of each row's completions, from one call of each function."""
    members = [(row, group, index) for row, group in batch for index in range(len(group.completions))]
    if not members:
        return [[] for _ in batch]
    columns = {name: [row[name] for row, _, _ in members] for name in members[0][0] if name not in NOT_PASSED_ON}
    completion_ids = None
    if processing_class is not None:
        completion_ids = [_completion_ids(*member, processing_class) for member in members]
    rewards = call_reward_funcs(
        reward_funcs,
        reward_weights,
        prompts=[group.prompt for _, group, _ in members],
        completions=[group.completions[index] for _, group, index in members],
        completion_ids=completion_ids,
        completion_index=[index for _, _, index in members],
        **columns,
    )
    rewards = iter(rewards)
    return [list(islice(rewards, len(group.completions))) for _, group in batch]


def _completion_ids(row: Row, group: Group, index: int, processing_class: PreTrainedTokenizerBase) -> list[int]:
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    alone = {**row, "prompt": group.prompt, "completions": [group.completions[index]], "rewards": [0.0]}
    completion_ids = tokenize_row(alone, index, processing_class, tokenizer.eos_token)["completion_ids"]
    return completion_ids[0] if completion_ids else []


def _score_batch(batch: dict[str, list], score: Callable[..., list[Rewards]], names: list[str]) -> dict[str, list]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    return _as_columns(names, score([(row, as_group(row)) for row in rows]))


def _reward_columns(columns: list[str]) -> list[str]:
    """Names of the columns that hold the rewards of rows with these columns."""
    if {"chosen", "rejected"} <= set(columns):
        return ["chosen_reward", "rejected_reward"]
    return ["rewards"] if "completions" in columns else ["reward"]


def _as_columns(names: list[str], scores: list[Rewards]) -> dict[str, list]:
    if names == ["rewards"]:
        return {"rewards": scores}
    return {name: [row[index] for row in scores] for index, name in enumerate(names)}


def _split(rewards: Tensor, sizes: Tensor) -> list[Rewards]:
    values = iter([None if math.isnan(reward) else reward for reward in rewards.tolist()])
    return [list(islice(values, size)) for size in sizes.tolist()]
