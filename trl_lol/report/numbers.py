"""What an advantage report counts."""

import math
from typing import TypedDict

from torch import Tensor


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
NUM_BINS = 10  # of the calibration
NUM_BARS = 60  # of a histogram, at most: as many as make its edges round numbers


class Bin(TypedDict):
    """
    Completions whose values are next to each other.

    Attributes:
        value (`float`):
            Mean of their values.
        reward (`float`):
            Mean of their rewards: where the values are calibrated, about the same.
        count (`int`):
            Their number.
    """

    value: float
    reward: float
    count: int


class Histogram(TypedDict):
    """
    How often a number lies where.

    Attributes:
        edges (`list[float]`):
            Edges of the bars, of equal width. An edge belongs to the bar on its right, and where the numbers go from
            below 0 to above it, 0 is an edge.
        kept, dropped (`list[int]`):
            Number of completions in each bar with a positive advantage, and without one.
    """

    edges: list[float]
    kept: list[int]
    dropped: list[int]


class Example(TypedDict):
    """
    One completion.

    Attributes:
        prompt, completion (`str`):
            Their whole texts.
        reward, value, advantage (`float`):
            Its numbers.
    """

    prompt: str
    completion: str
    reward: float
    value: float
    advantage: float


def quantiles(x: Tensor) -> list[float]:
    """Minimum, 5 %, 25 %, 50 %, 75 %, 95 % quantiles and maximum of `x`."""
    ordered = x.double().sort().values  # not `torch.quantile`, which takes at most 2^24 values
    return [ordered[round(q * (len(ordered) - 1))].item() for q in QUANTILES]


def calibrate(values: Tensor, rewards: Tensor) -> list[Bin]:
    """Mean reward of what has about the same value, in up to `NUM_BINS` bins of about equal size."""
    _, level, counts = _without_noise(values, rewards).unique(return_inverse=True, return_counts=True)
    # Equal values are a block of ranks, which goes where its middle is
    middle = counts.cumsum(0) - counts / 2
    bins = (middle * NUM_BINS / len(values)).long()[level]
    columns = (bins.bincount(weights=values), bins.bincount(weights=rewards), bins.bincount())
    return [
        Bin(value=value / count, reward=reward / count, count=count)
        for value, reward, count in zip(*(column.tolist() for column in columns), strict=True)
        if count
    ]


def histogram(x: Tensor, kept: Tensor, rewards: Tensor) -> Histogram:
    """Histogram with up to `NUM_BARS` bars, whose edges are round numbers; of equal numbers, a bar that is narrow
    beside the rewards."""
    x = _without_noise(x, rewards)
    span = (x.max() - x.min()).item() or rewards.abs().max().item() or NUM_BARS
    digit = 10.0 ** math.floor(math.log10(span / NUM_BARS))
    width = next((m * digit for m in (1, 2, 5) if m * digit * NUM_BARS >= span), 10 * digit)
    bars = (x / width + 1e-9).floor().long()  # 0.3 / 0.1 is less than 3
    first = int(bars.min())
    bars = bars - first
    counts = bars.bincount()
    is_kept = bars[kept].bincount(minlength=len(counts))
    return Histogram(
        edges=[float(f"{(first + i) * width:.10g}") for i in range(len(counts) + 1)],  # 0.3, not 0.30000000000000004
        kept=is_kept.tolist(),
        dropped=(counts - is_kept).tolist(),
    )


def _without_noise(x: Tensor, rewards: Tensor) -> Tensor:
    """Six digits on the scale of the rewards: what was taken as reward minus advantage is equal where it should be."""
    scale = rewards.abs().max().item()
    return x.round(decimals=6 - math.ceil(math.log10(scale))) if scale else x
