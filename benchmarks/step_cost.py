"""
What a step of A-LoL or CoPG costs beside a step of TRL's SFTTrainer on the same tokens.

Both trainers train on the same completions in the same order, in turn; the result is the median over rounds of the
ratio of CPU seconds. Reference log-probabilities come from the cache. CoPG trains on groups of four, SFT on their
members.

    python benchmarks/step_cost.py                                    # embedded world, full training
    python benchmarks/step_cost.py --model path/to/model --lora       # a real model, with LoRA
    python benchmarks/step_cost.py --method copg
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from trl_lol import ALoLConfig, ALoLTrainer, CoPGConfig, CoPGTrainer, toy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["alol", "copg"], default="alol")
    parser.add_argument("--model", help="folder or Hub id; the embedded world's model if not given")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=15, help="steps per round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output", type=Path, help="JSON file to write the result to")
    args = parser.parse_args()

    k = 4 if args.method == "copg" else 1
    if args.batch_size % k:
        raise ValueError(f"`--batch_size {args.batch_size}` must hold whole groups of {k}.")
    dialogues = toy.make_dialogues(args.steps * args.batch_size // k, answers_per_prompt=k)
    groups = dialogues.select_columns(["prompt", "completions"]).add_column(
        "rewards", [[1.0 + (i + j) % 3 for j in range(k)] for i in range(len(dialogues))]
    )
    members = [(row["prompt"], completion) for row in dialogues for completion in row["completions"]]
    singles = Dataset.from_dict({"prompt": [p for p, _ in members], "completion": [c for _, c in members]})
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else toy.make_tokenizer(dialogues)

    def model() -> transformers.PreTrainedModel:
        if args.model is None:
            return toy.make_model(tokenizer)
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)

    peft_config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if args.lora else None
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "use_cpu": not torch.cuda.is_available(), "bf16": args.dtype == "bfloat16", "report_to": "none",
            "save_strategy": "no", "disable_tqdm": True, "logging_steps": args.steps, "max_steps": args.steps,
            "gradient_checkpointing": False, "max_length": 1024, "train_sampling_strategy": "sequential",
            "learning_rate": 1e-5,
        }  # fmt: skip
        ours = {**shared, "per_device_train_batch_size": args.batch_size // k, "precompute_ref_log_probs": True}
        kwargs = {"processing_class": tokenizer, "peft_config": peft_config}
        if args.method == "alol":
            trainer_class, config = ALoLTrainer, ALoLConfig(f"{folder}/a", baseline="none", sampling="uniform", **ours)
        else:
            trainer_class, config = CoPGTrainer, CoPGConfig(f"{folder}/a", **ours)
        sft_args = SFTConfig(
            f"{folder}/sft", completion_only_loss=True, per_device_train_batch_size=args.batch_size, **shared
        )
        trainers = {
            args.method: trainer_class(model(), args=config, train_dataset=groups, **kwargs),
            "sft": SFTTrainer(model(), args=sft_args, train_dataset=singles, **kwargs),
        }
        seconds = {name: [] for name in trainers}
        for i in range(args.rounds + 1):
            for name in sorted(trainers, reverse=bool(i % 2)):
                start = time.process_time()
                trainers[name].train()
                if i:  # the first round warms up
                    seconds[name].append(time.process_time() - start)
    tokens = {name: trainer.state.log_history[0]["num_tokens"] for name, trainer in trainers.items()}
    assert trainers[args.method].ref_model is None
    ratios = [a / s for a, s in zip(seconds[args.method], seconds["sft"], strict=True)]
    result = {
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
        "cpu_seconds": seconds,
        "tokens_per_round": tokens,
        "settings": {k: Path(v).name if k == "model" and v else v for k, v in vars(args).items() if k != "output"},
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps({k: v for k, v in result.items() if k not in ("ratios", "cpu_seconds")}, indent=2))
    print(
        f"{trainer_class._name} / SFT: {result['ratio_median']:.3f}, between {min(ratios):.3f} and {max(ratios):.3f}"
    )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
