"""Records of runs, one JSON file each: what is chosen by them, with which intervals, and what changed."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from trl_lol._cache import written_beside


Record = dict[str, Any]
GridPoint = list[Record]  # runs of one task, method and setting, by seed

REFERENCE = "reference"  # the method of the policy that was not trained
CONFIDENCE = 0.95
# Processors round differently, and what has no spread has no interval that would allow for it
TOLERANCE = 1e-3
SIGNS = {"score": 1, "reward": 1, "regret": -1}  # what is compared, and which way is better


class Interval(NamedTuple):
    """A mean and its interval."""

    mean: float
    low: float
    high: float

    def overlaps(self, other: "Interval") -> bool:
        """Whether the two have a value in common, up to rounding (`TOLERANCE`, relative or absolute)."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return low <= high or math.isclose(low, high, rel_tol=TOLERANCE, abs_tol=TOLERANCE)

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Finding:
    """
    Where runs differ from the committed ones.

    Args:
        task, method, setting (`str`):
            Of the runs.
        change (`str`):
            `"worse"`, `"missing"` (runs, or a metric, that are committed), `"better"` or `"new"` (not committed yet).
        metric (`str`, *optional*, defaults to `""`):
            What is worse or better.
        committed, found ([`Interval`], *optional*):
            Its intervals.
        detail (`str`, *optional*, defaults to `""`):
            What is missing or new.
    """

    task: str
    method: str
    setting: str
    change: str
    metric: str = ""
    committed: Interval | None = None
    found: Interval | None = None
    detail: str = ""

    @property
    def fails(self) -> bool:
        """Whether it is more than a note."""
        return self.change in ("worse", "missing")

    def __str__(self) -> str:
        where = ", ".join(filter(None, (self.task, self.method, self.setting)))
        if self.change in ("missing", "new"):
            return f"{where}: {self.change}: {self.detail}"
        advice = ": update the reference" if self.change == "better" else ""
        return f"{where}: {self.metric} {self.found}, committed {self.committed}: {self.change}{advice}"


# ---- Files ----


def write_record(record: Record, path: Path) -> None:
    """Write a run's record, so that no half-written one is ever read."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(record, indent=1) + "\n")


def load_records(folder: Path) -> list[Record]:
    """
    Read the records of a suite, or of one of its tasks.

    Args:
        folder (`Path`):
            Folder of the suite or of the task.

    Returns:
        `list[dict]`: The records, in the order of their files' names.
    """
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]


# ---- Groups ----


def grid_points(records: Iterable[Record]) -> dict[tuple[str, str], list[GridPoint]]:
    """
    Group records.

    Args:
        records (`Iterable[dict]`):
            Records of any tasks and methods.

    Returns:
        `dict[tuple[str, str], list[list[dict]]]`: For each task and method the points of its grid, by their numbers,
        and in each the runs, by their seeds.
    """
    groups: dict[tuple[str, str], dict[str, GridPoint]] = {}
    for record in sorted(records, key=lambda record: (sorted(_settings(record).items()), record.get("seed", 0))):
        points = groups.setdefault((record["task"], record["method"]), {})
        points.setdefault(json.dumps(_settings(record), sort_keys=True), []).append(record)
    return {key: list(points.values()) for key, points in groups.items()}


def chosen_settings(records: Iterable[Record]) -> dict[tuple[str, str], GridPoint]:
    """
    Choose each method's setting: the one with the best mean score on the validation split.

    Only settings with all the seeds that the method has are chosen from, and of equals the first is chosen. A setting
    with a score that is not a number (a run that diverged) comes last.

    Args:
        records (`Iterable[dict]`):
            Records of any tasks and methods.

    Returns:
        `dict[tuple[str, str], list[dict]]`: For each task and method the runs of the chosen setting, by their seeds.
        A method no setting of which has all seeds is not there.
    """

    def score(runs: GridPoint) -> float:
        mean = fmean(metric(runs, "score", "validation"))
        return mean if math.isfinite(mean) else -math.inf

    chosen = {}
    for key, points in grid_points(records).items():
        seeds = set().union(*map(_seeds, points))
        whole = [runs for runs in points if _seeds(runs) == seeds]
        if whole:
            chosen[key] = max(whole, key=score)
    return chosen


def _settings(record: Record) -> dict[str, Any]:
    return record.get("settings", {})  # the untrained policy has none


def _seeds(runs: GridPoint) -> set[int | None]:
    return {record.get("seed") for record in runs}


def setting_name(runs: GridPoint, grid: Sequence[GridPoint] = ()) -> str:
    """Fields of a setting, those alone that differ within the grid where there are such."""
    settings = _settings(runs[0])
    differing = [name for name in settings if any(settings[name] != _settings(other[0]).get(name) for other in grid)]
    return ", ".join(f"{name} {short(settings[name])}" for name in differing or settings)


def short(value: Any) -> str:
    """A setting's value as it is shown."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def kl_and_reward(runs: GridPoint) -> list[tuple[float, float]]:
    """KL and reward on the test split of the runs where they are numbers."""
    points = zip(metric(runs, "kl"), metric(runs, "reward"), strict=True)
    return [point for point in points if all(map(math.isfinite, point))]


def metric(runs: GridPoint, name: str, split: str = "test") -> list[float]:
    """A metric's value in every run; none where some run is without it."""
    values = [record["metrics"][split].get(name) for record in runs]
    return [] if None in values else [float(value) for value in values]


class Results:
    """
    What was run on one task.

    Args:
        records (`Iterable[dict]`):
            Its records.
        order (`Iterable[str]`, *optional*):
            Names of methods in the order in which they are shown; others follow.

    Attributes:
        reference (`list[dict]`):
            Runs of the untrained policy.
        grids (`dict[str, list[list[dict]]]`):
            Every other method's grid, see [`grid_points`].
        chosen (`dict[str, list[dict]]`):
            Runs of every other method's chosen setting, see [`chosen_settings`].
    """

    def __init__(self, records: Iterable[Record], order: Iterable[str] = ()) -> None:
        self.records = list(records)
        self.name = self.records[0]["task"]
        grids = {method: points for (_, method), points in grid_points(self.records).items()}
        (self.reference,) = grids.pop(REFERENCE)
        chosen = {method: runs for (_, method), runs in chosen_settings(self.records).items()}
        names = [name for name in order if name in grids]
        self.grids = {name: grids[name] for name in names + sorted(grids.keys() - set(names))}
        self.chosen = {name: chosen[name] for name in self.grids if name in chosen}

    def methods(self, online: bool) -> list[str]:
        """Names of the methods that generate, or of those that do not."""
        return [name for name, grid in self.grids.items() if grid[0][0]["online"] == online]

    def frontier(self, method: str) -> list[GridPoint]:
        """A method's settings that no other one of it beats in both mean reward and mean KL, by their KL."""
        means = [(*(fmean(metric(runs, name)) for name in ("kl", "reward")), runs) for runs in self.grids[method]]
        kept, highest = [], -math.inf
        for kl, reward, runs in sorted(means, key=lambda point: point[0]):
            if math.isfinite(kl) and reward > highest:
                kept.append(runs)
                highest = reward
        return kept

    def rewards_at(self, method: str, kl: float) -> list[float]:
        """
        Rewards at a KL, on straight lines between a method's runs with the settings of its frontier.

        Args:
            method (`str`):
                Name of the method.
            kl (`float`):
                KL from the untrained policy, in nats.

        Returns:
            `list[float]`: One value per seed; empty where not every seed has runs on both sides of the KL.
        """
        by_seed: dict[int, list[tuple[float, float]]] = {}
        for runs in self.frontier(method):
            for record in runs:
                by_seed.setdefault(record["seed"], []).extend(kl_and_reward([record]))
        lines = [list(zip(*sorted(points), strict=True)) for points in by_seed.values()]
        if not all(kls[0] <= kl <= kls[-1] for kls, _ in lines):
            return []
        return [float(np.interp(kl, kls, rewards)) for kls, rewards in lines]


# ---- Intervals ----


def interval(values: Sequence[float]) -> Interval:
    """
    Mean over seeds with its 95 % bootstrap interval (percentiles, the same resamples each time).

    Args:
        values (`Sequence[float]`):
            One value per seed. A single one is its own interval, and so are equal ones.

    Returns:
        [`Interval`]: Mean, low and high; no numbers if some value is none.
    """
    return _bootstrap(tuple(values))


@cache
def _bootstrap(values: tuple[float, ...]) -> Interval:
    if (known := _without_spread(values)) is not None:
        return known
    result = stats.bootstrap(
        (np.array(values),),
        np.mean,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return Interval(fmean(values), *map(float, result.confidence_interval))


def t_interval(values: Sequence[float]) -> Interval:
    """
    Mean over seeds with its 95 % interval by Student's t.

    Two versions of a method are compared by it. The bootstrap interval of three seeds goes from the lowest to the
    highest one and no further, so that versions that are equal would seem to differ one time in ten.

    Args:
        values (`Sequence[float]`):
            One value per seed. A single one is its own interval, and so are equal ones.

    Returns:
        [`Interval`]: Mean, low and high; no numbers if some value is none.
    """
    if (known := _without_spread(values)) is not None:
        return known
    mean, error = fmean(values), stats.sem(values)
    return Interval(mean, *map(float, stats.t.interval(CONFIDENCE, len(values) - 1, mean, error)))


def _without_spread(values: Sequence[float]) -> Interval | None:
    if not all(map(math.isfinite, values)):
        return Interval(math.nan, math.nan, math.nan)
    return Interval(values[0], values[0], values[0]) if len(set(values)) == 1 else None


# ---- Comparison ----


def compare(records: Iterable[Record], committed: Iterable[Record]) -> list[Finding]:
    """
    Compare runs with committed ones: the test regret of each task, method and setting, or where there is none the
    score and the reward, which a policy that has learned nothing lacks even where its score is as good.

    Intervals are of the mean over seeds (see [`t_interval`]) and must overlap, and not all runs may lie on one side of
    the committed interval; values without spread must agree up to `TOLERANCE`. The untrained policy is left out: it
    has one run and so no spread, and no trainer changes it.

    Args:
        records (`Iterable[dict]`):
            Records of the runs.
        committed (`Iterable[dict]`):
            Those to compare with.

    Returns:
        `list[Finding]`: What changed. Only what is worse or missing fails ([`Finding.fails`]).
    """
    runs, committed_runs = _by_name(records), _by_name(committed)
    findings = []
    for where in sorted(runs.keys() | committed_runs.keys()):
        new, old = runs.get(where, []), committed_runs.get(where, [])
        seeds, old_seeds = _seeds(new), _seeds(old)
        for change, extra in (("missing", old_seeds - seeds), ("new", seeds - old_seeds)):
            if extra:
                detail = f"seed{'s' * (len(extra) > 1)} {', '.join(map(str, sorted(extra)))}"
                findings.append(Finding(*where, change, detail=detail))
        if not (new and old):
            continue
        # Where the best policy is known, a reward that rises may be a policy that goes too far
        names = ["regret"] if metric(old, "regret") else ["score", "reward"]
        for name, sign in ((name, SIGNS[name]) for name in names):
            values, old_values = metric(new, name), metric(old, name)
            if old_values and not values:
                findings.append(Finding(*where, "missing", name, detail=name))
            elif old_values:
                before, after = t_interval(old_values), t_interval(values)
                change = _change(before, after, values, sign)
                if change:
                    findings.append(Finding(*where, change, name, before, after))
    return findings


def _change(before: Interval, after: Interval, values: Sequence[float], sign: int) -> str | None:
    # Runs that scatter as they fail have an interval that reaches everything: then it is each of them that tells
    sides = {0 if before.overlaps(Interval(v, v, v)) else 1 if v > before.high else -1 for v in values}
    apart = not before.overlaps(after) or sides in ({1}, {-1})
    if math.isnan(before.mean) or math.isnan(after.mean):  # a run that diverged is worse than any that did not
        difference = math.isnan(before.mean) - math.isnan(after.mean)
    else:
        difference = sign * (after.mean - before.mean) if apart else 0
    return None if difference == 0 else "better" if difference > 0 else "worse"


def _by_name(records: Iterable[Record]) -> dict[tuple[str, str, str], GridPoint]:
    """Runs by task, method and name of the setting."""
    return {
        (task, method, setting_name(runs)): runs
        for (task, method), points in grid_points(records).items()
        for runs in points
        if method != REFERENCE
    }
