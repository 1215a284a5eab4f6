"""
What each trainer says to bad input: the error's type and the words that matter, and that nothing half-written is left.
(A process that is killed is the matter of `test_kills.py`, and input that nobody has thought of of
`test_properties.py`.)
"""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from conftest import distance, early_tokens, logged, weights
from datasets import Dataset, DatasetDict, IterableDataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trl_lol import ALoLTrainer, APATrainer, CoPGTrainer, DRPOTrainer, PPOTrainer
from trl_lol.data import LARGEST_REWARD, as_group, check_row, group_by_prompt
from trl_lol.rewards import ColumnReward, call_reward_funcs, score_dataset, weighted_sum


OFFLINE, ONLINE = [ALoLTrainer, CoPGTrainer], [PPOTrainer, APATrainer, DRPOTrainer]
A, B, C = [ALoLTrainer], [CoPGTrainer], [DRPOTrainer]
NAN, INF = math.nan, math.inf
ASK = [{"role": "user", "content": "Why?"}]


def rows(**columns: Any) -> Dataset:
    return Dataset.from_dict(columns)


def stream(*made: dict[str, Any]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(made))


def groups(*rewards: list, prompt: str = "a") -> Dataset:
    return rows(
        prompt=[f"{prompt} {i}" for i in range(len(rewards))],
        completions=[[f" {c}" for c in "bcdefg"[: len(group)]] for group in rewards],
        rewards=list(rewards),
    )


def returns(value: Any, name: str = "judge") -> Callable[..., Any]:
    def judge(completions: list, **kwargs: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return [value] * len(completions) if isinstance(value, float | None) else value

    judge.__name__ = name
    return judge


def later(value: Any) -> Callable[..., Any]:
    judge = returns(value)

    async def judge_later(**kwargs: Any) -> Any:
        return judge(**kwargs)

    return judge_later


def few(completions: list, **kwargs: Any) -> list[float]:
    return [0.0] * (len(completions) - 1)


PAIRS = {"prompt": ["a"] * 4, "chosen": [" b"] * 4, "rejected": [" c"] * 4}
PROMPTS = {"prompt": ["a b"] * 8, "reference": [" c d"] * 8}
LONG = "a b " * 200
TWO = [1.0, 0.0]

# The row of the table, the trainers, what they are given, the error, and its words
TABLE: list[tuple[str, list[type], dict[str, Any], type[Exception], str]] = [
    ("no reward", OFFLINE, {"train_dataset": rows(prompt=["a"], text=["b"])}, ValueError,
     "columns are prompt, text. | Accepted row formats: | prompt, completion, reward | reward_funcs"),
    ("no reward", OFFLINE, {"train_dataset": rows(prompt=["a"], completions=[["b", "c"]])}, ValueError,
     "Row 0 has no reward: its columns are prompt, completions. | reward_funcs | Accepted row formats:"),
    ("no reward", ONLINE, {"reward_funcs": None}, TypeError, "`reward_funcs` holds None | f(prompts, completions"),
    ("no reward", ONLINE, {"train_dataset": rows(question=["a"] * 8)}, ValueError,
     "columns question | `prompt` | Rename"),
    ("no reward", C, {"train_dataset": rows(prompt=["a"] * 8, answer=["b"] * 8)}, ValueError,
     "'completion' or 'chosen' or 'reference' | 'prompt', 'answer' | `reference_column`"),
    *(("bad reward", OFFLINE, {"train_dataset": groups(TWO, [0.0, bad])}, ValueError,
       f"Row 1 has the reward {bad}. | finite numbers | null") for bad in (NAN, INF, 1e300)),
    ("bad reward", OFFLINE, {"train_dataset": rows(prompt=["a"] * 3, completion=["b"] * 3, reward=[1.0, 0.0, NAN])},
     ValueError, "Row 2 has the reward nan. | finite numbers"),  # CoPG groups the rows first
    ("bad reward", OFFLINE, {"train_dataset": rows(prompt=["a"], completions=[["b", "c"]], rewards=[[1.0]])},
     ValueError, "Row 0: | 2 completions but 1 rewards | null"),
    *(("bad reward", OFFLINE + ONLINE, {"reward_funcs": [returns(bad)]}, ValueError,
       f"'judge' returned {bad} at index 0 | finite numbers | None") for bad in (NAN, INF, 1e30)),
    ("bad reward", OFFLINE + ONLINE, {"reward_funcs": [few]}, ValueError,
     "'few' returned | completions | exactly one"),
    ("bad reward", OFFLINE + ONLINE, {"reward_funcs": [returns("good")]}, ValueError, "'judge' returned str | a list"),
    ("raises", OFFLINE + ONLINE, {"reward_funcs": [returns(KeyError("answer"))]}, RuntimeError,
     "'judge' raised KeyError: 'answer'"),
    ("raises", OFFLINE + ONLINE, {"reward_funcs": [early_tokens, later(KeyError("answer"))]}, RuntimeError,
     "'judge_later' raised KeyError: 'answer'"),
    ("not scored", OFFLINE, {"reward_funcs": [returns(None)]}, ValueError,
     "None of the 4 rows | (8 completions are not scored) | score more"),
    ("no advantage", A, {"train_dataset": groups([1.0, 1.0], [2.0, 2.0]), "baseline": "group_mean"}, ValueError,
     "nothing to train on | reward | quantile | `baseline`"),
    ("no advantage", A, {"train_dataset": groups([1.0, 1.0], [1.0])}, ValueError, "All 3 rewards are 1 | baseline"),
    ("one completion", B, {"train_dataset": groups([1.0], [None, 1.0], [])}, ValueError,
     "None of the 3 rows | fewer than 2 scored completions (1 completions are not scored)"),
    ("too long", OFFLINE, {"train_dataset": groups(TWO, prompt=LONG), "max_length": 32}, ValueError,
     "None of the 1 rows | a prompt that fills `max_length=32` | Raise"),
    # What is no row of the table, and was a bare error from deep inside
    ("prompts", OFFLINE, {"train_dataset": rows(prompt=["a", None], completions=[["b", "c"]] * 2, rewards=[TWO] * 2)},
     ValueError, "Row 1 has a null prompt or completion. | drop the row"),
    ("prompts", ONLINE, {"train_dataset": rows(**PROMPTS | {"prompt": ["a"] * 7 + [None]})}, ValueError,
     "Row 7 of the train dataset has the `prompt` None. | text | messages"),
    ("prompts", ONLINE, {"train_dataset": rows(**PROMPTS | {"prompt": ["a"] * 7 + [""]})}, ValueError,
     "The prompt '' has no tokens | Drop"),
    ("prompts", ONLINE, {"train_dataset": stream(*[{"prompt": "\ud800", "reference": "a"}] * 8)}, ValueError,
     "cannot be tokenised | valid Unicode"),
    ("prompts", C, {"train_dataset": stream(*[{"prompt": "a", "reference": "\ud800"}] * 8)}, ValueError,
     "The reference completion of the prompt 'a' is '\\ud800'. | a text"),
    ("prompts", ONLINE, {"train_dataset": rows(**PROMPTS | {"prompt": [ASK] * 7 + [[]]})}, ValueError,
     "Row 7 | `prompt` []"),
    ("messages", OFFLINE, {"train_dataset": rows(prompt=[[{"content": "a"}]], completions=[[ASK]], rewards=[[1.0]])},
     ValueError, "Row 0 has the message {'content': 'a'} | `role`"),
    ("messages", OFFLINE, {"train_dataset": rows(prompt=[ASK], completions=[[ASK, ASK]], rewards=[TWO], tools=["[{"])},
     ValueError, "Row 0 cannot be tokenised, JSONDecodeError | `tools`"),
    ("messages", OFFLINE, {"train_dataset": rows(prompt=["a"], completions=["bc"], rewards=[TWO])}, ValueError,
     "Row 0: | the `completions` 'bc' | a list of texts | `completion`"),
    ("datasets", OFFLINE + ONLINE, {"train_dataset": [{"prompt": "a"}]}, TypeError, "`Dataset` | got `list`"),
    ("datasets", OFFLINE + ONLINE, {"train_dataset": DatasetDict(train=rows(**PAIRS))}, TypeError,
     "got `DatasetDict`"),
    ("datasets", OFFLINE + ONLINE, {"train_dataset": stream()}, ValueError, "dataset is | row"),
    ("weights", OFFLINE, {"reward_funcs": [returns(1.0)], "reward_weights": [NAN]}, ValueError,
     "weights are [nan] | finite"),
    ("weights", ONLINE, {"reward_weights": [NAN]}, ValueError, "`reward_weights` holds nan | finite"),
    ("weights", OFFLINE, {"reward_funcs": [returns(1e10)], "reward_weights": [1e10]}, ValueError,
     "Row 0 has the reward 1e+20. | scale"),
    ("weights", ONLINE, {"reward_funcs": [returns(1e10)], "reward_weights": [1e10]}, ValueError, "is 1e+20. | scale"),
]  # fmt: skip
CASES = [
    pytest.param(trainer_class, given, error, words, id=f"{name}-{number}-{trainer_class.__name__}")
    for number, (name, trainer_classes, given, error, words) in enumerate(TABLE)
    for trainer_class in trainer_classes
]


def leftovers(folder: Path) -> list[Path]:
    """Files that a later run could stumble over. Rewards that are kept whole are none."""

    def is_whole(path: Path) -> bool:
        try:
            return path.suffix == ".safetensors" and bool(load_file(path))
        except SafetensorError:
            return False

    return [path for path in folder.rglob("*") if path.is_file() and not is_whole(path)]


@pytest.mark.parametrize(("trainer_class", "given", "error", "words"), CASES)
def test_what_a_trainer_says(build_trainer, build_online_trainer, tmp_path, trainer_class, given, error, words):
    is_online = trainer_class in ONLINE
    build = build_online_trainer if is_online else build_trainer
    settings = {"train_dataset": rows(**PROMPTS if is_online else PAIRS), "max_steps": 1}
    with pytest.raises(error) as raised:
        trainer = build(trainer_class, **settings | given)
        before = weights(trainer)
        try:
            trainer.train()
        finally:
            assert distance(before, weights(trainer)) == 0
    for word in words.split(" | "):
        assert word in str(raised.value), str(raised.value)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("trainer_class", OFFLINE + ONLINE)
def test_a_model_that_is_wrapped_already(build_trainer, build_online_trainer, tiny_model, trainer_class):
    build = build_online_trainer if trainer_class in ONLINE else build_trainer
    settings = {"train_dataset": rows(**PROMPTS if trainer_class in ONLINE else PAIRS)}
    with pytest.raises(ValueError, match=r"made by `torch\.compile`.* Pass the model itself.* `torch_compile=True`"):
        build(trainer_class, model=torch.compile(tiny_model()), **settings)


def test_what_is_left_is_found(tmp_path):
    """Control."""
    save_file({"x": torch.zeros(3)}, tmp_path / "whole.safetensors")
    assert not leftovers(tmp_path)
    (tmp_path / "_cache").mkdir()
    (tmp_path / "_cache" / "half.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-4])
    (tmp_path / "_cache" / "whole.5.tmp").touch()
    assert len(leftovers(tmp_path)) == 2


# ---- What went wrong once ----


def test_a_thousand_rows_without_a_score(build_trainer):
    """Arrow took the type of the columns from the first thousand rows, and failed at the next."""
    rewards = [[None, None]] * 1001 + [TWO] * 4
    made = rows(prompt=["a"] * 1005, completions=[[" b", " c"]] * 1005, rewards=rewards, subset=[None] * 1004 + ["x"])
    for trainer_class, kept in ((ALoLTrainer, [[1.0]] * 4), (CoPGTrainer, [TWO] * 4)):
        settings = {"baseline": "group_mean"} if trainer_class is ALoLTrainer else {}
        assert build_trainer(trainer_class, train_dataset=made, **settings).train_dataset["rewards"][:] == kept


def test_completion_ids_of_preferences(tokenizer):
    """The rejected completion has its own."""
    seen = []

    def spy(completion_ids: list, **kwargs: Any) -> list[float]:
        seen.extend(tokenizer.batch_decode(completion_ids))
        return [0.0] * len(completion_ids)

    score_dataset(rows(prompt=["a"], chosen=[" good"], rejected=[" bad"]), spy, processing_class=tokenizer)
    assert seen == [" good<|end|>", " bad<|end|>"]


def test_texts_that_begin_differently_have_no_prompt():
    """TRL's `extract_prompt` looks for the space before the prompt's end, and found it at the end of the text."""
    group = as_group({"chosen": "Yes. ", "rejected": "No."})
    assert (group.prompt, group.completions) == ("", ["Yes. ", "No."])
    assert trl.extract_prompt({"chosen": "Yes. ", "rejected": "No."})["prompt"] == "Yes."  # Control


def test_the_row_of_an_error_is_that_of_the_dataset():
    """Also where rows are grouped first, or scored by the batch."""
    with pytest.raises(ValueError, match="Row 3 has the reward nan"):
        group_by_prompt(rows(prompt=["a"] * 4, completion=["b"] * 4, reward=[0.0, 1.0, 2.0, NAN]))
    made = rows(prompt=["a"] * 4, completion=["b"] * 3 + [None])
    for dataset in (made, made.to_iterable_dataset()):
        with pytest.raises(ValueError, match="Row 3 has a null prompt or completion"):
            [*score_dataset(dataset, returns(1.0), batch_size=2)]


def test_outdated_rewards_do_not_matter():
    """They are replaced, whatever they are."""
    made = rows(prompt=["a", "b"], completions=[["c"], ["d", "e"]], rewards=[[NAN, 1.0], None])
    assert score_dataset(made, returns(1.0))["rewards"][:] == [[1.0], [1.0, 1.0]]


def test_a_stream_keeps_its_texts():
    """A function that changes the messages that it is given has changed what was trained on."""

    def strips(completions: list, **kwargs: Any) -> list[float]:
        for completion in completions:
            completion[0]["content"] = completion[0]["content"].strip()
        return [0.0] * len(completions)

    made = rows(prompt=[ASK], completion=[[{"role": "assistant", "content": " a "}]])
    for dataset in (made, made.to_iterable_dataset()):
        assert next(iter(score_dataset(dataset, strips)))["completion"][0]["content"] == " a "


@pytest.mark.parametrize("is_async", [False, True])
def test_functions_do_not_share_their_lists(is_async):
    def empties(prompts: list, completions: list, columns: list, **kwargs: Any) -> list[float]:
        rewards = [float(len(columns))] * len(completions)
        for values in (prompts, completions, columns):
            values.clear()
        return rewards

    async def empties_later(**kwargs: Any) -> list[float]:
        return empties(**kwargs)

    func = empties_later if is_async else empties
    assert call_reward_funcs([func, func], None, ["p"] * 2, ["a", "b"], columns=[1, 2]) == [4.0, 4.0]
    assert score_dataset(rows(**PAIRS | {"columns": [0] * 4}), weighted_sum([func, func]))["chosen_reward"][0] == 16.0


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError()])
def test_exits_in_an_event_loop(error):
    """They ended its thread, and the caller waited for ever. In the main thread they are the user's: Ctrl-C."""

    async def leaves(**kwargs: Any) -> None:
        raise error

    def leaves_now(**kwargs: Any) -> None:
        raise error

    async def stays(completions: list, **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    for funcs in (leaves, weighted_sum([stays, leaves_now])):
        with pytest.raises(RuntimeError, match=rf"'leaves(_now)?' raised {type(error).__name__}"):
            call_reward_funcs(funcs, None, ["p"], ["a"])
    assert call_reward_funcs(stays, None, ["p"], ["a"]) == [1.0]
    with pytest.raises(type(error)):
        call_reward_funcs(leaves_now, None, ["p"], ["a"])


def test_an_iterator_that_ends_too_early():
    """A `next` too many in a reward function, let through, would have ended a stream of rows without a word."""
    answers = iter([1.0])

    def answers_once(completions: list, **kwargs: Any) -> list[float]:
        return [next(answers) for _ in completions]

    def answers_later(**kwargs: Any) -> None:
        raise StopIteration

    for func in (answers_once, answers_later):
        with pytest.raises(RuntimeError, match=f"'{func.__name__}' raised StopIteration"):
            [*score_dataset(rows(**PAIRS).to_iterable_dataset(), func)]


def test_a_function_that_is_not_waited_for():
    """Whoever gives up on it gets the error of having given up, and not one of the function."""

    async def sleeps(**kwargs: Any) -> None:
        await asyncio.sleep(60)

    async def impatient() -> None:
        await asyncio.wait_for(weighted_sum(sleeps)(prompts=["p"], completions=["a"]), timeout=0.01)

    with pytest.raises(TimeoutError):
        asyncio.run(impatient())


def test_column_names_that_are_arguments():
    for name in ("prompts", "trainer_state", "log_extra", "log_metric"):
        with pytest.raises(ValueError, match=f"column `{name}`.*Rename or remove"):
            score_dataset(rows(**PAIRS | {name: [1] * 4}), returns(1.0))
    assert score_dataset(rows(**PAIRS | {"reward_funcs": [1.0] * 4}), ColumnReward("reward_funcs"))[0]["chosen_reward"]


@pytest.mark.parametrize("made", [[{"prompt": "a", "completion": "b"}], DatasetDict(train=rows(**PAIRS)), "folder"])
def test_what_is_no_dataset(made):
    with pytest.raises(TypeError, match=f"got a {type(made).__name__}. Pass one split"):
        score_dataset(made, returns(1.0))


@pytest.mark.parametrize("trainer_class", OFFLINE + ONLINE)
def test_the_largest_rewards_are_trained_on(build_trainer, build_online_trainer, trainer_class):
    """From a norm that is infinite, gradients are clipped to nothing: that is where the limit comes from."""

    def extremes(completions: list, **kwargs: Any) -> list[float]:
        return [LARGEST_REWARD * (-1) ** i for i in range(len(completions))]

    is_online = trainer_class in ONLINE
    build = build_online_trainer if is_online else build_trainer
    made = rows(**PROMPTS) if is_online else groups(TWO, TWO, [0.0, 1.0], [0.0, 1.0])
    settings = {"baseline": "none"} if trainer_class is ALoLTrainer else {}
    trainer = build(trainer_class, train_dataset=made, reward_funcs=[extremes], max_steps=2, **settings)
    trainer.train()
    assert all(0 < norm < INF for norm in logged(trainer, "grad_norm"))


def test_numbers_of_other_kinds():
    """A stream may have NumPy's numbers in its rows; a whole number may be larger than any float."""
    row = {"prompt": "a", "completion": "b", "reward": np.float32(0.5)}
    assert check_row(row, 0).rewards == [0.5]
    assert [*score_dataset(stream(row), ColumnReward("reward"))] == [row]
    with pytest.raises(ValueError, match=r"'judge' returned 1000.* at index 0"):
        call_reward_funcs(returns([10**400]), None, ["p"], ["a"])
