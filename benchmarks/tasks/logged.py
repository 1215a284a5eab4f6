"""A task of your own, from a file of logged completions and, if there is one, a reward function: see OWN_TASK.md."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from scipy.stats import bootstrap
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_lol import score_dataset
from trl_lol.data import (
    PREFERENCE_REWARDS,
    check_columns,
    check_row,
    group_by_prompt,
    prompt_key,
    read_row,
    tokenize_row,
)
from trl_lol.evaluation import evaluate_policy
from trl_lol.generation import completion_logps
from trl_lol.rewards.scoring import NOT_PASSED_ON, completion_rewards

from ..task import Task, made_whole


FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
REWARD_COLUMNS = {"reward", "rewards", "label", *PREFERENCE_REWARDS[0], *PREFERENCE_REWARDS[1]}
CONTRASTIVE = frozenset({"CoPG", "DPO", "IPO"})
ROUNDING = 1e-3  # nats by which log-ratios differ, at least, to be told apart


class LoggedTask(Task):
    """
    Logged completions and a model. A subclass names both, and has a `reward` function for new completions, and a
    `judge` that is not trained on, if there are any. These get the other columns of the file, as in TRL's trainers.

    - Rewards of the file stay as they are. `reward` scores completions that have none.
    - Splits that the file has, called validation and test, are held out. Of what is missing, a share of the prompts is
      taken from the training rows, the same ones whatever the order of the rows. All rows of a prompt are in one
      split.
    - With a `judge` or a `reward`, policies are judged by what they generate on held-out prompts. Without, by how they
      rank the logged completions of held-out prompts, see [`ranked`]; their KL is that of a few completions they
      generate, and there are no online methods.

    Attributes:
        dataset (`str`):
            File (CSV, JSON, JSON lines or Parquet), folder or id on the Hub, with rows of any format that the trainers
            accept.
        model (`str`):
            Folder or id on the Hub of the reference policy.
        dtype (`str`):
            Its data type.
        num_groups (`int`, *optional*):
            Number of groups that a seed draws of those to train on. If `None`, all; a seed is their order.
        held_out (`float`):
            Share of the prompts for each split that the file has not.
        num_judged (`int`):
            Held-out prompts of a split by which policies are judged; a quarter of it along the way.
        num_generated (`int`):
            Held-out prompts of a split on which completions are generated for the KL, where policies are judged by
            logged ones.
        max_length (`int`, *optional*):
            Groups with a longer sequence, in tokens, are left out. If `None`, none is.
        judging_batch_size (`int`):
            Sequences per forward, and completions generated at a time, where policies are judged by logged ones.
    """

    dataset: str
    model: str
    dtype: str = "float32"
    num_groups: int | None = None
    held_out: float = 0.1
    num_judged: int = 64
    num_generated: int = 32
    max_length: int | None = None
    judging_batch_size: int = 16

    SPLITS: ClassVar = ("train", "validation", "test")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if not self.has_reward:
            self.num_completions = 0

    @property
    def judges_generated(self) -> bool:
        """Whether policies are judged by what they generate."""
        return self.has_reward or type(self).judge is not Task.judge

    @property
    def without(self) -> frozenset[str]:
        """What learns from differences, where no prompt has completions with different rewards."""
        has_difference = any(len(set(rewards)) > 1 for rewards in self.splits["train"]["rewards"])
        return frozenset() if has_difference else CONTRASTIVE

    def load(self) -> DatasetDict:
        """The rows as they are, by split."""
        return load_rows(self.dataset)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Not that of the reference's folder, which is made later than the splits."""
        return AutoTokenizer.from_pretrained(self.model)

    def make_reference(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype), self.tokenizer

    def make_rows(self, seed: int) -> Dataset:
        rows = self.splits["train"].shuffle(seed=seed)
        return rows if self.num_groups is None else rows.take(min(self.num_groups, len(rows)))

    def prompts(self, split: str) -> Dataset:
        rows = self.splits[split]
        first: dict[str, int] = {}
        for index, row in enumerate(rows):
            first.setdefault(_key(row), index)
        chosen = list(first.values())[: self.num_judged]
        return rows.select(chosen).remove_columns(["completions", "rewards"])

    def prepare(self, seed: int) -> None:
        super().prepare(seed)
        for split in () if self.judges_generated else self.SPLITS[1:]:
            with made_whole(self._ranked_folder(split)) as folder:
                if folder is not None:
                    self._make_ranked(split).save_to_disk(folder)

    def evaluate(
        self, policy: PreTrainedModel, reference: PreTrainedModel | None, split: str, *, brief: bool = False
    ) -> dict[str, float]:
        if self.judges_generated:
            return super().evaluate(policy, reference, split, brief=brief)
        share = 4 if brief else 1
        rows = load_from_disk(self._ranked_folder(split))
        rows = rows.take(-(-len(rows) // share))
        logps = iter(completion_logps(policy, *_sequences(rows), self.judging_batch_size).tolist())
        log_ratios = [[next(logps) - ref_logp for ref_logp in row] for row in rows["ref_logps"]]
        prompts = self.prompts(split)["prompt"][: -(-self.num_generated // share)]
        generated = evaluate_policy(
            policy,
            self.tokenizer,
            prompts,
            _unscored,
            ref_model=reference,
            max_new_tokens=self.max_completion_length,
            batch_size=self.judging_batch_size,
        )
        del generated["reward_std"], generated["samples"]
        return generated | ranked(log_ratios, rows["rewards"])

    # ---- What is kept ----

    @cached_property
    def splits(self) -> DatasetDict:
        """Groups by split, each with `prompt`, `completions`, `rewards` and the other columns of the file."""
        with made_whole(self.folder / "splits") as folder:
            if folder is not None:
                self._make_splits().save_to_disk(folder)
        return load_from_disk(self.folder / "splits")

    def _make_splits(self) -> DatasetDict:
        given = self.load()
        if len(given) == 1:
            given = {"train": next(iter(given.values()))}
        if "train" not in given:
            raise ValueError(f"{self.dataset} has the splits {', '.join(given)}, and none is called train.")
        groups = {split: self._groups(given[split]) for split in self.SPLITS if split in given}
        split_of = split_by_prompt(
            {split: [_key(row) for row in rows] for split, rows in groups.items()}, self.held_out
        )
        splits: dict[str, list] = {split: [] for split in self.SPLITS}
        for row in sorted((row for rows in groups.values() for row in rows), key=lambda row: _digest(_key(row))):
            splits[split_of[_key(row)]].append(row)
        if empty := [split for split, rows in splits.items() if not rows]:
            raise ValueError(f"{self.dataset} has too few prompts: none is left for {' and '.join(empty)}.")
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})

    def _groups(self, rows: Dataset) -> list[dict[str, Any]]:
        check_columns(rows.column_names)
        rows = group_by_prompt(rows.with_format(None))
        groups = [read_row(row, index) for index, row in enumerate(rows)]
        if self.has_reward:
            if not REWARD_COLUMNS & set(rows.column_names):
                groups = [replace(group, rewards=None) for group in groups]  # also those of a preference, 1 and 0
            if any(group.rewards is None or None in group.rewards for group in groups):
                for group, scored in zip(groups, completion_rewards(score_dataset(rows, self.reward)), strict=True):
                    logged = group.rewards or [None] * len(scored)
                    group.rewards = [new if old is None else old for old, new in zip(logged, scored, strict=True)]
        elif any(group.rewards is None for group in groups):
            raise ValueError(f"{self.dataset} has no rewards. Give `{type(self).__name__}` a `reward` function.")
        kept = []
        for index, (row, group) in enumerate(zip(rows, groups, strict=True)):
            columns = {name: value for name, value in row.items() if name not in NOT_PASSED_ON | REWARD_COLUMNS}
            row = {"prompt": group.prompt, "completions": group.completions, "rewards": group.rewards, **columns}
            scored = [i for i, reward in enumerate(check_row(row, index).rewards) if reward is not None]
            row |= {name: [row[name][i] for i in scored] for name in ("completions", "rewards")}
            if scored and self._fits(row):
                kept.append(row | {"rewards": [float(reward) for reward in row["rewards"]]})
        return kept

    def _fits(self, row: dict[str, Any]) -> bool:
        if self.max_length is None:
            return True
        row = tokenize_row(row, 0, self.tokenizer, self.tokenizer.eos_token)
        return len(row["prompt_ids"]) + max(map(len, row["completion_ids"]), default=0) <= self.max_length

    def _ranked_folder(self, split: str) -> Path:
        return self.folder / f"ranked_{split}"

    def _make_ranked(self, split: str) -> Dataset:
        """Held-out groups with a difference to rank by, tokenised, and what the reference policy says of them."""
        rows = [row for row in self.splits[split] if len(set(row["rewards"])) > 1][: self.num_judged]
        if not rows:
            raise ValueError(
                f"No prompt of the {split} split of {self.dataset} has completions with different rewards, so there "
                f"is nothing to judge by. Give `{type(self).__name__}` a `judge` function."
            )
        rows = [tokenize_row(row, index, self.tokenizer, self.tokenizer.eos_token) for index, row in enumerate(rows)]
        logps = iter(completion_logps(self.reference(), *_sequences(rows), self.judging_batch_size).tolist())
        return Dataset.from_list([{**row, "ref_logps": [next(logps) for _ in row["rewards"]]} for row in rows])


def load_rows(name: str) -> DatasetDict:
    """
    Load a dataset of any kind.

    Args:
        name (`str`):
            A file (CSV, JSON, JSON lines or Parquet, also with .gz), a folder, or an id on the Hub.

    Returns:
        [`~datasets.DatasetDict`]: Its rows by split, those of a file as `"train"`.

    Raises:
        `ValueError`: If there is no such file.
    """
    path = Path(name)
    if path.is_dir() and any((path / saved).exists() for saved in ("state.json", "dataset_dict.json")):
        rows = load_from_disk(path)
        return rows if isinstance(rows, DatasetDict) else DatasetDict(train=rows)
    kind = next((FORMATS[suffix] for suffix in path.suffixes if suffix in FORMATS), None)
    if path.is_dir() or kind is None:
        return load_dataset(name)
    if not path.exists():
        raise ValueError(f"There is no file {name}.")
    # An answer "None" is an answer; what is empty is null
    options = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
    return load_dataset(kind, data_files=name, **options)


def split_by_prompt(keys: Mapping[str, Sequence[str]], share: float) -> dict[str, str]:
    """
    Hold out prompts.

    Args:
        keys (`dict[str, list[str]]`):
            What tells the prompts of each split that there is apart. `"train"` has to be there.
        share (`float`):
            Share of the training prompts for each of `"validation"` and `"test"` that is not there, one at least.

    Returns:
        `dict[str, str]`: The split of each prompt. One that is in several is held out.
    """
    split_of = {key: split for split in ("validation", "test") for key in keys.get(split, [])}
    left = sorted(set(keys["train"]) - split_of.keys(), key=_digest)
    count = max(round(share * len(left)), 1)
    for split in ("validation", "test"):
        if split not in keys:
            split_of |= dict.fromkeys(left[:count], split)
            left = left[count:]
    return split_of | dict.fromkeys(left, "train")


def ranked(log_ratios: Sequence[Sequence[float]], rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """
    Judge a policy by how it ranks logged completions.

    Args:
        log_ratios (`list[list[float]]`):
            ln π − ln π_ref of the completions of each group.
        rewards (`list[list[float]]`):
            Their rewards, not all the same in a group.

    Returns:
        `dict[str, float]`: `reward` is that of the completion with the highest log-ratio, on average over the groups,
        and `reward_of_chance` the mean of the groups, which is the `reward` of a policy that has learned nothing.
        `pair_accuracy` is the share of the pairs with different rewards that the log-ratios order as the rewards do,
        0.5 by chance, and `pair_accuracy_error` its standard error, by bootstrap over the groups. Completions whose
        log-ratios are less than 0.001 nats apart count as equal: each is first for a part, and a pair half right.
    """
    first, right, pairs = [], [], []
    for ratios, values in zip(map(np.array, log_ratios), map(np.array, rewards), strict=True):
        first.append(values[ratios > ratios.max() - ROUNDING].mean())
        ahead = ratios[:, None] - ratios
        credit = np.where(abs(ahead) < ROUNDING, 0.5, ahead > 0)
        better = values[:, None] > values
        right.append(credit[better].sum())
        pairs.append(better.sum())
    accuracy = sum(right) / sum(pairs)
    error = 0.0
    if len(pairs) > 1:
        error = bootstrap(
            (right, pairs),
            lambda r, p, axis: r.sum(axis) / p.sum(axis),
            paired=True,
            n_resamples=2000,
            method="percentile",
            rng=0,
        ).standard_error
    return {
        "reward": float(np.mean(first)),
        "reward_of_chance": float(np.mean([np.mean(values) for values in rewards])),
        "pair_accuracy": float(accuracy),
        "pair_accuracy_error": float(error),
    }


def _key(row: Mapping[str, Any]) -> str:
    return prompt_key(row["prompt"], row)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sequences(rows: Iterable[Mapping[str, Any]]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of tokenised groups, one by one."""
    pairs = [(row["prompt_ids"], completion) for row in rows for completion in row["completion_ids"]]
    return [prompt for prompt, _ in pairs], [completion for _, completion in pairs]


def _unscored(prompts: list, completions: list, **columns: Any) -> list[None]:
    """For the KL alone."""
    return [None] * len(completions)
