"""
Reward against KL of offline methods on a small real language model: 8 stories sampled for each of 240 openings, scored
by sentiment (VADER); judged on held-out openings, over each method's β (or, where there is none, learning rate).

    pip install vaderSentiment
    python -m benchmarks.copg_stories run --model STORIES260K --output benchmarks/results/copg_stories
    python -m benchmarks.copg_stories plot --output benchmarks/results/copg_stories

Every run trains on 120 updates of 32 sequences. What a file of results exists for is not run again.
"""

import argparse
import json
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from trl_lol import ALoLConfig, ALoLTrainer, CoPGConfig, CoPGTrainer, score_dataset
from trl_lol.evaluation import evaluate_policy
from trl_lol.generation import generate_completions

from .tasks.stories import TEMPLATE, openings, sentiment


matplotlib.use("Agg")
from matplotlib import pyplot as plt


# Method: trainer, config, its settings, and the values of the setting that the frontier goes over
METHODS: dict[str, tuple[type, type, dict[str, Any], str, list[float]]] = {
    "CoPG": (CoPGTrainer, CoPGConfig, {"learning_rate": 1e-4}, "beta", [0.5, 0.2, 0.1, 0.05, 0.02, 0.01]),
    "DPO": (DPOTrainer, DPOConfig, {"learning_rate": 1e-4}, "beta", [10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1]),
    "IPO": (
        DPOTrainer,
        DPOConfig,
        {"learning_rate": 1e-4, "loss_type": ["ipo"]},
        "beta",
        [10.0, 5.0, 3.0, 2.0, 1.0, 0.5],
    ),
    "A-LoL": (ALoLTrainer, ALoLConfig, {}, "learning_rate", [1e-4, 3e-4, 1e-3]),
    "SFT on best": (ALoLTrainer, ALoLConfig, {"loss_type": ["nll"]}, "learning_rate", [1e-4, 3e-4, 1e-3]),
}
NUM_COMPLETIONS, MAX_NEW_TOKENS, NUM_JUDGED = 8, 48, 16


def sample_groups(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path) -> Dataset:
    """Scored groups of stories, the same for all methods."""
    if folder.exists():
        return Dataset.load_from_disk(folder)
    prompts = openings()["train"]
    repeated = [prompt for prompt in prompts for _ in range(NUM_COMPLETIONS)]
    stories, _, _ = generate_completions(
        model, tokenizer, repeated, max_new_tokens=MAX_NEW_TOKENS, batch_size=480, seed=seed
    )
    answers = [[{"role": "assistant", "content": story}] for story in stories]
    rows = {
        "prompt": [[{"role": "user", "content": prompt}] for prompt in prompts],
        "completions": [answers[i : i + NUM_COMPLETIONS] for i in range(0, len(answers), NUM_COMPLETIONS)],
    }
    scored = score_dataset(Dataset.from_dict(rows), sentiment)
    scored.save_to_disk(folder)
    return scored


def extremes(groups: Dataset) -> Dataset:
    """The best and the worst completion of each group."""

    def pair(row: dict[str, Any]) -> dict[str, Any]:
        order = sorted(range(NUM_COMPLETIONS), key=row["rewards"].__getitem__)
        return {"chosen": row["completions"][order[-1]], "rejected": row["completions"][order[0]]}

    return groups.map(pair, remove_columns=["completions", "rewards"])


def run(name: str, value: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    trainer_class, config_class, settings, varied, _ = METHODS[name]
    settings = {**settings, varied: value, **({"learning_rate": args.learning_rate} if args.learning_rate else {})}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(args.model)
    rows = sample_groups(model, tokenizer, seed, Path(args.work_dir) / f"groups_{seed}")
    if name == "SFT on best":
        rows = extremes(rows).rename_column("chosen", "completion").remove_columns("rejected")
        rows = rows.add_column("reward", [1.0] * len(rows))
    elif trainer_class is DPOTrainer:
        rows = extremes(rows)
    sequences = {CoPGTrainer: NUM_COMPLETIONS, DPOTrainer: 2, ALoLTrainer: 1}[trainer_class]  # per row
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(args.model),
        args=config_class(
            f"{args.work_dir}/{seed}/{name}",
            use_cpu=True,
            bf16=False,
            seed=seed,
            max_steps=args.max_steps,
            per_device_train_batch_size=32 // sequences,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    start = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - start
    return {
        "method": name,
        "settings": settings,
        "varied": varied,
        "seed": seed,
        "train_seconds": wall,
        **judge(trainer.model, model, tokenizer, args),
        "versions": {name: version(name) for name in ("trl-lol", "trl", "transformers", "peft", "torch")},
        "log_history": trainer.state.log_history,
    }


def judge(policy: PreTrainedModel, reference: PreTrainedModel, tokenizer: Any, args: argparse.Namespace) -> dict:
    result = evaluate_policy(
        policy,
        tokenizer,
        openings()[args.split],
        sentiment,
        ref_model=reference,
        num_generations=NUM_JUDGED,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=480,
    )
    return {k: v for k, v in result.items() if k != "samples"} | {"sample": result["samples"][0]["completion"]}


def frontier(runs: list[dict[str, Any]], kl: float) -> float | None:
    """Reward of one method and seed at a KL, on straight lines between its runs and the reference."""
    points = sorted((r["kl"], r["reward"]) for r in runs)
    if not points[0][0] <= kl <= points[-1][0]:
        return None
    return float(np.interp(kl, *zip(*points, strict=True)))


def plot(output: Path) -> None:
    runs = [json.loads(path.read_text()) for path in sorted(output.glob("runs/*.json"))]
    reference = next(r for r in runs if r["method"] == "reference")
    by_method: dict[str, dict[float, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for r in runs:
        if r["method"] != "reference":
            by_method[r["method"]][r["settings"][r["varied"]]].append(r)

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    lines = ["| method | setting | reward | KL, nats | length | distinct-2 | seeds |", "| --- |" + " ---: |" * 6]
    lines.append(f"| reference | | {reference['reward']:.3f} | 0 | {reference['length']:.1f} | "
                 f"{reference['distinct_2']:.3f} | |")  # fmt: skip
    for color, (name, values) in enumerate(sorted(by_method.items())):
        for axis, metric in zip(axes, ("reward", "distinct_2"), strict=True):
            mean = sorted((np.mean([r["kl"] for r in rs]), np.mean([r[metric] for r in rs])) for rs in values.values())
            axis.plot(*zip((0, reference[metric]), *mean, strict=True), color=f"C{color}", label=name)
            every = [(r["kl"], r[metric]) for rs in values.values() for r in rs]
            axis.scatter(*zip(*every, strict=True), color=f"C{color}", s=10, alpha=0.6)
        for value, rs in sorted(values.items(), reverse=True):
            cells = [(np.mean([r[m] for r in rs]), np.std([r[m] for r in rs], ddof=len(rs) > 1)) for m in
                     ("reward", "kl", "length", "distinct_2")]  # fmt: skip
            columns = [f"{m:.3f} ± {s:.3f}" if i in (0, 3) else f"{m:.1f} ± {s:.1f}" for i, (m, s) in enumerate(cells)]
            lines.append(f"| {name} | {rs[0]['varied']} {value:g} | " + " | ".join(columns) + f" | {len(rs)} |")
    for axis, label in zip(axes, ("reward on held-out openings", "distinct-2"), strict=True):
        axis.set(xlabel="KL from the reference, nats per story", ylabel=label)
        axis.set_xscale("symlog", linthresh=1)
        axis.axhline(reference["reward" if axis is axes[0] else "distinct_2"], color="gray", lw=0.8, ls=":")
    axes[0].legend()
    figure.savefig(output / "frontier.png", dpi=150)

    at = (1.0, 2.0, 5.0, 10.0, 20.0)
    lines += ["", "Reward at equal KL, mean over seeds and standard deviation:", ""]
    lines += ["| method | " + " | ".join(f"{kl:g} nats" for kl in at) + " |", "| --- |" + " ---: |" * len(at)]
    for name, values in sorted(by_method.items()):
        by_seed: dict[int, list[dict]] = defaultdict(lambda: [{"kl": 0.0, "reward": reference["reward"]}])
        for r in (r for rs in values.values() for r in rs):
            by_seed[r["seed"]].append(r)
        cells = []
        for kl in at:
            found = [x for x in (frontier(rs, kl) for rs in by_seed.values()) if x is not None]
            whole = len(found) == len(by_seed)
            cells.append(f"{np.mean(found):.3f} ± {np.std(found, ddof=len(found) > 1):.3f}" if whole else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (output / "frontier.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "plot"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--work_dir", default="runs/copg_stories")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--values", nargs="+", type=float, help="instead of the method's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", default="test")
    parser.add_argument("--learning_rate", type=float, help="instead of the method's own")
    parser.add_argument("--max_steps", type=int, default=120)
    args = parser.parse_args()
    if args.command == "plot":
        plot(args.output)
        return
    (args.output / "runs").mkdir(parents=True, exist_ok=True)
    path = args.output / "runs" / "reference.json"
    if not path.exists():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
        path.write_text(json.dumps({"method": "reference", **judge(model, model, tokenizer, args)}, indent=1) + "\n")
    for seed in args.seeds:
        for name in args.methods:
            for value in args.values or METHODS[name][4]:
                path = args.output / "runs" / f"{name.replace(' ', '_')}-{value:g}-{seed}.json"
                if not path.exists():
                    torch.manual_seed(seed)
                    result = run(name, value, seed, args)
                    path.write_text(json.dumps(result, indent=1) + "\n")
                    shown = ("reward", "kl", "length", "distinct_2", "train_seconds")
                    print(path.stem, *(f"{k} {result[k]:.3f}" for k in shown), flush=True)


if __name__ == "__main__":
    main()
