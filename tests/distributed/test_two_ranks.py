"""Two ranks give what one gives. Each world is launched once, by torchrun, and the tests compare what it wrote."""

from pathlib import Path

import pytest
from worlds import launch


WORKER = Path(__file__).parent / "worker.py"


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """What the worker wrote on one rank and on two."""
    results = {}
    for size in (1, 2):
        results[size] = launch(WORKER, size, tmp_path_factory.mktemp(f"ranks{size}"))
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


@pytest.mark.parametrize("run", ["full", "lora", "accumulated", "groups", "leave one out"])
@pytest.mark.parametrize("method", ["ppo", "apa", "drpo"])
def test_online_two_ranks_equal_one(worlds, method, run):
    """On the same completions: with whitening over all ranks' tokens, a critic, rows without a reward on one rank only
    (for PPO and APA all its rows in the second generation), and groups of which each rank has a half. For DR-PO the
    ranks draw the same roll-ins."""
    one, two = worlds[1][method][run], worlds[2][method][run]
    assert len(one["loss"]) == 4
    assert one["loss"] == pytest.approx(two["loss"], rel=0, abs=1e-6)
    assert distance(one["weights"], two["weights"]) <= 5e-6
    metrics = [name for name in one if one[name] and name not in ("loss", "weights")]
    assert ("value_loss" in metrics and "explained_variance" in metrics) == (run != "leave one out")
    assert ("eval_reward" in metrics and "eval_loss" in metrics) == (run == "full")
    assert {"roll_in/mean_length", "reward/reset", "reward/no_reset"} <= set(metrics) or method != "drpo"
    assert ("reset_fraction" in metrics) == (method == "drpo") and "eval_reset_fraction" not in metrics
    if run == "accumulated":  # the mean over micro-batches, which are other ones
        metrics = [name for name in metrics if name not in ("policy_loss", "value_loss", "entropy")]
    for name in metrics:
        # The KL sums over 7 tokens at most, of log-probabilities around -6.6, which float32 spaces by 4.8e-7
        rounding = 7 * 4.8e-7 if name.endswith("kl/completion") else 1e-6
        assert one[name] == pytest.approx(two[name], rel=1e-5, abs=rounding), name
    # Control: had one rank's share of the first batch been lost, the loss would show it
    half = worlds[1][method]["half"]["loss"][0]
    assert half != pytest.approx(worlds[2][method]["full"]["loss"][0], rel=0, abs=1e-3)


@pytest.mark.parametrize("method", ["ppo", "apa", "drpo"])
def test_online_accumulation_equals_one_batch_on_two_ranks(worlds, method):
    """And gradient checkpointing, which the one run has and the other has not."""
    one, two = worlds[2][method]["full"], worlds[2][method]["accumulated"]
    assert one["loss"] == pytest.approx(two["loss"], rel=0, abs=1e-6)
    assert distance(one["weights"], two["weights"]) <= 5e-6


@pytest.mark.parametrize(
    ("method", "policy"), [("ppo", "full"), ("apa", "full"), ("apa", "lora"), ("drpo", "full"), ("drpo", "lora")]
)
def test_online_resume_in_the_middle_of_a_generation_on_two_ranks(worlds, method, policy):
    whole, resumed = worlds[2][method][f"{policy}, whole"], worlds[2][method][f"{policy}, resumed"]
    assert len(whole["loss"]) == 8 and resumed["loss"] == whole["loss"]
    assert resumed["ref_resets"] == whole["ref_resets"]
    assert distance(resumed["weights"], whole["weights"]) == 0
    # Control: the steps after the checkpoint do something, and for APA one reset of the reference comes before it
    interrupted = worlds[2][method][f"{policy}, interrupted"]
    assert distance(interrupted["weights"], whole["weights"]) > 1e-4
    assert (len(interrupted["ref_resets"]) > 0) == (method == "apa")
