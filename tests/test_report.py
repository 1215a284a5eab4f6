"""The report of what the advantages keep."""

import json

import pytest
import torch

from trl_lol.report import AdvantageReport, quantiles


def test_numbers_of_a_small_dataset(tmp_path):
    """Rewards 0, 1, 2, 3 over values 1, 1, 1, 1: advantages −1, 0, 1, 2, of which two are positive.

    Effective sample size: (1 + 2)² / (1² + 2²) = 9/5. R²: residuals −1, 0, 1, 2 have squares 6, deviations from the
    mean 1.5 have squares 5, so 1 − 6/5.
    """
    rewards, values = torch.arange(4.0), torch.ones(4)
    report = AdvantageReport.from_tensors(rewards, values, rewards - values, ["a", "b", "b", "a"])
    assert (report.num_kept, report.num_completions, report.kept_fraction) == (2, 4, 0.5)
    assert report.effective_sample_size == pytest.approx(1.8)
    assert report.value_r2 == pytest.approx(-0.2)
    assert report.subsets == {"a": (1, 2), "b": (1, 2)}
    assert report.advantages[0] == -1 and report.advantages[-1] == 2
    report.save(tmp_path / "new" / "report.json")
    assert json.loads((tmp_path / "new" / "report.json").read_text())["num_kept"] == 2
    assert "2 of 4" in str(report) and "a: 1 of 2" in str(report)


def test_quantiles():
    """Of 0..100 the quantiles are the numbers themselves, in whatever order they come."""
    order = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    assert quantiles(order.float()) == [0, 5, 25, 50, 75, 95, 100]


def test_nothing_positive():
    report = AdvantageReport.from_tensors(torch.zeros(3), torch.ones(3), -torch.ones(3))
    assert report.num_kept == 0 and report.effective_sample_size == 0 and report.subsets == {}
