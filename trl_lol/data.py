"""
From every accepted row format to scored, tokenised completions, and from those to padded batches.

A *row* is whatever the user's dataset holds. A *group* is what this package trains on: one prompt with `k` completions
and one reward for each. A dataset row with a single completion is a group of one.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin
from transformers.utils import logging
from trl import extract_prompt, is_conversational

from ._trl import common_prefix_length, get_dataset_column_names, pad, tokenize
from .shared_prompts import completion_tokens, is_worth_sharing, share_prompts


logger = logging.get_logger(__name__)

ROW_FORMATS = """\
  - prompt, completion, reward
  - prompt, completions (list), rewards (list)
  - prompt, chosen, rejected [, chosen_reward and rejected_reward, or score_chosen and score_rejected]
  - prompt, completion, label (unpaired preference)
  - chosen, rejected (preference with an implicit prompt)
With `reward_funcs`, or after `score_dataset`, no reward column is needed."""

# Losses and norms of gradients hold squares of rewards, and single precision ends at 3e38: with much larger ones the
# norm is infinite, and gradients are clipped to nothing
LARGEST_REWARD = 1e15
PREFERENCE_REWARDS = (("chosen_reward", "rejected_reward"), ("score_chosen", "score_rejected"))

Messages = list[dict[str, Any]]


@dataclass
class Group:
    """
    One prompt with its completions and their rewards, as they stand in a dataset row.

    Attributes:
        prompt (`str` or `list[dict]`):
            The prompt, as text or as messages.
        completions (`list[str]` or `list[list[dict]]`):
            `k` completions, as text or as messages.
        rewards (`list[float | None]` or `None`):
            One reward per completion; `None` within the list means "not scored". `None` instead of the list means that
            the row carries no reward at all.
    """

    prompt: str | Messages
    completions: list[str] | list[Messages]
    rewards: list[float | None] | None

    def __post_init__(self) -> None:
        if not isinstance(self.rewards, list | None):
            raise ValueError(
                f"A row has {len(self.completions)} completions and the `rewards` {shortened(self.rewards)}. Give a "
                "list with one reward per completion, null for a completion that was not scored."
            )
        if self.rewards is not None and len(self.rewards) != len(self.completions):
            raise ValueError(
                f"A row has {len(self.completions)} completions but {len(self.rewards)} rewards. Give one reward per "
                "completion, null for a completion that was not scored."
            )

    @property
    def is_conversational(self) -> bool:
        """Whether prompt and completions are message lists rather than text."""
        return any(is_conversational({"prompt": text}) for text in (self.prompt, *self.completions) if text)


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns, of a stream those of its first row."""
    try:
        return get_dataset_column_names(dataset)
    except StopIteration:
        raise ValueError("The dataset is a stream without rows. Pass at least one.") from None


def check_columns(columns: list[str]) -> None:
    """
    Check that a dataset with these columns has completions that can be trained on.

    Args:
        columns (`list[str]`):
            Column names of the dataset.

    Raises:
        `ValueError`: If the columns fit none of the accepted row formats.
    """
    found = set(columns)
    if images := found & {"image", "images"}:
        raise ValueError(
            f"The dataset has an image column ({', '.join(sorted(images))}). Offline reward training supports text "
            "only: drop the column, or train with TRL's own trainers."
        )
    prompted = "prompt" in found and found & {"completion", "completions"}
    if not prompted and not {"chosen", "rejected"} <= found:
        raise ValueError(f"The dataset's columns are {', '.join(columns)}. Accepted row formats:\n{ROW_FORMATS}")
    for pair in PREFERENCE_REWARDS:
        if len(found & set(pair)) == 1:
            raise ValueError(
                f"The dataset has one of the columns `{pair[0]}` and `{pair[1]}`, but both are needed to score a "
                "preference. Add the missing one, or remove the other."
            )


def as_group(row: Mapping[str, Any]) -> Group:
    """
    Read a dataset row of any accepted format.

    Args:
        row (`Mapping[str, Any]`):
            The row. See the README for the formats.

    Returns:
        [`Group`]: Its prompt, completions and rewards. The chosen completion of a preference comes first; a preference
        without scores has rewards 1 and 0.

    Raises:
        `ValueError`: If the row fits none of the accepted formats.
    """
    if row.get("chosen") is not None and row.get("rejected") is not None:
        example = row if "prompt" in row else _with_prompt(row["chosen"], row["rejected"])
        rewards = next(([row[c], row[r]] for c, r in PREFERENCE_REWARDS if c in row and r in row), [1.0, 0.0])
        return Group(example["prompt"], [example["chosen"], example["rejected"]], rewards)
    if row.get("completions") is not None and "prompt" in row:
        if isinstance(row["completions"], str | Mapping) or not isinstance(row["completions"], Iterable):
            raise ValueError(
                f"A row has the `completions` {shortened(row['completions'])}. Give a list of texts or of message "
                "lists, or name the column `completion` if it holds a single one."
            )
        return Group(row["prompt"], list(row["completions"]), row.get("rewards"))
    if "completion" in row and "prompt" in row:
        rewards = next(([row[name]] for name in ("reward", "label") if name in row), None)
        return Group(row["prompt"], [row["completion"]], rewards)
    found = ", ".join(name if value is not None else f"{name} (null)" for name, value in row.items())
    raise ValueError(f"A row has {found}. Accepted row formats:\n{ROW_FORMATS}")


def _with_prompt(chosen: str | Messages, rejected: str | Messages) -> dict[str, str | Messages]:
    """What two completions begin with, and what is left of them."""
    for text in (chosen, rejected):
        if not isinstance(text, str | list) or not text:
            raise ValueError(
                f"A row has no `prompt`, which is then what `chosen` and `rejected` both begin with, and one of these "
                f"is {shortened(text)}. Give texts or messages that hold the prompt, too, or add it as a column."
            )
    if chosen[0] != rejected[0]:  # TRL would look for the space before the prompt at the other end
        return {"prompt": chosen[:0], "chosen": chosen, "rejected": rejected}
    return extract_prompt({"chosen": chosen, "rejected": rejected})


def is_reward(value: Any) -> bool:
    """Whether something is a number that can be trained on."""
    try:
        return not isinstance(value, str | bytes) and abs(float(value)) <= LARGEST_REWARD
    except (TypeError, ValueError, OverflowError):
        return False


def read_row(row: Mapping[str, Any], index: int) -> Group:
    """Read a row as [`check_row`] does, whatever its rewards are."""
    try:
        group = as_group(row)
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from None
    texts = (group.prompt, *group.completions)
    if any(text is None for text in texts):
        raise ValueError(f"Row {index} has a null prompt or completion. Give it a text or messages, or drop the row.")
    if odd := [text for text in texts if not isinstance(text, str | list)]:
        raise ValueError(
            f"Row {index} has {shortened(odd[0])}, of type {type(odd[0]).__name__}, for a prompt or completion. Give "
            "it a text or messages."
        )
    if len({isinstance(text, str) for text in texts}) > 1:
        raise ValueError(
            f"Row {index} mixes text and messages in its prompt and completions. Use one kind; if `chosen` and "
            "`rejected` hold the whole conversation, drop the `prompt` column, and the prompt is taken from them."
        )
    if group.prompt == []:
        raise ValueError(f"Row {index} has a prompt without messages. Give it at least one message to answer.")
    if odd := [m for text in texts if isinstance(text, list) for m in text if not is_message(m)]:
        raise ValueError(
            f"Row {index} has the message {shortened(odd[0])}. A message has a `role` and a `content`, or what the "
            "chat template takes in its place, such as `tool_calls`."
        )
    return group


def is_message(message: Any) -> bool:
    """Whether something is a message of a conversation that says something, be it an empty text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    return any(value is not None for name, value in message.items() if name != "role")


def check_row(row: Mapping[str, Any], index: int) -> Group:
    """
    Read a row that is to be trained on.

    Args:
        row (`Mapping[str, Any]`):
            A row of any accepted format.
        index (`int`):
            Its position in the dataset, for error messages.

    Returns:
        [`Group`]: Its prompt, completions and rewards.

    Raises:
        `ValueError`: If something is missing or of the wrong kind, or if there is no reward, or one that is not a
            finite number.
    """
    group = read_row(row, index)
    if group.rewards is None:
        raise ValueError(
            f"Row {index} has no reward: its columns are {', '.join(row)}. Pass `reward_funcs` to the trainer, or add "
            f"rewards with `score_dataset`. Accepted row formats:\n{ROW_FORMATS}"
        )
    for reward in group.rewards:
        if reward is not None and not is_reward(reward):
            raise ValueError(
                f"Row {index} has the reward {shortened(reward)}. Rewards must be finite numbers; use null for a "
                f"completion that was not scored. Beyond {LARGEST_REWARD:g} losses overflow: scale or clip what is."
            )
    return group


def prompt_key(prompt: str | Messages, row: Mapping[str, Any]) -> str:
    """What tells a prompt, with its row's `tools` and `chat_template_kwargs`, from another one."""
    return json.dumps([prompt, row.get("tools"), row.get("chat_template_kwargs")], sort_keys=True, default=str)


def template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's `tools` and `chat_template_kwargs` columns say to the chat template."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}


def tokenize_prompt(
    prompt: str | Messages, row: Mapping[str, Any], processing_class: PreTrainedTokenizerBase
) -> list[int]:
    """
    Tokenise a prompt that a completion is to follow.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt, as text or as messages.
        row (`Mapping[str, Any]`):
            Its row, whose `tools` and `chat_template_kwargs` go to the chat template.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer or processor.

    Returns:
        `list[int]`: Its tokens.
    """
    kwargs = {} if isinstance(prompt, str) else {"add_generation_prompt": True, **template_kwargs(row)}
    return list(tokenize(processing_class, prompt, **kwargs)["input_ids"])


def tokenize_row(
    row: Mapping[str, Any], index: int, processing_class: PreTrainedTokenizerBase, eos_token: str | None
) -> dict[str, Any]:
    """
    Read and tokenise one row, exactly as [`~trl.DPOTrainer`] tokenises a preference.

    Text completions get the EOS token appended when it is missing; messages go through the chat template, with the
    row's `tools` and `chat_template_kwargs`. All completions share the prompt tokens that they have in common.

    Args:
        row (`Mapping[str, Any]`):
            A row of any accepted format.
        index (`int`):
            Its position in the dataset, for error messages.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer or processor.
        eos_token (`str`):
            The tokenizer's end-of-sequence token.

    Returns:
        `dict[str, Any]`: `prompt_ids` (`list[int]`), `completion_ids` (`list[list[int]]`), `rewards` (`list[float]`)
        and `num_dropped` (`int`): completions without a reward, or without a token, which are left out of the lists.

    Raises:
        `ValueError`: If the row has no reward, or one that is not a finite number.
    """
    group = check_row(row, index)
    # What is not trained on must not move the end of the prompt that the others share
    scored = [
        (c, float(r)) for c, r in zip(group.completions, group.rewards, strict=True) if r is not None and c != []
    ]

    completions = [completion for completion, _ in scored]
    if not group.is_conversational:
        if eos_token is None:
            raise ValueError(
                "The tokenizer has no EOS token, which ends a completion that is a text. Set `eos_token`, to one that "
                "the model was trained with."
            )
        completions = [c if c.endswith(eos_token) else c + eos_token for c in completions]
    try:
        kwargs = template_kwargs(row) if group.is_conversational else {}
        prompt_ids = tokenize_prompt(group.prompt, row, processing_class)
        sequences = [tokenize(processing_class, group.prompt + c, **kwargs)["input_ids"] for c in completions]
    except Exception as error:  # whatever tokenizers and chat templates raise
        raise ValueError(
            f"Row {index} cannot be tokenised, {type(error).__name__}: {error}. Texts must be valid Unicode, and "
            "messages, `tools` (a list, or JSON of it) and `chat_template_kwargs` what the chat template takes."
        ) from error

    # The completion starts where the tokens of prompt and prompt+completion part (see `common_prefix_length`)
    prompt_len = min((common_prefix_length(prompt_ids, ids) for ids in sequences), default=len(prompt_ids))
    if prompt_len < len(prompt_ids):
        logger.warning_once(
            "The tokens of a prompt are not a prefix of the tokens of prompt and completion. The completion starts "
            f"where they part, and {processing_class.decode(prompt_ids[prompt_len:])!r} is left out of training. "
            "Use a chat template that renders the prompt the same way in both cases, or end the prompt on a token "
            "boundary. This is said once and likely holds for the whole dataset."
        )
    kept = [(ids[prompt_len:], reward) for ids, (_, reward) in zip(sequences, scored, strict=True) if ids[prompt_len:]]
    return {
        "prompt_ids": prompt_ids[:prompt_len],
        "completion_ids": [ids for ids, _ in kept],
        "rewards": [reward for _, reward in kept],
        "num_dropped": len(group.completions) - len(kept),
    }


# What [`tokenize_row`] returns. Found out from the first thousand rows, it would be wrong where these are all empty
TOKENIZED = Features(
    {
        "prompt_ids": List(Value("int64")),
        "completion_ids": List(List(Value("int64"))),
        "rewards": List(Value("float64")),
        "num_dropped": Value("int64"),
    }
)


def flatten_groups(batch: Mapping[str, list[Any]], keep_positive: bool = False) -> dict[str, list[Any]]:
    """
    Split groups into groups of one, for methods that treat each completion on its own.

    Args:
        batch (`Mapping[str, list]`):
            Batch of tokenised rows. `completion_ids`, `rewards` and `advantages` hold one entry per completion and are
            split; the other columns are repeated.
        keep_positive (`bool`, *optional*, defaults to `False`):
            Whether to drop the completions whose advantage is not positive.

    Returns:
        `dict[str, list]`: The same columns with one completion per row.
    """
    per_completion = {"completion_ids", "rewards", "advantages"} & batch.keys()
    kept = [
        (row, member)
        for row, completions in enumerate(batch["completion_ids"])
        for member in range(len(completions))
        if not keep_positive or batch["advantages"][row][member] > 0
    ]
    return {
        name: [[column[row][member]] if name in per_completion else column[row] for row, member in kept]
        for name, column in batch.items()
    }


def has_single_completions(columns: Iterable[str]) -> bool:
    """Whether rows with these columns hold one completion each, of a prompt that others may share."""
    return "completion" in columns and not {"completions", "chosen"} & set(columns)


def group_by_prompt(dataset: Dataset) -> Dataset:
    """
    Join rows of one completion that have the same prompt into groups, for methods that contrast completions.

    This comes before tokenisation, which may move the end of a prompt for the sake of one completion.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of any accepted format. Only rows of `prompt` and `completion`, with or without `reward` or `label`,
            are joined.

    Returns:
        [`~datasets.Dataset`]: Rows with `completions` and `rewards` where the first of each prompt stood, whose other
        columns they keep; or the dataset itself, if its rows are of another format.
    """
    if not has_single_completions(dataset.column_names):
        return dataset
    joined = [name for name in ("completion", "reward", "label") if name in dataset.column_names]
    return dataset.map(
        _join_rows, batched=True, batch_size=None, remove_columns=joined, desc="Grouping completions by prompt"
    )


def _join_rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    check = check_row if batch.keys() & {"reward", "label"} else read_row
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        check(row, i)  # while its number is still that in the dataset
        members.setdefault(prompt_key(row["prompt"], row), []).append(i)
    grouped = {name: [column[rows[0]] for rows in members.values()] for name, column in batch.items()}
    for name, source in (("completions", "completion"), ("rewards", "label"), ("rewards", "reward")):
        if source in batch:
            grouped[name] = [[batch[source][i] for i in rows] for rows in members.values()]
    return {name: column for name, column in grouped.items() if name not in ("completion", "reward", "label")}


def batches_by_prompt(
    prompts: Sequence[list[int]], completions: Sequence[list[list[int]]], batch_size: int, share: bool = False
) -> list[list[list[int]]]:
    """
    Rows in batches of similar length, longest first, so that what does not fit fails at once.

    Args:
        prompts (`Sequence[list[int]]`):
            Tokens of the prompt of each row.
        completions (`Sequence[list[list[int]]]`):
            Tokens of the completions of each row.
        batch_size (`int`):
            Number of rows in a batch, at most.
        share (`bool`, *optional*, defaults to `False`):
            Whether rows of the same prompt are to come together, as one group.

    Returns:
        `list[list[list[int]]]`: Batches of groups of row indices.
    """
    sizes: list[int] = []
    keys: list[Any] = []
    for row, (prompt_ids, group) in enumerate(zip(prompts, completions, strict=True)):
        sizes.append(len(prompt_ids) + max(map(len, group)))
        keys.append(tuple(prompt_ids) if share else row)
    order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    groups: list[list[int]] = []
    of_prompt: dict[Any, list[int]] = {}
    for row in order:
        key = keys[row]
        if len(group := of_prompt.setdefault(key, [])) % batch_size == 0:
            group = of_prompt[key] = []
            groups.append(group)
        group.append(row)
    batches: list[list[list[int]]] = []
    room = 0
    for group in groups:
        if len(group) > room:
            batches.append([])
            room = batch_size
        batches[-1].append(group)
        room -= len(group)
    return batches


def group_mask(group_ids: Tensor) -> Tensor:
    """
    Layout of the groups of a batch as the rows of a matrix: `x.new_zeros(mask.shape).masked_scatter(mask, x)` puts one
    value per completion into it.

    Args:
        group_ids (`torch.Tensor`):
            Group of each completion, of shape `(batch,)`, as [`DataCollatorForGroups`] returns them.

    Returns:
        `torch.Tensor`: True for the members of each group, of shape `(num_groups, k)`, where the largest has `k`.
    """
    sizes = group_ids.bincount()
    return torch.arange(int(sizes.max()), device=sizes.device) < sizes.unsqueeze(1)


@dataclass
class DataCollatorForGroups(DataCollatorMixin):
    """
    Data collator for groups of scored completions.

    Every completion becomes one right-padded sequence of prompt and completion; the sequences of a group follow each
    other. Where it saves enough, and as far as `max_shared_length` allows, a group becomes one sequence instead, in
    which its completions share the prompt: see [`~trl_lol.shared_prompts.share_prompts`].

    The examples hold `prompt_ids`, `completion_ids` (one list per completion), and optionally `rewards`, `advantages`
    and `ref_logps` with one entry per completion. The batch holds, for `batch` completions in all:

    - `group_ids`: `(batch,)`, equal for the completions of one row
    - `input_ids`, `attention_mask`, `completion_mask`: `(batch, seq_len)`, or `(num_groups, seq_len)` if prompts are
      shared
    - only if prompts are shared, `position_ids` and `branch_ids` (0 for the prompt, 1, 2, ... for the completions, -1
      for padding): `(num_groups, seq_len)`; `branch_index`, the places of each completion's branch in its sequence, -1
      for padding: `(batch, branch_len)`
    - `rewards`, `advantages`: `(batch,)`
    - `ref_logps`: `(batch, seq_len - 1)`, aligned with the next-token log-probabilities, 0 outside the completion; if
      prompts are shared `(batch, branch_len - 1)`, as [`~trl_lol.shared_prompts.per_completion`] gives them

    Args:
        pad_token_id (`int`):
            Token ID to use for padding.
        max_length (`int`, *optional*):
            Maximum length of a sequence of prompt and completion, in tokens; the end of longer ones is cut off.
        pad_to_multiple_of (`int`, *optional*):
            If set, the sequences are padded to a multiple of this value.
        max_shared_length (`int`, *optional*, defaults to `0`):
            Longest prompt with a completion, in tokens, up to which prompts are shared. 0 never shares them.
        pairs_per_token (`float`, *optional*, defaults to `inf`), is_dense (`bool`, *optional*, defaults to `False`):
            What attention costs, see [`~trl_lol.shared_prompts.is_worth_sharing`].
    """

    pad_token_id: int
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    max_shared_length: int = 0
    pairs_per_token: float = math.inf
    is_dense: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return self.collate(examples, self._shares(examples))

    def collate(self, examples: list[dict[str, Any]], share: bool) -> dict[str, Tensor]:
        """
        Make a batch in a given layout.

        Args:
            examples (`list[dict[str, Any]]`):
                The groups.
            share (`bool`):
                Whether completions share their prompt, worth while or not.

        Returns:
            `dict[str, torch.Tensor]`: The batch.
        """
        sizes = [len(example["completion_ids"]) for example in examples]
        # First, since the length of the first tensor is the number of samples to whoever averages over batches
        batch = {"group_ids": torch.arange(len(examples)).repeat_interleave(torch.tensor(sizes))}
        batch |= self._shared(examples) if share else self._repeated(examples)
        for name in ("rewards", "advantages"):
            if name in examples[0]:
                # A column of booleans or integers stays one, whatever tokenising makes of its rewards
                values = [value for example in examples for value in example[name]]
                batch[name] = torch.tensor(values, dtype=torch.float)
        if "ref_logps" in examples[0]:
            scored = completion_tokens(batch).bool()
            ref_logps = [logp for example in examples for logps in example["ref_logps"] for logp in logps]
            batch["ref_logps"] = torch.zeros(scored.shape).masked_scatter(scored, torch.tensor(ref_logps))
        return batch

    def _repeated(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        input_ids, completion_mask = [], []
        for example in examples:
            prompt_ids = example["prompt_ids"]
            for completion_ids in example["completion_ids"]:
                mask = [0] * len(prompt_ids) + [1] * len(completion_ids)
                input_ids.append(torch.tensor((prompt_ids + completion_ids)[: self.max_length]))
                completion_mask.append(torch.tensor(mask[: self.max_length]))
        return self._padded({"input_ids": input_ids, "completion_mask": completion_mask})

    def _shared(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        columns = share_prompts(
            [example["prompt_ids"] for example in examples],
            [example["completion_ids"] for example in examples],
            self.max_length,
        )
        branch_index = pad(columns.pop("branch_index"), -1, padding_side="right")
        return {**self._padded(columns), "branch_index": branch_index}

    def _padded(self, columns: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        columns = {**columns, "attention_mask": [torch.ones_like(ids) for ids in columns["input_ids"]]}
        values = {"input_ids": self.pad_token_id, "branch_ids": -1}
        return {
            name: pad(rows, values.get(name, 0), padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)
            for name, rows in columns.items()
        }

    def _shares(self, examples: list[dict[str, Any]]) -> bool:
        prompts = [len(example["prompt_ids"]) for example in examples]
        longest = math.inf if self.max_length is None else self.max_length
        completions = [
            [min(len(ids), longest - prompt) for ids in example["completion_ids"]]
            for prompt, example in zip(prompts, examples, strict=True)
        ]
        if max(prompt + max(lengths) for prompt, lengths in zip(prompts, completions, strict=True)) > (
            self.max_shared_length
        ):
            return False
        return is_worth_sharing(prompts, completions, self.pairs_per_token, self.is_dense)
