"""
Every method on the same work, from the root of the repository:

    python -m benchmarks.run --suite quick    # minutes: has a method become worse than in the committed results?
    python -m benchmarks.run --suite full     # hours: tables and plots under benchmarks/results/full
    python -m benchmarks.run --suite speed    # what a step costs beside SFT's, or GRPO's

A task of your own, from a file (see OWN_TASK.md):

    python -m benchmarks.run --tasks my_task.py --methods "SFT on best" DPO A-LoL CoPG --output results

Each run is a process of its own, on one thread. A run of the full suite that has a record is not run again, so that
the same command goes on where it was stopped. Some tasks need a model or data, and are left out where these are not
given: STORIES260K for the stories, BENCHMARK_MODEL (SmolLM2-135M-Instruct) and BENCHMARK_DATA for `gsm8k` and `hh`.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .harness import Run
    from .task import Task


RESULTS = Path(__file__).parent / "results"
PRELOADED = [
    "benchmarks.harness", "benchmarks.tasks.exact", "benchmarks.tasks.dialogues", "trl_lol.offline.alol_trainer",
    "trl_lol.offline.copg_trainer", "trl_lol.online.apa_trainer", "trl_lol.online.drpo_trainer",
]  # fmt: skip
SABOTAGED = ("A-LoL", "CoPG", "PPO", "APA")


@dataclass(frozen=True)
class Plan:
    """
    What a suite does on a task.

    Args:
        task (`str`):
            Name of the task.
        methods (`Sequence[str]`, *optional*):
            Names of the methods. If `None`, all that the task has a use for.
        seeds (`Sequence[int]`, *optional*):
            Seeds. If `None`, those of the task.
        settings (`dict[str, dict[str, float]]`, *optional*):
            The one setting of each method. If not given, the task's grid.
        overrides (`dict[str, Any]`, *optional*):
            Attributes of the task to set.
    """

    task: str
    methods: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    settings: Mapping[str, Mapping[str, float]] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


QUICK = [
    Plan(
        "bandit",
        seeds=(0, 1, 2),
        settings={
            "SFT on best": {"learning_rate": 1e-3},
            "A-LoL": {"learning_rate": 1e-3},
            "CoPG": {"learning_rate": 1e-3, "beta": 0.5},
            "IPO": {"learning_rate": 1e-3, "beta": 0.5},
            "RLOO": {"learning_rate": 1e-3, "beta": 0.5},
            "PPO": {"learning_rate": 1e-3, "beta": 0.5},
            "APA": {"learning_rate": 1e-3, "beta": 0.5},
        },
    ),
    Plan(
        "dialogues",
        seeds=(0, 1, 2),
        settings={
            "SFT on best": {"learning_rate": 5e-4},
            "A-LoL": {"learning_rate": 5e-4},
            "CoPG": {"learning_rate": 2e-4, "beta": 0.3},
            "DPO": {"learning_rate": 2e-4, "beta": 0.3},
            "PPO": {"learning_rate": 3e-4, "beta": 0.3},
        },
        overrides={"num_prompts": 300, "reference_steps": 250, "num_sequences": 640, "num_completions": 384},
    ),
]
GROUP_SIZES = ("CoPG", "DPO", "IPO")
FULL = [
    Plan("bandit"),
    Plan("two_steps"),
    Plan("dialogues"),
    Plan("dialogues_long", methods=("PPO", "APA")),
    Plan("stories"),
    Plan("stories_k2", methods=GROUP_SIZES),
    Plan("stories_k4", methods=GROUP_SIZES),
    Plan("gsm8k"),
    Plan("hh"),
]
SUITES = {"quick": QUICK, "full": FULL}


@dataclass(frozen=True)
class Job:
    """A process to come: a function of a run, the file for what it returns, and the file for what it says."""

    name: str
    function: Callable[[Any], Any]
    run: Any
    log: Path
    record: Path | None = None


def _work(job: Job) -> None:
    """What a process does, on one thread. Several run at once, so what each says goes to a file of its own."""
    import torch

    from .records import write_record

    torch.set_num_threads(1)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    result = job.function(job.run)
    if job.record is not None:
        job.record.parent.mkdir(parents=True, exist_ok=True)
        write_record(result, job.record)


def work_off(jobs: Sequence[Job], workers: int) -> list[Job]:
    """
    Do every job in a process of its own, which begins with everything imported.

    Args:
        jobs (`Sequence[Job]`):
            What to do.
        workers (`int`):
            Number of processes at a time.

    Returns:
        `list[Job]`: Those that failed. One that dies takes no other along.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting, running, failed = list(reversed(jobs)), {}, []
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop()
            process = context.Process(target=_work, args=(job,))
            process.start()
            running[process.sentinel] = process, job
        for sentinel in connection.wait(running):
            process, job = running.pop(sentinel)
            process.join()
            done = f"[{len(jobs) - len(waiting) - len(running)}/{len(jobs)}] {job.name}"
            if process.exitcode:
                failed.append(job)
                said = job.log.read_text().splitlines() if job.log.exists() else []
                print(f"{done} FAILED ({process.exitcode}), see {job.log}", *said[-20:], sep="\n    ", flush=True)
            else:
                print(done + (_in_short(json.loads(job.record.read_text())) if job.record else ""), flush=True)
    return failed


def _in_short(record: Mapping[str, Any]) -> str:
    test = record["metrics"]["test"]
    shown = [f"{name} {test[name]:.3f}" for name in ("reward", "kl", "score", "regret") if name in test]
    if "costs" in record:
        shown.append(f"{record['costs']['wall_s']:.0f} s")
    return ": " + ", ".join(shown)


def run_plans(
    plans: Iterable[Plan],
    output: Path,
    work_dir: Path,
    *,
    workers: int,
    sabotage: bool = False,
    old_ppo: Path | None = None,
) -> list[str]:
    """
    Run what has no record yet.

    Args:
        plans (`Iterable[Plan]`):
            What to run.
        output (`Path`):
            Folder of the records, in which each task has its own.
        work_dir (`Path`):
            Where the tasks keep what they make.
        workers (`int`):
            Number of processes at a time.
        sabotage (`bool`, *optional*, defaults to `False`):
            Whether to turn the losses' sign.
        old_ppo (`Path`, *optional*):
            Python of an environment with TRL 1.12, whose PPO is left out otherwise.

    Returns:
        `list[str]`: Names of what failed.

    Raises:
        `ValueError`: If there is a record of a run with another budget.
    """
    from .harness import check_record, judge_reference, measure, prepare
    from .methods import OLD_PPO
    from .old_ppo import measure_old_ppo

    preparing, jobs = [], []
    for plan in plans:
        first, task, planned = plan_runs(plan, work_dir, sabotage, old_ppo)
        if task.missing:
            print(f"Left out: {task.missing}", flush=True)
            continue
        new = {}
        for run in [first, *planned]:
            path = output / task.name / f"{run.name}.json"
            if path.exists():
                check_record(json.loads(path.read_text()), run, task, path)
            else:
                new[path] = run
        if new:
            seeds = sorted({run.seed for run in new.values()})
            log = work_dir / "logs" / task.name / "prepare.txt"
            preparing.append(Job(task.name, partial(prepare, seeds=seeds), first, log))
        for path, run in new.items():
            function = judge_reference if run is first else measure_old_ppo if run.method == OLD_PPO else measure
            log = work_dir / "logs" / task.name / f"{path.stem}.txt"
            jobs.append(Job(f"{task.name}/{path.stem}", function, run, log, path))
    unprepared = work_off(preparing, workers)
    tasks = {job.name for job in unprepared}
    failed = work_off([job for job in jobs if job.name.partition("/")[0] not in tasks], workers)
    return [job.name for job in (*unprepared, *failed)]


def plan_runs(
    plan: Plan, work_dir: Path, sabotage: bool = False, old_ppo: Path | None = None
) -> tuple["Run", "Task", list["Run"]]:
    """The run that judges the untrained policy, the task, and the runs of its methods."""
    from .harness import Run
    from .methods import METHODS, OLD_PPO

    first = Run(plan.task, "reference", {}, 0, str(work_dir), plan.overrides, sabotage, old_ppo and str(old_ppo))
    task = first.load_task()
    seeds = plan.seeds or task.seeds
    first, planned = replace(first, seed=seeds[0]), []
    for name in plan.methods or plan.settings or METHODS:
        method = METHODS[name]
        if name == OLD_PPO and (old_ppo is None or task.importable_reward is None):
            reason = "needs `--trl_1_12`" if old_ppo is None else "needs an `importable_reward`"
        elif name in task.without:
            reason = "is not for this task"
        elif method.is_online and not task.num_completions:
            reason = "has no reward for new completions"
        else:
            grid = [plan.settings[name]] if plan.settings else task.grid(method.has_beta, method.is_online)
            planned += [
                replace(first, method=name, settings=dict(point), seed=seed) for seed in seeds for point in grid
            ]
            continue
        if plan.methods:
            print(f"Left out: {name} on {task.name} {reason}.", flush=True)
    return first, task, planned


def check(output: Path, committed: Path, plans: Iterable[Plan], work_dir: Path) -> bool:
    """Say what is different from the committed results of the same runs; whether nothing is worse."""
    from .records import compare, load_records

    planned = {
        (task.name, run.method, run.seed) for _, task, runs in (plan_runs(p, work_dir) for p in plans) for run in runs
    }
    before, now = (
        [
            record
            for record in load_records(folder)
            if (record["task"], record["method"], record.get("seed")) in planned
        ]
        for folder in (committed, output)
    )
    findings = compare(now, before)
    for finding in findings:
        print(("FAILED " if finding.fails else "       ") + str(finding))
    failed = not before or any(finding.fails for finding in findings)
    print(f"Compared with {len(before)} committed runs: {'FAILED' if failed else 'as good'}.")
    return not failed


def check_sabotage(output: Path, committed: Path) -> bool:
    """Whether every method whose loss was turned around is found to be worse."""
    from .records import compare, load_records

    records = load_records(output)
    findings = compare(records, load_records(committed))
    trained = {(record["task"], record["method"]) for record in records if record["method"] in SABOTAGED}
    unnoticed = trained - {(f.task, f.method) for f in findings if f.change == "worse"}
    for task, method in sorted(trained):
        print(f"{task}, {method}: the turned loss is {'NOT noticed' if (task, method) in unnoticed else 'noticed'}.")
    return bool(trained) and not unnoticed


def select(plans: Iterable[Plan], args: argparse.Namespace) -> list[Plan]:
    """What the command line leaves of a suite, or makes of tasks that are in none."""
    plans = list(plans)
    if args.tasks:
        known = {plan.task: plan for plan in plans}
        plans = [known.get(task, Plan(task)) for task in args.tasks]
    chosen = []
    for plan in plans:
        methods, settings = plan.methods, plan.settings
        if args.methods and settings is not None:
            settings = {name: value for name, value in settings.items() if name in args.methods}
        elif args.methods:
            methods = [name for name in args.methods if methods is None or name in methods]
        if settings != {} and methods != []:
            chosen.append(replace(plan, methods=methods, settings=settings, seeds=args.seeds or plan.seeds))
    return chosen


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=[*SUITES, "speed"], default="full")
    parser.add_argument(
        "--tasks", nargs="+", help="names, or files with tasks of your own; all of the suite by default"
    )
    parser.add_argument("--methods", nargs="+", help="names, as in the tables; all of the suite by default")
    parser.add_argument("--seeds", nargs="+", type=int, help="those of the tasks by default")
    parser.add_argument(
        "--output", type=Path, help="folder of the records; benchmarks/results/full, or one of work_dir"
    )
    parser.add_argument("--work_dir", type=Path, default=Path("runs/benchmarks"), help="for policies and logged data")
    parser.add_argument("--workers", type=int, help="processes at a time; one for each core, or one on a GPU")
    parser.add_argument("--update", action="store_true", help="quick: make these the committed results")
    parser.add_argument("--sabotage", action="store_true", help="quick: turn the losses; succeed if that is noticed")
    parser.add_argument("--trl_1_12", type=Path, help="Python of an environment with trl==1.12.0, for its PPO")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    # Before torch is imported, here and in the processes to come
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    if problem := wrong(args):
        parser.error(problem)
    if args.suite == "speed":
        from . import shared_prompts
        from .speed import run_speed

        run_speed(args.output or RESULTS / "speed", methods=args.methods)
        if not args.methods:
            folder = args.output / "shared_prompts" if args.output else RESULTS / "shared_prompts"
            shared_prompts.run(folder, ["HH", "TL;DR"], steps=4, rounds=2)
        return
    import torch

    from .tables import write_tables

    is_quick = args.suite == "quick"
    committed, work_dir = RESULTS / args.suite, args.work_dir / args.suite
    output = args.output or (args.work_dir / "quick_results" if is_quick and not args.update else committed)
    if args.sabotage:
        args.methods = [name for name in SABOTAGED if not args.methods or name in args.methods]
        output = args.output or args.work_dir / "sabotage_results"
    plans = select(SUITES[args.suite], args)
    if is_quick:  # what an earlier version of the code has made says nothing of this one
        for task in (plan_runs(plan, work_dir)[1] for plan in plans):
            for path in (output / task.name).glob("*.json"):
                path.unlink()
            shutil.rmtree(task.folder, ignore_errors=True)
    workers = args.workers or (1 if torch.cuda.is_available() else os.cpu_count())
    failed = run_plans(plans, output, work_dir, workers=workers, sabotage=args.sabotage, old_ppo=args.trl_1_12)
    if failed:
        print(f"Failed: {', '.join(failed)}.", flush=True)
    if args.sabotage:
        sys.exit(not check_sabotage(output, committed) or bool(failed))
    if output.exists():
        write_tables(output)
        print(f"Records, tables and plots are in {output}.", flush=True)
    is_as_good = not is_quick or args.update or check(output, committed, plans, work_dir)
    sys.exit(bool(failed) or not is_as_good)


def wrong(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, if anything."""
    from .methods import METHODS

    is_quick, filters = args.suite == "quick", args.tasks or args.methods or args.seeds
    if unknown := set(args.methods or ()) - set(METHODS):
        return f"unknown method {unknown.pop()!r}. Known: {', '.join(METHODS)}"
    if is_quick and (unknown := set(args.tasks or ()) - {plan.task for plan in QUICK}):
        return f"the quick suite has no task {unknown.pop()!r}, which is for `--suite full`"
    if is_quick and (unknown := set(args.methods or ()) - {name for plan in QUICK for name in plan.settings}):
        return f"the quick suite has no method {unknown.pop()!r}, which is for `--suite full`"
    if (args.update or args.sabotage) and not is_quick:
        return "`--update` and `--sabotage` are for `--suite quick`"
    if args.update and (args.sabotage or args.output or filters):
        return "`--update` commits the whole quick suite: leave out everything else"
    if args.suite == "speed" and (args.tasks or args.seeds or (args.methods and not args.output)):
        return "`--suite speed` has no tasks and seeds, and with `--methods` it needs an `--output` of its own"
    return None


if __name__ == "__main__":
    main()
