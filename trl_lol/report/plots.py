"""Pictures of an advantage report."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .numbers import Bin, Histogram
from .tables import shorten


try:
    from matplotlib.figure import Figure  # not pyplot, whose state belongs to whoever calls this
except ImportError as error:
    raise ImportError('The plots of a report need matplotlib. Install it: pip install "trl-lol[report]"') from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT, DROPPED, INK = "#1b7f79", "#c9ced6", "#333333"
MAX_SUBSETS = 30


def plot_distributions(histograms: Mapping[str, Histogram], title: str) -> Figure:
    """Rewards, values and advantages side by side, what is kept below what is dropped."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = dict(zip(histograms, figure.subplots(1, len(histograms)), strict=True))
    axes["values"].sharex(axes["rewards"])  # shows how much of the rewards' spread the values have
    for name, bars in histograms.items():
        left, width = bars["edges"][:-1], bars["edges"][1] - bars["edges"][0]
        axes[name].bar(left, bars["kept"], width, align="edge", color=KEPT, label="kept: advantage > 0")
        axes[name].bar(left, bars["dropped"], width, bars["kept"], align="edge", color=DROPPED, label="dropped")
        axes[name].set(xlabel=name.removesuffix("s"), ylabel="completions")
        _unframe(axes[name])
    figure.legend(*axes["rewards"].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def plot_calibration(bins: Sequence[Bin], value_r2: float | None) -> Figure:
    """Mean reward over mean value of each bin, beside the line where they are equal."""
    figure = Figure(figsize=(4.8, 4.8), layout="constrained")
    axis = figure.subplots()
    values, rewards, counts = ([x[key] for x in bins] for key in ("value", "reward", "count"))
    mean = sum(r * n for r, n in zip(rewards, counts, strict=True)) / sum(counts)
    axis.axline((mean, mean), slope=1, color=INK, linewidth=1, label="reward = value")
    axis.axhline(mean, color=INK, linewidth=1, linestyle=":", label="mean reward")
    size = [150 * n / max(counts) for n in counts]
    label = f"completions of like value, {sum(counts) / len(counts):.0f} each on average"
    axis.scatter(values, rewards, size, color=KEPT, alpha=0.85, zorder=2, label=label)
    axis.set(xlabel="mean value", ylabel="mean reward")
    explained = "rewards are all equal" if value_r2 is None else f"R² = {value_r2:z.3f}"
    axis.set_title(f"Values against rewards: {explained}")
    # The same range both ways, so that the diagonal is one
    low, high = min(values + rewards), max(values + rewards)
    margin = 0.08 * (high - low)
    axis.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
    figure.legend(frameon=False, fontsize="small", loc="outside lower center")
    _unframe(axis)
    return figure


def plot_subsets(subsets: Mapping[str, tuple[int, int]]) -> Figure:
    """Kept and dropped completions of each subset, the largest on top."""
    largest = sorted(subsets.items(), key=lambda item: -item[1][1])[:MAX_SUBSETS]
    figure = Figure(figsize=(7, 1.6 + 0.35 * len(largest)), layout="constrained")
    axis = figure.subplots()
    rows = range(len(largest))
    kept, total = zip(*(counts for _, counts in largest), strict=True)
    dropped = [n - k for k, n in zip(kept, total, strict=True)]
    axis.barh(rows, kept, color=KEPT, label="kept: advantage > 0")
    bars = axis.barh(rows, dropped, left=kept, color=DROPPED, label="dropped")
    axis.bar_label(bars, [f"{k / n:.0%} kept" for k, n in zip(kept, total, strict=True)], padding=4, color=INK)
    axis.set_yticks(rows, [shorten(name, 40) for name, _ in largest], parse_math=False)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlim(left=0)
    others = len(subsets) - len(largest)
    axis.set(
        xlabel="completions", title=f"The {len(largest)} largest of {len(subsets)} subsets" if others else "Subsets"
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _unframe(axis)
    return figure


def _unframe(axis: "Axes") -> None:
    axis.spines[["top", "right"]].set_visible(False)
