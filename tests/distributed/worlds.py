"""What the tests on several processes share: how a script is launched, and rows whose losses can be compared."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from trl_lol import toy


def launch(script: Path, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Run a script on a number of processes without a GPU, and read the `results.pt` that it leaves in the folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*torchrun, str(script), str(num_ranks), str(folder)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=True)


def leave() -> None:
    """
    What a script does last. gloo aborts a process now and then that ends while the group stands, that takes it down
    while a trainer still holds it, or whose peer has left before.
    """
    gc.collect()
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def short_rows(dialogues: Dataset) -> tuple[Dataset, Dataset]:
    """
    Pairs, and groups of 2, 3 or 4, with completions of one word: with small rewards losses are below one, from sums
    of a few tokens, so that 1e-6 is above the rounding of float32. They are in memory on every process, where
    DPOTrainer's own cache of reference log-probabilities fails.
    """
    pairs = toy.preference_pairs(dialogues).map(lambda row: {n: _first_word(row[n]) for n in ("chosen", "rejected")})
    groups = dialogues.map(
        lambda row, i: {"completions": [_first_word(completion) for completion in row["completions"][: 2 + i % 3]]},
        with_indices=True,
        remove_columns="qualities",
    )
    return pairs, groups


def _first_word(completion: list[dict]) -> list[dict]:
    return [{**completion[0], "content": " ".join(completion[0]["content"].split()[:1])}]
