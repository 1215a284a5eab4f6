"""One method on one task with one seed: trained, judged, and written down."""

import hashlib
import importlib
import inspect
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import disable_caching
from transformers import Trainer, set_seed

from trl_lol._cache import written_beside

from .meter import Meter
from .methods import METHODS, Method
from .records import REFERENCE
from .task import Task, load_task


GRIDS = {"learning_rates", "betas", "beta_learning_rates", "online_betas", "online_learning_rates", "description"}
# Where the trainers find their losses: what `sabotage` turns around
LOSSES = {
    "trl_lol.offline.alol_trainer": ["alol_loss"],
    "trl_lol.offline.copg_trainer": ["copg_loss"],
    "trl_lol.online.apa_trainer": ["apa_loss", "awr_loss"],
    "trl_lol.online.ppo_trainer": ["ppo_policy_loss"],
}


@dataclass(frozen=True)
class Run:
    """
    What is to be run, and what its result depends on.

    Args:
        task, method (`str`):
            Name of the task, or path of its file, and name of the method.
        settings (`dict[str, float]`):
            Fields of the config, one of the task's grid.
        seed (`int`):
            Seed of the logged data and of the training.
        work_dir (`str`):
            Where the tasks keep what they make.
        overrides (`dict[str, Any]`):
            Attributes of the task to set.
        sabotage (`bool`, *optional*, defaults to `False`):
            Whether the losses' sign is turned, to see that this is noticed.
        old_ppo (`str`, *optional*):
            Python of an environment with TRL 1.12.
    """

    task: str
    method: str
    settings: Mapping[str, float]
    seed: int
    work_dir: str
    overrides: Mapping[str, Any]
    sabotage: bool = False
    old_ppo: str | None = None

    @property
    def name(self) -> str:
        """File name of the result."""
        if self.method == REFERENCE:
            return REFERENCE
        settings = [f"{name}={value:g}" for name, value in self.settings.items()]
        return "-".join([self.method.replace(" ", "_"), *settings, str(self.seed)])

    def load_task(self) -> Task:
        task = load_task(self.task, Path(self.work_dir))
        for name, value in self.overrides.items():
            if not hasattr(task, name):
                raise ValueError(f"Task {self.task!r} has no attribute {name!r} to set.")
            setattr(task, name, value)
        return task


def check_record(record: Mapping[str, Any], run: Run, task: Task, path: Path) -> None:
    """
    Check that a record is of the run that would be made now.

    Args:
        record (`dict[str, Any]`):
            What is there.
        run ([`Run`]), task ([`~benchmarks.task.Task`]):
            What it must be of.
        path (`Path`):
            Its file.

    Raises:
        `ValueError`: If it is of a run with another budget.
    """
    before, now = record["task_info"], json.loads(json.dumps(info(task)))
    other = [name for name in now if name not in GRIDS and before.get(name) != now[name]]
    if record.get("sabotage", False) != run.sabotage:
        other.append("sabotage")
    if other:
        raise ValueError(
            f"{path} is of a run with another {', '.join(other)}. Choose another `--output`, or delete it."
        )


class CountingReward:
    """A reward function that counts what it scores."""

    __name__ = "reward"

    def __init__(self, reward: Callable[..., list[float | None]]) -> None:
        self.reward = reward
        self.completions = self.tokens = 0

    def __call__(
        self, prompts: list, completions: list, completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        self.completions += len(completions)
        self.tokens += sum(map(len, completion_ids))
        return self.reward(prompts, completions, completion_ids=completion_ids, **columns)


def config_for(method: Method, task: Task, run: Run, group_size: float) -> dict[str, Any]:
    """The fields of the config that are not its defaults. Groups are of `group_size` completions on average."""
    shared = {
        "seed": run.seed,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        **method.settings,
        **run.settings,
    }
    if method.is_online:
        num_batches = task.num_completions // task.generation_batch_size
        return {
            "max_steps": num_batches * method.settings.get("num_iterations", 1),
            "per_device_train_batch_size": task.generation_batch_size,
            "generation_batch_size": task.generation_batch_size,
            "max_completion_length": task.max_completion_length,
            "temperature": 1.0,
            "lr_scheduler_type": "constant",
            **shared,
        }
    caches_reference = hasattr(method.config_class, "precompute_ref_log_probs")
    per_row = method.completions_per_row or group_size
    rows_per_step = max(round(task.batch_size / per_row), 1)
    return {
        "max_steps": max(round(task.num_sequences / (rows_per_step * per_row)), 1),
        "per_device_train_batch_size": rows_per_step,
        "lr_scheduler_type": "cosine",
        "warmup_steps": task.warm_up,
        **({"precompute_ref_log_probs": True} if caches_reference else {}),
        **shared,
    }


def prepare(run: Run, seeds: Sequence[int]) -> None:
    """
    Make what the runs on a task share.

    Args:
        run ([`Run`]):
            One of the runs.
        seeds (`Sequence[int]`):
            Seeds whose logged completions are needed.

    Raises:
        `ValueError`: If something is there that another version of the task has made.
    """
    task = run.load_task()
    stamp = {
        "task": hashlib.sha256(inspect.getsource(type(task)).encode()).hexdigest(),
        "overrides": json.loads(json.dumps(run.overrides)),
    }
    path = task.folder / "made_by.json"
    if path.exists() and json.loads(path.read_text()) != stamp:
        raise ValueError(f"{task.folder} is of another version of the task, or of other overrides. Delete it.")
    task.folder.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        beside.write_text(json.dumps(stamp))
    for seed in seeds:
        task.prepare(seed)


def judge_reference(run: Run) -> dict[str, Any]:
    """The record of the policy that everything starts from."""
    task = run.load_task()
    model = task.reference()
    metrics = {split: judged(task, model, model, split) for split in ("validation", "test")}
    return {"task": task.name, "method": REFERENCE, "metrics": metrics, "task_info": info(task), **circumstances()}


def judged(task: Task, policy: Any, reference: Any, split: str, **kwargs: Any) -> dict[str, Any]:
    policy.eval()
    with torch.no_grad():
        metrics = task.evaluate(policy, reference, split, **kwargs)
    return metrics | {"score": metrics["reward"] - task.beta * metrics["kl"]}


def measure(run: Run) -> dict[str, Any]:
    """
    Train a method on a task and judge what comes of it. Best in a process of its own, whose memory and clock are then
    those of the run.

    Args:
        run ([`Run`]):
            What to run.

    Returns:
        `dict[str, Any]`: The record of the run, see records.py.
    """
    disable_caching()  # of what trainers make of the rows: each run pays for it
    if run.sabotage:
        _turn_losses()
    task, method = run.load_task(), METHODS[run.method]
    groups = task.rows(run.seed)
    rows = method.rows(task, groups, run.seed)
    group_size = fmean(map(len, groups["rewards"]))
    config = config_for(method, task, run, group_size)
    reward = CountingReward(task.reward)
    reference = None if task.peft_config is not None else task.reference()

    def judge(split: str = "validation", brief: bool = True) -> dict[str, Any]:
        was_training = trainer.model.training
        policy = trainer.accelerator.unwrap_model(trainer.model)
        metrics = judged(task, policy, reference, split, brief=brief)
        policy.train(was_training)
        return metrics

    # Completions of an optimizer step
    if method.is_online:
        seen = task.generation_batch_size / method.settings.get("num_iterations", 1)
    else:
        seen = config["per_device_train_batch_size"] * (method.completions_per_row or group_size)
    steps = {round(config["max_steps"] * i / task.num_points) for i in range(1, task.num_points)}
    curve = []
    meter = Meter(
        lambda completions: curve.append(curve_point(completions, judge())),
        {step: round(step * seen) for step in steps},
    )

    def train() -> None:
        nonlocal trainer
        trainer = method.trainer_class(
            task.reference(),
            args=method.config_class(folder, **config),
            train_dataset=rows,
            processing_class=task.tokenizer,
            peft_config=task.peft_config,
            callbacks=[meter],
            **({"reward_funcs": reward} if method.is_online else {}),
        )
        trainer.train()

    trainer: Trainer | None = None
    with tempfile.TemporaryDirectory() as folder:
        set_seed(run.seed)
        costs = meter.measure(train)
        metrics = {split: judge(split, brief=False) for split in ("validation", "test")}
    logs = trainer.state.log_history
    curve.append(curve_point(round(config["max_steps"] * seen), metrics["validation"]))
    return {
        "task": task.name,
        "method": run.method,
        "online": method.is_online,
        "settings": dict(run.settings),
        "seed": run.seed,
        "sabotage": run.sabotage,
        "metrics": metrics,
        "curve": curve,
        "counts": {
            "sequences": round(config["max_steps"] * config["per_device_train_batch_size"] * (
                1 if method.is_online else method.completions_per_row or group_size
            )),
            "tokens": next((log["num_tokens"] for log in reversed(logs) if "num_tokens" in log), None),
            "generated": reward.completions,
            "generated_tokens": reward.tokens,
            "reward_calls": reward.completions if method.is_online else sum(map(len, groups["rewards"])),
            "rows": sum(map(len, rows["completions"])) if "completions" in rows.column_names else len(rows),
            "kept_fraction": next(
                (log["advantages/kept_fraction"] for log in logs if "advantages/kept_fraction" in log), None
            ),
        },
        "costs": costs,
        "config": {"trainer": method.trainer_class.__name__, **config},
        "task_info": info(task),
        **circumstances(),
    }  # fmt: skip


def curve_point(completions: int, metrics: Mapping[str, Any]) -> dict[str, float]:
    """A point of a learning curve: the numbers of an evaluation."""
    return {"completions": completions, **{name: value for name, value in metrics.items() if isinstance(value, float)}}


def _turn_losses() -> None:
    for module_name, names in LOSSES.items():
        module = importlib.import_module(module_name)
        for name in names:
            loss = getattr(module, name)
            setattr(module, name, lambda *args, _loss=loss, **kwargs: -_loss(*args, **kwargs))


def info(task: Task) -> dict[str, Any]:
    """What the tables say of a task."""
    fields = [
        "description", "beta", "num_sequences", "batch_size", "num_completions", "generation_batch_size",
        "max_completion_length", "num_generations", "learning_rates", "betas", "beta_learning_rates", "online_betas",
        "online_learning_rates",
    ]  # fmt: skip
    values = {name: getattr(task, name) for name in fields}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def circumstances() -> dict[str, Any]:
    """Versions and the class of the machine."""
    packages = ("trl-lol", "trl", "transformers", "peft", "accelerate", "datasets", "torch")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }
