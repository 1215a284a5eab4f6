"""Reward models share the rows out among the ranks, each of which has one, and everyone gets all scores."""

import json
import os
import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest
import torch
from transformers import LlamaForSequenceClassification

from trl_lol import score_dataset, toy
from trl_lol.rewards import RewardModel, standardize


SCRIPT = """
    import json, sys
    from pathlib import Path
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from trl_lol import score_dataset, toy
    from trl_lol.rewards import RewardModel, standardize

    folder = Path(sys.argv[1])
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    rows = toy.preference_pairs(toy.make_dialogues(num_prompts=15)).take(15)
    reward, sizes = RewardModel(folder / "model", batch_size=3), []
    read = reward._score
    reward._score = lambda sequences: sizes.append(len(sequences)) or read(sequences)
    plain = score_dataset(rows, reward, batch_size=4)
    counts = gather_object([sum(sizes)])
    scaled = score_dataset(rows, standardize(reward, rows, path=folder / "scale.json"))
    names = ("chosen_reward", "rejected_reward")
    seen = gather_object([[dataset[name][:] for dataset in (plain, scaled) for name in names]])
    if state.is_main_process:
        (folder / "results.json").write_text(json.dumps({"seen": seen, "counts": counts}))
    state.wait_for_everyone()  # gloo aborts a process whose peer has left before it
    state.destroy_process_group()
"""


def test_two_ranks_score_as_one(tmp_path, tokenizer):
    """
    15 pairs: 8 for rank 0 and 7 for rank 1. Both end up with all scores, which are those of a single process but for
    rounding, since a batch has others in it; so do standardised ones, whose mean and variance are those of all rows.
    """
    config = toy.make_model(tokenizer, hidden_size=32, num_layers=2).config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, script, tmp_path], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())

    rows = toy.preference_pairs(toy.make_dialogues(num_prompts=15)).take(15)
    reward = RewardModel(tmp_path / "model")
    alone = [score_dataset(rows, f) for f in (reward, standardize(reward, rows))]
    expected = [scored[name][:] for scored in alone for name in ("chosen_reward", "rejected_reward")]
    assert results["counts"] == [16, 14]
    first, second = results["seen"]
    assert first == second
    for column, of_one in zip(first, expected, strict=True):
        assert column == pytest.approx(of_one, rel=0, abs=1e-5)
        assert min(abs(a - b) for a, b in pairwise(column)) > 1e-5  # none passes for its neighbour
    scaled = torch.tensor(first[2] + first[3], dtype=torch.float64)
    assert scaled.mean().item() == pytest.approx(0, abs=1e-5)  # the batches are others than those it was fitted on
    assert scaled.std(correction=0).item() == pytest.approx(1, abs=1e-5)
