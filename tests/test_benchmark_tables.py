"""What the benchmark's pages say of the runs, and what a comparison with committed runs finds."""

import math
import random
from itertools import product
from pathlib import Path

import pytest

from benchmarks.methods import METHODS
from benchmarks.records import (
    Results,
    chosen_settings,
    compare,
    interval,
    load_records,
    setting_name,
    t_interval,
    write_record,
)
from benchmarks.tables import task_page, write_tables


def record(method, setting, seed, *, kl=1.0, reward=0.5, score=0.4, validation=0.4, online=False, **metrics):
    """A run with β `setting` as its setting."""
    metrics = {"reward": reward, "kl": kl, "score": score, **metrics}
    return {
        "task": "toy",
        "method": method,
        "online": online,
        "settings": {"learning_rate": 1e-4, "beta": setting},
        "seed": seed,
        "metrics": {"validation": {**metrics, "score": validation}, "test": metrics},
        "curve": [{"completions": n, "reward": n * reward / 200, "kl": n * kl / 200} for n in (100, 200)],
        "counts": {"sequences": 200, "tokens": 1234, "generated": 64 if online else 0},
        "costs": {"wall_s": 12.0, "cpu_s": 11.6, "gpu_s": 0.0, "peak_memory_mb": 99.7},
        "versions": {"torch": "2.0"},
        "machine": {"cpus": 2},
    }


def untrained(task="toy", reward=0.1, **metrics):
    """The record of the untrained policy, which has no setting, seed or costs."""
    metrics = {"reward": reward, "kl": 0.0, "score": reward, **metrics}
    info = {"description": "A toy.", "beta": 0.1, "num_sequences": 200, "num_completions": 64, "batch_size": 8}
    return {
        "task": task,
        "method": "reference",
        "metrics": {"validation": metrics, "test": metrics},
        "task_info": info,
    }


def runs(method, scores, setting=0.1, **kwargs):
    return [record(method, setting, seed, score=score, **kwargs) for seed, score in enumerate(scores)]


def synthetic(seeds=3):
    """Records of all methods on two tasks, five settings each."""
    rng = random.Random(0)
    records = []
    for task in ("dialogues", "bandit"):
        records.append(untrained(task, 0.2, entropy=2.0, length=12.0, **({"regret": 0.3} if task == "bandit" else {})))
        for i, (name, method) in enumerate(METHODS.items()):
            for step, seed in product(range(5), range(seeds)):
                kl = (0.02 + 0.01 * i) * 4**step * math.exp(rng.gauss(0, 0.1))
                reward = 0.2 + (0.2 + 0.03 * i) * (1 - math.exp(-kl / 2)) - 0.01 * kl + rng.gauss(0, 0.01)
                metrics = {"reward": reward, "kl": kl, "score": reward - 0.05 * kl, "length": 10 + rng.random()}
                metrics |= {"train_reward": reward + 0.1, "distinct_2": rng.random(), "entropy": 2 * math.exp(-kl / 9)}
                if task == "bandit":
                    metrics["regret"] = 0.8 - reward
                new = record(name, 3.0 / 3**step, seed, online=method.is_online)
                shares = (0.25, 0.5, 0.75, 1.0)
                new["task"], new["metrics"] = task, {"validation": metrics, "test": metrics}
                new["counts"]["kept_fraction"] = 0.4 if name.startswith("A-LoL") else None
                new["curve"] = [
                    {"completions": round(3840 * x), "reward": 0.2 + (reward - 0.2) * x**0.5 + rng.gauss(0, 0.01),
                     "kl": kl * x, "entropy": 2 * math.exp(-kl * x / 9)} for x in shares
                ]  # fmt: skip
                records.append(new)
    return records


# ---- Intervals ----


def test_bootstrap_interval():
    """Two seeds, 0 and 1: resamples have the means 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4, and 2.5 % lie in
    the first. Of three seeds, the lowest one three times has 1/27 > 2.5 %: the interval is the range.

    Of twenty, ten at 0 and ten at 1, the mean is binomial, 1/2 ± 1.96 × √(1/80) = 1/2 ± 0.22, in steps of 1/20.
    """
    assert interval([0, 1]) == (0.5, 0, 1)
    assert interval([1, 5, 3]) == (3, 1, 5)
    mean, low, high = interval([0, 1] * 10)
    assert mean == 0.5 and low == pytest.approx(0.3) and high == pytest.approx(0.7)


def test_t_interval():
    """0, 1, 2: mean 1, standard deviation 1, so 1 ± 4.302653 / √3, where 4.302653 is t's quantile with 2 degrees."""
    mean, low, high = t_interval([0, 1, 2])
    assert mean == 1
    assert (low, high) == pytest.approx((1 - 4.302653 / 3**0.5, 1 + 4.302653 / 3**0.5), abs=1e-6)


@pytest.mark.parametrize("function", [interval, t_interval])
def test_values_without_spread(function):
    assert function([0.3]) == function([0.3, 0.3]) == (0.3, 0.3, 0.3)
    assert all(map(math.isnan, function([0.3, math.nan, 0.5])))


# ---- Files and choice ----


def test_records_are_read_as_written(tmp_path):
    records = [record("CoPG", 0.1, 1, score=math.inf), record("CoPG", 0.1, 0)]
    for name, one in zip("ab", records, strict=True):
        write_record(one, tmp_path / "toy" / f"{name}.json")
    (tmp_path / "toy" / "c.17.tmp").write_text("{")  # of a run that was killed while it wrote
    assert load_records(tmp_path) == load_records(tmp_path / "toy") == records


def test_setting_is_chosen_on_validation():
    """β = 0.1 has mean 0.45 there and β = 1 0.4; on the test split it is the other way round."""
    low = [record("CoPG", 0.1, seed, validation=x, score=0.1) for seed, x in enumerate((0.3, 0.6))]
    high = [record("CoPG", 1.0, seed, validation=0.4, score=0.9) for seed in (0, 1)]
    assert chosen_settings(low + high) == {("toy", "CoPG"): low}
    for run in low + high:  # control: with the splits exchanged the other one is chosen
        metrics = run["metrics"]
        metrics["validation"], metrics["test"] = metrics["test"], metrics["validation"]
    assert chosen_settings(low + high) == {("toy", "CoPG"): high}


def test_only_whole_settings_are_chosen():
    """The best setting lacks a seed, and the next one has a run that diverged. Of the two that are equal the first in
    the grid is chosen; a method with no whole setting has none."""
    lacking = runs("CoPG", [0], 3.0, validation=9.0)
    diverged = [record("CoPG", 1.0, 0, validation=9.0), record("CoPG", 1.0, 1, validation=math.nan)]
    equal = [record("CoPG", beta, seed) for beta in (0.3, 0.1) for seed in (1, 0)]
    apart = [record("DPO", 0.1, 0), record("DPO", 0.3, 1)]
    assert chosen_settings(lacking + diverged + equal + apart) == {("toy", "CoPG"): [equal[3], equal[2]]}


def test_name_of_a_setting_says_what_differs():
    one, other = [record("CoPG", 0.1, 0)], [record("CoPG", 0.3, 0)]
    assert setting_name(one, [one, other]) == "beta 0.1"
    assert setting_name(one, [one]) == setting_name(one) == "learning_rate 0.0001, beta 0.1"


# ---- Comparison ----


def changes(found):
    return [(finding.change, finding.metric, finding.fails) for finding in found]


def test_equal_runs_have_no_findings():
    """Also where another machine rounds differently: 0.5 and 0.5004 are within `TOLERANCE`, 0.5 and 0.502 are not."""
    committed = runs("CoPG", [0.4, 0.5, 0.6], regret=0.1) + runs("DPO", [0.5, 0.5])
    assert compare(committed, committed) == []
    assert compare(runs("DPO", [0.5004] * 2), committed[3:]) == []
    assert changes(compare(runs("DPO", [0.498] * 2), committed[3:])) == [("worse", "score", True)]


def test_interval_of_three_seeds_allows_for_their_number():
    """Half of the interval is 4.303 / √3 = 2.484 standard deviations: 0.5 ± 0.248 of 0.4, 0.5, 0.6, and 0.283 ± 0.190
    of 0.2, 0.3, 0.35, which overlap, though the ranges do not. 0, 0.05, 0.1 gives 0.05 ± 0.124, which is below."""
    committed = runs("CoPG", [0.4, 0.5, 0.6])
    assert not interval([0.4, 0.5, 0.6]).overlaps(interval([0.2, 0.3, 0.35]))
    assert compare(runs("CoPG", [0.2, 0.3, 0.35]), committed) == []
    (finding,) = compare(runs("CoPG", [0, 0.05, 0.1]), committed)
    assert (finding.task, finding.method, finding.change, finding.fails) == ("toy", "CoPG", "worse", True)
    assert str(finding) == (
        "toy, CoPG, learning_rate 0.0001, beta 0.1: "
        "score 0.05 [-0.07421, 0.1742], committed 0.5 [0.2516, 0.7484]: worse"
    )


def test_runs_that_scatter_as_they_fail():
    """0.5 ± 0.025 of 0.49, 0.5, 0.51. The interval of -3, -1, 0.4 is -1.2 ± 4.26 and holds all of it, but each of the
    runs lies below. Controls: one of them within, or on either side."""
    committed = runs("CoPG", [0.49, 0.5, 0.51])
    assert changes(compare(runs("CoPG", [-3, -1, 0.4]), committed)) == [("worse", "score", True)]
    assert changes(compare(runs("CoPG", [0.6, 2, 4]), committed)) == [("better", "score", False)]
    assert compare(runs("CoPG", [-3, -1, 0.49]), committed) == compare(runs("CoPG", [-3, -1, 0.6]), committed) == []


def test_better_is_a_note():
    """More score, less regret; control: the same difference the other way fails."""
    for less, more, name in (
        (runs("CoPG", [0.1, 0.11]), runs("CoPG", [0.8, 0.81]), "score"),
        (runs("CoPG", [0.1, 0.11], regret=0.9), runs("CoPG", [0.8, 0.81], regret=0.1), "regret"),
    ):
        found = compare(more, less)
        assert changes(found) == [("better", name, False)]
        assert str(found[0]).endswith("better: update the reference")
        assert changes(compare(less, more)) == [("worse", name, True)]


@pytest.mark.parametrize("task", ["bandit", "dialogues"])
def test_a_policy_that_learned_nothing_is_noticed(task):
    """The committed results of the quick suite, in which each method's policies are replaced by the untrained one."""
    committed = load_records(Path(__file__).parents[1] / "benchmarks" / "results" / "quick" / task)
    (reference,) = (record for record in committed if record["method"] == "reference")
    assert compare(committed, committed) == []
    lazy = [{**record, "metrics": reference["metrics"]} for record in committed]
    noticed = {finding.method for finding in compare(lazy, committed) if finding.change == "worse"}
    # On the bandit the best of two that were drawn badly is worse than the untrained policy
    assert noticed == {record["method"] for record in committed} - {"reference"} - (
        {"SFT on best"} if task == "bandit" else set()
    )


def test_missing_runs_and_new_ones():
    committed = runs("CoPG", [0.5, 0.5, 0.5], regret=0.2) + runs("CoPG", [0.5], setting=1.0)
    found = compare(runs("CoPG", [0.5, 0.5]) + runs("DPO", [0.5]), committed)
    assert [(str(finding), finding.fails) for finding in found] == [
        ("toy, CoPG, learning_rate 0.0001, beta 0.1: missing: seed 2", True),
        ("toy, CoPG, learning_rate 0.0001, beta 0.1: missing: regret", True),
        ("toy, CoPG, learning_rate 0.0001, beta 1: missing: seed 0", True),
        ("toy, DPO, learning_rate 0.0001, beta 0.1: new: seed 0", False),
    ]


def test_runs_that_diverged():
    """No number overlaps with "not a number", which is worse than all, and equal to itself."""
    fine, diverged = runs("CoPG", [0.4, 0.5]), runs("CoPG", [0.4, math.nan])
    assert changes(compare(diverged, fine)) == [("worse", "score", True)]
    assert changes(compare(fine, diverged)) == [("better", "score", False)]
    assert compare(diverged, diverged) == []


def test_untrained_policy_is_not_compared():
    assert compare([untrained()], [untrained(reward=0.9)]) == compare([], [untrained()]) == []


# ---- Pages ----


def rows_of(page, title):
    """Cells of the table below a heading."""
    lines = page.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_reward_at_equal_kl():
    """Seed 0 goes from (0.1, 0.2) by (1, 0.3) to (3, 0.5): 0.25 at 0.55 nats, 0.4 at 2. Seed 1 goes from (0.2, 0.2)
    by (1.5, 0.6) to (2, 0.7): 0.2 + 0.4 × 0.35 / 1.3 at 0.55 nats. The setting that diverged is passed over, and so is
    β = 3, which is worse at more KL; before the first run of a seed nothing is known."""
    records = [
        untrained(),
        record("CoPG", 0.1, 0, kl=3.0, reward=0.5),
        record("CoPG", 0.1, 1, kl=2.0, reward=0.7),
        record("CoPG", 1.0, 0, kl=1.0, reward=0.3),
        record("CoPG", 1.0, 1, kl=1.5, reward=0.6),
        record("CoPG", 5.0, 0, kl=0.1, reward=0.2),
        record("CoPG", 5.0, 1, kl=0.2, reward=0.2),
        record("CoPG", 3.0, 0, kl=1.2, reward=0.2),
        record("CoPG", 3.0, 1, kl=1.7, reward=0.2),
        *(record("CoPG", 10.0, seed, kl=math.nan, reward=math.nan) for seed in (0, 1)),
    ]
    results = Results(records)
    assert "at equal KL" not in task_page(Results(records[:5]))  # two settings are too few for lines between them
    assert [runs[0]["settings"]["beta"] for runs in results.frontier("CoPG")] == [5.0, 1.0, 0.1]
    assert results.rewards_at("CoPG", 0.55) == pytest.approx([0.25, 0.2 + 0.4 * 0.35 / 1.3])
    assert results.rewards_at("CoPG", 2.0) == pytest.approx([0.4, 0.7])
    assert results.rewards_at("CoPG", 2.5) == results.rewards_at("CoPG", 0.15) == []
    header, _, cells = rows_of(task_page(results), "Reward against KL")
    assert header == ["method", "0.2 nats", "0.3 nats", "0.5 nats", "0.7 nats", "1 nats", "1.5 nats", "2 nats"]
    # 0.2 + 0.1 × 0.1 / 0.9 and 0.2 + 0.4 × 0 at 0.2 nats
    assert cells[1] == "0.206 [0.200, 0.211]"


def test_cells():
    """The chosen setting's means on the test split; columns that nothing fills are left out."""
    records = [
        untrained(length=12.0),
        record("CoPG", 0.1, 0, reward=0.5, kl=0.0125, score=0.45, length=10.0),
        record("CoPG", 0.1, 1, reward=0.7, kl=0.0135, score=0.65, length=11.0),
        record("CoPG", 1.0, 0, reward=9.0, validation=0.1, length=11.0),
        record("CoPG", 1.0, 1, reward=9.0, validation=0.1, length=11.0),
        record("RLOO", 0.1, 0, online=True),
    ]
    page = task_page(Results(records, METHODS))
    costs = ["completions trained on", "tokens seen", "wall s", "CPU s", "memory MB"]
    header, _, first, second = rows_of(page, "Offline methods")
    assert header == ["method", "setting", "reward", "KL, nats", "score", "length", *costs]
    assert first == ["reference", "", "0.100", "0.00", "0.100", "12.0", "", "", "", "", ""]
    assert second[:4] == ["CoPG", "beta 0.1", "0.600 [0.500, 0.700]", "0.0130"]
    assert second[4:] == ["0.550 [0.450, 0.650]", "10.5", "200", "1,234", "12", "12", "100"]
    header, _, _, second = rows_of(page, "Online methods")
    assert second[header.index("reward")] == "0.500"  # one seed has no interval
    assert second[header.index("generated")] == "64"
    # The seeds' rewards 0.5 and 0.7 have the standard deviation 0.1 × √2
    assert rows_of(page, "Spread over seeds")[2] == ["CoPG", "0.141", "0.500", "0.700", "2"]


def test_head_of_a_page():
    lines = task_page(
        Results([untrained(), *runs("CoPG", [0.1, 0.2]), *runs("CoPG", [0.1], 1.0), *runs("CoPG", [0.1], 10.0)])
    ).splitlines()
    assert lines[:3] == ["# toy", "", "A toy."]
    for line in (
        "- Budget: every offline method trains on 200 completions. Counted: 200 completions in steps × batch, 1,234"
        " tokens seen.",
        "- Grid of CoPG: learning_rate 0.0001; beta 0.1, 1, 10.",
        "- Chosen by the mean score on the validation split: reward − β × KL, with β = 0.1 per nat.",
        "- Chosen at an end of the grid, beyond which there may be better: CoPG.",
        "- Seeds: 0, 1.",
        "- Versions: torch 2.0.",
        "- Machine: cpus 2.",
    ):
        assert line in lines


def test_best_are_bold(tmp_path):
    """On `toy` CoPG is best with 0.4 to 0.6, A-LoL reaches into that and DPO does not. On `exact` less regret is
    better."""
    records = [untrained(), *runs("CoPG", [0.4, 0.6]), *runs("A-LoL", [0.3, 0.45]), *runs("DPO", [0.1, 0.3])]
    exact = [untrained(regret=0.5), *runs("CoPG", [0.9, 0.9], regret=0.2), *runs("DPO", [0.1, 0.1], regret=0.001)]
    records += [{**one, "task": "exact"} for one in exact]
    for i, one in enumerate(records):
        write_record(one, tmp_path / one["task"] / f"{i}.json")
    write_tables(tmp_path)
    table = (tmp_path / "README.md").read_text().splitlines()[4:]
    assert table == [
        "| method | [exact](exact/README.md): regret | [toy](toy/README.md): score |",
        "| --- | ---: | ---: |",
        "| reference | 0.500 | 0.100 |",
        "| A-LoL |  | **0.375 [0.300, 0.450]** |",
        "| CoPG | 0.200 [0.200, 0.200] | **0.500 [0.400, 0.600]** |",
        "| DPO | **0.00100 [0.00100, 0.00100]** | 0.200 [0.100, 0.300] |",
    ]


def test_all_methods_on_two_tasks(tmp_path):
    """All methods are there, in their order, and the records' order is not seen."""
    records = synthetic()
    for i, one in enumerate(records):
        write_record(one, tmp_path / one["task"] / f"{i}.json")
    write_tables(tmp_path)
    for task in ("bandit", "dialogues"):
        page = (tmp_path / task / "README.md").read_text()
        assert page == task_page(Results([one for one in reversed(records) if one["task"] == task], METHODS))
        tables = {kind: rows_of(page, f"{kind} methods") for kind in ("Offline", "Online")}
        assert [row[0] for table in tables.values() for row in table[3:]] == list(METHODS)
        assert ("regret" in tables["Online"][0]) == (task == "bandit")
        for name in ("frontier", "curves"):
            assert (tmp_path / task / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pages_of_runs_that_diverged(tmp_path):
    """They are shown as they are, and never as the best."""
    bad = runs("CoPG", [math.nan, 0.5], kl=math.nan, reward=math.nan)
    for i, one in enumerate([untrained(), *bad, *runs("DPO", [0.3, 0.4])]):
        write_record(one, tmp_path / "toy" / f"{i}.json")
    write_tables(tmp_path)
    overview = (tmp_path / "README.md").read_text()
    assert "| CoPG | nan [nan, nan] |" in overview and "| DPO | **0.350 [0.300, 0.400]** |" in overview
