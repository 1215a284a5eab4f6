"""
Online methods on a small real language model: stories are generated for 240 openings, scored by sentiment (VADER), and
trained on; the policy is judged on held-out openings along the way. Every method gets the same number of completions.
DR-PO, and SFT on its references, get a good story for each opening beside it: the best of 16 by the same reward.

    pip install vaderSentiment
    python -m benchmarks.online_stories run --model STORIES260K --output benchmarks/results/online_stories
    python -m benchmarks.online_stories table --output benchmarks/results/online_stories

and for DR-PO, beside PPO's `reset_prob=0`, with other values of it:

    python -m benchmarks.online_stories run --model STORIES260K --output benchmarks/results/drpo_stories \\
        --methods "SFT on references" "DR-PO" --set reset_prob=0.5

PPO, APA and AWR are those of this package, RLOO and GRPO those of the installed TRL. "TRL 1.12 PPO" is the trainer
that TRL removed in 1.13; it runs in an environment of its own (`--environment`), made if it is missing, with the
installed versions of torch, transformers, accelerate and datasets.

Each batch of 64 completions is generated for 64 openings (16 with 4 completions each for RLOO and GRPO) and trained on
as often as the method's config says by default, 4 updates for PPO and 1 for RLOO and GRPO; APA and AWR get PPO's 4. β
is PPO's and RLOO's KL coefficient; GRPO divides the rewards by their standard deviation first, which makes the same β
weaker, unless it is told not to ("unscaled"). Gradients are clipped to norm 1 as by default, which TRL 1.12's PPO does
not do.

Learning rates: of 3e-5, 1e-4, 3e-4 and 1e-3, the one with the highest reward − β KL on the validation openings after
3200 completions of seed 100. PPO, APA and AWR were tried at two or three of these (AWR also at 1e-5); "GRPO, unscaled"
takes RLOO's.

Every run is a process of its own, on one thread, which saves policies along the way; they are judged afterwards. Time
is that of `train()` without the saving; memory (Linux) is the peak over what the process held before it made a model.
VADER takes none, so that TRL's PPO holds three models here and not the four that it holds with a reward model. What a
file of results exists for is not run again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from collections import defaultdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_lol.evaluation import evaluate_policy
from trl_lol.generation import generate_completions

from .copg_stories import MAX_NEW_TOKENS, NUM_JUDGED, plt
from .meter import Meter
from .tasks.stories import TEMPLATE, openings, sentiment
from .trl_ppo import train_old_ppo


BASELINE = "TRL 1.12 PPO"
NUM_SAMPLED = 16  # stories of which the best is an opening's reference
METRICS = {"reward": 3, "kl": 1, "length": 1, "distinct_2": 3}  # and the digits shown
BETA = 0.05  # of PPO's and RLOO's objective, reward − β KL, by whose final value the learning rates were picked

OURS = {"num_iterations": 4, "value_learning_rate": 1e-3}  # as many passes for APA as PPO makes by default

# Method: package, trainer, config and what is not the config's default
METHODS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "PPO": ("trl_lol", "PPOTrainer", "PPOConfig", {**OURS, "learning_rate": 3e-5, "beta": BETA}),
    "PPO, lam 1": ("trl_lol", "PPOTrainer", "PPOConfig", {**OURS, "learning_rate": 3e-5, "beta": BETA, "lam": 1.0}),
    "DR-PO": (
        "trl_lol",
        "DRPOTrainer",
        "DRPOConfig",
        {**OURS, "learning_rate": 3e-5, "beta": BETA, "lam": 1.0, "reset_prob": 1.0},
    ),
    "SFT on references": ("trl", "SFTTrainer", "SFTConfig", {"learning_rate": 3e-5, "completion_only_loss": True}),
    "APA": ("trl_lol", "APATrainer", "APAConfig", {**OURS, "learning_rate": 3e-5, "beta": 0.1, "loss_type": "apa"}),
    "AWR": ("trl_lol", "APATrainer", "APAConfig", {**OURS, "learning_rate": 1e-5, "beta": 1.0, "loss_type": "awr"}),
    "RLOO": ("trl", "RLOOTrainer", "RLOOConfig", {"learning_rate": 1e-4, "beta": BETA, "num_generations": 4}),
    "GRPO": ("trl", "GRPOTrainer", "GRPOConfig", {"learning_rate": 3e-5, "beta": BETA, "num_generations": 4}),
    "GRPO, unscaled": (
        "trl",
        "GRPOTrainer",
        "GRPOConfig",
        {"learning_rate": 1e-4, "beta": BETA, "num_generations": 4, "scale_rewards": "none"},
    ),
    "TRL 1.12 PPO": ("", "PPOTrainer", "PPOConfig", {"learning_rate": 3e-5, "kl_coef": BETA}),
}
WITH_REFERENCES = ("DR-PO", "SFT on references")


def environment(folder: Path) -> Path:
    """Python of the environment with TRL 1.12, made if it is missing or unfinished."""
    python = folder / "bin" / "python"
    show = "from importlib.metadata import version; import vaderSentiment; print(version('trl'))"
    if python.exists() and subprocess.run([python, "-c", show], capture_output=True).stdout.strip() == b"1.12.0":
        return python
    venv.create(folder, with_pip=True, clear=True)
    pinned = {name: version(name).split("+")[0] for name in ("torch", "transformers", "accelerate", "datasets")}
    same = [f"{name}=={number}" for name, number in pinned.items()]
    for packages in (same[:1], ["trl==1.12.0", *same[1:], "vaderSentiment"]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def references(seed: int, args: argparse.Namespace) -> list[str]:
    """The best of several stories for each opening."""
    path = args.work_dir / f"references-{seed}.json"
    if not path.exists():
        tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model)
        prompts = [prompt for prompt in openings()["train"] for _ in range(NUM_SAMPLED)]
        stories, _, _ = generate_completions(
            model, tokenizer, prompts, max_new_tokens=args.max_new_tokens, batch_size=480, seed=seed
        )
        best = np.reshape(sentiment(prompts, stories), (-1, NUM_SAMPLED)).argmax(axis=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([stories[i * NUM_SAMPLED + member] for i, member in enumerate(best)]))
    return json.loads(path.read_text())


def specify(name: str, seed: int, overrides: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """All that a run depends on."""
    settings = {**METHODS[name][3], **overrides}
    if name == BASELINE and "beta" in overrides:
        settings["kl_coef"] = settings.pop("beta")
    if args.num_completions % args.batch_size or args.batch_size % args.micro_batch_size:
        raise ValueError("`--num_completions` must be whole batches, and `--batch_size` whole micro-batches.")
    batches = args.num_completions // args.batch_size
    judged = sorted({round(batches * i / (args.num_points - 1)) for i in range(args.num_points)} - {0})
    return {
        "method": name,
        "seed": seed,
        "model": Path(args.model).name,
        "settings": settings,
        "num_completions": args.num_completions,
        "batch_size": args.batch_size,
        "judged_batches": [] if args.no_judge else judged,
        "max_new_tokens": args.max_new_tokens,
        "dtype": args.dtype,
        "split": None if args.no_judge else args.split,
        "threads": args.threads,
        "arguments": {
            "seed": seed,
            "per_device_train_batch_size": args.micro_batch_size,
            "gradient_accumulation_steps": args.batch_size // args.micro_batch_size,
            "gradient_checkpointing": False,
            "lr_scheduler_type": "constant",
            "use_cpu": not torch.cuda.is_available(),
            "bf16": False,
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        },
    }


def config_for(spec: dict[str, Any]) -> tuple[type, Any]:
    package, trainer, config, _ = METHODS[spec["method"]]
    module = import_module(package)
    generation = {
        "generation_batch_size": spec["batch_size"],
        "max_completion_length": spec["max_new_tokens"],
        "temperature": 1.0,
    }
    config = getattr(module, config)(
        spec["folder"],
        max_steps=10**9,  # the number of updates per generated batch is known only now
        **({} if config == "SFTConfig" else generation),
        **spec["arguments"],
        **spec["settings"],
    )
    config.max_steps = spec["num_completions"] // spec["batch_size"] * getattr(config, "num_iterations", 1)
    return getattr(module, trainer), config


def train(spec: dict[str, Any]) -> dict[str, Any]:
    trainer_class, config = config_for(spec)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.chat_template = TEMPLATE
    rows: dict[str, Any] = {"prompt": spec["prompts"]}
    if spec["method"] in WITH_REFERENCES:
        rows["completion"] = spec["references"]
    num_iterations, reward = getattr(config, "num_iterations", 1), {"reward_funcs": sentiment}
    if config.__class__.__name__ == "SFTConfig":  # which would write an EOS behind texts, but not behind messages
        roles, reward = {"prompt": "user", "completion": "assistant"}, {}
        rows = {name: [[{"role": roles[name], "content": text}] for text in rows[name]] for name in roles}
    points = {batches * num_iterations: batches * spec["batch_size"] for batches in spec["judged_batches"]}
    set_seed(spec["seed"])
    meter = Meter(lambda completions: trainer.save_model(f"{spec['folder']}/{completions}"), points)
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    trainer = trainer_class(
        model,
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[meter],
        **reward,
    )
    costs = meter.measure(trainer.train)
    return {
        "costs": costs,
        "updates_per_batch": num_iterations,
        "versions": {name: version(name) for name in ("trl-lol", "trl", "transformers", "torch")},
        "log_history": trainer.state.log_history,
    }


def judge(policy: str | Path, args: argparse.Namespace, num_generations: int) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model, reference = (AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (policy, args.model))
    return evaluate_policy(
        model,
        tokenizer,
        openings()[args.split],
        sentiment,
        ref_model=reference,
        num_generations=num_generations,
        max_new_tokens=args.max_new_tokens,
        batch_size=480,
    )


def run_here(full: dict[str, Any], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    if full["method"] in WITH_REFERENCES:
        full["references"] = references(full["seed"], args)
    (folder / "spec.json").write_text(json.dumps(full))
    with open(folder / "log.txt", "w") as log:
        command = [sys.executable, "-m", "benchmarks.online_stories", "train", "--spec", folder / "spec.json"]
        threads = {"OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, env={**os.environ, **threads}, stdout=log, stderr=log)
    if done.returncode:
        raise RuntimeError(f"{full['method']} failed:\n{(folder / 'log.txt').read_text()[-4000:]}")
    return json.loads((folder / "measured.json").read_text())


def run(spec: dict[str, Any], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    full = {**spec, "model": args.model, "folder": str(folder), "prompts": openings()["train"]}
    if spec["method"] == BASELINE:
        prompt_ids = AutoTokenizer.from_pretrained(args.model)(full["prompts"])["input_ids"]
        full |= {"prompt_ids": prompt_ids, "reward": "benchmarks.trl_ppo:sentiment"}
        python = environment(args.environment or args.work_dir / "trl_1.12")
        measured = train_old_ppo(python, full, folder, args.threads)
        del measured["policies"]
    else:
        measured = run_here(full, folder, args)
    costs = measured.pop("costs")
    times = {"train_seconds": costs["wall_s"], "train_cpu_seconds": costs["cpu_s"]}
    result = {**spec, **times, "peak_memory_mb": costs["peak_memory_mb"], **measured}
    result["samples_per_second"] = spec["num_completions"] / result["train_seconds"]
    if args.no_judge:
        return result
    counts = [0, *(batches * spec["batch_size"] for batches in spec["judged_batches"])]
    curve = []
    for count in counts:
        num_generations = NUM_JUDGED if count == counts[-1] else 4
        judged = judge(folder / str(count) if count else args.model, args, num_generations)
        result |= {"sample": judged["samples"][0]["completion"], **{name: judged[name] for name in METRICS}}
        curve.append({"completions": count, "num_generations": num_generations, **{m: judged[m] for m in METRICS}})
    return result | {"curve": curve}


def label(result: dict[str, Any]) -> str:
    """The method, and what is not as in METHODS."""
    usual = METHODS[result["method"]][3]
    return " ".join([result["method"], *(f"{k}={v}" for k, v in result["settings"].items() if usual.get(k) != v)])


def mean(values: list[float], digits: int) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def table(output: Path) -> None:
    results = [json.loads(path.read_text()) for path in sorted(output.glob("runs/*.json"))]
    of_baseline = sorted((r for r in results if r["method"] == BASELINE), key=lambda r: label(r) == BASELINE)
    baseline = {r["seed"]: r for r in of_baseline}
    by_label: dict[str, list[dict]] = defaultdict(list)
    for r in results:
        by_label[label(r)].append(r)
    order = sorted(by_label, key=lambda name: (list(METHODS).index(by_label[name][0]["method"]), name))

    quality = ["reward", "KL, nats", "length", "distinct-2", f"reward − {BETA} KL"]
    # Compared with the baseline, where it has been run
    costs = ["samples/s", "ratio", "CPU ratio", "memory, MB", "ratio"] if baseline else ["CPU s", "memory, MB"]
    head = ["method", *quality, *costs, "seeds"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    judged = [r for r in results if "curve" in r]
    if judged:
        start = judged[0]["curve"][0]
        lines.append("| reference | " + " | ".join(f"{start[m]:.{d}f}" for m, d in METRICS.items())
                     + f" | {start['reward']:.3f}" + " | " * (len(costs) + 1) + "|")  # fmt: skip
    for name in order:
        rs = by_label[name]
        cells = [mean([r[m] for r in rs], d) if all(m in r for r in rs) else "" for m, d in METRICS.items()]
        cells.append(mean([r["reward"] - BETA * r["kl"] for r in rs], 3) if all("kl" in r for r in rs) else "")
        pairs = [(r, baseline[r["seed"]]) for r in rs if r["seed"] in baseline]
        ratios = {
            "samples_per_second": [r["samples_per_second"] / b["samples_per_second"] for r, b in pairs],
            "cpu": [b["train_cpu_seconds"] / r["train_cpu_seconds"] for r, b in pairs],
            "peak_memory_mb": [r["peak_memory_mb"] / b["peak_memory_mb"] for r, b in pairs],
        }
        ratio = {key: mean(values, 2) if values else "" for key, values in ratios.items()}
        memory = mean([r["peak_memory_mb"] for r in rs], 0)
        if baseline:
            cells += [mean([r["samples_per_second"] for r in rs], 1), ratio["samples_per_second"], ratio["cpu"]]
            cells += [memory, ratio["peak_memory_mb"]]
        else:
            cells += [mean([r["train_cpu_seconds"] for r in rs], 0), memory]
        cells.append(str(len(rs)))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "Mean ± standard deviation over seeds."]
    if baseline:
        lines[-1] += (f" Ratios: to {BASELINE} of the same seed, more samples per second (of time, of CPU time) being "
                      "better and less memory.")  # fmt: skip
    (output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if judged:
        plot({name: rs for name in order if (rs := [r for r in by_label[name] if "curve" in r])}, output)


def plot(by_label: dict[str, list[dict[str, Any]]], output: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    panels = (("completions", "reward"), ("completions", "kl"), ("kl", "reward"))
    names = {"completions": "completions generated", "reward": "reward on held-out openings", "kl": "KL, nats a story"}
    for axis, (x, y) in zip(axes, panels, strict=True):
        for color, (name, rs) in enumerate(by_label.items()):
            for r in rs:
                axis.plot(*zip(*((p[x], p[y]) for p in r["curve"]), strict=True), color=f"C{color}", lw=0.6, alpha=0.5)
            points = zip(*(r["curve"] for r in rs), strict=True)
            means = [(np.mean([p[x] for p in at]), np.mean([p[y] for p in at])) for at in points]
            axis.plot(*zip(*means, strict=True), color=f"C{color}", marker="o", ms=3, label=name)
        axis.set(xlabel=names[x], ylabel=names[y])
    axes[1].set_yscale("symlog", linthresh=1)
    axes[2].set_xscale("symlog", linthresh=1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(output / "curves.png", dpi=150)


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table", "train"], help="`train` is what `run` starts")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/online_stories"))
    parser.add_argument("--environment", type=Path, help="of TRL 1.12; WORK_DIR/trl_1.12 if not given")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--learning_rate", type=float, help="instead of the method's own")
    parser.add_argument("--beta", type=float, help="instead of the method's own")
    parser.add_argument("--set", nargs="+", type=setting, default=[], metavar="FIELD=JSON", help="of the config")
    parser.add_argument("--num_completions", type=int, default=6400)
    parser.add_argument("--batch_size", type=int, default=64, help="completions generated at a time")
    parser.add_argument("--micro_batch_size", type=int, default=64, help="completions per forward and backward")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS)
    parser.add_argument("--num_points", type=int, default=8, help="of the curve, the reference included")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no_judge", action="store_true", help="time and memory alone")
    parser.add_argument("--spec", type=Path, help="file that `run` wrote for `train`")
    args = parser.parse_args()
    if args.command == "train":
        spec = json.loads(args.spec.read_text())
        (Path(spec["folder"]) / "measured.json").write_text(json.dumps(train(spec)) + "\n")
        return
    if args.command == "table":
        table(args.output)
        return
    (args.output / "runs").mkdir(parents=True, exist_ok=True)
    given = {"learning_rate": args.learning_rate, "beta": args.beta, **dict(args.set)}
    overrides = {name: value for name, value in given.items() if value is not None}
    for seed in args.seeds:
        for name in args.methods:
            spec = specify(name, seed, overrides, args)
            parts = [name.replace(" ", "_"), *(f"{k}={v}" for k, v in overrides.items()), str(seed)]
            path = args.output / "runs" / f"{'-'.join(parts)}.json"
            if path.exists():
                before = json.loads(path.read_text())
                if changed := [key for key, value in spec.items() if before[key] != value]:
                    raise ValueError(f"{path} is of a run with another {', '.join(changed)}; choose another --output.")
                continue
            result = run(spec, args.work_dir / path.stem, args)
            path.write_text(json.dumps(result, indent=1) + "\n")
            shown = (*METRICS, "train_seconds", "peak_memory_mb")
            print(path.stem, *(f"{key} {result[key]:.3f}" for key in shown if key in result), flush=True)


if __name__ == "__main__":
    main()
