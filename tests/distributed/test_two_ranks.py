"""Two ranks give what one gives. Each world is launched once, by torchrun, and the tests compare what it wrote."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


WORKER = Path(__file__).parent / "worker.py"


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """What the worker wrote on one rank and on two."""
    results = {}
    for size in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*launch, str(WORKER), str(size), str(folder)], env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-4000:]
        results[size] = torch.load(folder / "results.pt", weights_only=True)
    return results


def distance(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("run", ["cached", "lora", "live"])
def test_two_ranks_equal_one(worlds, run):
    one, two = worlds[1][run], worlds[2][run]
    assert one["loss"] == pytest.approx(two["loss"], rel=0, abs=1e-6)
    assert one["logratio/mean"] == pytest.approx(two["logratio/mean"], rel=1e-4, abs=1e-6)
    assert distance(one["weights"], two["weights"]) <= 5e-6
    # Control: had one rank's share of the batches been lost, the losses would show it
    assert worlds[1]["half"]["loss"] != pytest.approx(worlds[2]["live"]["loss"], rel=0, abs=1e-4)


def test_scores_values_advantages_and_reference_log_probs_do_not_depend_on_the_ranks(worlds):
    one, two = worlds[1]["cached"]["dataset"], worlds[2]["cached"]["dataset"]
    assert one.keys() == two.keys() == {"prompt_ids", "completion_ids", "rewards", "subset", "advantages", "ref_logps"}
    for name in ("prompt_ids", "completion_ids", "rewards", "subset"):
        assert one[name] == two[name]
    for name in ("advantages", "ref_logps"):
        flat = [
            torch.tensor([x for row in world[name] for x in torch.tensor(row).flatten().tolist()])
            for world in (one, two)
        ]
        torch.testing.assert_close(*flat, rtol=1e-5, atol=1e-5)
    assert worlds[1]["scores"] == worlds[2]["scores"]


def test_resume_in_the_second_epoch_on_two_ranks(worlds):
    for world in worlds.values():
        assert world["resumed"]["loss"] == world["whole"]["loss"]
        assert distance(world["resumed"]["weights"], world["whole"]["weights"]) == 0
    # Control: on two ranks accelerate does not pass the epoch on to the sampler, and the order is another one
    without = worlds[2]["resumed without the callback"]
    assert distance(without["weights"], worlds[2]["whole"]["weights"]) > 1e-4


def test_evaluation_on_two_ranks_equals_one(worlds):
    assert worlds[1]["cached"]["eval_loss"] == pytest.approx(worlds[2]["cached"]["eval_loss"], rel=0, abs=1e-6)
