"""
Every method on the same work, from the root of the repository:

    python -m benchmarks.run --suite quick    # minutes: has a method become worse than in the committed results?
    python -m benchmarks.run --suite full     # a night: tables and plots under benchmarks/results/full
    python -m benchmarks.run --suite speed    # what a step costs beside SFT's, or GRPO's

A task of your own, from a file (see OWN_TASK.md):

    python -m benchmarks.run --tasks my_task.py --methods "SFT on best" DPO A-LoL CoPG --output results

Each run is a process of its own, on one thread. A run of the full suite that has a record is not run again, so that
the same command goes on where it was stopped. Some tasks need a model or data, and are left out where these are not
given: STORIES260K for the stories, BENCHMARK_MODEL (SmolLM2-135M-Instruct) and BENCHMARK_DATA for `gsm8k` and `hh`.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any


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
    Plan("stories"),
    Plan("stories_k2", methods=GROUP_SIZES),
    Plan("stories_k4", methods=GROUP_SIZES),
    Plan("gsm8k"),
    Plan("hh"),
]
SUITES = {"quick": QUICK, "full": FULL}


class Pool:
    """Processes that run one thing each, with everything imported."""

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.executor = ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1)
        self.errors: list[str] = []

    def finished(self, futures: Mapping[Future, str]) -> Iterator[tuple[str, Any]]:
        """Names and results as they come. What failed is said, and kept in `errors`."""
        for done, future in enumerate(as_completed(futures), start=1):
            name = futures[future]
            try:
                result = future.result()
            except Exception as error:
                self.errors.append(name)
                print(f"[{done}/{len(futures)}] {name} FAILED", flush=True)
                traceback.print_exception(error)
                continue
            print(f"[{done}/{len(futures)}] {name}{_in_short(result)}", flush=True)
            yield name, result


def _logged(function: Callable[[Any], Any], run: Any, log: Path) -> Any:
    """What a process of the pool does: what the run says goes to a file, since several run at once."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    return function(run)


def _in_short(record: Mapping[str, Any] | None) -> str:
    if not record:
        return ""
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
        `list[str]`: Names of the runs that failed.
    """
    from .harness import Run, judge_reference, measure, prepare
    from .methods import METHODS, OLD_PPO
    from .old_ppo import measure_old_ppo
    from .records import write_record

    pool, prepared, runs = Pool(workers), {}, {}
    for plan in plans:
        first = Run(plan.task, "reference", {}, 0, str(work_dir), plan.overrides, sabotage, old_ppo and str(old_ppo))
        task = first.load_task()
        if task.missing:
            print(f"Left out: {task.missing}", flush=True)
            continue
        folder = output / task.name
        planned = {}
        for name in plan.methods or plan.settings or METHODS:
            method = METHODS[name]
            if name in task.without or (method.is_online and not task.num_completions):
                continue
            if name == OLD_PPO and (old_ppo is None or task.importable_reward is None):
                continue
            grid = [plan.settings[name]] if plan.settings else task.grid(method.has_beta, method.is_online)
            for seed in plan.seeds or task.seeds:
                for settings in grid:
                    run = replace(first, method=name, settings=dict(settings), seed=seed)
                    planned[folder / f"{run.name}.json"] = run
        planned = {path: run for path, run in planned.items() if not path.exists()}
        seeds = sorted({run.seed for run in planned.values()})
        if planned:
            log = work_dir / "logs" / task.name / "prepare.txt"
            prepared[pool.executor.submit(_logged, partial(prepare, seeds=seeds), first, log)] = f"{task.name}: ready"
        if not (folder / "reference.json").exists():
            runs[folder / "reference.json"] = (judge_reference, first)
        runs |= {path: (measure_old_ppo if run.method == OLD_PPO else measure, run) for path, run in planned.items()}
    for _ in pool.finished(prepared):
        pass
    if pool.errors:
        return pool.errors
    futures = {}
    for path, (function, run) in runs.items():
        name = path.relative_to(output).with_suffix("")
        log = work_dir / "logs" / f"{name}.txt"
        futures[pool.executor.submit(_logged, function, run, log)] = str(name)
    for name, record in pool.finished(futures):
        path = output / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(record, path)
    pool.executor.shutdown()
    return pool.errors


def check(output: Path, committed: Path, methods: Iterable[str]) -> bool:
    """Say what is different from the committed results; whether nothing is worse."""
    from .records import compare, load_records

    before = [record for record in load_records(committed) if record["method"] in methods]
    findings = compare([record for record in load_records(output) if record["method"] in methods], before)
    for finding in findings:
        print(("WORSE  " if finding.change == "worse" else "       ") + str(finding))
    failed = not before or any(finding.fails for finding in findings)
    print(f"Compared with {committed.relative_to(RESULTS.parent.parent)}: {'FAILED' if failed else 'as good'}.")
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


def main() -> None:
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
    args = parser.parse_args()
    # Before torch is imported, here and in the processes to come
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

    if args.suite == "speed":
        from .speed import run_speed

        run_speed(args.output or RESULTS / "speed", methods=args.methods)
        return
    import torch

    from .tables import write_tables

    is_quick = args.suite == "quick"
    committed = RESULTS / args.suite
    output = args.output or (args.work_dir / "quick_results" if is_quick and not args.update else committed)
    if is_quick:  # what an earlier version of the code left says nothing of this one
        shutil.rmtree(output, ignore_errors=True)
    if args.sabotage:
        args.methods = [name for name in SABOTAGED if not args.methods or name in args.methods]
    plans = select(SUITES[args.suite], args)
    workers = args.workers or (1 if torch.cuda.is_available() else os.cpu_count())
    work_dir = args.work_dir / args.suite
    failed = run_plans(plans, output, work_dir, workers=workers, sabotage=args.sabotage, old_ppo=args.trl_1_12)
    if args.sabotage:
        sys.exit(not check_sabotage(output, committed))
    if output.exists():
        write_tables(output)
        print(f"Records, tables and plots are in {output}.")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")
    if is_quick and not args.update:
        methods = args.methods or {name for plan in plans for name in plan.settings or ()}
        sys.exit(not check(output, committed, methods))


if __name__ == "__main__":
    main()
