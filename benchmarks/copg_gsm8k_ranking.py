"""
What offline methods learn from groups of solutions scored right or wrong: how the log-ratio of the trained policy to
its reference ranks solutions of held-out questions. Chance is 0.5; only pairs with different rewards count.

    python benchmarks/copg_gsm8k_ranking.py --model BASE --dataset DATA --output benchmarks/results/copg_gsm8k

Every method sees the same questions, with as many optimizer steps of 4 questions each: CoPG all their solutions, DPO
and IPO the best against the worst where there is one, A-LoL what beats the value of the question, 16 draws a step.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, DPOTrainer

from trl_lol import ALoLConfig, ALoLTrainer, CoPGConfig, CoPGTrainer
from trl_lol.data import tokenize_row
from trl_lol.evaluation import reference_policy
from trl_lol.generation import completion_logps


METHODS: dict[str, tuple[type, type, dict[str, Any]]] = {
    **{f"copg β={beta}": (CoPGTrainer, CoPGConfig, {"beta": beta}) for beta in (0.01, 0.03, 0.1, 0.3)},
    "dpo β=0.1": (DPOTrainer, DPOConfig, {"beta": 0.1}),
    "ipo β=1.0": (DPOTrainer, DPOConfig, {"beta": 1.0, "loss_type": ["ipo"]}),
    "alol": (ALoLTrainer, ALoLConfig, {}),
}


def load_rows(path: str, num_train: int, max_length: int, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """The first training questions that fit, and the test questions that have right and wrong solutions."""

    def fits(row: dict[str, Any]) -> bool:
        texts = [row["prompt"] + completion for completion in row["completions"]]
        return max(map(len, tokenizer(texts)["input_ids"])) < max_length

    rows = load_dataset(path).map(lambda row: {"prompt": row["prompt"] + "\n"})
    rows = rows.select_columns(["prompt", "completions", "rewards"])
    rows["train"] = rows["train"].filter(fits).take(num_train)
    rows["test"] = rows["test"].filter(lambda row: len(set(row["rewards"])) > 1)
    return rows


def best_against_worst(rows: Dataset) -> Dataset:
    def pair(row: dict[str, Any]) -> dict[str, Any]:
        rewards = row["rewards"]
        best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
        return {"chosen": row["completions"][best], "rejected": row["completions"][worst]}

    rows = rows.filter(lambda row: len(set(row["rewards"])) > 1)
    return rows.map(pair, remove_columns=["completions", "rewards"])


def accuracy(scores: Tensor, rewards: Tensor) -> tuple[float, float]:
    """Part of the pairs within a question that the scores order as the rewards do, and its standard error, by
    bootstrap over the questions."""
    better = rewards.unsqueeze(2) > rewards.unsqueeze(1)
    right = ((scores.unsqueeze(2) - scores.unsqueeze(1)).sign() + 1) / 2
    pairs, right = better.sum((1, 2)).double(), (right * better).sum((1, 2)).double()
    drawn = torch.randint(len(pairs), (2000, len(pairs)), generator=torch.Generator().manual_seed(0))
    spread = (right[drawn].sum(1) / pairs[drawn].sum(1)).std()
    return (right.sum() / pairs.sum()).item(), spread.item()


def write_table(output: Path) -> None:
    """All results so far, as Markdown."""
    results = [json.loads(path.read_text()) for path in output.glob("*.json")]
    results.sort(key=lambda result: list(METHODS).index(result["method"]))
    first = results[0]
    lines = [
        f"{first['pairs']} pairs of right and wrong solutions of {first['questions']} held-out questions. Standard "
        "errors by bootstrap over the questions.",
        "",
        "| policy | ranked right | by log-ratio per token | mean log-ratio: right | wrong | sd within a question |",
        "| --- |" + " ---: |" * 5,
    ]
    for r in results:
        cells = [r[f"log_ratio_{name}"] for name in ("of_right", "of_wrong", "std_within")]
        lines.append(
            f"| {r['method']} | {r['accuracy']:.3f} ± {r['standard_error']:.3f} | {r['accuracy_per_token']:.3f} | "
            + " | ".join(f"{cell:+.2f}" for cell in cells[:2])
            + f" | {cells[2]:.2f} |"
        )
    for label, name in (("length alone", "length"), ("log-probability of the reference", "reference")):
        lines.append(f"| {label} | {first[f'accuracy_of_{name}']:.3f} | | | | |")
    lines.append(f"| the same per token | {first['accuracy_of_reference_per_token']:.3f} | | | | |")
    (output / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work_dir", default="runs/copg_gsm8k")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--num_train", type=int, default=200)
    parser.add_argument(
        "--max_length", type=int, default=192, help="training questions with longer solutions are left out"
    )
    parser.add_argument("--max_steps", type=int, default=50)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_rows(args.dataset, args.num_train, args.max_length, tokenizer)
    pairs = best_against_worst(rows["train"])
    test = [tokenize_row(row, i, tokenizer, tokenizer.eos_token) for i, row in enumerate(rows["test"])]
    sequences = (
        [row["prompt_ids"] for row in test for _ in row["completion_ids"]],
        [ids for row in test for ids in row["completion_ids"]],
    )
    rewards = torch.tensor([row["rewards"] for row in test])
    reference = None

    for name in args.methods:
        path = args.output / f"{name.replace(' β=', '_')}.json"
        if path.exists():
            continue
        trainer_class, config_class, settings = METHODS[name]
        is_paired = trainer_class is DPOTrainer
        settings = {"learning_rate": args.learning_rate, **settings}
        set_seed(args.seed)
        trainer = trainer_class(
            AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16),
            args=config_class(
                f"{args.work_dir}/{'pairs' if is_paired else 'groups'}",  # CoPG's runs share their cache
                use_cpu=True,
                seed=args.seed,
                max_steps=args.max_steps,
                # 4 questions a step; few at a time, so that there is little padding
                per_device_train_batch_size={CoPGTrainer: 2, DPOTrainer: 4, ALoLTrainer: 8}[trainer_class],
                gradient_accumulation_steps=1 if is_paired else 2,
                per_device_eval_batch_size=8,
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=2,
                gradient_checkpointing=False,
                lr_scheduler_type="cosine",
                warmup_steps=5,
                max_length=args.max_length,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                **settings,
            ),
            train_dataset=pairs if is_paired else rows["train"],
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        start = time.perf_counter()
        trainer.train()
        wall = time.perf_counter() - start
        policy = completion_logps(trainer.model, *sequences, batch_size=8)
        if reference is None:
            with reference_policy(trainer.model, None) as model:
                reference = completion_logps(model, *sequences, batch_size=8)
        log_ratio = (policy - reference).view(rewards.shape)
        lengths = torch.tensor([len(ids) for ids in sequences[1]], dtype=torch.float).view(rewards.shape)
        within, error = accuracy(log_ratio, rewards)
        result = {
            "method": name,
            "settings": {**settings, "seed": args.seed, "max_steps": args.max_steps},
            "train_rows": len(trainer.train_dataset),
            "questions": len(test),
            "pairs": int((rewards.unsqueeze(2) > rewards.unsqueeze(1)).sum()),
            "accuracy": within,
            "standard_error": error,
            "accuracy_per_token": accuracy(log_ratio / lengths, rewards)[0],
            "accuracy_of_length": accuracy(lengths, rewards)[0],
            "accuracy_of_reference": accuracy(reference.view(rewards.shape), rewards)[0],
            "accuracy_of_reference_per_token": accuracy(reference.view(rewards.shape) / lengths, rewards)[0],
            "log_ratio_mean": log_ratio.mean().item(),
            "log_ratio_std_within": log_ratio.std(dim=1).mean().item(),
            "log_ratio_of_wrong": log_ratio[rewards == 0].mean().item(),
            "log_ratio_of_right": log_ratio[rewards == 1].mean().item(),
            "train_seconds": wall,
            "versions": {name: version(name) for name in ("trl-lol", "trl", "transformers", "peft", "torch")},
            "log_history": trainer.state.log_history,
            "log_ratios": [[round(x, 4) for x in row] for row in log_ratio.tolist()],
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
        print({k: v for k, v in result.items() if not isinstance(v, list)}, flush=True)
    write_table(args.output)


if __name__ == "__main__":
    main()
