"""Plots of what was run on a task."""

from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .records import GridPoint, Results, kl_and_reward, metric


CURVES = ["reward", "kl", "entropy"]
INK = "#333333"
_BLACK, _GRAY, _ORANGE, _SKY, _GREEN, _BLUE, _RED, _PINK = (
    "#000000", "#888888", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip  # Okabe and Ito's, which the colour-blind can tell apart
# Colour, line and marker. Those of one family share a colour, and no two in a panel share a marker
STYLES = {
    "SFT on all": (_GRAY, "--", "o"),
    "SFT on best": (_BLACK, "--", "s"),
    "wBC": (_ORANGE, "-", "^"),
    "R-GOLD": (_ORANGE, "--", "v"),
    "R-LoL": (_ORANGE, ":", "<"),
    "A-LoL": (_BLUE, "-", "D"),
    "A-LoL seq": (_BLUE, "--", "P"),
    "A-LoL ref-free": (_SKY, "-", "X"),
    "A-LoL KL": (_SKY, "--", "*"),
    "CoPG": (_RED, "-", "p"),
    "DPO": (_GREEN, "-", ">"),
    "IPO": (_GREEN, "--", "h"),
    "KTO": (_PINK, "-", "d"),
    "RLOO": (_SKY, "-", "o"),
    "GRPO": (_BLUE, "--", "s"),
    "PPO": (_RED, "-", "^"),
    "APA": (_GREEN, "-", "D"),
    "AWR": (_PINK, "--", "v"),
    "DR-PO": (_ORANGE, "-", "P"),
    "TRL 1.12 PPO": (_GRAY, "--", "X"),
}
# For a method that is not named there
_OTHERS = [(color, ":", marker) for marker in "o^sDvP" for color in (_BLACK, _RED, _BLUE, _GREEN, _PINK, _ORANGE)]


def plot_frontier(results: Results) -> Figure:
    """Reward against KL: a line over the means of a method's frontier, and a faint dot for every run."""
    figure, (axes,) = _panels(results, 1)
    start = fmean(metric(results.reference, "reward"))
    kls = []
    for axis, methods in axes:
        for method in methods:
            color, line, marker = _style(results, method)
            every = [point for runs in results.grids[method] for point in kl_and_reward(runs)]
            kls += [kl for kl, _ in every if kl > 0]
            if every:
                axis.scatter(*zip(*every, strict=True), 14, color, marker, alpha=0.4, linewidths=0)
            frontier = results.frontier(method)
            means = [tuple(map(fmean, (metric(runs, "kl"), metric(runs, "reward")))) for runs in frontier]
            x, y = zip((0.0, start), *means, strict=True)
            axis.plot(x, y, line, color=color, marker=marker, markersize=6, linewidth=1.5, label=method)
        axis.axhline(start, color=INK, linewidth=0.8, linestyle=":")
        axis.set(xlabel="KL from the untrained policy, nats per completion", ylabel="reward, test split")
    if kls:
        # A straight scale up to here, so that a KL of next to nothing takes no decade
        threshold = float(np.quantile(kls, 0.1))
        for axis, _ in axes:
            axis.set_xscale("symlog", linthresh=threshold)
            axis.set_xlim(-threshold / 2, 1.3 * max(kls))
            axis.xaxis.set_major_formatter("{x:g}")
    _finish(figure, axes)
    return figure


def plot_curves(results: Results) -> Figure:
    """Reward, KL and entropy against completions seen, chosen settings: the mean, and the range of the seeds."""
    chosen = results.chosen.values()
    names = [name for name in CURVES if any(_curve(runs, name) for runs in chosen)] or CURVES[:1]
    figure, rows = _panels(results, len(names))
    for axes, name in zip(rows, names, strict=True):
        before = metric(results.reference, name, "validation")
        for axis, methods in axes:
            for method in methods:
                runs = results.chosen.get(method, [])
                if not (curves := _curve(runs, name)):
                    continue
                color, line, marker = _style(results, method)
                # Seeds of ragged data are not at the same numbers
                x = curves[0][0]
                y = np.array([np.interp(x, *curve) for curve in curves])
                if before and x[0] > 0:
                    x, y = [0, *x], np.insert(y, 0, fmean(before), axis=1)
                every = max(1, len(x) // 8)
                axis.plot(x, y.mean(0), line, color=color, marker=marker, markevery=every, linewidth=1.5, label=method)
                axis.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.1, linewidth=0)
            if before:
                axis.axhline(fmean(before), color=INK, linewidth=0.8, linestyle=":")
            axis.set(ylabel=f"{'KL, nats' if name == 'kl' else name}, validation split")
            if name == "kl":
                axis.set_yscale("symlog", linthresh=1, subs=[2, 5])
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter("{x:g}")
    for axis, methods in rows[-1]:
        online = methods == results.methods(online=True)
        axis.set(xlabel=f"completions {'generated' if online else 'trained on, repetitions counted'}")
    _finish(figure, rows[-1])
    return figure


def _curve(runs: GridPoint, name: str) -> list[tuple[list[float], list[float]]]:
    """Numbers of completions and a metric's values, for every seed; none where some seed is without it."""
    curves = [[(p["completions"], p[name]) for p in record["curve"] if p.get(name) is not None] for record in runs]
    return [tuple(map(list, zip(*curve, strict=True))) for curve in curves] if all(curves) else []


def _style(results: Results, method: str) -> tuple[str, str, str]:
    others = [name for name in results.grids if name not in STYLES]
    return STYLES.get(method) or _OTHERS[others.index(method) % len(_OTHERS)]


def _panels(results: Results, rows: int) -> tuple[Figure, list[list[tuple[Axes, list[str]]]]]:
    """A column of panels for the methods that do not generate and one for those that do, where there are such."""
    columns = [(online, methods) for online in (False, True) if (methods := results.methods(online))]
    figure = Figure(figsize=(6.5 * len(columns), 1.4 + 4 * rows), layout="constrained", dpi=150)
    grid = figure.subplots(rows, len(columns), squeeze=False, sharey="row", sharex="col" if rows > 1 else False)
    for axis, (online, _) in zip(grid[0], columns, strict=True):
        axis.set_title(f"{results.name}: {'online' if online else 'offline'} methods")
    return figure, [[(axis, methods) for axis, (_, methods) in zip(row, columns, strict=True)] for row in grid]


def _finish(figure: Figure, axes: list[tuple[Axes, list[str]]]) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelleft=True)
        axis.grid(alpha=0.25, linewidth=0.5)
    for axis, _ in axes:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
        axis.legend(fontsize="small", frameon=False, handlelength=3.5, ncols=4, **place)
