"""
What the log-ratio of a trained LoRA policy ranks held-out completions by: reward, or only length and style.

    python benchmarks/alol_hh_ranking.py --model BASE --adapter runs/alol_hh_lora --dataset DATA --rows 250
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_lol.data import tokenize_row
from trl_lol.generation import completion_logps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--dataset", required=True, help="preference rows with scores, with a test split")
    parser.add_argument("--rows", type=int, default=250)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_dataset(args.dataset)["test"].take(args.rows)
    tokenized = [tokenize_row(row, i, tokenizer, tokenizer.eos_token) for i, row in enumerate(rows)]
    prompts = [row["prompt_ids"] for row in tokenized for _ in row["completion_ids"]]
    completions = [ids for row in tokenized for ids in row["completion_ids"]]
    rewards = torch.tensor([reward for row in tokenized for reward in row["rewards"]])
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    reference = completion_logps(model, prompts, completions, batch_size=8)
    policy = completion_logps(PeftModel.from_pretrained(model, args.adapter), prompts, completions, batch_size=8)

    lengths = torch.tensor([len(ids) for ids in completions], dtype=torch.float)
    log_ratio = policy - reference
    better = rewards.view(-1, 2)[:, 0] > rewards.view(-1, 2)[:, 1]
    untied = rewards.view(-1, 2)[:, 0] != rewards.view(-1, 2)[:, 1]

    def ranking(scores: Tensor) -> dict[str, float]:
        pairs = scores.view(-1, 2)
        right = (pairs[:, 0] > pairs[:, 1]) == better
        return {
            "spearman": float(spearmanr(scores, rewards).statistic),
            "pair_accuracy": right[untied].double().mean().item(),
        }

    result = {
        "pairs": int(untied.sum()),
        "log_ratio": ranking(log_ratio),
        "log_ratio_per_token": ranking(log_ratio / lengths),
        "reference_logp_per_token": ranking(reference / lengths),
        "length": ranking(lengths),
        "mean_log_ratio": log_ratio.mean().item(),
        "correlation_of_log_ratio_and_length": torch.corrcoef(torch.stack([log_ratio, lengths]))[0, 1].item(),
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
