"""Reward models share the rows out among the ranks, each of which has one, and everyone gets all scores."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import LlamaForSequenceClassification

from trl_lol import toy


SCRIPT = """
    import json, sys
    from pathlib import Path
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from trl_lol import score_dataset, toy
    from trl_lol.rewards import RewardModel, standardize

    num_processes, folder = int(sys.argv[1]), Path(sys.argv[2])
    state = PartialState(cpu=True)
    assert state.num_processes == num_processes
    rows = toy.preference_pairs(toy.make_dialogues(num_prompts=15))
    reward, calls = RewardModel(folder / "model", batch_size=3), []
    read = reward._score
    reward._score = lambda sequences: calls.append(len(sequences)) or read(sequences)
    scored = score_dataset(rows, reward, batch_size=4)
    counts = gather_object([sum(calls)])
    scaled = score_dataset(rows, standardize(reward, rows, path=folder / f"scale{num_processes}" / "scale.json"))
    names = ("chosen_reward", "rejected_reward")
    seen = gather_object([[dataset[name][:] for dataset in (scored, scaled) for name in names]])
    if state.is_main_process:
        (folder / f"results{num_processes}.json").write_text(json.dumps({"seen": seen, "counts": counts}))
    state.destroy_process_group()
"""


def test_two_ranks_score_as_one(tmp_path, tokenizer):
    """
    15 pairs, 30 sequences: 16 for rank 0 and 14 for rank 1. Every rank ends up with all scores, which are those of a
    single process but for rounding, since a batch has others in it; standardised, they have mean 0 and variance 1.
    """
    config = toy.make_model(tokenizer, hidden_size=32, num_layers=2).config
    config.num_labels = 1
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    results = {}
    for size in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [*launch, str(script), str(size), str(tmp_path)], env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
        results[size] = json.loads((tmp_path / f"results{size}.json").read_text())
    (expected,), (first, second) = results[1]["seen"], results[2]["seen"]
    assert results[1]["counts"] == [30] and results[2]["counts"] == [16, 14]
    assert first == second
    for column, column_of_one in zip(first, expected, strict=True):
        assert column == pytest.approx(column_of_one, rel=0, abs=1e-5)
        assert min(abs(a - b) for a, b in zip(column, column[1:], strict=False)) > 1e-5  # none passes for another
    scaled = torch.tensor(first[2] + first[3], dtype=torch.float64)
    assert scaled.mean().item() == pytest.approx(0, abs=1e-12)
    assert scaled.std(correction=0).item() == pytest.approx(1, abs=1e-12)
