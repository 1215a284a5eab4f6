"""The report of what the advantages keep: its numbers, its text and its pictures."""

import json
import sys
from dataclasses import asdict
from io import StringIO

import pytest
import torch
from datasets import Dataset
from rich.console import Console

import trl_lol.report
from trl_lol import estimate_advantages
from trl_lol.report import AdvantageReport, quantiles


def as_report(rewards, values, **kwargs):
    """The report of two lists."""
    rewards, values = (torch.tensor(x, dtype=torch.float64) for x in (rewards, values))
    return AdvantageReport.from_tensors(rewards, values, rewards - values, **kwargs)


# ---- Numbers ----


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
    assert report.calibration == [{"value": 1.0, "reward": 1.5, "count": 4}]
    # What it was not told
    assert (report.num_prompts, report.num_missing, report.num_duplicates) == (None, 0, None)
    assert report.best == report.worst == []
    report.save(tmp_path / "new" / "report.json")
    assert json.loads((tmp_path / "new" / "report.json").read_text())["num_kept"] == 2


def test_quantiles():
    """Of 0..100 the quantiles are the numbers themselves, in whatever order they come."""
    order = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    assert quantiles(order.float()) == [0, 5, 25, 50, 75, 95, 100]


def test_nothing_positive():
    report = AdvantageReport.from_tensors(torch.zeros(3), torch.ones(3), -torch.ones(3))
    assert report.num_kept == 0 and report.effective_sample_size == 0 and report.subsets == {}


def test_equal_rewards_have_no_variance_to_explain(tmp_path):
    """Also where the mean of the rewards is rounded: three times 0.1 is not 0.3."""
    report = as_report([0.1, 0.1, 0.1], [0.0, 0.1, 0.2])
    assert report.value_r2 is None and "The rewards are all equal" in str(report)
    report.save(tmp_path / "report.json")
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)  # no NaN, which is not JSON
    report.plot(tmp_path)
    assert as_report([0.1, 0.1, 0.3], [0.0, 0.1, 0.2]).value_r2 is not None  # Control


def test_nothing_scored_is_an_error():
    with pytest.raises(ValueError, match=r"no scored completion to report on \(3 are not scored\)"):
        as_report([], [], num_missing=3)


def test_calibration_has_bins_of_equal_count():
    """Twenty values, in any order: ten bins of two, {0, 1}, {2, 3}, ... A reward is twice the value."""
    values = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    bins = as_report([2 * v for v in values], values).calibration
    assert bins == [{"value": 2 * i + 0.5, "reward": 4 * i + 1, "count": 2} for i in range(10)]


def test_calibration_keeps_equal_values_together():
    """Thirteen times 0 and then 1 to 7. The middle of the zeros is rank 6.5 of 20, in the bin of ranks 6 to 8; the
    middles of the others are 13.5 to 19.5, two to a bin but for the first. Half of the zeros have the reward 1."""
    values = [0.0] * 13 + [1, 2, 3, 4, 5, 6, 7]
    rewards = [1.0, 0.0] * 6 + [0.5] + [0, 2, 4, 0, 0, 7, 7]
    expected = [(0, 0.5, 13), (1, 0, 1), (2.5, 3, 2), (4.5, 0, 2), (6.5, 7, 2)]
    found = as_report(rewards, values).calibration
    assert [(x["value"], x["reward"], x["count"]) for x in found] == expected


def test_rounding_does_not_part_equal_values():
    """R − (R − 0.1) is 0.1 only up to rounding, which depends on R."""
    rewards = torch.linspace(-3, 4, 100, dtype=torch.float64)
    values = rewards - (rewards - 0.1)
    assert len(values.unique()) > 1  # Control
    report = AdvantageReport.from_tensors(rewards, values, rewards - values)
    assert [x["count"] for x in report.calibration] == [100]
    # A bar that is narrow beside the rewards, up to 4: 4 / 60 is at most .1
    assert report.histograms["values"]["edges"] == [0.1, 0.2]


def test_histograms():
    """Advantages −1, 0, 1, 2 span 3, a sixtieth of which is .05: 61 bars from −1 to 2.05, and 0 is an edge. Of the
    rewards, 0 to 3, as many."""
    report = as_report([0, 1, 2, 3], [1, 1, 1, 1])
    advantages = report.histograms["advantages"]
    assert advantages["edges"] == [pytest.approx(-1 + i * 0.05, abs=1e-12) for i in range(62)]
    assert advantages["edges"][20] == 0.0
    assert [i for i, n in enumerate(advantages["dropped"]) if n] == [0, 20]
    assert [i for i, n in enumerate(advantages["kept"]) if n] == [40, 60]
    for bars in report.histograms.values():
        assert len(bars["kept"]) == len(bars["dropped"]) == len(bars["edges"]) - 1
        assert (sum(bars["kept"]), sum(bars["dropped"])) == (2, 2)


@pytest.mark.parametrize("scale", [1e-6, 0.1, 1.0, 1e6])
def test_an_edge_belongs_to_the_bar_on_its_right(scale):
    """Also where dividing by the width falls short, as 0.3 / 0.1 does of 3."""
    rewards = [i * scale for i in range(-3, 57)]
    bars = as_report(rewards, [0.0] * 60).histograms["rewards"]
    assert bars["edges"][:-1] == pytest.approx(rewards, rel=1e-9) and len(bars["edges"]) == 61
    assert [k + d for k, d in zip(bars["kept"], bars["dropped"], strict=True)] == [1] * 60


def test_examples_are_the_extremes():
    """Advantages 0, 2, −1, 2, 5: the best is 4, then 1 before 3, its equal; the worst are 2 and 0."""
    asked = []

    def examples(positions):
        asked.append(positions)
        return [(f"prompt {i}", f"completion {i}") for i in positions]

    report = as_report([1, 3, 0, 3, 6], [1] * 5, examples=examples, num_examples=2)
    assert asked == [[4, 1], [2, 0]]  # only what is shown is decoded
    assert [x["completion"] for x in report.best] == ["completion 4", "completion 1"]
    assert report.worst[0] == {
        "prompt": "prompt 2",
        "completion": "completion 2",
        "reward": 0.0,
        "value": 1.0,
        "advantage": -1.0,
    }


# ---- Datasets ----


@pytest.fixture
def rows():
    """4 prompts and 8 completions: one is not scored, and two repeat one of their prompt, in the same row and in
    another. "no" to "b?" is none: the prompt is another."""
    return Dataset.from_list(
        [
            {"prompt": "a?", "completions": ["yes", "no"], "rewards": [2.0, 0.0], "subset": "x"},
            {"prompt": "b?", "completions": ["no", "no"], "rewards": [1.0, 1.0], "subset": "y"},
            {"prompt": "a?", "completions": ["yes", "maybe"], "rewards": [3.0, None], "subset": "x"},
            {"prompt": "c?", "completions": [], "rewards": [], "subset": "y"},
            {"prompt": "d?", "completions": ["yes", "no"], "rewards": [0.5, 1.5], "subset": "y"},
        ]
    )


def as_singles(rows):
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": completion, "reward": reward, "subset": row["subset"]}
            for row in rows
            for completion, reward in zip(row["completions"], row["rewards"], strict=True)
        ]
    )


def as_pairs(rows):
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["completions"][0]}],
                "rejected": [{"role": "assistant", "content": row["completions"][1]}],
                "score_chosen": row["rewards"][0],
                "score_rejected": row["rewards"][1],
                "subset": row["subset"],
            }
            for row in rows
            if row["completions"]
        ]
    )


@pytest.mark.parametrize("baseline", ["value", "leave_one_out", "batch_mean"])
def test_every_row_format(rows, tiny_model, tokenizer, baseline):
    """The report of groups, single completions and pairs is the same, but for the texts of messages.

    The mean of the seven rewards is 9/7: 2, 3 and 1.5 are above it. Without themselves, the completions of "a?" have
    the means 1.5, 2.5 and 1, so 2 and 3 are above; of "b?" none is, of "d?" 1.5.
    """
    settings = {"num_train_epochs": 1} if baseline == "value" else {}
    found = []
    for format_rows in (lambda rows: rows, as_singles, as_pairs):
        scored = estimate_advantages(format_rows(rows), tiny_model(), None, tokenizer, baseline=baseline, **settings)
        assert ("value" in scored.column_names) == (baseline == "value")
        found.append(AdvantageReport.from_dataset(scored))
    groups, singles, pairs = found
    assert groups == singles
    assert (groups.num_prompts, groups.num_completions, groups.num_missing, groups.num_duplicates) == (3, 7, 1, 2)
    assert {name: total for name, (_, total) in groups.subsets.items()} == {"x": 3, "y": 4}
    for name in ("num_prompts", "num_completions", "num_missing", "num_duplicates", "rewards"):
        assert getattr(pairs, name) == getattr(groups, name)
    if baseline == "value":
        first = estimate_advantages(rows, tiny_model(), None, tokenizer, **settings)[0]
        example = next(x for x in groups.best if x["reward"] == 2.0)  # of seven
        assert example["value"] == pytest.approx(first["value"], rel=0, abs=1e-6)
    else:
        subsets = {"leave_one_out": {"x": (2, 3), "y": (1, 4)}, "batch_mean": {"x": (2, 3), "y": (1, 4)}}[baseline]
        assert groups.subsets == pairs.subsets == subsets and groups.num_kept == 3
        assert pairs.advantages == pytest.approx(groups.advantages, abs=1e-12)
    assert pairs.best[0]["prompt"] == "user: a?" and pairs.best[0]["completion"] == "yes"
    assert groups.best[0]["prompt"] == "a?"


def test_prompts_differ_by_their_tools():
    """The same question with other tools is another prompt, and the same answer to it no duplicate."""
    tools = [[{"name": "search"}], [{"name": "add"}], [{"name": "add"}]]
    columns = {"prompt": ["a?"] * 3, "completion": ["b"] * 3, "reward": [0.0, 1.0, 2.0], "advantage": [0.0, 1.0, 2.0]}
    report = AdvantageReport.from_dataset(Dataset.from_dict({**columns, "tools": tools}))
    assert (report.num_prompts, report.num_duplicates) == (2, 1)
    report = AdvantageReport.from_dataset(Dataset.from_dict(columns))
    assert (report.num_prompts, report.num_duplicates) == (1, 2)  # Control


def test_other_subset_columns(rows):
    dataset = as_singles(rows).filter(lambda row: row["reward"] is not None)
    dataset = dataset.add_column("advantage", dataset["reward"][:]).rename_column("subset", "source")
    assert AdvantageReport.from_dataset(dataset).subsets == {}
    assert AdvantageReport.from_dataset(dataset, "source", num_examples=1).subsets == {"x": (2, 3), "y": (4, 4)}
    assert len(AdvantageReport.from_dataset(dataset, num_examples=1).best) == 1


def test_a_dataset_without_advantages_is_an_error(rows):
    with pytest.raises(ValueError, match=r"no column 'advantages': its columns are prompt, .*`estimate_advantages"):
        AdvantageReport.from_dataset(rows)
    with pytest.raises(ValueError, match="no column 'reward' and no 'advantage'"):
        AdvantageReport.from_dataset(as_singles(rows).remove_columns("reward"))
    unscored = as_singles(rows).map(lambda row: {"reward": None, "advantage": None})
    with pytest.raises(ValueError, match=r"8 are not scored"):
        AdvantageReport.from_dataset(unscored)


# ---- Files and text ----


@pytest.fixture
def report():
    """A report with everything in it, some of it hostile to whoever prints it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, generator=generator).double()
    rewards = values + torch.randn(200, generator=generator).double()
    names = ["plain", "[bold]$x$[/bold]", "\x1b[31mred"]
    return AdvantageReport.from_tensors(
        rewards,
        values,
        rewards - values,
        [names[i % 3] for i in range(200)],
        group_ids=torch.arange(200) // 4,
        num_missing=5,
        num_duplicates=7,
        examples=lambda positions: [
            ("start " + "of it " * 99 + "end?", "\x1b[2J[red]so[/red] 日本") for _ in positions
        ],
    )


def test_saved_and_loaded_it_is_equal(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert AdvantageReport.load(tmp_path / "report.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]  # nothing beside it
    changed = {**asdict(report), "num_missing": 6}
    assert AdvantageReport(**changed) != report  # Control


def test_reports_of_before_are_read(tmp_path):
    """The first nine fields were all there was."""
    old = {"num_completions": 4, "num_kept": 2, "rewards": [0.0], "values": [1.0], "advantages": [1.0]}
    old |= {"value_r2": -0.2, "effective_sample_size": 1.8, "subsets": {"a": [1, 2]}}
    (tmp_path / "report.json").write_text(json.dumps(old))
    report = AdvantageReport.load(tmp_path / "report.json")
    assert report.subsets == {"a": (1, 2)} and report.num_prompts is None and "2 of 4 completions" in str(report)


def test_text(report, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    text = str(report)
    assert text.isprintable() or set(filter(lambda c: not c.isprintable(), text)) == {"\n"}
    assert max(map(len, text.splitlines())) <= 119
    lines = text.splitlines()
    assert lines[0] == (
        f"{report.num_kept} of 200 completions ({report.num_kept / 200:.1%}) have a positive advantage; the effective "
        f"sample size under priority sampling is {report.effective_sample_size:.0f}."
    )
    repeated = "Completions that repeat an earlier one of the same prompt: 7."
    assert lines[1] == f"Prompts: 50. {repeated} Completions that are not scored: 5."
    table = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert table["advantages"] == [f"{x:z.3f}" for x in report.advantages]
    assert table["plain"][:2] == [str(n) for n in (report.subsets["plain"][0], 67 - report.subsets["plain"][0])]
    assert "[bold]$x$[/bold]" in text and "[red]so[/red] 日本" in text  # data is no markup
    assert "end?" in text and "start" not in text  # of a long prompt its end
    assert f"explain {report.value_r2:.1%} of the rewards' variance" in text
    start = next(i for i, line in enumerate(lines) if line.startswith("mean value")) + 1
    bins = [[f"{x['value']:z.3f}", f"{x['reward']:z.3f}", str(x["count"])] for x in report.calibration]
    assert len(bins) == 10 and [line.split() for line in lines[start : start + 11]] == [*bins, []]


def test_rich_prints_it_as_wide_as_the_terminal(report):
    file = StringIO()
    Console(force_terminal=True, color_system="standard", width=80, file=file).print(report)
    assert "\x1b[1mhighest advantages\x1b[0m" in file.getvalue() and "\x1b[2J" not in file.getvalue()
    tables = file.getvalue().split("quantiles")[1].replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert max(map(len, tables.splitlines())) <= 80 < max(map(len, str(report).splitlines()))


def test_small_numbers_keep_their_digits():
    text = str(as_report([0.00012, 0.00034], [0.0002, 0.0002]))
    assert "0.00012" in text and "0.000 " not in text


def test_many_subsets_are_cut_short(tmp_path):
    """Thirty subsets, of which the text has the twenty largest. All of them are in the file."""
    subsets = [f"s{i}" for i in range(30) for _ in range(i + 1)]
    report = as_report([1.0] * len(subsets), [0.0] * len(subsets), subsets=subsets)
    assert len(report.subsets) == 30
    lines = str(report).splitlines()
    assert any(line.startswith("s29 ") for line in lines) and not any(line.startswith("s9 ") for line in lines)
    assert "... and 10 smaller ones." in lines


# ---- Pictures ----


def png(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000
    return content


def test_plots(report, tmp_path):
    paths = report.plot(tmp_path / "new" / "a")
    assert [path.name for path in paths] == ["distributions.png", "calibration.png", "subsets.png"]
    report.save(tmp_path / "report.json")
    again = AdvantageReport.load(tmp_path / "report.json").plot(tmp_path / "b")
    assert list(map(png, again)) == list(map(png, paths))
    other = as_report(list(range(9)) * 2, [4.0, 3.0] * 9, subsets=["a"] * 10 + ["b"] * 8).plot(tmp_path / "c")
    for one, two in zip(paths, other, strict=True):  # Control
        assert png(one) != png(two), one.name


def test_what_is_missing_is_not_drawn(tmp_path):
    """No subsets, and one value, over which there is nothing to see."""
    assert [path.name for path in as_report([0, 1], [1, 1]).plot(tmp_path)] == ["distributions.png"]


def test_without_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "trl_lol.report.plots", raising=False)
    monkeypatch.delattr(trl_lol.report, "plots", raising=False)
    assert str(report)
    with pytest.raises(ImportError, match=r'pip install "trl-lol\[report\]"'):
        report.plot(tmp_path)
