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
@pytest.mark.parametrize("method", ["alol", "copg"])
def test_two_ranks_equal_one(worlds, method, run):
    one, two = worlds[1][method][run], worlds[2][method][run]
    assert one["loss"] == pytest.approx(two["loss"], rel=0, abs=1e-6)
    assert one["logratio/mean"] == pytest.approx(two["logratio/mean"], rel=1e-4, abs=1e-6)
    assert distance(one["weights"], two["weights"]) <= 5e-6
    # Control: had one rank's share of the batches been lost, the losses would show it
    assert worlds[1][method]["half"]["loss"] != pytest.approx(worlds[2][method]["live"]["loss"], rel=0, abs=1e-4)


def test_scores_values_advantages_and_reference_log_probs_do_not_depend_on_the_ranks(worlds):
    for method, computed in (("alol", ["advantages", "ref_logps"]), ("copg", ["ref_logps"])):
        one, two = (world[method]["cached"]["dataset"] for world in worlds.values())
        assert one.keys() == two.keys() == {"prompt_ids", "completion_ids", "rewards", "subset", *computed}
        for name in ("prompt_ids", "completion_ids", "rewards", "subset"):
            assert one[name] == two[name]
        for name in computed:
            torch.testing.assert_close(*(torch.tensor(list(flat(x[name]))) for x in (one, two)), rtol=1e-5, atol=1e-5)
    assert worlds[1]["scores"] == worlds[2]["scores"]


def flat(nested):
    for x in nested:
        yield from flat(x) if isinstance(x, list) else [x]


def test_groups_are_ragged(worlds):
    """What the runs of CoPG are about: 31 groups, of 2, 3 or 4 completions."""
    sizes = [len(rewards) for rewards in worlds[2]["copg"]["cached"]["dataset"]["rewards"]]
    assert sizes == ([2, 3, 4] * 11)[:31]


@pytest.mark.parametrize("method", ["alol", "copg"])
def test_resume_in_the_second_epoch_on_two_ranks(worlds, method):
    for world in worlds.values():
        assert world[method]["resumed"]["loss"] == world[method]["whole"]["loss"]
        assert distance(world[method]["resumed"]["weights"], world[method]["whole"]["weights"]) == 0
    # Control: on two ranks accelerate does not pass the epoch on to the sampler, and the order is another one
    without = worlds[2][method]["resumed without the callback"]
    assert distance(without["weights"], worlds[2][method]["whole"]["weights"]) > 1e-4


@pytest.mark.parametrize("method", ["alol", "copg"])
def test_evaluation_on_two_ranks_equals_one(worlds, method):
    one, two = (world[method]["cached"]["eval_loss"] for world in worlds.values())
    assert one == pytest.approx(two, rel=0, abs=1e-6)


def test_sampled_groups_do_not_depend_on_the_ranks(worlds):
    assert worlds[1]["samples"] == worlds[2]["samples"]
    one, five = worlds[1]["samples"]
    assert len(one) == 1 and [len(group) for group in five] == [2] * 5
