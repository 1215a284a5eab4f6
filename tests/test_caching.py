"""Rewards kept by function and text, and scoring that is killed."""

import asyncio
import json
import os
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from datasets import Dataset

from trl_lol import ColumnReward, cache_rewards, score_dataset, weighted_sum
from trl_lol._cache import JsonLines
from trl_lol.rewards import call_reward_funcs
from trl_lol.rewards.hashing import hash_reward_funcs


CALLS: list[list[str]] = []


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


def length(prompts, completions, **columns):
    CALLS.append(list(completions))
    return [None if completion == "?" else float(len(completion)) for completion in completions]


async def slow_length(prompts, completions, **columns):
    await asyncio.sleep(0)
    return length(prompts, completions)


def with_tag(prompts, completions, tag, **columns):
    CALLS.append(list(completions))
    return [float(len(completion) + int(t)) for completion, t in zip(completions, tag, strict=True)]


def logs(prompts, completions, log_extra, **columns):
    log_extra("length", [len(completion) for completion in completions])
    return length(prompts, completions)


def score(func, completions, prompts=None, **columns):
    return call_reward_funcs(func, None, prompts or ["p"] * len(completions), completions, **columns)


@pytest.mark.parametrize("func", [length, slow_length, partial(length), weighted_sum([length], [1.0])])
def test_no_text_is_scored_twice(tmp_path, func):
    """Not in another batch, not within one, not by a later run; another prompt is another text."""
    cached = cache_rewards(func, tmp_path)
    assert score(cached, ["a", "bb", "a"]) == [1.0, 2.0, 1.0] and sorted(CALLS[0]) == ["a", "bb"]
    assert score(cached, ["ccc", "bb"]) == [3.0, 2.0] and CALLS[1] == ["ccc"]
    again = cache_rewards(func, tmp_path)
    assert score(again, ["bb", "ccc", "a"]) == [2.0, 3.0, 1.0] and len(CALLS) == 2
    assert score(again, ["a"], ["q"]) == [1.0] and len(CALLS) == 3
    assert score(again, [], []) == [] and len(CALLS) == 3
    score(func, ["a"])  # Control: by itself the function keeps nothing
    assert len(CALLS) == 4


def test_what_is_not_scored_is_asked_for_again(tmp_path):
    cached = cache_rewards(length, tmp_path)
    for _ in range(2):
        assert score(cached, ["?", "a"]) == [None, 1.0]
    assert CALLS == [["?", "a"], ["?"]]


def test_columns_are_part_of_the_text(tmp_path):
    """All of them unless told which; the tokens and what TRL passes beside the columns are not."""
    cached = cache_rewards(with_tag, tmp_path)
    assert score(cached, ["a", "a"], tag=["1", "2"], id=[7, 8], completion_ids=[[1], [2]]) == [2.0, 3.0]
    assert score(cached, ["a"], tag=["1"], id=[7], completion_ids=[[9]]) == [2.0] and len(CALLS) == 1
    assert score(cached, ["a"], tag=["1"], id=[9]) == [2.0] and len(CALLS) == 2
    by_tag = cache_rewards(with_tag, tmp_path, columns=["tag"])
    assert score(by_tag, ["a", "a"], tag=["1", "5"], id=[1, 2]) == [2.0, 6.0] and len(CALLS) == 3
    assert score(by_tag, ["a"], tag=["5"], id=[3]) == [6.0] and len(CALLS) == 3
    with pytest.raises(RuntimeError, match="are kept by the columns tag, and tag is not there; the columns are "):
        score(by_tag, ["a"])


def test_the_same_text_elsewhere(tmp_path):
    """At another place in its row, beside rewards that are there already, and as an online trainer passes it."""
    cached = cache_rewards(length, tmp_path)
    rows = Dataset.from_list([{"prompt": "p", "completions": order} for order in (["a", "bb"], ["bb", "a"])])
    scored = score_dataset(rows, cached)
    assert scored["rewards"][:] == [[1.0, 2.0], [2.0, 1.0]] == score_dataset(scored, cached)["rewards"][:]
    assert score(cached, ["bb"], completion_ids=[[1]]) == [2.0]
    assert sum(map(len, CALLS)) == 2
    with pytest.raises(ValueError, match=r"`ColumnReward\('score'\)` reads what is in the dataset"):
        cache_rewards(weighted_sum([length, ColumnReward("score")]), tmp_path)


def test_columns_that_are_no_json(tmp_path):
    """Arrays of which only the middle differs, which printing leaves out."""

    def middle(prompts, completions, array, **columns):
        return [float(x[2500]) for x in array]

    cached = cache_rewards(middle, tmp_path)
    arrays = [np.zeros(5000), np.zeros(5000)]
    arrays[1][2500] = 7
    assert score(cached, ["a", "a"], array=arrays) == [0.0, 7.0]


def test_other_functions_have_other_rewards(tmp_path):
    def shifted(prompts, completions, shift, **columns):
        return [reward + shift for reward in length(prompts, completions)]

    one, two = (cache_rewards(partial(shifted, shift=x), tmp_path) for x in (1.0, 2.0))
    assert score(one, ["a"]) == [2.0] and score(two, ["a"]) == [3.0] and score(one, ["a"]) == [2.0]
    assert len(CALLS) == 2 and len(list(tmp_path.iterdir())) == 2


def test_a_key_stands_for_a_function_that_cannot_be_told_from_others(tmp_path):
    def judge(prompts, completions, **columns):
        next(client)
        return length(prompts, completions)

    client = (i for i in range(100))
    with pytest.raises(ValueError, match=r"'judge' holds something that cannot be hashed.*`cache_key`"):
        cache_rewards(judge, tmp_path)

    def other(prompts, completions, **columns):
        return [-1.0] * len(completions)

    other.cache_key = "v1"
    assert score(cache_rewards(other, tmp_path), ["a"]) == [-1.0]
    for key, calls in (("v1", 1), ("v1", 1), ("v2", 2)):
        judge.cache_key = key
        assert score(cache_rewards(judge, tmp_path), ["a"]) == [1.0] and len(CALLS) == calls


def test_it_is_named_and_hashed_like_the_function(tmp_path):
    cached = cache_rewards(length, tmp_path)
    assert cached.__name__ == "length"
    before = hash_reward_funcs(cached)
    score(cached, ["a"])
    assert hash_reward_funcs(cached) == before  # so that `score_dataset` finds its own cache
    assert hash_reward_funcs(cache_rewards(with_tag, tmp_path)) != before


def test_half_a_line_and_the_log_of_a_part(tmp_path):
    """What a killed process leaves is passed over. A function that logs for each completion sees a part of them."""
    cached, seen = cache_rewards(logs, tmp_path), []
    score(cached, ["a", "bb"])
    (path,) = tmp_path.glob("*/0.jsonl")
    with open(path, "a") as file:
        file.write('{"abc": 1')
    again = cache_rewards(logs, tmp_path)
    assert score(again, ["bb", "ccc"], log_extra=lambda *args: seen.append(args)) == [2.0, 3.0]
    assert CALLS == [["a", "bb"], ["ccc"]] and seen == []
    assert score(cache_rewards(logs, tmp_path), ["a", "ccc"]) == [1.0, 3.0] and len(CALLS) == 2


def test_not_a_reward_function(tmp_path):
    with pytest.raises(TypeError, match="RewardModel"):
        cache_rewards("path/to/a/model", tmp_path)


# ---- Summary ----


def test_a_line_for_each_function(tmp_path, capsys):
    """Lengths 1, 3 and none: mean 2, standard deviation 1. What took 0.2 s for 3 completions takes 66.7 s for 1000."""

    def slow(prompts, completions, **columns):
        time.sleep(0.2)
        return [0.5] * len(completions)

    rows = Dataset.from_list([{"prompt": "p", "completions": ["a", "bbb", "?"]}])
    for _ in range(2):  # the second is from the cache, and tells what it took
        score_dataset(rows, [length, slow], cache_dir=tmp_path)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("length: mean 2, sd 1, 1 of 3 completions not scored, ")
        assert lines[1].startswith("slow: mean 0.5, sd 0, 0 of 3 completions not scored, ")
        seconds = [float(line.split()[-4]) for line in lines]
        assert 66 < seconds[1] < 200 and 0 < seconds[0] < 60
        assert lines[0].endswith(" s per 1,000")
    score_dataset(rows.select([0]).map(lambda row: {"completions": ["?"]}), length)
    assert capsys.readouterr().out.startswith("length: 1 of 1 completions not scored, ")


# ---- Killed ----

SCRIPT = """
    import json, os, sys
    from accelerate import PartialState
    from datasets import Dataset
    from trl_lol import score_dataset

    num_processes, log, cache, output, pause = sys.argv[1:]
    assert PartialState(cpu=True).num_processes == int(num_processes)

    def reward(prompts, completions, **columns):
        import time
        time.sleep(float(os.environ["PAUSE"]))
        with open(os.environ["LOG"], "a") as file:
            file.write("".join(f"{prompt}\\n" for prompt in prompts))
        return [None if int(prompt) % 7 == 3 else float(prompt) / 3 for prompt in prompts]

    os.environ["LOG"], os.environ["PAUSE"] = log, pause
    rows = Dataset.from_list([{"prompt": str(i), "completion": "c"} for i in range(60)])
    scored = score_dataset(rows, reward, batch_size=2, cache_dir=cache)
    if PartialState().is_main_process:
        with open(output, "w") as file:
            json.dump(scored["reward"][:], file)
"""


@pytest.mark.parametrize("num_processes", [1, 2])
def test_scoring_that_is_killed_scores_every_row_once(tmp_path, num_processes):
    """SIGKILL after 20 rows at least, and another run. The batch that was cut off, 2 rows of each process at most, is
    scored again; no other row is, and the rewards are those of a run that was left alone."""
    script, log, output = tmp_path / "script.py", tmp_path / "log", tmp_path / "rewards.json"
    script.write_text(textwrap.dedent(SCRIPT))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(pause):
        command = [
            *(launch if num_processes > 1 else [sys.executable]),
            script,
            num_processes,
            log,
            tmp_path / "cache",
            output,
            pause,
        ]
        kwargs = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*map(str, command)], env=env, **kwargs)

    def num_scored():
        return len(log.read_text().splitlines()) if log.exists() else 0

    process = start(0.1)
    while num_scored() < 20:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    for victim in (*psutil.Process(process.pid).children(recursive=True), process):
        victim.kill()
    process.communicate()
    assert num_scored() < 60 and not output.exists()
    process = start(0)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(output.read_text()) == [None if i % 7 == 3 else i / 3 for i in range(60)]
    scored = [int(row) for row in log.read_text().split()]
    assert {*scored} == {*range(60)}
    assert len(scored) - 60 <= 2 * num_processes


# ---- Lines ----


def test_a_folder_that_another_run_removes(tmp_path, monkeypatch):
    """Once between making it and writing to it; a file in its place is an error, at once."""
    lines, mkdir = JsonLines(tmp_path / "lines"), Path.mkdir
    removed = []

    def made_and_removed(self, **kwargs):
        mkdir(self, **kwargs)
        if not removed:
            removed.append(self.rmdir())

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", made_and_removed)
        lines.write({"a": 1})
    assert removed and list(lines.read()) == [{"a": 1}]
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileExistsError):
        JsonLines(tmp_path / "taken").write(1)
