"""Scores, values, advantages, draws and groups are the same on 1, 2 and 4 ranks."""

from pathlib import Path

import pytest
import torch
from sharing import collect
from worlds import launch


WORKER = Path(__file__).parent / "sharing.py"
SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """What the worker finds on each number of ranks; a single one is this process."""
    results = {1: collect(tmp_path_factory.mktemp("ranks1"))}
    for size in SIZES[1:]:
        results[size] = launch(WORKER, size, tmp_path_factory.mktemp(f"ranks{size}"))
    return results


MORE = pytest.mark.parametrize("size", SIZES[1:])


@MORE
def test_scores(worlds, size):
    assert worlds[1]["scores"] == worlds[size]["scores"]


@MORE
def test_sampled_groups(worlds, size):
    """Greedy ones: others are drawn from another seed on each rank."""
    assert worlds[1]["samples"] == worlds[size]["samples"]
    one, five = worlds[1]["samples"]
    assert len(one) == 1 and [len(group) for group in five] == [2] * 5


@MORE
def test_estimated_advantages(worlds, size):
    """Two rows have their only prompts read by the fit; of thirty, ten prompts are, and the others are shared out."""
    for one, many, n in zip(worlds[1]["advantages"], worlds[size]["advantages"], (2, 30), strict=True):
        assert len(one) == 2 * n and one == pytest.approx(many, rel=0, abs=1e-5)
        assert len({round(a, 3) for a in one}) >= 2


@MORE
def test_datasets(worlds, size):
    for method, computed in (("alol", ["advantages", "ref_logps"]), ("copg", ["ref_logps"])):
        one, many = (worlds[n][method]["dataset"] for n in (1, size))
        assert one.keys() == many.keys() == {"prompt_ids", "completion_ids", "rewards", "subset", *computed}
        for name in ("prompt_ids", "completion_ids", "rewards", "subset"):
            assert one[name] == many[name]
        for name in computed:
            torch.testing.assert_close(*(torch.tensor(list(flat(x[name]))) for x in (one, many)), rtol=1e-5, atol=1e-5)


def flat(nested):
    for x in nested:
        yield from flat(x) if isinstance(x, list) else [x]


@MORE
@pytest.mark.parametrize("method", ["alol", "copg", "ppo"])
def test_rows_of_each_step(worlds, method, size):
    """All ranks together get the same rows in a step: those drawn by advantage for A-LoL, whole groups for CoPG, and
    each prompt four times for PPO."""
    one, many = (worlds[n][method]["rows"] for n in (1, size))
    assert one == many
    assert len(one) >= 2 and len({str(step) for step in one}) == len(one)  # control: the steps have rows of their own


def test_rows_are_drawn_by_advantage(worlds):
    """Drawn with replacement: an epoch has some of the rows more than once. A permutation has none."""
    for method, is_drawn in (("alol", True), ("copg", False)):
        rows = worlds[1][method]["rows"]
        epoch = [str(row) for step in rows[: len(rows) // 2] for row in step]
        repeated = len(epoch) - len(set(epoch))
        assert (repeated > len(epoch) // 10) == is_drawn


def test_groups_are_ragged(worlds):
    """What the runs of CoPG are about: 31 groups, of 2, 3 or 4 completions."""
    sizes = [len(rewards) for rewards in worlds[4]["copg"]["dataset"]["rewards"]]
    assert sizes == ([2, 3, 4] * 11)[:31]


@MORE
@pytest.mark.parametrize("method", ["alol", "copg", "ppo"])
def test_losses(worlds, method, size):
    """With PPO's groups of four on four ranks, each rank has half a group, whose advantages need the other half."""
    one, many = (worlds[n][method]["loss"] for n in (1, size))
    assert len(one) >= 4
    assert one == pytest.approx(many, rel=0, abs=1e-6)
