"""The order in which rows are visited."""

import subprocess
import sys

import torch
from scipy.stats import chisquare
from torch.utils.data import WeightedRandomSampler
from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_lol._resume import SetEpochCallback
from trl_lol.advantages import priority_weights
from trl_lol.offline.sampling import EpochSampler


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_frequencies_follow_the_advantages():
    """Row i is drawn with probability A⁺_i / ΣA⁺; rows without a positive advantage never."""
    advantages = torch.tensor([0.5, -1.0, 2.0, 1.0, 0.0, 0.25])
    weights = priority_weights(advantages)
    sampler = EpochSampler(6, seed=3, weights=weights)
    draws = torch.tensor([row for epoch in range(5000) for row in epoch_of(sampler, epoch)])
    counts = torch.bincount(draws, minlength=6)
    assert counts[1] == counts[4] == 0
    kept = weights > 0
    expected = weights[kept].double() / weights.double().sum() * len(draws)
    assert chisquare(counts[kept], expected).pvalue > 0.01
    # Control: the test tells A⁺ from (A⁺)²
    wrong = weights[kept].square().double()
    assert chisquare(counts[kept], wrong / wrong.sum() * len(draws)).pvalue < 1e-6


def test_uniform_epochs_are_permutations():
    sampler = EpochSampler(50, seed=0)
    first, second = epoch_of(sampler, 0), epoch_of(sampler, 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_order_is_a_function_of_seed_and_epoch():
    for weights in (None, torch.arange(1.0, 41.0)):
        sampler = EpochSampler(40, seed=7, weights=weights)
        forward = [epoch_of(sampler, epoch) for epoch in range(3)]
        torch.manual_seed(123)  # and of nothing else
        backward = [epoch_of(EpochSampler(40, seed=7, weights=weights), epoch) for epoch in (2, 1, 0)]
        assert forward == backward[::-1]
        assert len({tuple(order) for order in forward}) == 3
        # Seed and epoch are not simply added up
        assert epoch_of(EpochSampler(40, seed=8, weights=weights), 0) != forward[1]
    # Control: torch's own weighted sampler gives another order whenever it is asked
    torchs = WeightedRandomSampler(torch.ones(40), 40, generator=torch.Generator().manual_seed(7))
    assert list(torchs) != list(torchs)


def test_order_is_equal_in_another_process():
    code = (
        "import torch; from trl_lol.offline.sampling import EpochSampler; "
        "s = EpochSampler(20, 5, torch.arange(20.0)); s.set_epoch(2); print(list(s))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(epoch_of(EpochSampler(20, 5, torch.arange(20.0)), 2))


def test_callback_sets_the_epoch_that_a_resumed_run_is_in(tmp_path):
    sampler = EpochSampler(10)
    callback = SetEpochCallback(sampler)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    for epoch, expected in ((0, 0), (1.0, 1), (2.4285714285714284, 2)):
        callback.on_epoch_begin(args, TrainerState(epoch=epoch), TrainerControl())
        assert sampler.epoch == expected
