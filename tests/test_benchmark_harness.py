"""The benchmarks' harness: what a run trains on, what its record says, and what happens to runs that are there."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from benchmarks import methods
from benchmarks.harness import Run, config_for, judge_reference, measure, prepare
from benchmarks.methods import METHODS
from benchmarks.old_ppo import measure_old_ppo
from benchmarks.run import FULL, QUICK, Job, Plan, check_sabotage, make_parser, run_plans, select, work_off, wrong
from benchmarks.task import TASKS, load_task


SMALL = {"num_sequences": 640, "num_completions": 320, "num_rows": 64}
COPG = {"learning_rate": 3e-3, "beta": 0.5}


def run_of(folder: Path, method: str = "CoPG", seed: int = 0, settings: dict | None = None, **overrides) -> Run:
    return Run("bandit", method, settings or COPG, seed, str(folder), {**SMALL, **overrides})


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    prepare(run_of(folder), [0, 1])
    return folder


@pytest.fixture
def groups():
    return Dataset.from_dict({
        "prompt": ["p", "q"],
        "completions": [["a", "b"], ["c", "d"]],
        "rewards": [[1.0, 3.0], [5.0, 3.0]],
    })  # fmt: skip


# ---- What is trained on ----


def test_rows(groups, work_dir):
    """The mean of 1, 3, 5, 3 is 3, and labels say what is above it; unit rewards are (R − 1) / 4."""
    task = load_task("bandit", work_dir)
    rows = {name: getattr(methods, name)(task, groups, 0) for name in ("everything", "best", "labelled", "prompts")}
    assert rows["everything"]["completion"][:] == ["a", "b", "c", "d"]
    assert rows["everything"]["prompt"][:] == ["p", "p", "q", "q"]
    assert rows["best"].to_dict() == {"prompt": ["p", "q"], "completion": ["b", "c"]}
    labels = dict(zip(rows["labelled"]["completion"], rows["labelled"]["label"], strict=True))
    assert labels == {"a": False, "b": False, "c": True, "d": False}
    assert rows["prompts"].column_names == ["prompt"]
    assert methods.with_unit_rewards(task, groups, 0)["rewards"][:] == [[0.0, 0.5], [1.0, 0.5]]


def test_preferences_are_the_best_against_the_worst(groups):
    from benchmarks.task import Task

    tied = Dataset.from_list([*groups, {"prompt": "r", "completions": ["e", "f"], "rewards": [2.0, 2.0]}])
    pairs = Task.pairs(None, tied, 0)
    assert pairs.to_dict() == {"prompt": ["p", "q"], "chosen": ["b", "c"], "rejected": ["a", "d"]}


@pytest.mark.parametrize("name", [name for name in METHODS if name != methods.OLD_PPO])
def test_every_method_has_the_budget(name, work_dir, tmp_path):
    """Completions of all optimizer steps: as many as the task says, passes over a generated batch aside."""
    method, run = METHODS[name], run_of(work_dir)
    task = run.load_task()
    for settings in task.grid(method.has_beta, method.is_online):
        fields = config_for(method, task, replace(run, settings=settings), group_size=2)
        config = method.config_class(str(tmp_path), **fields)  # a field that does not exist is an error
        assert config.learning_rate == settings["learning_rate"] and config.seed == run.seed
        if method.is_online:
            batches = config.max_steps / getattr(config, "num_iterations", 1)
            assert batches * config.generation_batch_size == task.num_completions
        else:
            per_step = config.per_device_train_batch_size * (method.completions_per_row or 2)
            assert config.max_steps * per_step == task.num_sequences


@pytest.mark.parametrize("plan", [*QUICK, *FULL], ids=lambda plan: plan.task)
def test_suites_name_what_there_is(plan, tmp_path):
    assert plan.task in TASKS
    assert set(plan.methods or plan.settings or ()) <= set(METHODS)
    task = Run(plan.task, "reference", {}, 0, str(tmp_path), plan.overrides).load_task()
    assert task.description.endswith(".") and task.without <= set(METHODS)


# ---- A run ----


def test_a_run_and_its_record(work_dir):
    record = measure(run_of(work_dir))
    reference = judge_reference(run_of(work_dir))
    assert json.loads(json.dumps(record)) == record
    assert record["counts"] == {
        "sequences": 640, "tokens": pytest.approx(640 * 3, rel=0.5), "generated": 0, "generated_tokens": 0,
        "reward_calls": 128, "rows": 128, "kept_fraction": None,
    }  # fmt: skip
    assert [point["completions"] for point in record["curve"]] == [128, 320, 512, 640]
    regrets = [reference["metrics"]["test"]["regret"], *(point["regret"] for point in record["curve"])]
    assert regrets[0] == pytest.approx(0.2919, abs=1e-4) and regrets[-1] < regrets[0] / 2
    test = record["metrics"]["test"]
    assert test["score"] == pytest.approx(test["reward"] - 0.5 * test["kl"])
    assert min(record["costs"][name] for name in ("wall_s", "cpu_s", "peak_memory_mb")) > 0
    assert {"trl", "trl-lol", "torch"} <= record["versions"].keys() and record["config"]["beta"] == 0.5
    # The same again, and, as the control, another seed
    assert measure(run_of(work_dir))["metrics"] == record["metrics"]
    assert measure(run_of(work_dir, seed=1))["metrics"] != record["metrics"]


def test_an_online_run_counts_what_it_generates(work_dir):
    settings = {"learning_rate": 1e-3, "beta": 0.5}
    counts = measure(run_of(work_dir, "PPO", settings=settings))["counts"]
    assert counts["generated"] == counts["generated_tokens"] == counts["reward_calls"] == 320
    assert counts["sequences"] == 4 * 320  # passes


def test_the_old_ppo_is_judged_like_the_others(work_dir, monkeypatch):
    """320 completions are 5 batches of 64, and the curve has points after 1, 2, 4 and 5. What would be trained in
    another environment is the reference here, whose regret is that of the untrained policy."""
    specs = []

    def train(python: Path, spec: dict, folder: Path) -> dict:
        specs.append(json.loads(json.dumps(spec)))
        policies = {batches * spec["batch_size"]: spec["model"] for batches in spec["judged_batches"]}
        return {"policies": policies, "costs": {"wall_s": 1.0}, "updates_per_batch": 4, "versions": {"trl": "1.12.0"}}

    monkeypatch.setattr("benchmarks.old_ppo.train_old_ppo", train)
    settings = {"learning_rate": 1e-3, "beta": 0.5}
    run = run_of(work_dir, methods.OLD_PPO, settings=settings, importable_reward="module:function")
    record = measure_old_ppo(replace(run, old_ppo="python"))
    assert json.loads(json.dumps(record)) == record and record["settings"] == settings
    assert record["metrics"]["test"]["regret"] == pytest.approx(0.2919, abs=1e-4)
    assert [point["completions"] for point in record["curve"]] == [64, 128, 256, 320]
    assert record["counts"]["sequences"] == 4 * 320 and record["versions"]["trl"] == "1.12.0"
    (spec,) = specs
    assert spec["settings"] == {"learning_rate": 1e-3, "kl_coef": 0.5} and spec["reward"] == "module:function"
    ids = run.load_task().tokenizer.apply_chat_template(spec["prompts"][0], add_generation_prompt=True)["input_ids"]
    assert spec["prompt_ids"] == [ids] * 64


def test_an_attribute_that_a_task_has_not(work_dir):
    with pytest.raises(ValueError, match="no attribute 'num_sequence' to set"):
        run_of(work_dir, num_sequence=1).load_task()


# ---- A suite ----


def plan_of(seeds: tuple[int, ...], **settings: dict[str, float]) -> Plan:
    return Plan("bandit", seeds=seeds, settings=settings, overrides=SMALL)


def test_what_has_a_record_is_not_run_again(work_dir, tmp_path, capfd):
    plan = plan_of((0, 1), CoPG=COPG)
    assert run_plans([plan], tmp_path, work_dir, workers=2) == []
    records = {path.name: path.read_text() for path in (tmp_path / "bandit").iterdir()}
    first, second = "CoPG-learning_rate=0.003-beta=0.5-0.json", "CoPG-learning_rate=0.003-beta=0.5-1.json"
    assert records.keys() == {first, second, "reference.json"}
    (tmp_path / "bandit" / second).unlink()
    capfd.readouterr()
    assert run_plans([plan], tmp_path, work_dir, workers=2) == []
    assert "[1/1]" in (said := capfd.readouterr().out) and first not in said
    again = {path.name: json.loads(path.read_text()) for path in (tmp_path / "bandit").iterdir()}
    assert again[second]["metrics"] == json.loads(records[second])["metrics"]
    # A process of its own gives what this one does
    assert measure(run_of(work_dir))["metrics"] == again[first]["metrics"]


def test_a_record_of_another_budget_is_not_taken(work_dir, tmp_path):
    plan = plan_of((0,), CoPG=COPG)
    run_plans([plan], tmp_path, work_dir, workers=1)
    smaller = replace(plan, overrides={**SMALL, "num_sequences": 128})
    with pytest.raises(ValueError, match=r"is of a run with another num_sequences\. Choose another `--output`"):
        run_plans([smaller], tmp_path, work_dir, workers=1)
    with pytest.raises(ValueError, match="another sabotage"):
        run_plans([plan], tmp_path, work_dir, workers=1, sabotage=True)


def test_what_another_version_of_a_task_has_made_is_not_taken(work_dir):
    with pytest.raises(ValueError, match=r"of other overrides\. Delete it"):
        prepare(run_of(work_dir, num_rows=32), [0])


def test_a_process_that_dies_takes_no_other_along(tmp_path, capfd):
    jobs = [Job("dies", os._exit, 9, tmp_path / "dies.txt"), Job("lives", print, "hello", tmp_path / "lives.txt")]
    assert [job.name for job in work_off(jobs, workers=1)] == ["dies"]
    assert (tmp_path / "lives.txt").read_text() == "hello\n"
    assert capfd.readouterr().out.splitlines() == [
        f"[1/2] dies FAILED (9), see {tmp_path / 'dies.txt'}",
        "[2/2] lives",
    ]


def test_a_run_that_fails_is_named_and_leaves_no_record(work_dir, tmp_path):
    failed = run_plans([plan_of((0,), CoPG={**COPG, "beta": -1.0})], tmp_path, work_dir, workers=1)
    assert len(failed) == 1 and "CoPG" in failed[0]
    assert [path.name for path in (tmp_path / "bandit").iterdir()] == ["reference.json"]


def test_a_turned_loss_is_noticed(work_dir, tmp_path):
    """And the same loss as it is is not: the control of the control."""
    plan = plan_of((0, 1), CoPG=COPG)
    run_plans([plan], tmp_path / "committed", work_dir, workers=2)
    assert not check_sabotage(tmp_path / "committed", tmp_path / "committed")
    run_plans([plan], tmp_path / "turned", work_dir, workers=2, sabotage=True)
    assert check_sabotage(tmp_path / "turned", tmp_path / "committed")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--suite", "quick", "--tasks", "bandit", "--methods", "CoPG"], None),
        (["--suite", "quick", "--update"], None),
        (["--tasks", "my_task.py", "--methods", "DPO", "--output", "results"], None),
        (["--methods", "A-Lol"], "unknown method 'A-Lol'. Known: SFT on all, "),
        (["--suite", "quick", "--tasks", "stories"], "the quick suite has no task 'stories'"),
        (["--suite", "quick", "--methods", "KTO"], "the quick suite has no method 'KTO'"),
        (["--sabotage"], "are for `--suite quick`"),
        (["--suite", "quick", "--update", "--sabotage"], "leave out everything else"),
        (["--suite", "quick", "--update", "--seeds", "0"], "leave out everything else"),
        (["--suite", "speed", "--methods", "PPO"], "it needs an `--output` of its own"),
    ],
)
def test_a_wrong_command_line(arguments, problem):
    found = wrong(make_parser().parse_args(arguments))
    assert found is None if problem is None else problem in found


def test_the_command_line_chooses():
    class Arguments:
        tasks, methods, seeds = ["bandit", "my_task.py"], ["CoPG", "SFT on all"], None

    quick, own = select(QUICK, Arguments)
    assert list(quick.settings) == ["CoPG"] and quick.seeds == (0, 1, 2)
    assert own == Plan("my_task.py", methods=["CoPG", "SFT on all"])
