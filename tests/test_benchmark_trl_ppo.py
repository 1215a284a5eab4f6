"""What benchmarks/trl_ppo.py gives to reward functions. The trainer itself needs an environment of its own."""

import json
from copy import deepcopy

import pytest
import torch

from benchmarks.trl_ppo import Scorer, train_old_ppo
from trl_lol.data import tokenize_prompt


def echo(prompts, completions, bonus, **columns):
    """Length of the answer, and the bonus of its row, if the prompt is the one that this row has."""
    return [
        len(completion[0]["content"].split()) + extra * (prompt[-1]["role"] == "user")
        for prompt, completion, extra in zip(prompts, completions, bonus, strict=True)
    ]


@pytest.fixture
def batch(tokenizer, conversations):
    """Prompts padded on the left, and answers of 3 and 1 words, padded on the right, the prompts in another order."""
    prompts = conversations[0][:3]
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    pad = tokenizer.pad_token_id
    prompt_ids = [tokenize_prompt(prompt, {}, tokenizer) for prompt in prompts]
    width = max(map(len, prompt_ids)) + 2
    answers = [tokenizer("one two three")["input_ids"] + [tokenizer.eos_token_id], tokenizer("one")["input_ids"]]
    rows = [
        [pad] * (width - len(prompt_ids[i])) + prompt_ids[i] + answer + [pad] * (20 - len(answer))
        for i, answer in zip((2, 0), answers, strict=True)
    ]
    spec = {
        "reward": f"{__name__}:echo",
        "prompts": prompts,
        "prompt_ids": prompt_ids,
        "columns": {"bonus": [0.1, 0.2, 0.3]},
    }
    return tokenizer, spec, torch.tensor(rows), pad, width


def test_rewards_get_prompts_answers_and_columns(batch):
    """3 words and the third row's 0.3, then 1 word and the first row's 0.1."""
    tokenizer, spec, rows, pad, width = batch
    torch.testing.assert_close(Scorer(tokenizer, spec)(rows, pad, width), torch.tensor([3.3, 1.1]))


def python_that(tmp_path, does):
    """What stands in for the other environment's Python, called with `-m`, the module and the file of the spec."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    return script


def test_a_run_gives_what_was_measured_and_the_policies(tmp_path):
    """2 and 3 batches of 16 completions."""
    python = python_that(
        tmp_path, 'test "$2" = benchmarks.trl_ppo && echo "{\\"a\\": 1}" > "$(dirname "$3")/measured.json"'
    )
    result = train_old_ppo(python, {"batch_size": 16, "judged_batches": [2, 3]}, tmp_path / "run")
    assert result == {"a": 1, "policies": {32: tmp_path / "run" / "32", 48: tmp_path / "run" / "48"}}
    assert json.loads((tmp_path / "run" / "spec.json").read_text())["folder"] == str(tmp_path / "run")


def test_a_failure_shows_the_log(tmp_path):
    python = python_that(tmp_path, "echo no such trainer\nexit 1")
    with pytest.raises(RuntimeError, match=r"TRL 1\.12's PPO failed:\nno such trainer"):
        train_old_ppo(python, {"judged_batches": []}, tmp_path / "run")
