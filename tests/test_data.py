"""Every accepted row format, tokenised as DPOTrainer tokenises it, and the batches made from them."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import cpu_args
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from trl_lol import ALoLConfig, ALoLTrainer
from trl_lol.data import (
    DataCollatorForGroups,
    Group,
    as_group,
    check_columns,
    flatten_groups,
    group_by_prompt,
    group_mask,
    tokenize_row,
)


# A tokenizer of whole words, so that the expected ids can be read off: "a b" is [4, 5], and </s> is 1
WORDS = {"<pad>": 0, "</s>": 1, "user": 2, "assistant": 3, "a": 4, "b": 5, "c": 6, "d": 7, "e": 8}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(WORDS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


# ---- Row formats ----


def message(content: str, role: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def conversational(row: dict[str, Any]) -> dict[str, Any]:
    """The same row with message lists in place of text."""
    texts: dict[str, Callable[[Any], Any]] = {
        "prompt": lambda text: message(text, "user"),
        "completion": message,
        "chosen": message,
        "rejected": message,
        "completions": lambda values: [message(text) for text in values],
    }
    return {name: texts[name](value) if name in texts else value for name, value in row.items()}


# The row, its completions, its rewards. The prompt is "a b" in all of them.
FORMATS: dict[str, tuple[dict[str, Any], list[str], list[float | None]]] = {
    "completion": ({"prompt": "a b", "completion": " c", "reward": 0.5}, [" c"], [0.5]),
    "completions": (
        {"prompt": "a b", "completions": [" c", " d e", " e"], "rewards": [0.5, -1, 2.0]},
        [" c", " d e", " e"],
        [0.5, -1.0, 2.0],
    ),
    "preference": ({"prompt": "a b", "chosen": " c", "rejected": " d e"}, [" c", " d e"], [1.0, 0.0]),
    "chosen_reward": (
        {"prompt": "a b", "chosen": " c", "rejected": " d e", "chosen_reward": -2.0, "rejected_reward": 3.0},
        [" c", " d e"],
        [-2.0, 3.0],
    ),
    "score_chosen": (
        {"prompt": "a b", "chosen": " c", "rejected": " d e", "score_chosen": 9, "score_rejected": 4},
        [" c", " d e"],
        [9.0, 4.0],
    ),
    "label True": ({"prompt": "a b", "completion": " c", "label": True}, [" c"], [1.0]),
    "label False": ({"prompt": "a b", "completion": " d e", "label": False}, [" d e"], [0.0]),
}
IDS = {" c": [6], " d e": [7, 8], " e": [8]}


@pytest.mark.parametrize("name", FORMATS)
def test_as_group(name):
    row, completions, rewards = FORMATS[name]
    assert as_group(row) == Group("a b", completions, rewards)
    assert not as_group(row).is_conversational
    group = as_group(conversational(row))
    assert group == Group(message("a b", "user"), [message(c) for c in completions], rewards)
    assert group.is_conversational


def test_as_group_with_an_implicit_prompt():
    """What both completions begin with is the prompt; TRL leaves the space before they part to the completion."""
    row = {"chosen": "a b c", "rejected": "a b d e", "chosen_reward": 2.0, "rejected_reward": 1.0}
    assert as_group(row) == Group("a b", [" c", " d e"], [2.0, 1.0])
    asked = message("a b", "user")
    row = {"chosen": asked + message("c"), "rejected": asked + message("d e")}
    assert as_group(row) == Group(asked, [message("c"), message("d e")], [1.0, 0.0])


def test_as_group_without_a_reward():
    """`None` is "no reward at all", which reward functions may still supply; it is not "not scored"."""
    assert as_group({"prompt": "a", "completion": "b"}).rewards is None
    assert as_group({"prompt": "a", "completions": ["b", "c"]}).rewards is None
    assert as_group({"prompt": "a", "completion": "b", "reward": None}).rewards == [None]


def test_a_reward_column_wins_over_a_label():
    assert as_group({"prompt": "a", "completion": "b", "label": True, "reward": -0.5}).rewards == [-0.5]


@pytest.mark.parametrize("row", [{"prompt": "a", "text": "b"}, {"completion": "b", "reward": 1.0}, {"chosen": "a"}])
def test_other_rows_are_told_what_is_accepted(row):
    with pytest.raises(ValueError, match=f"(?s){', '.join(row)}.*prompt, completions .list., rewards .list.") as error:
        as_group(row)
    with pytest.raises(ValueError, match=r"(?s)columns are.*Accepted row formats") as of_columns:
        check_columns(list(row))
    for accepted in ("prompt, completion, reward", "score_chosen", "label", "implicit prompt", "reward_funcs"):
        assert accepted in str(error.value) and accepted in str(of_columns.value)


@pytest.mark.parametrize("rewards", [[1.0], [1.0, 2.0, 3.0], []])
def test_one_reward_per_completion(rewards):
    with pytest.raises(ValueError, match=f"2 completions but {len(rewards)} rewards"):
        as_group({"prompt": "a", "completions": ["b", "c"], "rewards": rewards})


@pytest.mark.parametrize("column", ["image", "images"])
def test_image_columns_are_refused(column):
    with pytest.raises(ValueError, match=rf"image column \({column}\).*text only"):
        check_columns(["prompt", "chosen", "rejected", column])
    check_columns(["prompt", "chosen", "rejected"])


# ---- Tokens ----


@pytest.mark.parametrize("name", FORMATS)
def test_tokenize_row(words, name):
    """
    Text: "a b" is [4, 5], and a completion gets the EOS token 1. Messages: the template writes "user a b </s>" and
    then "assistant " to ask for an answer, so [2, 4, 5, 1, 3]; it ends the answer with the EOS token itself.
    """
    row, completions, rewards = FORMATS[name]
    expected = {"completion_ids": [[*IDS[c], 1] for c in completions], "rewards": rewards, "num_dropped": 0}
    assert tokenize_row(row, 0, words, "</s>") == {"prompt_ids": [4, 5], **expected}
    assert tokenize_row(conversational(row), 0, words, "</s>") == {"prompt_ids": [2, 4, 5, 1, 3], **expected}


def test_rewards_are_floats(words):
    for name in ("completions", "score_chosen", "label True"):  # ints and bools in the row
        rewards = tokenize_row(FORMATS[name][0], 0, words, "</s>")["rewards"]
        assert [type(reward) for reward in rewards] == [float] * len(rewards)


def test_eos_is_appended_once(words):
    row = {"prompt": "a", "completions": [" b", " b </s>"], "rewards": [0.0, 1.0]}
    assert tokenize_row(row, 0, words, "</s>")["completion_ids"] == [[5, 1], [5, 1]]


def test_an_empty_completion_is_kept_for_its_eos(words):
    row = {"prompt": "a b", "completions": ["", " c"], "rewards": [0.25, 1.0]}
    tokenized = tokenize_row(row, 0, words, "</s>")
    assert tokenized["completion_ids"] == [[1], [6, 1]] and tokenized["rewards"] == [0.25, 1.0]
    assert tokenize_row(conversational(row), 0, words, "</s>")["completion_ids"] == [[1], [6, 1]]


def test_a_prompt_without_tokens(words):
    row = {"prompt": "", "completion": "a b", "reward": 1.0}
    assert tokenize_row(row, 0, words, "</s>") == {
        "prompt_ids": [],
        "completion_ids": [[4, 5, 1]],
        "rewards": [1.0],
        "num_dropped": 0,
    }


def test_unscored_completions_are_left_out_and_counted(words):
    row = {"prompt": "a", "completions": [" b", " c", " d"], "rewards": [None, 0.0, None]}
    assert tokenize_row(row, 0, words, "</s>") == {
        "prompt_ids": [4],
        "completion_ids": [[6, 1]],
        "rewards": [0.0],
        "num_dropped": 2,
    }
    assert tokenize_row({"prompt": "a", "completion": " b", "label": None}, 0, words, "</s>")["completion_ids"] == []


def test_a_row_without_completions(words):
    tokenized = tokenize_row({"prompt": "a", "completions": [], "rewards": []}, 0, words, "</s>")
    assert tokenized == {"prompt_ids": [4], "completion_ids": [], "rewards": [], "num_dropped": 0}


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf"), "good", "1.0", [1.0]])
def test_rewards_that_are_no_finite_numbers(words, reward):
    with pytest.raises(ValueError, match=r"Row 17 has the reward .*finite numbers; use null"):
        tokenize_row({"prompt": "a", "completion": "b", "reward": reward}, 17, words, "</s>")
    with pytest.raises(ValueError, match="Row 3 has the reward"):
        tokenize_row({"prompt": "a", "completions": ["b", "c"], "rewards": [1.0, reward]}, 3, words, "</s>")


@pytest.mark.parametrize(
    "row", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completions": ["b"], "score": 1}]
)
def test_a_row_without_a_reward(words, row):
    with pytest.raises(ValueError, match=f"(?s)Row 5 has no reward: its columns are {', '.join(row)}.*reward_funcs"):
        tokenize_row(row, 5, words, "</s>")


@pytest.mark.parametrize("text", ["Grüße, 你好", "🦜 مرحبا", "e\u0301\u200b\u2028"])
def test_unicode(tokenizer, text):
    """A byte-level tokenizer loses nothing: prompt and completion decode to what they were."""
    row = {"prompt": text, "completion": f" {text}", "reward": 1.0}
    tokenized = tokenize_row(row, 0, tokenizer, tokenizer.eos_token)
    ids = tokenized["prompt_ids"] + tokenized["completion_ids"][0]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == f"{text} {text}{tokenizer.eos_token}"


def test_completions_share_the_tokens_that_the_prompt_has_with_all_of_them(tokenizer):
    """
    "Sor" and "ry" merge into other tokens than the prompt ends on, and the completion starts where they part. The
    other one does not merge with the prompt, but starts as early: the ids of both still add up to their text.
    """
    row = {"prompt": "Please wait. Sor", "completions": ["ry for that.", "! Go away."], "rewards": [1.0, 0.0]}
    tokenized = tokenize_row(row, 0, tokenizer, tokenizer.eos_token)
    alone = tokenizer(row["prompt"])["input_ids"]
    assert tokenized["prompt_ids"] == alone[: len(tokenized["prompt_ids"])]
    assert len(tokenized["prompt_ids"]) < len(alone), "the texts of this test no longer merge"
    for completion, ids in zip(row["completions"], tokenized["completion_ids"], strict=True):
        whole = tokenizer(row["prompt"] + completion + tokenizer.eos_token)["input_ids"]
        assert tokenized["prompt_ids"] + ids == whole
    only_second = tokenize_row(
        {**row, "completions": row["completions"][1:], "rewards": [0.0]}, 0, tokenizer, "<|end|>"
    )
    assert only_second["prompt_ids"] == alone


# ---- Groups ----

BATCH = {
    "prompt_ids": [[1], [2, 2], [3]],
    "completion_ids": [[[10], [11, 12]], [[13]], []],
    "rewards": [[0.1, 0.2], [0.3], []],
    "advantages": [[-1.0, 0.5], [0.0], []],
    "subset": ["x", "y", "z"],
}


def test_flatten_groups():
    assert flatten_groups(BATCH) == {
        "prompt_ids": [[1], [1], [2, 2]],
        "completion_ids": [[[10]], [[11, 12]], [[13]]],
        "rewards": [[0.1], [0.2], [0.3]],
        "advantages": [[-1.0], [0.5], [0.0]],
        "subset": ["x", "x", "y"],
    }


def test_flatten_groups_keeps_positive_advantages():
    """Of −1, 0.5 and 0 only 0.5 is positive: zero is dropped."""
    assert flatten_groups(BATCH, keep_positive=True) == {
        "prompt_ids": [[1]],
        "completion_ids": [[[11, 12]]],
        "rewards": [[0.2]],
        "advantages": [[0.5]],
        "subset": ["x"],
    }


def test_flatten_groups_without_advantages():
    batch = {name: column for name, column in BATCH.items() if name != "advantages"}
    assert flatten_groups(batch) == {k: v for k, v in flatten_groups(BATCH).items() if k != "advantages"}


SINGLES = {
    "prompt": ["a", "b ", "a", "b", "b ", "a"],
    "completion": [" u", " v", " w", " x", " y", " u"],
    "reward": [0.1, 0.2, None, 0.4, 0.5, 0.6],
    "subset": ["x", "y", "z", "x", "y", "z"],
}


def test_group_by_prompt():
    """Of the six rows, the first, the third and the last have one prompt, and the second and the fifth another: "b"
    is not "b ". A completion that comes twice is kept twice, and so is one without a reward."""
    grouped = group_by_prompt(Dataset.from_dict(SINGLES))
    assert grouped.to_dict() == {
        "prompt": ["a", "b ", "b"],
        "subset": ["x", "y", "x"],
        "completions": [[" u", " w", " u"], [" v", " y"], [" x"]],
        "rewards": [[0.1, None, 0.6], [0.2, 0.5], [0.4]],
    }
    assert group_by_prompt(grouped) is grouped


def test_group_by_prompt_reads_what_is_asked():
    """Messages, labels in place of rewards, and tools: another tool makes another prompt."""
    ask, answers = message("a", "user"), [message(content) for content in "uvw"]
    rows = {
        "prompt": [ask] * 3,
        "completion": answers,
        "label": [True, False, True],
        "tools": ['["f"]', '["f"]', '["g"]'],
    }
    assert group_by_prompt(Dataset.from_dict(rows)).to_dict() == {
        "prompt": [ask] * 2,
        "tools": ['["f"]', '["g"]'],
        "completions": [answers[:2], answers[2:]],
        "rewards": [[True, False], [True]],
    }
    unscored = Dataset.from_dict({"prompt": ["a", "a"], "completion": ["u", "v"]})
    assert group_by_prompt(unscored).to_dict() == {"prompt": ["a"], "completions": [["u", "v"]]}


@pytest.mark.parametrize("name", ["completions", "preference", "chosen_reward"])
def test_group_by_prompt_leaves_other_formats_alone(name):
    rows = Dataset.from_list([FORMATS[name][0]] * 2)
    assert group_by_prompt(rows) is rows


def test_rewards_may_be_whole_numbers_or_truth_values():
    """A column of lists of booleans stays one when it is tokenised, and its tensor must still be one of numbers."""
    collate = DataCollatorForGroups(pad_token_id=0)
    for rewards in ([True, False], [1, 0], [1.0, 0.0]):
        batch = collate([{"prompt_ids": [4], "completion_ids": [[5], [6]], "rewards": rewards}])
        assert batch["rewards"].dtype == torch.float and batch["rewards"].tolist() == [1.0, 0.0]


def test_rewards_of_a_group_are_a_list():
    with pytest.raises(ValueError, match=r"2 completions and the `rewards` 0.5. Give a list"):
        as_group({"prompt": "a", "completions": ["b", "c"], "rewards": 0.5})


def test_group_mask():
    """Groups of 2, 1 and 3: three rows, as wide as the largest, into which a value per completion falls in order."""
    mask = group_mask(torch.tensor([0, 0, 1, 2, 2, 2]))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], requires_grad=True)
    matrix = x.new_zeros(mask.shape).masked_scatter(mask, x)
    assert matrix.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    (matrix * torch.arange(9.0).view(3, 3)).sum().backward()
    assert x.grad.tolist() == [0, 1, 3, 6, 7, 8]  # and gradients find back


@pytest.mark.parametrize("sizes", [[1], [4], [2, 2, 2], [4, 1, 3, 2]])
def test_group_mask_of_what_the_collator_makes(sizes):
    examples = [{"prompt_ids": [5], "completion_ids": [[7]] * k, "rewards": [float(k)] * k} for k in sizes]
    batch = DataCollatorForGroups(pad_token_id=0)(examples)
    mask = group_mask(batch["group_ids"])
    assert mask.shape == (len(sizes), max(sizes)) and mask.sum(1).tolist() == sizes
    matrix = torch.zeros(mask.shape).masked_scatter(mask, batch["rewards"])
    assert torch.equal(matrix, mask * torch.tensor(sizes).unsqueeze(1))


EXAMPLES = [
    {
        "prompt_ids": [5, 6],
        "completion_ids": [[7], [8, 9, 1]],
        "rewards": [0.5, -1.0],
        "advantages": [1.5, 0.0],
        "ref_logps": [[-0.1], [-0.2, -0.3, -0.4]],
    },
    {
        "prompt_ids": [4],
        "completion_ids": [[3, 2]],
        "rewards": [2.0],
        "advantages": [0.25],
        "ref_logps": [[-0.5, -0.6]],
    },
]


def test_collator():
    """
    Three sequences, of 2 + 1, 2 + 3 and 1 + 2 tokens, padded to 5. The log-probability at position t is that of token
    t + 1: the first sequence's only completion token stands at position 2, so that its −0.1 goes to position 1 of 4.
    """
    batch = DataCollatorForGroups(pad_token_id=0)(EXAMPLES)
    expected = {
        "input_ids": torch.tensor([[5, 6, 7, 0, 0], [5, 6, 8, 9, 1], [4, 3, 2, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "completion_mask": torch.tensor([[0, 0, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]),
        "group_ids": torch.tensor([0, 0, 1]),
        "rewards": torch.tensor([0.5, -1.0, 2.0]),
        "advantages": torch.tensor([1.5, 0.0, 0.25]),
        "ref_logps": torch.tensor([[0, -0.1, 0, 0], [0, -0.2, -0.3, -0.4], [-0.5, -0.6, 0, 0]]),
    }
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype and torch.equal(batch[name], tensor), name


def test_collator_takes_what_the_examples_hold():
    examples = [{"prompt_ids": [5], "completion_ids": [[7]]}]
    batch = DataCollatorForGroups(pad_token_id=0)(examples)
    assert batch.keys() == {"input_ids", "attention_mask", "completion_mask", "group_ids"}


def test_collator_truncates():
    """
    At `max_length=4` the second sequence loses its last token. The reference log-probabilities of the examples were
    computed on sequences that were cut in the same way, so that there are two of them.
    """
    examples = copy.deepcopy(EXAMPLES)
    examples[0]["ref_logps"][1] = [-0.2, -0.3]
    batch = DataCollatorForGroups(pad_token_id=0, max_length=4)(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 6, 8, 9], [4, 3, 2, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0]]
    expected = torch.tensor([[0, -0.1, 0], [0, -0.2, -0.3], [-0.5, -0.6, 0]])
    assert torch.equal(batch["ref_logps"], expected)


def test_collator_pads_to_a_multiple():
    """5 tokens become 8, and there are 7 next-token log-probabilities."""
    batch = DataCollatorForGroups(pad_token_id=9, pad_to_multiple_of=4)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, *[9] * 5], [5, 6, 8, 9, 1, *[9] * 3], [4, 3, 2, *[9] * 5]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5, 3]
    assert batch["completion_mask"].sum(1).tolist() == [1, 3, 2]
    assert batch["ref_logps"].shape == (3, 7)
    assert torch.equal(batch["ref_logps"][:, :4], DataCollatorForGroups(0)(EXAMPLES)["ref_logps"])
    assert not batch["ref_logps"][:, 4:].any()


def test_collator_on_a_prompt_without_tokens():
    """Nothing comes before the first token, so that two of the three completion tokens have a log-probability."""
    examples = [
        {"prompt_ids": [], "completion_ids": [[7, 8, 1]], "ref_logps": [[-0.1, -0.2]]},
        {"prompt_ids": [5], "completion_ids": [[7, 1]], "ref_logps": [[-0.3, -0.4]]},
    ]
    batch = DataCollatorForGroups(pad_token_id=0)(examples)
    assert batch["completion_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert torch.equal(batch["ref_logps"], torch.tensor([[-0.1, -0.2], [-0.3, -0.4]]))


# ---- Whole datasets ----

RAW = {"advantage_filter": "none", "baseline": "none"}  # every row stays, in its order


@pytest.fixture(scope="module")
def prepare(tmp_path_factory, tiny_model, tokenizer, scored_pairs) -> Callable[..., Dataset | IterableDataset]:
    """Prepares a dataset as the constructor of ALoLTrainer does."""
    args = cpu_args(ALoLConfig, tmp_path_factory.mktemp("alol"), max_length=256, **RAW)
    trainer = ALoLTrainer(tiny_model(), args=args, train_dataset=scored_pairs.take(2), processing_class=tokenizer)
    return _prepare_with(trainer)


@pytest.fixture(scope="module")
def dpo_prepare(tmp_path_factory, tiny_model, tokenizer, pairs) -> Callable[..., Dataset | IterableDataset]:
    """Prepares a dataset as the constructor of DPOTrainer does."""
    args = cpu_args(DPOConfig, tmp_path_factory.mktemp("dpo"), max_length=256)
    trainer = DPOTrainer(tiny_model(), tiny_model(), args, train_dataset=pairs.take(2), processing_class=tokenizer)
    return _prepare_with(trainer)


def _prepare_with(trainer: DPOTrainer) -> Callable[..., Dataset | IterableDataset]:
    def prepare(dataset, processing_class=None, max_length=256):
        args = copy.copy(trainer.args)
        args.max_length = max_length
        return trainer._prepare_dataset(dataset, processing_class or trainer.processing_class, args, "train")

    return prepare


TOOLS = [
    {"type": "function", "function": {"name": "lookup", "parameters": {"properties": {"city": {"type": "string"}}}}}
]
CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"city": "Köln"}}}
QUESTION, GOOD, BAD = "My kettle leaks. What can I do?", "Please replace the seal.", "Go away."
TOOL_ROW = {
    "prompt": [
        *message("How warm is it?", "user"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "21 degrees", "name": "lookup"},
    ],
    "chosen": message("It is 21 degrees."),
    "rejected": [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
}
ASKED = message(QUESTION, "user")

# Rows of preferences, and the chat template that they are rendered with, where @ is that of the toy world
PREFERENCES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "standard": ([{"prompt": QUESTION, "chosen": f" {GOOD}", "rejected": f" {BAD}<|end|>"}], "@"),
    "conversational": (
        [
            {"prompt": ASKED, "chosen": message(GOOD), "rejected": message(BAD)},
            {"prompt": ASKED + message(BAD) + ASKED, "chosen": message(""), "rejected": message("Ü" + GOOD)},
        ],
        "@",
    ),
    "implicit prompt": ([{"chosen": f"{QUESTION} {GOOD}", "rejected": f"{QUESTION} {BAD}"}], "@"),
    "implicit prompt, conversational": ([{"chosen": ASKED + message(GOOD), "rejected": ASKED + message(BAD)}], "@"),
    "tools as a list": ([{**TOOL_ROW, "tools": TOOLS}], "@"),
    "tools as JSON": ([{**TOOL_ROW, "tools": json.dumps(TOOLS)}], "@"),
    "chat_template_kwargs": (
        [
            {
                "prompt": ASKED,
                "chosen": message(GOOD),
                "rejected": message(BAD),
                "chat_template_kwargs": {"think": True, "mood": mood},
            }
            for mood in ("gladly", "sadly")
        ],
        "{% if think %}{{ '(' + mood + ')' }}{% endif %}@",
    ),
    "a template that renders the prompt alone differently": (
        [{"prompt": ASKED, "chosen": message(GOOD), "rejected": message(BAD)}],
        "@{% if add_generation_prompt %}(nothing to think about){% endif %}",
    ),
    "a boundary that merges": (
        [{"prompt": "Please wait. Sor", "chosen": "ry for that.", "rejected": "! Go away."}],
        "@",
    ),
}


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template.replace("@", tokenizer.chat_template)
    return tokenizer


@pytest.mark.parametrize("kind", [Dataset, IterableDataset])
@pytest.mark.parametrize("name", PREFERENCES)
def test_tokens_are_those_of_dpo_trainer(name, kind, prepare, dpo_prepare, tokenizer):
    """A pair is two completions of one prompt: chosen, then rejected. DPOTrainer's own ids say what they must be."""
    rows, template = PREFERENCES[name]
    tokenizer = with_template(tokenizer, template)
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if kind is IterableDataset else dataset
    expected = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": [row[ids]], "rewards": [reward]}
        for row in dpo_prepare(dataset, tokenizer)
        for ids, reward in (("chosen_ids", 1.0), ("rejected_ids", 0.0))
    ]
    prepared = [
        {k: row[k] for k in ("prompt_ids", "completion_ids", "rewards")} for row in prepare(dataset, tokenizer)
    ]
    assert prepared == expected and len(prepared) == 2 * len(rows)


def test_preferences_of_the_toy_world_have_the_tokens_of_dpo_trainer(prepare, dpo_prepare, pairs):
    expected = [row[ids] for row in dpo_prepare(pairs) for ids in ("chosen_ids", "rejected_ids")]
    assert prepare(pairs)["completion_ids"] == [[ids] for ids in expected]


def test_the_comparison_can_fail(prepare, dpo_prepare, tokenizer):
    """Control: other ids where the template's arguments, the template or the tools are left out."""
    rows, template = PREFERENCES["chat_template_kwargs"]
    tokenizer_with_moods = with_template(tokenizer, template)
    dataset = Dataset.from_list(rows)
    gladly, _, sadly, _ = prepare(dataset, tokenizer_with_moods)["prompt_ids"]
    assert gladly != sadly and gladly != dpo_prepare(dataset)[0]["prompt_ids"]

    (row,), template = PREFERENCES["a template that renders the prompt alone differently"]
    dataset = Dataset.from_list([row])
    alone = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    rendered = with_template(tokenizer, template).apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_dict=False
    )
    assert (
        len(alone) < len(rendered) and prepare(dataset, with_template(tokenizer, template))["prompt_ids"][0] == alone
    )

    with_tools, no_tools = Dataset.from_list(PREFERENCES["tools as a list"][0]), Dataset.from_list([TOOL_ROW])
    assert prepare(with_tools)["prompt_ids"][0] != dpo_prepare(no_tools)["prompt_ids"][0]


@pytest.mark.parametrize("as_messages", [False, True])
def test_all_formats_agree(prepare, as_messages):
    """The same two completions as a group, as a pair with scores of either name, and as two rows of one completion."""
    same = {
        "completions": [{"prompt": QUESTION, "completions": [GOOD, BAD], "rewards": [2.0, -1.0]}],
        "chosen_reward": [
            {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD, "chosen_reward": 2.0, "rejected_reward": -1.0}
        ],
        "score_chosen": [
            {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD, "score_chosen": 2.0, "score_rejected": -1.0}
        ],
        "completion": [
            {"prompt": QUESTION, "completion": GOOD, "reward": 2.0},
            {"prompt": QUESTION, "completion": BAD, "reward": -1.0},
        ],
    }
    prepared = [
        list(prepare(Dataset.from_list([conversational(row) if as_messages else row for row in rows])))
        for rows in same.values()
    ]
    assert len(prepared[0]) == 2 and [row["rewards"] for row in prepared[0]] == [[2.0], [-1.0]]
    assert all(other == prepared[0] for other in prepared[1:])


def test_ragged_groups_and_their_subset(prepare):
    rows = [
        {"prompt": "How?", "completions": ["a", "b", "c"], "rewards": [1.0, None, 3.0], "subset": "x", "id": 7},
        {"prompt": "Why?", "completions": ["d"], "rewards": [4.0], "subset": "y", "id": 8},
        {"prompt": "When?", "completions": [], "rewards": [], "subset": "y", "id": 9},
    ]
    prepared = prepare(Dataset.from_list(rows))
    assert set(prepared.column_names) == {"prompt_ids", "completion_ids", "rewards", "advantages", "subset"}
    assert prepared["rewards"] == prepared["advantages"] == [[1.0], [3.0], [4.0]]
    assert prepared["subset"] == ["x", "x", "y"]


def test_what_is_dropped_is_counted(prepare, caplog):
    """Two of five completions have no reward; the second row has no other, and the third an overlong prompt."""
    rows = [
        {"prompt": "How?", "completions": ["a", "b"], "rewards": [1.0, None]},
        {"prompt": "Why?", "completions": ["c"], "rewards": [None]},
        {"prompt": "When? " * 20, "completions": ["d"], "rewards": [1.0]},
        {"prompt": "Who?", "completions": ["e"], "rewards": [0.5]},
    ]
    assert prepare(Dataset.from_list(rows), max_length=16)["rewards"] == [[1.0], [0.5]]
    assert "Dropped 2 completions of the train dataset that are not scored" in caplog.text
    assert "Dropped 2 of 4 rows of the train dataset: the prompt fills `max_length=16`" in caplog.text


def test_prompts_that_fill_max_length_are_dropped_as_by_dpo_trainer(prepare, dpo_prepare, tokenizer):
    """A prompt of `max_length` tokens leaves no room, one token less does; nothing is dropped without a limit."""
    texts = ["How?", "How is it?", "How is it then?"]
    rows = [{"prompt": text, "chosen": " a", "rejected": " b"} for text in texts]
    dataset = Dataset.from_list(rows)
    length = len(tokenizer(texts[1])["input_ids"])
    for max_length, kept in ((length, 1), (length + 1, 2), (None, 3)):
        assert len(dpo_prepare(dataset, max_length=max_length)) == kept
        prepared = prepare(dataset, max_length=max_length)
        assert prepared["prompt_ids"][::2] == dpo_prepare(dataset, max_length=max_length)["prompt_ids"]


def test_nothing_is_left(prepare):
    with pytest.raises(ValueError, match=r"None of the 2 rows of the train dataset is left.*max_length=2"):
        prepare(Dataset.from_list([{"prompt": "How is it?", "completion": "a", "reward": 1.0}] * 2), max_length=2)
    with pytest.raises(ValueError, match=r"None of the 1 rows of the train dataset is left.*score more"):
        prepare(Dataset.from_dict({"prompt": ["How?"], "completions": [["a"]], "rewards": [[None]]}))


@pytest.mark.parametrize("kind", [Dataset, IterableDataset])
def test_an_empty_dataset(prepare, kind):
    columns = {"prompt": [], "completion": [], "reward": []}
    empty = Dataset.from_dict(columns) if kind is Dataset else IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ValueError, match="The train dataset is empty"):
        prepare(empty)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), "good"])
def test_a_bad_reward_is_found_in_its_row(prepare, reward):
    rewards = ["0.5", reward] if isinstance(reward, str) else [0.5, reward]
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"], "reward": rewards})
    row = 0 if isinstance(reward, str) else 1  # a column of strings is wrong from its first row on
    with pytest.raises(ValueError, match=f"Row {row} has the reward"):
        prepare(dataset)


def test_missing_rewards_and_wrong_columns(prepare):
    with pytest.raises(
        ValueError, match=r"(?s)its columns are prompt, completion, score\. Pass `reward_funcs`.*label"
    ):
        prepare(Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "score": [1.0]}))
    with pytest.raises(ValueError, match=r"(?s)columns are prompt, text.*Accepted row formats"):
        prepare(Dataset.from_dict({"prompt": ["a"], "text": ["b"]}))
    with pytest.raises(ValueError, match="image column"):
        prepare(Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "reward": [1.0], "images": [[]]}))


def test_preferences_without_scores_are_announced(prepare, pairs, scored_pairs, caplog):
    prepare(pairs.take(1))
    assert "preferences without scores: chosen completions get reward 1, rejected ones 0" in caplog.text
    caplog.clear()
    prepare(scored_pairs.take(1))
    assert "without scores" not in caplog.text


def test_a_prepared_dataset_is_left_alone(prepare, scored_pairs):
    """`evaluate` hands over datasets that were prepared before."""
    prepared = prepare(scored_pairs.take(3))
    assert prepare(prepared) is prepared


def test_the_trainer_refuses_bad_datasets_before_anything_is_built(tiny_model, tokenizer, tmp_path):
    args = cpu_args(ALoLConfig, tmp_path, **RAW)
    model: PreTrainedModel = tiny_model()
    for columns, expected in (
        ({"prompt": ["a"], "text": ["b"]}, "Accepted row formats"),
        ({"prompt": ["a"], "completion": ["b"], "reward": [1.0], "image": ["c"]}, "image column"),
        ({"prompt": [], "completion": [], "reward": []}, "train dataset is empty"),
    ):
        with pytest.raises(ValueError, match=expected):
            ALoLTrainer(model, args=args, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        ALoLTrainer(model, args=args, processing_class=tokenizer)


def test_mixed_kinds_and_lone_scores_are_refused(prepare):
    """The prompt as text, the answers as whole conversations: a common shape of preference data."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(ValueError, match=r"(?s)Row 0 mixes text and messages.*drop the `prompt` column"):
        prepare(Dataset.from_list([{"prompt": "Hi", "chosen": talk, "rejected": talk}]))
    with pytest.raises(ValueError, match=r"`chosen_reward` and `rejected_reward`"):
        check_columns(["prompt", "chosen", "rejected", "chosen_reward"])
    group = as_group({"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"})
    assert group.completions == ["b", "c"]


def test_completions_of_any_collection_are_a_group():
    for completions in (["a", "b"], ("a", "b"), np.array(["a", "b"])):
        assert as_group({"prompt": "x", "completions": completions, "rewards": [1.0, 0.0]}).completions == ["a", "b"]
    with pytest.raises(ValueError, match="name the column `completion` if it holds a single one"):
        as_group({"prompt": "x", "completions": "ab", "rewards": [1.0, 0.0]})
