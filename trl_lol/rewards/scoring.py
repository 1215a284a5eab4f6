"""Scoring a dataset with reward functions, before any training."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from datasets import Dataset, Features, IterableDataset, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .._cache import JsonLines, cache_digest, cached, content_key, tokenizer_key
from .._trl import get_callable_name
from ..data import Group, check_columns, column_names, read_row, tokenize_row
from .calling import PASSED_BY_TRL, RewardFunc, Rewards, call_each, check_reward_funcs, weighted_nansum
from .hashing import hash_reward_funcs


# What a reward function is given in another form, or must not see: the other completions of the row
NOT_PASSED_ON = {"prompt", "completion", "completions", "chosen", "rejected", "completion_ids", "completion_index"}

# Columns that hold no completions where rewards are called so
OTHER_FORMATS = {"chosen_reward": ["completion", "completions"], "rewards": ["completion"], "reward": []}

REWARD_FEATURES = {
    "reward": Value("float64"),
    "rewards": List(Value("float64")),
    "chosen_reward": Value("float64"),
    "rejected_reward": Value("float64"),
}

Row = Mapping[str, Any]
_Read = tuple[int, Row, Group]  # a row with its position in the dataset
_Scores = tuple[list[list[tuple[float | None, ...]]], list[float]]  # of rows, their completions and the functions


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

    In a distributed run every rank scores its share of the rows, and all ranks get all rewards. At the end a line is
    printed for each function: mean and standard deviation of its rewards, how many completions it has not scored, and
    the time that it took.

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
            define them and that they call, and their models are the same, whatever `reward_weights`; and if scoring is
            interrupted, the batches that were done. If `None`, nothing is kept.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The same rows with the column `reward`, `rewards` (one
        list per row), or `chosen_reward` and `rejected_reward`, in place of earlier rewards. Null is "not scored".

    Raises:
        `ValueError`: If the dataset has none of the accepted row formats, or a function returns a wrong number of
            rewards, NaN or infinity.
        `TypeError`: If something other than a dataset or a reward function is given.
        `RuntimeError`: If a reward function raises.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`score_dataset` takes a `Dataset` or an `IterableDataset`, and got a {type(dataset).__name__}. Pass one "
            "split of a `DatasetDict`; `Dataset.from_list` makes a dataset of a list of rows."
        )
    columns = column_names(dataset)
    check_columns(columns)
    if taken := sorted((PASSED_BY_TRL - NOT_PASSED_ON) & set(columns)):
        raise ValueError(
            f"The dataset has a column `{taken[0]}`. Columns go to the reward functions by name, which get another "
            f"`{taken[0]}`. Rename or remove it."
        )
    funcs, weights = check_reward_funcs(reward_funcs, reward_weights)
    if isinstance(dataset, IterableDataset):
        names, outdated = _reward_columns(columns), _outdated_columns(columns)
        features = dataset.features
        if features is not None:  # left unknown, finding the columns later on would score a batch
            kept = {name: feature for name, feature in features.items() if name not in outdated}
            features = Features({**kept, **{name: REWARD_FEATURES[name] for name in names}})
        score = partial(
            _score_batch, reward_funcs=funcs, weights=weights, processing_class=processing_class, names=names
        )
        return dataset.map(
            score, with_indices=True, batched=True, batch_size=batch_size, remove_columns=outdated, features=features
        )

    rows = dataset.with_format(None)
    key = None
    if cache_dir is not None:
        key = (
            content_key(rows, columns),
            hash_reward_funcs(reward_funcs),
            None if processing_class is None else tokenizer_key(processing_class),
        )
        cache_dir = None if key[1] is None else cache_dir
    journal = None if cache_dir is None else JsonLines(Path(cache_dir) / f"rewards-{cache_digest(key)}.unfinished")
    scored = cached(cache_dir, "rewards", key, partial(_score_all, rows, funcs, processing_class, batch_size, journal))
    if PartialState().is_main_process and journal is not None:
        journal.remove()
    if PartialState().is_local_main_process:
        for line in _summary(funcs, scored["rewards"], scored["seconds"]):
            print(line)
    per_func = [[None if math.isnan(r) else r for r in column] for column in scored["rewards"].T.tolist()]
    rewards = iter(weighted_nansum(per_func, weights))
    return write_rewards(dataset, [list(islice(rewards, size)) for size in scored["sizes"].tolist()])


def write_rewards(dataset: Dataset, rewards: list[Rewards]) -> Dataset:
    """
    Write rewards into a dataset, in place of earlier ones.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of any accepted format.
        rewards (`list[list[float | None]]`):
            Rewards of each row's completions.

    Returns:
        [`~datasets.Dataset`]: The same rows with the column `reward`, `rewards`, or `chosen_reward` and
        `rejected_reward`.
    """
    columns = reward_columns(dataset, rewards)
    dataset = dataset.remove_columns(_outdated_columns(dataset.column_names))
    for name, values in columns.items():
        dataset = dataset.add_column(name, values, feature=REWARD_FEATURES[name])
    return dataset


def reward_columns(dataset: Dataset, rewards: list[Rewards]) -> dict[str, list]:
    """
    Numbers of each row's completions as columns of a dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of any accepted format.
        rewards (`list[list[float | None]]`):
            The numbers.

    Returns:
        `dict[str, list]`: The columns by their names, for rewards.
    """
    return _as_columns(_reward_columns(dataset.column_names), rewards)


def completion_rewards(dataset: Dataset) -> list[Rewards]:
    """The rewards of each row's completions, as [`score_dataset`] has written them."""
    names = _reward_columns(dataset.column_names)
    columns = [dataset[name] for name in names]
    return list(columns[0]) if names == ["rewards"] else [list(row) for row in zip(*columns, strict=True)]


def _score_all(
    rows: Dataset,
    reward_funcs: list[RewardFunc],
    processing_class: PreTrainedTokenizerBase | None,
    batch_size: int,
    journal: JsonLines | None,
) -> dict[str, Tensor]:
    """
    What each function says of each completion, on every rank: `rewards` of shape `(num_completions, num_funcs)`, NaN
    for None; `sizes` of the rows; and `seconds` that the functions took, summed over the ranks.
    """
    done = [list(journal.read()) if journal is not None and PartialState().is_main_process else []]
    (done,) = broadcast_object_list(done)
    known = {int(row) for batch in done for row in batch["scores"]}
    left = [i for i in range(len(rows)) if i not in known]
    with PartialState().split_between_processes(left) as mine:
        scored, positions = [], iter(mine)
        with tqdm(total=len(known) + len(mine), initial=len(known), desc="Scoring", unit=" rows") as progress:
            for batch in _batches(mine, rows.select(mine), batch_size):
                scores, seconds = _score_rows(batch, reward_funcs, processing_class)
                by_position = dict(zip(islice(positions, len(batch)), scores, strict=True))
                scored.append({"scores": by_position, "seconds": seconds})
                if journal is not None:
                    journal.write(scored[-1])
                progress.update(len(batch))
    done += gather_object(scored)
    by_row = {int(row): scores for batch in done for row, scores in batch["scores"].items()}
    flat = [[math.nan if r is None else r for r in rewards] for i in range(len(rows)) for rewards in by_row[i]]
    return {
        "rewards": torch.tensor(flat, dtype=torch.float64).view(-1, len(reward_funcs)),
        "sizes": torch.tensor([len(by_row[i]) for i in range(len(rows))], dtype=torch.int64),
        "seconds": torch.tensor([batch["seconds"] for batch in done], dtype=torch.float64)
        .view(-1, len(reward_funcs))
        .sum(0),
    }


def _summary(reward_funcs: list[RewardFunc], rewards: Tensor, seconds: Tensor) -> Iterator[str]:
    """A line for each function: what it says, and what it took."""
    for func, column, time in zip(reward_funcs, rewards.T, seconds.tolist(), strict=True):
        known = column[~column.isnan()]
        spread = f"mean {known.mean():.4g}, sd {known.std(correction=0):.4g}, " if len(known) else ""
        yield (
            f"{get_callable_name(func)}: {spread}{len(column) - len(known):,} of {len(column):,} completions not "
            f"scored, {1000 * time / max(len(column), 1):.3g} s per 1,000"
        )


def _batches(indices: Iterable[int], rows: Iterable[Row], batch_size: int) -> Iterator[list[_Read]]:
    """Whole rows, with at least `batch_size` completions together."""
    batch: list[_Read] = []
    size = 0
    for index, row in zip(indices, rows, strict=True):
        batch.append(_read(index, row))
        size += len(batch[-1][2].completions)
        if size >= batch_size:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read(index: int, row: Row) -> _Read:
    """A row of the format that its columns have, to be given rewards in place of those that it may have."""
    ignored = {*_outdated_columns(list(row)), *OTHER_FORMATS[_reward_columns(list(row))[0]]}
    return index, row, read_row({name: value for name, value in row.items() if name not in ignored}, index)


def _score_rows(
    batch: list[_Read],
    reward_funcs: list[RewardFunc],
    processing_class: PreTrainedTokenizerBase | None,
) -> _Scores:
    """What each function says of each row's completions, from one call of each, and the seconds that it took."""
    members = [(*read, number) for read in batch for number in range(len(read[2].completions))]
    if not members:
        return [[] for _ in batch], [0.0] * len(reward_funcs)
    names = [name for name in batch[0][1] if name not in NOT_PASSED_ON]
    completion_ids = None
    if processing_class is not None:
        completion_ids = [_completion_ids(*member, processing_class) for member in members]
    called = call_each(
        reward_funcs,
        prompts=[group.prompt for _, _, group, _ in members],
        completions=[group.completions[number] for _, _, group, number in members],
        completion_ids=completion_ids,
        completion_index=[number for *_, number in members],
        **{name: [row[name] for _, row, _, _ in members] for name in names},
    )
    rewards = zip(*(rewards for rewards, _ in called), strict=True)
    scores = [list(islice(rewards, len(group.completions))) for _, _, group in batch]
    return scores, [seconds for _, seconds in called]


def _completion_ids(
    index: int, row: Row, group: Group, number: int, processing_class: PreTrainedTokenizerBase
) -> list[int]:
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    kept = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    alone = {**kept, "prompt": group.prompt, "completions": [group.completions[number]], "rewards": [0.0]}
    completion_ids = tokenize_row(alone, index, processing_class, tokenizer.eos_token)["completion_ids"]
    return completion_ids[0] if completion_ids else []


def _score_batch(
    batch: dict[str, list],
    indices: list[int],
    reward_funcs: list[RewardFunc],
    weights: list[float],
    processing_class: PreTrainedTokenizerBase | None,
    names: list[str],
) -> dict[str, list]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    read = [*map(_read, indices, deepcopy(rows))]  # the stream goes on with the rows, whatever is done to messages
    scores, _ = _score_rows(read, reward_funcs, processing_class)
    return _as_columns(names, [weighted_nansum([*zip(*row, strict=True)], weights) for row in scores])


def _reward_columns(columns: list[str]) -> list[str]:
    """Names of the columns that hold the rewards of rows with these columns."""
    if {"chosen", "rejected"} <= set(columns):
        return ["chosen_reward", "rejected_reward"]
    return ["rewards"] if "completions" in columns else ["reward"]


def _outdated_columns(columns: list[str]) -> list[str]:
    """Those of the columns that new rewards take the place of."""
    return [name for name in (*_reward_columns(columns), "score_chosen", "score_rejected") if name in columns]


def _as_columns(names: list[str], scores: list[Rewards]) -> dict[str, list]:
    if names == ["rewards"]:
        return {"rewards": scores}
    return {name: [row[index] for row in scores] for index, name in enumerate(names)}
