"""
Noisy data: one logged answer per prompt, a good one, which is replaced by a bad one with probability 0, 0.3 or 0.6.
Does A-LoL's filter make it robust, beside signed advantages, wBC, SFT and DPO?

    python -m benchmarks.alol_noise toy
    python -m benchmarks.alol_noise stories --model STORIES260K
    python -m benchmarks.alol_noise hh --model SMOLLM2 --dataset HH_SCORED
    python -m benchmarks.alol_noise plot

Each method's learning rate is the one of its grid that is best without noise on a seed of its own. A run that has a
result is not run again. With the same seed a higher noise replaces the same answers and further ones.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from matplotlib import pyplot as plt
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, ModelConfig

from trl_lol import ALoLConfig, ALoLTrainer, ColumnReward, score_dataset, sigmoid, toy
from trl_lol.data import tokenize_row
from trl_lol.evaluation import evaluate_policy
from trl_lol.generation import completion_logps

from .copg_stories import MAX_NEW_TOKENS, NUM_JUDGED, sample_groups
from .tasks.stories import TEMPLATE, openings, sentiment


sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
from common import BaseArguments, Setup, load_toy


RESULTS = Path(__file__).parent / "results" / "alol_noise"
LEVELS, TUNING_SEED = (0.0, 0.3, 0.6), 100
DPO, CLEAN = "DPO", "SFT, clean rows"
# All but DPO train on the same rows: the logged answers and their rewards
METHODS: dict[str, dict[str, Any]] = {
    "A-LoL": {},
    "A-LoL, signed": {"advantage_filter": "none"},
    # What the filter does alone: SFT on the answers of positive advantage
    "filter only": {"loss_type": ["alol_ref_free"], "sampling": "uniform", "advantage_weighting": False},
    "wBC": {"loss_type": ["wbc"]},
    "SFT": {"loss_type": ["nll"]},
    CLEAN: {"loss_type": ["nll"]},  # knows which answers were replaced: fewer rows, no noise
    DPO: {"beta": 0.1},
}
RATES = {"toy": (5e-4, 1e-3, 2e-3), "stories": (1e-4, 3e-4, 1e-3), "hh": (1e-4, 4e-4)}
DPO_RATES = {"toy": (1e-4, 2e-4, 5e-4), "stories": (3e-5, 1e-4, 3e-4), "hh": (1e-4, 4e-4)}
JUDGED = {"toy": "reward", "stories": "reward", "hh": "margin"}  # what the learning rate is picked by, and the plot's


@dataclass
class World:
    """A task: the policy that everything starts from, pairs of answers with their scores, and what judges a policy."""

    reference: str
    tokenizer: PreTrainedTokenizerBase
    groups: Dataset  # `prompt`, `good`, `bad`, `good_score`, `bad_score`, and `other`, which DPO rejects
    judge: Callable[[PreTrainedModel | None], dict[str, float]]  # the reference for `None`
    settings: dict[str, Any]  # of the trainers
    batch_size: int  # completions per step
    peft_config: LoraConfig | None = None
    model_init_kwargs: dict[str, Any] = field(default_factory=dict)


def generated(prompts: list, reward: Any, reference: PreTrainedModel, tokenizer: Any, **kwargs: Any) -> Callable:
    """A judge of new answers."""

    def judge(policy: PreTrainedModel | None) -> dict[str, float]:
        policy, ref_model = policy or reference, policy and reference
        result = evaluate_policy(policy, tokenizer, prompts, reward, ref_model=ref_model, **kwargs)
        rewards = [sample["reward"] for sample in result["samples"]]
        per_prompt = torch.tensor(rewards).view(len(prompts), -1).mean(1)  # answers to one prompt are alike
        result = {name: result[name] for name in ("reward", "kl", "length", "distinct_2") if name in result}
        return result | {"reward_error": (per_prompt.std() / len(prompts) ** 0.5).item()}

    return judge


def best_and_worst(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The best completion, and the two worst, in random order, so that neither is the better one by design."""
    texts, scores = row["completions"], row["rewards"]
    *_, good = order = sorted(range(len(scores)), key=scores.__getitem__)
    bad, other = rng.sample(order[:2], 2)
    columns = {"good": texts[good], "bad": texts[bad], "other": texts[other]}
    return {**columns, "good_score": scores[good], "bad_score": scores[bad]}


def make_toy(seed: int, args: argparse.Namespace) -> World:
    """The embedded world: answers are scored by the oracle, and judged by the held-out reward."""
    recipe = BaseArguments(reference_sft_steps=300)
    dialogues, model, tokenizer = load_toy(recipe, seed)
    settings = {"max_steps": 75, "lr_scheduler_type": "cosine", "bf16": False, "use_cpu": True, "max_length": 256}
    folder = args.work_dir / f"toy{seed}"
    if not (folder / "reference").exists():
        same = {"per_device_train_batch_size": 16, "gradient_checkpointing": False, "report_to": "none", "seed": seed}
        config = ALoLConfig(str(folder), **same, **settings)
        Setup(recipe, config, ModelConfig(), model, tokenizer).make_reference(dialogues["train"])
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference")
    judge = generated(
        *(dialogues["test"]["prompt"], toy.heldout_reward, reference, tokenizer),
        **{"num_generations": 1, "max_new_tokens": 64, "batch_size": 100, "seed": seed},
    )
    groups = score_dataset(dialogues["train"].take(600), toy.oracle_reward)
    groups = groups.map(best_and_worst, fn_kwargs={"rng": random.Random(seed)}, remove_columns=["subset"])
    return World(str(folder / "reference"), tokenizer, groups, judge, settings, batch_size=16)


def make_stories(seed: int, args: argparse.Namespace) -> World:
    """The task of `copg_stories.py`: the best and the worst of 8 stories, by sentiment, on the oracle's scale."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = TEMPLATE
    reference = AutoModelForCausalLM.from_pretrained(args.model)
    groups = sample_groups(reference, tokenizer, seed, args.work_dir / f"stories_groups{seed}")
    judge = generated(
        openings()["validation" if seed == TUNING_SEED else "test"],
        *(sentiment, reference, tokenizer),
        **{"num_generations": NUM_JUDGED, "max_new_tokens": MAX_NEW_TOKENS, "batch_size": 480, "seed": seed},
    )
    settings = {"max_steps": 40, "lr_scheduler_type": "cosine", "warmup_steps": 5, "bf16": False, "use_cpu": True}
    groups = groups.map(lambda row: {"rewards": [3 * reward for reward in row["rewards"]]})
    groups = groups.map(best_and_worst, fn_kwargs={"rng": random.Random(seed)})
    return World(args.model, tokenizer, groups, judge, settings, batch_size=32)


def make_hh(seed: int, args: argparse.Namespace) -> World:
    """Real dialogues whose two answers clearly differ in a reward model's score. There is no other bad answer."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = {"dtype": "bfloat16"}

    def order(row: dict[str, Any]) -> dict[str, Any]:
        names = sorted(("chosen", "rejected"), key=lambda name: row[f"{name}_reward"])
        bad, good = (row[name] for name in names)
        scores = {"bad_score": row[f"{names[0]}_reward"], "good_score": row[f"{names[1]}_reward"]}
        tokens = tokenize_row(row, 0, tokenizer, tokenizer.eos_token)
        length = len(tokens["prompt_ids"]) + max(map(len, tokens["completion_ids"]))
        return {"good": good, "bad": bad, "other": bad, **scores, "length": length}

    rows = concatenate_datasets(list(load_dataset(args.dataset).values())).map(order).shuffle(seed=0)
    rows = rows.filter(lambda row: row["good_score"] - row["bad_score"] > 0.5 and row["length"] <= 128)
    rows = rows.select({json.dumps(prompt): i for i, prompt in enumerate(rows["prompt"])}.values())  # each prompt once
    held_out = rows.skip(100).take(100) if seed == TUNING_SEED else rows.take(100)
    groups = rows.skip(200).shuffle(seed=seed).take(args.rows)
    pairs = [{"prompt": r["prompt"], "completions": [r["good"], r["bad"]], "rewards": [1.0, 0.0]} for r in held_out]
    tokenized = [tokenize_row(pair, i, tokenizer, tokenizer.eos_token) for i, pair in enumerate(pairs)]
    prompts = [row["prompt_ids"] for row in tokenized for _ in range(2)]
    completions = [ids for row in tokenized for ids in row["completion_ids"]]
    reference = AutoModelForCausalLM.from_pretrained(args.model, **dtype)
    reference_logps = completion_logps(reference, prompts, completions)

    def judge(policy: PreTrainedModel | None) -> dict[str, float]:
        """Log-ratio to the reference of the good answer over that of the bad one, in nats."""
        if policy is None:
            return {"margin": 0.0, "accuracy": 0.5, "pairs": len(pairs)}
        good, bad = (completion_logps(policy, prompts, completions) - reference_logps).view(-1, 2).unbind(1)
        margin, right = good - bad, ((good - bad).sign() + 1) / 2
        return {
            **{"margin": margin.mean().item(), "margin_error": (margin.std() / len(pairs) ** 0.5).item()},
            **{"accuracy": right.mean().item(), "accuracy_error": (right.std() / len(pairs) ** 0.5).item()},
            **{"log_ratio_good": good.mean().item(), "log_ratio_bad": bad.mean().item(), "pairs": len(pairs)},
        }

    lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"max_steps": args.steps, "warmup_steps": 3, "max_length": 128, "bf16": False, "use_cpu": True}
    settings["lr_scheduler_type"] = "constant_with_warmup"
    return World(args.model, tokenizer, groups, judge, settings, 8, lora, dtype)


WORLDS = {"toy": make_toy, "stories": make_stories, "hh": make_hh}


def logged(groups: Dataset, noise: float, seed: int) -> Dataset:
    """The logged answers with their scores. `subset` says which were replaced."""
    rng = random.Random(f"noise {seed}")
    rows = []
    for group in groups:
        kind = "bad" if rng.random() < noise else "good"
        row = {"completion": group[kind], "score": group[f"{kind}_score"], "subset": kind}
        rows.append({"prompt": group["prompt"], "other": group["other"], **row})
    return Dataset.from_list(rows)


def run(world: World, method: str, noise: float, seed: int, rate: float, folder: Path) -> dict[str, Any]:
    torch.manual_seed(seed)
    rows = logged(world.groups, noise, seed)
    if method == CLEAN:
        rows = rows.filter(lambda row: row["subset"] == "good")
    trainer_class, config_class, size = ALoLTrainer, ALoLConfig, world.batch_size
    if method == DPO:
        # Where the answer was replaced a bad one is chosen over another, or over itself, which has no gradient
        rows = rows.rename_columns({"completion": "chosen", "other": "rejected"}).remove_columns(["score", "subset"])
        trainer_class, config_class, size = DPOTrainer, DPOConfig, world.batch_size // 2
    else:
        rows = score_dataset(rows.remove_columns("other"), sigmoid(ColumnReward("score")))
    args = config_class(
        str(folder),
        seed=seed,
        learning_rate=rate,
        per_device_train_batch_size=size,
        **{"precompute_ref_log_probs": True, "gradient_checkpointing": False, "logging_steps": 10},
        **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True},
        **world.settings,
        **METHODS[method],
    )
    model = AutoModelForCausalLM.from_pretrained(world.reference, **world.model_init_kwargs)
    same = {"processing_class": world.tokenizer, "peft_config": world.peft_config}
    start = time.perf_counter()
    trainer = trainer_class(model, args=args, train_dataset=rows, **same)
    trainer.train()
    seconds = time.perf_counter() - start
    if world.peft_config is not None:
        trainer.save_model()
    report = getattr(trainer, "advantage_report", None)
    return {
        **{"method": method, "noise": noise, "seed": seed, "learning_rate": rate, "train_seconds": round(seconds)},
        **world.judge(trainer.model),
        "loss": [round(log["loss"], 4) for log in trainer.state.log_history if "loss" in log],
        "kept": report and {kind: list(counts) for kind, counts in report.subsets.items()},
    }


def run_world(name: str, args: argparse.Namespace) -> None:
    path = RESULTS / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else {"world": name, "references": {}, "runs": []}
    result["versions"] = {n: version(n) for n in ("trl-lol", "trl", "transformers", "peft", "torch", "datasets")}
    result["threads"] = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    worlds: dict[int, World] = {}

    def once(method: str, noise: float, seed: int, rate: float) -> dict[str, Any]:
        key = {"method": method, "noise": noise, "seed": seed, "learning_rate": rate}
        for done in result["runs"]:
            if key.items() <= done.items():
                return done
        if seed not in worlds:
            worlds.clear()
            worlds[seed] = world = WORLDS[name](seed, args)
            result["references"][str(seed)] = world.judge(None)
            result["settings"] = world.settings | {"batch_size": world.batch_size, "rows": len(world.groups)}
        folder = args.work_dir / name / f"{method.replace(', ', '_').replace(' ', '_')}-{noise:g}-{seed}-{rate:g}"
        done = run(worlds[seed], method, noise, seed, rate, folder)
        result["runs"].append(done)
        path.write_text(json.dumps(result, indent=1) + "\n")
        shown = {k: round(v, 4) for k, v in done.items() if isinstance(v, float)}
        print(method, seed, shown, "kept", done["kept"], "loss", done["loss"][:1], done["loss"][-1:], flush=True)
        return done

    metric, rates = JUDGED[name], {}
    for method in args.methods:
        grid = DPO_RATES[name] if method == DPO else RATES[name]
        rates[method] = max(grid, key=lambda rate: once(method, 0.0, TUNING_SEED, rate)[metric])
    print("Learning rates:", rates, flush=True)
    for seed in args.seeds:
        for noise in LEVELS:
            for method in args.methods:
                once(method, noise, seed, rates[method])


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {spread(values):.3f}"


def tables(result: dict[str, Any]) -> list[str]:
    """What is judged, over the noise, and what goes with it."""
    name, metric = result["world"], JUDGED[result["world"]]
    runs = [r for r in result["runs"] if r["seed"] != TUNING_SEED]
    references = [r for seed, r in result["references"].items() if int(seed) != TUNING_SEED]
    others = [m for m in ("kl", "distinct_2", "accuracy", "log_ratio_good") if m in runs[0]]
    lines = ["", f"## {name}", "", f"{len({r['seed'] for r in runs})} seeds, {result['settings']}"]
    for shown in (metric, *others):
        reference = [r[shown] for r in references if shown in r]
        lines += ["", f"**{shown}**" + (f" (the reference: {cell(reference)})" if reference else ""), ""]
        lines.append("| method | learning rate | " + " | ".join(f"{p:.0%}" for p in LEVELS) + " | gain kept |")
        lines.append("| --- |" + " ---: |" * (len(LEVELS) + 2))
        for method in METHODS:
            found = [r for r in runs if r["method"] == method]
            levels = [[r[shown] for r in found if r["noise"] == p] for p in LEVELS]
            if all(levels):
                first, *_, last = (statistics.mean(values) for values in levels)
                base = statistics.mean(reference) if reference else 0.0
                kept = f"{(last - base) / (first - base):.0%}" if shown == "reward" else ""
                cells = [f"{found[0]['learning_rate']:g}", *map(cell, levels), kept]
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", "Answers of positive advantage, of all of their kind:", ""]
    lines += ["| noise | good | bad |", "| ---: | ---: | ---: |"]
    for noise in LEVELS:
        kept = [r["kept"] for r in runs if r["method"] == "A-LoL" and r["noise"] == noise]
        shares = [[k[kind][0] / k[kind][1] for k in kept if kind in k] for kind in ("good", "bad")]
        lines.append(f"| {noise:.0%} | " + " | ".join(f"{statistics.mean(s):.0%}" if s else "" for s in shares) + " |")
    return lines


def plot() -> None:
    results = [json.loads(path.read_text()) for name in WORLDS if (path := RESULTS / f"{name}.json").exists()]
    results = [r for r in results if any(run["seed"] != TUNING_SEED for run in r["runs"])]
    figure, axes = plt.subplots(1, len(results), figsize=(14, 4), layout="constrained", squeeze=False)
    lines = [
        "Mean ± standard deviation. Gain kept: the gain over the reference at the highest noise over that at none."
    ]
    for axis, result in zip(axes[0], results, strict=True):
        metric = JUDGED[result["world"]]
        runs = [r for r in result["runs"] if r["seed"] != TUNING_SEED]
        for i, method in enumerate(METHODS):
            by_level = {p: [r[metric] for r in runs if r["method"] == method and r["noise"] == p] for p in LEVELS}
            means = [(p + 0.004 * i, statistics.mean(v), spread(v)) for p, v in by_level.items() if v]
            if means:
                axis.errorbar(*zip(*means, strict=True), label=method, color=f"C{i}", capsize=2)
        references = [r[metric] for seed, r in result["references"].items() if int(seed) != TUNING_SEED]
        axis.axhline(statistics.mean(references), color="gray", ls=":", lw=0.8, label="reference")
        axis.set(title=result["world"], xlabel="part of good answers replaced", ylabel=metric, xticks=LEVELS)
        lines += tables(result)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(RESULTS / "noise.png", dpi=150)
    (RESULTS / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=[*WORLDS, "plot"])
    parser.add_argument("--model", help="stories260k, or SmolLM2-135M-Instruct")
    parser.add_argument("--dataset", help="HH with scores")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/alol_noise"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=160, help="number of training rows of HH")
    parser.add_argument("--steps", type=int, default=40, help="number of steps on HH")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    plot() if args.world == "plot" else run_world(args.world, args)


if __name__ == "__main__":
    main()
