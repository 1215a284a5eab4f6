"""TRL 1.12's PPO on a task: trained in its own environment by trl_ppo.py, and judged here."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from trl_lol.data import tokenize_prompt

from .harness import Run, circumstances, curve_point, info, judged
from .trl_ppo import train_old_ppo


def measure_old_ppo(run: Run) -> dict[str, Any]:
    """
    What [`~benchmarks.harness.measure`] does, for the trainer that TRL had until 1.12.

    Args:
        run ([`~benchmarks.harness.Run`]):
            What to run. Its task must have an `importable_reward`.

    Returns:
        `dict[str, Any]`: The record of the run.
    """
    task = run.load_task()
    rows = task.rows(run.seed).remove_columns(["completions", "rewards"])
    prompts = rows["prompt"]
    points = task.num_points
    num_batches = task.num_completions // task.generation_batch_size
    spec = {
        "model": str(task.reference_folder),
        "prompts": list(prompts),
        "prompt_ids": [tokenize_prompt(row["prompt"], row, task.tokenizer) for row in rows],
        "columns": {name: list(rows[name]) for name in rows.column_names if name != "prompt"},
        "reward": task.importable_reward,
        "seed": run.seed,
        "num_completions": task.num_completions,
        "batch_size": task.generation_batch_size,
        "max_new_tokens": task.max_completion_length,
        "dtype": "float32",
        "judged_batches": sorted({max(round(num_batches * i / points), 1) for i in range(1, points + 1)}),
        "arguments": {
            "seed": run.seed,
            "per_device_train_batch_size": task.generation_batch_size,
            "lr_scheduler_type": "constant",
            "use_cpu": not torch.cuda.is_available(),
            "bf16": False,
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        },
        "settings": {"learning_rate": run.settings["learning_rate"], "kl_coef": run.settings["beta"]},
    }  # fmt: skip
    reference = task.reference()
    with tempfile.TemporaryDirectory() as folder:
        measured = train_old_ppo(Path(run.old_ppo), spec, Path(folder))
        curve = []
        for count, path in measured["policies"].items():
            policy = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
            point = judged(task, policy, reference, "validation", brief=count < task.num_completions)
            curve.append(curve_point(count, point))
        metrics = {split: judged(task, policy, reference, split) for split in ("validation", "test")}
    generated = num_batches * task.generation_batch_size
    versions = circumstances()
    versions["versions"] |= measured["versions"]
    return {
        "task": task.name,
        "method": run.method,
        "online": True,
        "settings": dict(run.settings),
        "seed": run.seed,
        "metrics": metrics,
        "curve": curve,
        "counts": {
            "sequences": generated * measured["updates_per_batch"],
            "tokens": None,
            "generated": generated,
            "generated_tokens": None,
            "reward_calls": generated,
            "rows": len(rows),
            "kept_fraction": None,
        },
        "costs": measured["costs"],
        "config": {"trainer": "PPOTrainer", **spec["arguments"], **spec["settings"]},
        "task_info": info(task),
        **versions,
    }
