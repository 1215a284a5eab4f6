"""What a suite found, as pages in Markdown that are made from its records alone."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from .methods import METHODS
from .plots import plot_curves, plot_frontier
from .records import (
    REFERENCE,
    SIGNS,
    GridPoint,
    Interval,
    Record,
    Results,
    interval,
    load_records,
    metric,
    setting_name,
    short,
)


class Column(NamedTuple):
    """A column: its title, where a record has it, how it is written, and whether with an interval."""

    title: str
    group: str
    name: str
    form: str = ".3f"
    has_interval: bool = False


MIN_POINTS = 3  # of a grid, to speak of what lies between them
COLUMNS = [
    Column("reward", "test", "reward", has_interval=True),
    Column("train reward", "test", "train_reward"),
    Column("KL, nats", "test", "kl", "#.3g"),
    Column("score", "test", "score", has_interval=True),
    Column("regret", "test", "regret", "#.3g", has_interval=True),
    Column("length", "test", "length", ".1f"),
    Column("distinct-2", "test", "distinct_2"),
    Column("entropy", "test", "entropy"),
    Column("completions trained on", "counts", "sequences", ",.0f"),
    Column("tokens seen", "counts", "tokens", ",.0f"),
    Column("generated", "counts", "generated", ",.0f"),
    Column("reward calls", "counts", "reward_calls", ",.0f"),
    Column("kept", "counts", "kept_fraction", ".0%"),
    Column("wall s", "costs", "wall_s", ",.0f"),
    Column("CPU s", "costs", "cpu_s", ",.0f"),
    Column("GPU s", "costs", "gpu_s", ",.0f"),
    Column("memory MB", "costs", "peak_memory_mb", ",.0f"),
]


def write_tables(folder: Path) -> None:
    """
    Write a page with plots for each task of a suite, and one over all of them.

    Args:
        folder (`Path`):
            Folder of the suite, with a folder of records for each task. The pages are `README.md`, there and here.
    """
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in load_records(folder):
        by_task[record["task"]].append(record)
    results = []
    for name, records in by_task.items():
        methods = {record["method"] for record in records}
        if REFERENCE in methods and len(methods) > 1:
            results.append(Results(records, METHODS))
        else:
            print(f"No page for {name}: a table needs the untrained policy and one that was trained.")
    for task in results:
        (folder / task.name).mkdir(exist_ok=True)
        (folder / task.name / "README.md").write_text(task_page(task))
        plot_frontier(task).savefig(folder / task.name / "frontier.png")
        plot_curves(task).savefig(folder / task.name / "curves.png")
    (folder / "README.md").write_text(overview(folder.name, results))


# ---- Pages ----


def task_page(results: Results) -> str:
    """The page of one task, in Markdown."""
    info = next((record["task_info"] for record in results.records if "task_info" in record), {})
    seeds = sorted({record["seed"] for grid in results.grids.values() for runs in grid for record in runs})
    lines = [f"# {results.name}", "", info.get("description", ""), "", *_settings(results, info, seeds), ""]
    lines += [
        "Means over seeds on the test split, each method with its chosen setting, in brackets 95 % bootstrap intervals"
        " of the mean: of three seeds, that is their range. The reference is the untrained policy, one run. Tokens"
        " seen are TRL's `num_tokens`, prompts included; online, further passes over them are not counted again."
        " Completions trained on are optimizer steps × batch: the last batch of a pass may hold fewer.",
    ]
    for online, title in ((False, "Offline methods"), (True, "Online methods")):
        if methods := results.methods(online):
            lines += ["", f"## {title}", "", *_method_table(results, methods)]
    lines += ["", "## Reward against KL", "", "![Reward against KL](frontier.png)", ""]
    if kl_table := _kl_table(results):
        lines += [
            "Reward at equal KL, on straight lines between runs of one seed, with the settings that no other one of"
            " the method beats in both; empty where not every seed has runs on both sides.",
            "",
            *kl_table,
            "",
        ]
    lines += [
        "## Reward against completions seen",
        "",
        "Chosen settings, mean and range of the seeds.",
        "",
        "![Curves of reward, KL and entropy](curves.png)",
        "",
        "## Spread over seeds",
        "",
        *_spread_table(results),
    ]
    return "\n".join(lines) + "\n"


def overview(suite: str, tasks: Sequence[Results]) -> str:
    """The page of a suite, in Markdown: every method on every task."""
    order = list(dict.fromkeys(name for name in (*METHODS, *(name for task in tasks for name in task.chosen))))
    columns = []
    for task in tasks:
        rows = {REFERENCE: task.reference, **task.chosen}
        name = "regret" if any(metric(runs, "regret") for runs in task.chosen.values()) else "score"
        intervals = {method: interval(values) for method, runs in rows.items() if (values := metric(runs, name))}
        best = _best(intervals, SIGNS[name])
        cells = {
            method: f"**{text}**" if method in best else text
            for method, found in intervals.items()
            for text in [_interval_text(found, "#.3g" if name == "regret" else ".3f", len(rows[method]))]
        }
        columns.append((f"[{task.name}]({task.name}/README.md): {name}", cells))
    rows = [
        [method, *(cells.get(method, "") for _, cells in columns)]
        for method in (REFERENCE, *order)
        if any(method in cells for _, cells in columns)
    ]
    lines = [
        f"# {suite}",
        "",
        "Each method's chosen setting on the test split: score (reward minus what its KL costs; more is better), or"
        " regret (less is better) where the best policy is known. Mean over seeds and its 95 % bootstrap interval. In"
        " bold the best, and with it all whose interval overlaps its own.",
        "",
    ]
    return "\n".join(lines + _table(["method", *(title for title, _ in columns)], rows)) + "\n"


def _best(intervals: dict[str, Interval], sign: int) -> set[str]:
    """The best method, and those whose intervals overlap its own."""
    known = {method: found for method, found in intervals.items() if found.mean == found.mean}
    if not known:
        return set()
    best = max(known.values(), key=lambda found: sign * found.mean)
    return {method for method, found in known.items() if found.low <= best.high and best.low <= found.high}


def _settings(results: Results, info: dict[str, Any], seeds: list[int]) -> list[str]:
    """What was equal, what was tried, and on what it ran."""
    lines = []
    for online, does, verb in ((False, "num_sequences", "trains on"), (True, "num_completions", "generates")):
        if not (methods := results.methods(online)):
            continue
        kind = "online" if online else "offline"
        budget = f"every {kind} method {verb} {info[does]:,} completions" if does in info else f"{kind} methods"
        runs = [record for name in methods for record in results.chosen.get(name, [])]
        measured = [
            f"{span} {what}"
            for what, name in (("completions in steps × batch", "sequences"), ("tokens seen", "tokens"),
                               ("generated", "generated"))
            if (span := _span(_value(record, "counts", name) for record in runs))
        ]  # fmt: skip
        lines.append(f"- Budget: {budget}. Counted: {', '.join(measured) or 'nothing'}.")
    grids = defaultdict(list)
    for name, grid in results.grids.items():
        grids[_grid(grid)].append(name)
    lines += [f"- Grid of {', '.join(names)}: {grid}." for grid, names in grids.items()]
    cost = f", with β = {info['beta']:g} per nat" if "beta" in info else ""
    lines.append(f"- Chosen by the mean score on the validation split: reward − β × KL{cost}.")
    edge = [name for name, runs in results.chosen.items() if runs in (results.grids[name][0], results.grids[name][-1])]
    edge = [name for name in edge if len(results.grids[name]) > 2]  # of two, each is an end
    lines += [f"- Chosen at an end of the grid, beyond which there may be better: {', '.join(edge)}."] * bool(edge)
    open_ = [name for name in results.grids if name not in results.chosen]
    lines += [f"- Not finished, no setting has all seeds: {', '.join(open_)}."] * bool(open_)
    lines.append(f"- Seeds: {', '.join(map(str, seeds))}.")
    # The grid is the one that was run
    shown = ("description", "num_sequences", "num_completions")
    others = {k: v for k, v in info.items() if k not in shown and "beta" not in k and "learning_rate" not in k}
    lines.append(f"- Task: {', '.join(f'{name} {value}' for name, value in others.items())}.")
    for title in ("versions", "machine"):
        values: dict[str, set[str]] = defaultdict(set)
        for record in results.records:
            for name, value in record.get(title, {}).items():
                values[name].add("none" if value is None else str(value))
        text = ", ".join(f"{name} {' or '.join(sorted(found))}" for name, found in values.items())
        lines.append(f"- {title.capitalize()}: {text}.")
    return lines


def _grid(grid: Sequence[GridPoint]) -> str:
    """Values of each field, in the order in which they were found."""
    values: dict[str, dict[str, None]] = defaultdict(dict)
    for runs in grid:
        for name, value in runs[0]["settings"].items():
            values[name][short(value)] = None
    return "; ".join(f"{name} {', '.join(found)}" for name, found in values.items())


# ---- Tables ----


def _method_table(results: Results, methods: list[str]) -> list[str]:
    rows = {REFERENCE: results.reference, **{name: results.chosen[name] for name in methods if name in results.chosen}}
    cells = {column: [_cell(column, runs) for runs in rows.values()] for column in COLUMNS}
    cells = {column: texts for column, texts in cells.items() if any(texts)}
    settings = ["", *(setting_name(runs, results.grids[name]) for name, runs in list(rows.items())[1:])]
    return _table(
        ["method", "setting", *(column.title for column in cells)],
        [list(row) for row in zip(rows, settings, *cells.values(), strict=True)],
    )


def _kl_table(results: Results) -> list[str]:
    # A straight line between two that are far apart would understate what lies between them
    grids = [name for name, grid in results.grids.items() if len(grid) >= MIN_POINTS]
    if not grids:
        return []
    ladder = [float(f"{digit}e{power}") for power in range(-5, 4) for digit in (1, 1.5, 2, 3, 5, 7)]
    columns = []
    for kl in ladder:
        cells = {name: _values_text(values) for name in grids if (values := results.rewards_at(name, kl))}
        columns.append((f"{kl:g} nats", cells))
    # Where most methods have runs on both sides
    most = sorted(columns, key=lambda column: -len(column[1]))[:8]
    columns = [column for column in columns if column in most and column[1]]
    rows = [[name, *(cells.get(name, "") for _, cells in columns)] for name in grids]
    return _table(["method", *(title for title, _ in columns)], rows)


def _spread_table(results: Results) -> list[str]:
    rows = []
    for name, runs in results.chosen.items():
        values = metric(runs, "reward")
        spread = f"{np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        rows.append([name, spread, f"{min(values):.3f}", f"{max(values):.3f}", str(len(values))])
    return _table(["method", "standard deviation of the reward", "lowest", "highest", "seeds"], rows)


def _cell(column: Column, runs: GridPoint) -> str:
    values = [_value(record, column.group, column.name) for record in runs]
    if None in values:
        return ""
    return _values_text(values, column.form) if column.has_interval else _number(fmean(values), column.form)


def _value(record: Record, group: str, name: str) -> float | None:
    if group == "test":
        return record["metrics"]["test"].get(name)
    return record.get(group, {}).get(name) or None  # a column of zeros is as good as an empty one


def _values_text(values: Sequence[float], form: str = ".3f") -> str:
    return _interval_text(interval(values), form, len(values))


def _interval_text(found: Interval, form: str, count: int) -> str:
    mean, low, high = (_number(value, form) for value in found)
    return f"{mean} [{low}, {high}]" if count > 1 else mean


def _number(value: float, form: str) -> str:
    return format(value, f"z{form}").rstrip(".")  # z: no minus before a zero


def _span(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{min(known):,.0f}" + (f" to {max(known):,.0f}" if min(known) < max(known) else "")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return [lines[0], "| --- |" + " ---: |" * (len(header) - 1), *lines[1:]]
