"""Reward functions: combining them, calling them as TRL does, and scoring datasets with them."""

import asyncio
import importlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerState
from trl import GRPOConfig, GRPOTrainer

from trl_lol import _cache
from trl_lol._cache import cached, content_key
from trl_lol._trl import is_async_callable
from trl_lol.data import as_group
from trl_lol.rewards import ColumnReward, call_reward_funcs, score_dataset, sigmoid, weighted_sum
from trl_lol.rewards.hashing import hash_reward_funcs


# Completions of each call of `length`. Global, so that they are no part of the function's hash
CALLS: list[list[str]] = []
FAILS_AFTER: list[int] = []  # calls of `fragile`

WORDS = ["a", "b", "c", "good", "bad", "user", "assistant"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def length(prompts, completions, **kwargs):
    CALLS.append([text(c) for c in completions])
    return [float(len(text(c))) for c in completions]


def minus_length(prompts, completions, **kwargs):
    return [-float(len(text(c))) for c in completions]


def only_short(prompts, completions, **kwargs):
    return [1.0 if len(text(c)) == 1 else None for c in completions]


async def slow_length(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(text(c))) for c in completions]


@pytest.fixture(autouse=True)
def _no_calls_yet():
    CALLS.clear()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHAT_TEMPLATE, **special)


def message(content: str, role: str = "assistant") -> list[dict]:
    return [{"role": role, "content": content}]


# --- one reward function out of others ---


def test_weighted_sum_is_trls_nansum():
    """
    Completions "a" and "bb" with 2·length − 3·only_short: 2·1 − 3·1 = −1, and 2·2 = 4 because None drops out of the
    sum (counting it as 0 gives the same, so `only_short` alone must stay None: it is not 0).
    """
    both = weighted_sum([length, only_short], weights=[2.0, -3.0])
    assert both(prompts=["p", "p"], completions=["a", "bb"]) == [-1.0, 4.0]
    assert weighted_sum([only_short, only_short])(prompts=["p", "p"], completions=["a", "bb"]) == [2.0, None]
    assert weighted_sum(length)(["p"], ["abc"]) == [3.0]


def test_sigmoid():
    """σ(0) = ½, σ(ln 3) = ¾; far out it saturates instead of overflowing (exp(1000) would raise)."""

    def logits(prompts, completions, **kwargs):
        return [0.0, math.log(3), 1000.0, -1000.0, None]

    assert sigmoid(logits)(prompts=["p"] * 5, completions=["c"] * 5) == pytest.approx([0.5, 0.75, 1.0, 0.0, None])


def test_combinations_are_picklable_and_named():
    reward = weighted_sum([sigmoid(length), ColumnReward("score")], weights=[1.0, 0.5])
    assert reward.__name__ == "weighted_sum(sigmoid(length), score)"
    kwargs = {"prompts": ["p"], "completions": ["aa"], "score": [4.0]}
    assert pickle.loads(pickle.dumps(reward))(**kwargs) == reward(**kwargs)
    assert reward(**kwargs) == pytest.approx([1 / (1 + math.exp(-2)) + 2.0])


def test_combinations_of_async_functions_are_async():
    reward = weighted_sum([sigmoid(slow_length), length], weights=[1.0, 2.0])
    assert is_async_callable(reward) and not is_async_callable(weighted_sum([length]))
    (value,) = asyncio.run(pickle.loads(pickle.dumps(reward))(prompts=["p"], completions=["aa"]))
    assert value == pytest.approx(1 / (1 + math.exp(-2)) + 4.0)


def test_column_reward():
    reward = ColumnReward("score")
    assert reward(["p", "p"], ["a", "b"], score=[1, None]) == [1.0, None]
    # A list holds one number per completion; rows with one number and rows with a list may be mixed
    assert reward(["p"] * 3, ["a", "b", "c"], completion_index=[0, 1, 0], score=[[1, 2], [1, 2], 7]) == [1, 2, 7]


def test_column_reward_says_what_is_missing():
    with pytest.raises(ValueError, match=r"no column 'score'.*columns: label, other\."):
        ColumnReward("score")(["p"], ["a"], other=[1], label=[1], trainer_state=None, completion_ids=None)
    with pytest.raises(ValueError, match=r"'score' holds a list of 2 numbers.*completion number 2"):
        ColumnReward("score")(["p"], ["a"], completion_index=[2], score=[[1, 2]])
    with pytest.raises(ValueError, match="only completion"):
        ColumnReward("score")(["p"], ["a"], score=[[1, 2]])


# --- calling them ---


def test_functions_get_what_trl_passes():
    seen = {}

    def spy(prompts, completions, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions)
        kwargs["log_extra"]("column", [1, 2])
        kwargs["log_metric"]("name", 1.0)
        return [0.0, 0.0]

    call_reward_funcs(spy, None, ["p", "q"], ["a", "b"], tag=[1, 2])
    assert seen["prompts"] == ["p", "q"] and seen["completions"] == ["a", "b"] and seen["tag"] == [1, 2]
    assert seen["completion_ids"] is None and isinstance(seen["trainer_state"], TrainerState)
    state = TrainerState(global_step=7)
    call_reward_funcs([spy], None, ["p", "q"], ["a", "b"], [[1], [2]], trainer_state=state)
    assert seen["completion_ids"] == [[1], [2]] and seen["trainer_state"] is state


def test_each_function_is_called_once_on_the_batch():
    """2·length + 10·slow_length: 12 per character."""
    rewards = call_reward_funcs([length, slow_length], [2.0, 10.0], ["p"] * 3, ["a", "bb", ""])
    assert rewards == [12.0, 24.0, 0.0]
    assert CALLS == [["a", "bb", ""]]


def test_async_functions_wait_concurrently():
    """Each of the two waits for the other to have started: one after the other, they would time out."""
    started: list[asyncio.Event] = []

    def waiter(mine: int):
        async def wait_for_other(prompts, completions, **kwargs):
            started.append(asyncio.Event())
            started[-1].set()
            while len(started) < 2:
                await asyncio.sleep(0.001)
            return [float(mine)] * len(completions)

        return wait_for_other

    async def timed(*args, **kwargs):
        return await asyncio.wait_for(weighted_sum([waiter(1), waiter(2)])(*args, **kwargs), timeout=10)

    assert call_reward_funcs([timed], None, ["p"], ["c"]) == [3.0]
    started.clear()
    assert call_reward_funcs([waiter(1), waiter(2)], None, ["p"], ["c"]) == [3.0]


def test_async_functions_inside_a_running_loop():
    """As in a notebook, where `asyncio.run` would raise."""

    async def notebook_cell():
        coroutine = slow_length(["p"], ["abc"])
        with pytest.raises(RuntimeError, match="running event loop"):  # the control
            asyncio.run(coroutine)
        coroutine.close()
        return call_reward_funcs([slow_length, length], None, ["p"], ["abc"])

    assert asyncio.run(notebook_cell()) == [6.0]


def test_async_functions_keep_their_loop_and_sync_ones_their_thread():
    """A client session opened in one batch serves the next; the current CUDA device belongs to the thread."""
    loops, threads = [], []

    async def remote(prompts, completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    def local(prompts, completions, **kwargs):
        threads.append(threading.current_thread())
        return [0.0] * len(completions)

    for _ in range(2):
        call_reward_funcs([remote, local], None, ["p"], ["c"])
    assert loops[0] is loops[1] and not loops[0].is_closed()
    assert threads == [threading.main_thread()] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_async_functions_in_a_forked_process():
    """A data loader's worker has the parent's memory but not the thread that ran the loop: it would wait for ever."""
    assert call_reward_funcs(slow_length, None, ["p"], ["c"]) == [1.0]
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if call_reward_funcs(slow_length, None, ["p"], ["c"]) == [1.0] else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "returned", [torch.tensor([1.0, 2.0]), np.array([1, 2]), [np.float32(1), torch.tensor(2.0)], (1, 2), [True, 2]]
)
def test_what_a_function_may_return(returned):
    rewards = call_reward_funcs(lambda **kwargs: returned, None, ["p", "p"], ["a", "b"])
    assert rewards == [1.0, 2.0] and all(type(reward) is float for reward in rewards)


def broken(returned):
    def broken_reward(prompts, completions, **kwargs):
        return returned

    return broken_reward


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "'broken_reward' returned 1 rewards for 2 completions. Return exactly one"),
        ([1.0, math.nan], "'broken_reward' returned nan at index 1"),
        ([None, -math.inf], "'broken_reward' returned -inf at index 1"),
        (np.array([math.inf, 0.0]), "'broken_reward' returned inf at index 0"),
        (None, "'broken_reward' returned NoneType"),
        (1.0, "'broken_reward' returned float"),
        (torch.zeros(2, 1), r"'broken_reward' returned \[0.0\] at index 0 of its batch. Return finite numbers"),
        (["good", "bad"], "'broken_reward' returned 'good' at index 0"),
    ],
)
def test_what_a_function_may_not_return(returned, message):
    with pytest.raises(ValueError, match=message):
        call_reward_funcs([length, broken(returned)], None, ["p", "p"], ["a", "b"])


def test_errors_name_the_function():
    def failing(prompts, completions, **kwargs):
        raise KeyError("answer")

    async def failing_async(prompts, completions, **kwargs):
        raise KeyError("answer")

    for func in (failing, failing_async):
        with pytest.raises(RuntimeError, match=f"'{func.__name__}' raised KeyError: 'answer'") as raised:
            call_reward_funcs([length, func], None, ["p"], ["a"])
        assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(RuntimeError, match=r"'weighted_sum\(failing\)' raised.*'failing' raised KeyError"):
        call_reward_funcs(weighted_sum(failing), None, ["p"], ["a"])


@pytest.mark.parametrize("call", [lambda f, w: call_reward_funcs(f, w, ["p"], ["a"]), weighted_sum])
def test_wrong_reward_funcs(call):
    with pytest.raises(TypeError, match=r"holds 'some/reward-model'.*pass `RewardModel"):
        call(["some/reward-model"], None)
    with pytest.raises(TypeError, match=r"holds a Linear.*pass `RewardModel"):
        call(torch.nn.Linear(1, 1), None)
    with pytest.raises(ValueError, match="1 reward weights for 2 reward functions"):
        call([length, minus_length], [1.0])
    with pytest.raises(ValueError, match="empty"):
        call([], None)


# --- scoring a dataset ---

ROWS = {
    "standard": {"prompt": "p", "completion": "aa"},
    "unpaired": {"prompt": "p", "completion": "aa", "label": True},
    "conversational": {"prompt": message("p", "user"), "completion": message("aa")},
    "group": {"prompt": "p", "completions": ["a", "bbb"]},
    "conversational group": {"prompt": message("p", "user"), "completions": [message("a"), message("bbb")]},
    "preference": {"prompt": "p", "chosen": "bbb", "rejected": "a"},
    "scored preference": {"prompt": "p", "chosen": "bbb", "rejected": "a", "score_chosen": 9, "score_rejected": 8},
    "implicit prompt": {
        "chosen": [*message("p", "user"), *message("bbb")],
        "rejected": [*message("p", "user"), *message("a")],
    },
}
REWARDS = {
    "standard": {"reward": 2.0},
    "unpaired": {"reward": 2.0},
    "conversational": {"reward": 2.0},
    "group": {"rewards": [1.0, 3.0]},
    "conversational group": {"rewards": [1.0, 3.0]},
    "preference": {"chosen_reward": 3.0, "rejected_reward": 1.0},
    "scored preference": {"chosen_reward": 3.0, "rejected_reward": 1.0},
    "implicit prompt": {"chosen_reward": 3.0, "rejected_reward": 1.0},
}


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("stream", [False, True], ids=["Dataset", "IterableDataset"])
def test_every_row_format(form, stream):
    """The reward is the length of the text: 2 for "aa", 1 for "a", 3 for "bbb"."""
    row = {**ROWS[form], "tag": 5}
    dataset = Dataset.from_list([row])
    scored = score_dataset(dataset.to_iterable_dataset() if stream else dataset, length)
    (found,) = list(scored)
    kept = {name: value for name, value in row.items() if not name.startswith("score_")}
    assert found == {**kept, **REWARDS[form]}
    assert as_group(found).rewards == ([2.0] if "reward" in found else as_group(found).rewards)
    assert set(scored.column_names) == set(found)


def test_rewards_replace_earlier_ones_and_order_stays():
    """The first function reads the column that its result replaces: 10 + length, 20 + length."""
    rows = [{"prompt": "p", "completion": "aa", "reward": 10.0}, {"prompt": "q", "completion": "b", "reward": 20.0}]
    scored = score_dataset(Dataset.from_list(rows), [ColumnReward("reward"), length])
    assert list(scored) == [{**rows[0], "reward": 12.0}, {**rows[1], "reward": 21.0}]


def test_ragged_groups():
    """Batches of at least 3 completions, with the completions of a row together: rows 0-2, row 3, row 4."""
    groups = [["a", "bb"], [], ["ccc"], ["d", "e", "f", "g"], ["hh"]]
    scores = [[1, 2], [], [3], [4, 5, 6, 7], [None]]
    dataset = Dataset.from_dict({"prompt": list("pqrst"), "completions": groups, "score": scores})
    scored = score_dataset(dataset, [ColumnReward("score"), length], [10.0, 1.0], batch_size=3)
    assert scored["rewards"][:] == [[11.0, 22.0], [], [33.0], [41.0, 51.0, 61.0, 71.0], [2.0]]
    assert CALLS == [["a", "bb", "ccc"], ["d", "e", "f", "g"], ["hh"]]
    assert scored["score"][:] == scores and scored["prompt"][:] == list("pqrst")


def test_unscored_completions_stay_null():
    group = Dataset.from_list([{"prompt": "p", "completions": ["a", "bb"]}])
    assert score_dataset(group, only_short)["rewards"][:] == [[1.0, None]]
    single = Dataset.from_list([{"prompt": "p", "completion": "bb"}])
    scored = score_dataset(single, only_short)
    assert scored["reward"][:] == [None] and as_group(scored[0]).rewards == [None]
    assert scored.features["reward"].dtype == "float64"


@pytest.mark.parametrize("rows", [{"prompt": [], "completion": []}, {"prompt": ["p"], "completions": [[]]}])
def test_nothing_to_score(rows):
    """The functions are not called with an empty batch, which many could not handle."""
    scored = score_dataset(Dataset.from_dict(rows), length)
    assert len(scored) == len(rows["prompt"]) and CALLS == []


def test_columns_that_reward_functions_get():
    seen = {}

    def spy(prompts, completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(prompts)

    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "completion_ids": [1], "tag": tag} for tag in "xy"]
    score_dataset(Dataset.from_list(rows), spy)
    assert seen["tag"] == ["x", "x", "y", "y"] and seen["completion_index"] == [0, 1, 0, 1]
    assert seen["completion_ids"] is None and not {"prompt", "chosen", "rejected"} & seen.keys()


@pytest.mark.parametrize("form", ["group", "conversational group"])
def test_completion_ids(tokenizer, form):
    """The tokens of each completion with its EOS, without the prompt's."""
    seen = []

    def spy(prompts, completions, completion_ids, **kwargs):
        seen.extend(tokenizer.batch_decode(completion_ids))
        return [0.0] * len(prompts)

    contents = ["good a", "bad"]
    chat = form.startswith("conv")
    prompt = message("a b", "user") if chat else "a b "
    row = {"prompt": prompt, "completions": [message(c) if chat else c + " " for c in contents]}
    score_dataset(Dataset.from_list([row]), spy, processing_class=tokenizer)
    assert seen == ["good a </s>", "bad </s>"]


def test_dataset_format_and_indices_are_respected(tmp_path):
    """In torch format `score` is a tensor, of which a long one is cut short where it is printed."""
    rows = [{"prompt": "p", "completions": ["a", "b"], "score": [float(n), 0.0], "ids": [n] * 2000} for n in range(5)]
    dataset = Dataset.from_list(rows).select([4, 1, 3]).with_format("torch")
    scored = score_dataset(dataset, [length, ColumnReward("score")], cache_dir=tmp_path)
    assert torch.stack(list(scored["rewards"])).tolist() == [[5.0, 1.0], [2.0, 1.0], [4.0, 1.0]]
    assert isinstance(scored[0]["score"], torch.Tensor)
    ids = [[4] * 1000 + [0] + [4] * 999, [1] * 2000, [3] * 2000]
    changed = dataset.remove_columns("ids").add_column("ids", ids)
    score_dataset(changed, [length, ColumnReward("score")], cache_dir=tmp_path)
    assert len(CALLS) == 2


def test_wrong_datasets():
    with pytest.raises(ValueError, match="Accepted row formats"):
        score_dataset(Dataset.from_list([{"text": "a"}]), length)
    with pytest.raises(ValueError, match="image"):
        score_dataset(Dataset.from_list([{"prompt": "p", "completion": "a", "image": "x"}]), length)
    assert CALLS == []


def test_iterable_dataset_is_scored_when_read():
    def rows():
        yield from ({"prompt": "p", "completion": "a" * n, "reward": -1.0} for n in range(1, 5))

    scored = score_dataset(IterableDataset.from_generator(rows), [length, ColumnReward("reward")], batch_size=2)
    CALLS.clear()  # a generator's columns are only known from its first row, which is not scored for that
    stream = iter(scored)
    assert CALLS == []
    assert next(stream) == {"prompt": "p", "completion": "a", "reward": 0.0}
    assert CALLS == [["a", "aa"]]
    assert [row["reward"] for row in stream] == [1.0, 2.0, 3.0]


# --- the cache ---


def group_dataset() -> Dataset:
    return Dataset.from_list([{"prompt": "p", "completions": ["a", "bbb"]}, {"prompt": "q", "completions": []}])


def test_rewards_are_found_again(tmp_path):
    func = weighted_sum([length, only_short], [0.1, 1.0])
    first = score_dataset(group_dataset(), func, cache_dir=tmp_path)
    assert len(CALLS) == 1
    again = score_dataset(group_dataset(), weighted_sum([length, only_short], [0.1, 1.0]), cache_dir=tmp_path)
    assert len(CALLS) == 1
    # 0.1·3 is not 0.3 in binary, and the file keeps every bit
    assert again["rewards"][:] == first["rewards"][:] == [[0.1 * 1 + 1.0, 0.1 * 3], []]
    score_dataset(group_dataset(), func)
    assert len(CALLS) == 2


def test_using_a_tokenizer_does_not_change_the_key(tmp_path, tokenizer):
    for _ in range(2):
        score_dataset(group_dataset(), length, processing_class=tokenizer, cache_dir=tmp_path)
    assert len(CALLS) == 1


def test_null_survives_the_cache(tmp_path):
    for _ in range(2):
        scored = score_dataset(group_dataset(), [weighted_sum(only_short)], cache_dir=tmp_path)
        assert scored["rewards"][:] == [[1.0, None], []]


def test_other_weights_are_not(tmp_path):
    """Lengths 1 and 3, and their negatives: weighted 1 and 2 they are −1 and −3, weighted 2 and 1 they are 1 and 3."""
    for weights, expected in (([1.0, 2.0], [-1.0, -3.0]), ([2.0, 1.0], [1.0, 3.0])):
        scored = score_dataset(group_dataset(), [length, minus_length], weights, cache_dir=tmp_path)
        assert scored["rewards"][0] == expected
    assert len(CALLS) == 1


@pytest.mark.parametrize("change", ["rows", "another column", "functions", "tokenizer"])
def test_changes_are_scored_anew(tmp_path, tokenizer, change):
    dataset, funcs, weights, processing_class = group_dataset(), [length, minus_length], [1.0, 2.0], None
    score_dataset(dataset, funcs, weights, processing_class, cache_dir=tmp_path)
    if change == "rows":
        dataset = Dataset.from_list([*dataset.select([0]), {"prompt": "q", "completions": ["c"]}])
    elif change == "another column":
        dataset = dataset.add_column("tag", [1, 2])
    elif change == "functions":
        funcs = [length, only_short]
    else:
        processing_class = tokenizer
    score_dataset(dataset, funcs, weights, processing_class, cache_dir=tmp_path)
    assert len(CALLS) == 2 and len(list(tmp_path.iterdir())) == 2


def test_an_edited_function_is_called_anew(tmp_path, monkeypatch):
    """The hash of a function in a module is that of its name; what it does is in the source code."""
    source = tmp_path / "my_rewards.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def rewards(value: float) -> list:
        source.write_text(f"def fixed(prompts, completions, **kwargs):\n    return [{value}] * len(prompts)\n")
        importlib.invalidate_caches()
        module = importlib.import_module("my_rewards")
        module = importlib.reload(module)
        return score_dataset(group_dataset(), weighted_sum(module.fixed), cache_dir=tmp_path / "cache")["rewards"][:]

    try:
        assert rewards(1.0) == [[1.0, 1.0], []]
        assert rewards(20.0) == [[20.0, 20.0], []]
        assert len(list((tmp_path / "cache").iterdir())) == 2
    finally:
        sys.modules.pop("my_rewards", None)


def test_functions_that_cannot_be_hashed_are_not_cached(tmp_path, caplog):
    stream = (float(i) for i in range(100))  # generators cannot be pickled

    def streamed(prompts, completions, **kwargs):
        return [next(stream) for _ in prompts]

    with caplog.at_level("INFO", logger="trl_lol.rewards.hashing"):
        scored = [score_dataset(group_dataset(), streamed, cache_dir=tmp_path)["rewards"][:] for _ in range(2)]
    assert scored == [[[0.0, 1.0], []], [[2.0, 3.0], []]] and list(tmp_path.iterdir()) == []
    assert caplog.text.count("cannot be hashed") == 2  # once per call


def fragile(prompts, completions, **kwargs):
    if CALLS and len(CALLS) in FAILS_AFTER:
        FAILS_AFTER.remove(len(CALLS))
        raise KeyboardInterrupt if len(CALLS) % 2 else ValueError("no answer")
    CALLS.append(list(prompts))
    return [float(ord(prompt)) if prompt != "e" else None for prompt in prompts]


@pytest.mark.parametrize("fails_after", [(1,), (3,), (1, 2, 5)])
def test_scoring_goes_on_where_it_stopped(tmp_path, fails_after):
    """Every row is scored once. What was done is kept without the last line's end, and forgotten when all is done."""
    FAILS_AFTER[:] = fails_after
    rows = [{"prompt": p, "completion": "a"} for p in "abcdefghijkl"]
    dataset = Dataset.from_list(rows)
    for _ in fails_after:
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            score_dataset(dataset, fragile, batch_size=2, cache_dir=tmp_path)
        (unfinished,) = tmp_path.iterdir()
        with open(unfinished / "0.jsonl", "a") as file:
            file.write('{"0": [1')  # as a process leaves it that is killed while it writes
    scored = score_dataset(dataset, fragile, batch_size=2, cache_dir=tmp_path)
    assert scored["reward"][:] == [float(ord(p)) if p != "e" else None for p in "abcdefghijkl"]
    assert sorted(p for call in CALLS for p in call) == list("abcdefghijkl")
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_batches_of_other_rows_are_not_taken(tmp_path):
    """What was done belongs to its rows and functions."""
    rows = [{"prompt": p, "completion": "a"} for p in "abcd"]
    FAILS_AFTER[:] = [1]
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        score_dataset(Dataset.from_list(rows), fragile, batch_size=2, cache_dir=tmp_path)
    CALLS.clear()
    score_dataset(Dataset.from_list(rows[::-1]), fragile, batch_size=2, cache_dir=tmp_path)
    assert sorted(p for call in CALLS for p in call) == list("abcd")


def test_a_crash_while_writing_leaves_nothing_to_be_read(tmp_path, monkeypatch):
    def crash(source, target):
        assert Path(source).stat().st_size > 0  # the file was written, but not in its place
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="disk gone"):
            score_dataset(group_dataset(), length, cache_dir=tmp_path)
    assert list(tmp_path.glob("*.safetensors")) == []
    for _ in range(2):
        assert score_dataset(group_dataset(), length, cache_dir=tmp_path)["rewards"][:] == [[1.0, 3.0], []]
    assert len(CALLS) == 1  # by the crashed run; the next finds what it had scored, the third reads
    assert len(list(tmp_path.iterdir())) == 1


def test_a_killed_write_is_not_read(tmp_path, monkeypatch):
    """A process that is killed cannot clean up: its unfinished file stays, under a name that is never looked up."""

    def killed(tensors, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_cache, "save_file", killed)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(KeyboardInterrupt):
            score_dataset(group_dataset(), length, cache_dir=tmp_path)
    assert [file.read_bytes() for file in tmp_path.iterdir() if file.is_file()] == [b"half"]
    assert score_dataset(group_dataset(), length, cache_dir=tmp_path)["rewards"][:] == [[1.0, 3.0], []]


def test_cached_computes_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"x": torch.tensor([0.1, math.nan], dtype=torch.float64), "n": torch.zeros(0, dtype=torch.int64)}

    for key, expected_calls in [((1, "a"), 1), ((1, "a"), 1), ((2, "a"), 2)]:
        found = cached(tmp_path, "things", key, compute)
        assert torch.equal(found["x"][:1], torch.tensor([0.1], dtype=torch.float64)) and found["x"][1].isnan()
        assert found["n"].shape == (0,) and len(calls) == expected_calls
    cached(None, "things", (1, "a"), compute)
    assert len(calls) == 3


def test_content_key_is_of_the_content():
    rows = [{"prompt": "p", "info": {"a": 1, "b": None}}, {"prompt": "q", "info": {"a": 2, "b": "x"}}]
    dataset = Dataset.from_list(rows)
    key = content_key(dataset, ["prompt", "info"])
    infos = [dict(reversed(row["info"].items())) for row in rows]
    rebuilt = Dataset.from_dict({"info": infos, "prompt": ["p", "q"]})
    assert list(rebuilt[0]["info"]) == ["b", "a"]
    assert rebuilt._fingerprint != dataset._fingerprint  # the control: datasets' own key differs
    assert content_key(rebuilt, ["prompt", "info"]) == key
    assert content_key(Dataset.from_list(rows[::-1]).select([1, 0]), ["prompt", "info"]) == key
    assert content_key(dataset.select([1, 0]), ["prompt", "info"]) != key
    assert content_key(dataset, ["prompt"]) != key


def keys() -> list:
    dataset = Dataset.from_list([{"prompt": "p", "completion": "c", "info": {"a": 1, "b": [None, 2.5]}}])
    funcs = [weighted_sum([ColumnReward("info"), sigmoid(ColumnReward("b"))], [1, 2])]
    return [content_key(dataset, dataset.column_names), hash_reward_funcs(funcs), hash("control")]


def test_keys_are_equal_across_processes():
    """Python's own hashes of strings, and with them the order of sets, change with PYTHONHASHSEED."""
    script = "import json, test_rewards; print(json.dumps(test_rewards.keys()))"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    elsewhere, here = json.loads(run.stdout), keys()
    assert elsewhere[:2] == here[:2] and None not in here
    assert elsewhere[2] != here[2]


# --- TRL's own trainer ---


def test_they_work_in_grpo_trainer(tmp_path, tokenizer):
    """
    Two steps of TRL's GRPOTrainer. The weighted sum is 1·score + 2·1 (the constant async function), so that the logged
    mean reward is 3 + 2 = 5 with a score of 3 in every row, and with `ColumnReward` alone beside it 5 + 3 = 8.
    """

    async def one(prompts, completions, **kwargs):
        return [1.0] * len(completions)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    config.update({"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None})
    dataset = Dataset.from_list([{"prompt": "a b", "score": 3.0}, {"prompt": "c", "score": 3.0}])
    trainer = GRPOTrainer(
        model=LlamaForCausalLM(config),
        reward_funcs=[weighted_sum([ColumnReward("score"), one], [1.0, 2.0]), sigmoid(length), ColumnReward("score")],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=3,
            max_steps=2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            reward_weights=[1.0, 0.0, 1.0],
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["rewards/weighted_sum(score, one)/mean"] == 5.0
        assert log["rewards/score/mean"] == 3.0 and log["reward"] == 8.0
        assert 0.5 <= log["rewards/sigmoid(length)/mean"] < 1.0
