"""
DR-PO on real posts: SmolLM2-135M-Instruct with LoRA writes summaries and restarts from prefixes of human ones. The
reward is cheap, ROUGE-L to the human summary and how near its length is: this shows a run, not how good summaries get.

    pip install rouge-score
    python benchmarks/drpo_tldr_smollm2.py --model SMOLLM2 --data TLDR --output benchmarks/results/drpo_tldr_smollm2

`TLDR` is a folder with train and test files of rows with `prompt`, which ends in "TL;DR:", and `reference`. Summaries
before and after go, with their posts, to `--work_dir`.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
from datasets import Dataset, load_dataset
from peft import LoraConfig
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoTokenizer

from trl_lol import DRPOConfig, DRPOTrainer
from trl_lol.evaluation import evaluate_policy


matplotlib.use("Agg")
from matplotlib import pyplot as plt


SCORER = RougeScorer(["rougeL"], use_stemmer=True)
SUMMARY_TOKENS = 53  # as in the paper
WEIGHTS = [1.0, 0.2]  # of ROUGE-L and length
CURVES = {
    "reward/no_reset": "reward, from the prompt",
    "reward/reset": "reward, from within a reference",
    "rewards/rouge_l/mean": "ROUGE-L, all",
    "kl/completion": "KL of the generated tokens, nats",
    "completions/mean_length/no_reset": "tokens, from the prompt",
    "completions/mean_length/reset": "tokens, from within a reference",
}


def rouge_l(prompts: list[str], completions: list[str], reference: list[str], **columns: Any) -> list[float]:
    """F-measure of the longest common subsequence with the human summary."""
    pairs = zip(reference, completions, strict=True)
    return [SCORER.score(target, completion)["rougeL"].fmeasure for target, completion in pairs]


def near_length(prompts: list[str], completions: list[str], reference: list[str], **columns: Any) -> list[float]:
    """0 for as many words as the human summary has, -1 for none or twice as many."""
    lengths = ((len(target.split()), len(found.split())) for target, found in zip(reference, completions, strict=True))
    return [-min(abs(found - target) / max(target, 1), 1.0) for target, found in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work_dir", default="runs/drpo_tldr_smollm2")
    parser.add_argument("--reset_prob", type=float, default=0.5)
    parser.add_argument("--num_batches", type=int, default=12, help="generation batches")
    parser.add_argument("--batch_size", type=int, default=16, help="posts per generation batch")
    parser.add_argument("--max_prompt_length", type=int, default=256)
    parser.add_argument("--num_test", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_dataset(args.data)
    rows = rows.filter(lambda row: len(tokenizer(row["prompt"])["input_ids"]) <= args.max_prompt_length)
    test: Dataset = rows["test"].select(range(min(args.num_test, len(rows["test"]))))
    config = DRPOConfig(
        args.work_dir,
        reset_prob=args.reset_prob,
        reward_weights=WEIGHTS,
        beta=0.01,  # KL is summed over the tokens, and ROUGE-L is below 1
        lam=1.0,
        missing_eos_penalty=0.2,
        learning_rate=1e-4,
        value_learning_rate=1e-3,
        lr_scheduler_type="constant",
        num_iterations=2,
        max_steps=2 * args.num_batches,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=args.batch_size // 8,
        gradient_checkpointing=False,
        max_completion_length=SUMMARY_TOKENS,
        model_init_kwargs={"dtype": "bfloat16"},
        use_cpu=True,
        bf16=False,
        seed=args.seed,
        logging_steps=2,
        log_completions=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DRPOTrainer(
        args.model,
        [rouge_l, near_length],
        args=config,
        train_dataset=rows["train"].select_columns(["prompt", "reference"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )

    def judge() -> dict[str, Any]:
        columns = {"reference": test["reference"]}
        return evaluate_policy(
            trainer.model,
            tokenizer,
            test["prompt"],
            [rouge_l, near_length],
            reward_weights=WEIGHTS,
            columns=columns,
            max_new_tokens=SUMMARY_TOKENS,
            seed=args.seed,
        )

    results = {"before": judge()}
    trainer.train()
    results["after"] = judge()

    args.output.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(min(6, len(test))):
        lines += ["", "---", "", "```", results["before"]["samples"][i]["prompt"], "```"]
        lines += ["", f"**human** {test['reference'][i].strip()}"]
        for name, result in results.items():
            sample = result["samples"][i]
            lines += ["", f"**{name}** ({sample['reward']:.2f}) {sample['completion'].strip()}"]
    Path(args.work_dir, "samples.md").write_text("# Summaries before and after\n" + "\n".join(lines) + "\n")
    for result in results.values():
        del result["samples"]
    record = {
        "arguments": {
            name: value for name, value in vars(args).items() if name not in ("model", "data", "output", "work_dir")
        },
        "versions": {name: version(name) for name in ("trl-lol", "trl", "transformers", "torch")},
        "posts": {name: len(split) for name, split in rows.items()},
        "held_out": results,
        "log_history": trainer.state.log_history,
    }
    (args.output / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (name, title) in zip(axes.flat, CURVES.items(), strict=True):
        logs = [log for log in trainer.state.log_history if log.get(name) is not None]
        axis.plot([log["step"] for log in logs], [log[name] for log in logs], marker=".")
        axis.set(xlabel="step", title=title)
    figure.savefig(args.output / "curves.png", dpi=120)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
