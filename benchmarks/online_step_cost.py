"""
Where the time of a PPO or APA step goes, and what it costs beside TRL's GRPOTrainer on completions of the same length.

Both trainers generate as many tokens (EOS is not sampled), keep a reference, and go over each generation batch as
often; rounds alternate. Time is split into generation, scoring (log-probabilities of policy and reference, values,
rewards, advantages) and updates. On the CPU it is CPU time, on a GPU wall time between synchronisations.

    python benchmarks/online_step_cost.py                                   # embedded world, full training
    python benchmarks/online_step_cost.py --model path/to/model --lora      # a real model, with LoRA
    python benchmarks/online_step_cost.py --hidden_size 2048 --num_layers 16 --lora --dtype bfloat16 --batch_size 32 \\
        --max_new_tokens 256                                                # a random one, about 1 B parameters
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_lol import APAConfig, APATrainer, PPOConfig, PPOTrainer, toy


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Stopwatch:
    """Time spent in methods of a trainer."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        names = ("_generate_single_turn", "_generate_and_score_completions", "training_step")
        for name in names:
            setattr(trainer, name, self.timed(name, getattr(trainer, name)))

    def timed(self, name: str, method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[name] += clock() - start

        return call

    def phases(self) -> dict[str, float]:
        """Seconds by phase since the last call. A step contains the scoring, which contains the generation."""
        generation, scoring, step = (
            self.seconds[name]
            for name in ("_generate_single_turn", "_generate_and_score_completions", "training_step")
        )
        self.seconds.clear()
        return {"generation": generation, "scoring": scoring - generation, "update": step - scoring}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["ppo", "apa"], default="ppo")
    parser.add_argument("--model", help="folder or Hub id; the embedded world's model if not given")
    parser.add_argument("--hidden_size", type=int, help="of a Llama with random weights, instead of --model")
    parser.add_argument("--num_layers", type=int, default=16)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--batch_size", type=int, default=16, help="completions per generation batch")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--num_iterations", type=int, default=4)
    parser.add_argument("--batches", type=int, default=3, help="generation batches per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file to write the result to")
    args = parser.parse_args()

    dialogues = toy.make_dialogues(args.batches * args.batch_size)
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else toy.make_tokenizer(dialogues)
    if args.model:
        policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    else:
        size = {"hidden_size": args.hidden_size, "num_layers": args.num_layers} if args.hidden_size else {}
        policy = toy.make_model(tokenizer, **size).to(getattr(torch, args.dtype))
    num_parameters = policy.num_parameters()
    shared = {
        "use_cpu": not torch.cuda.is_available(), "bf16": args.dtype == "bfloat16", "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000, "learning_rate": 1e-6,
        "max_steps": args.batches * args.num_iterations, "per_device_train_batch_size": args.batch_size,
        "gradient_checkpointing": args.gradient_checkpointing, "max_completion_length": args.max_new_tokens,
        "num_iterations": args.num_iterations, "beta": 0.05,
        "generation_kwargs": {"min_new_tokens": args.max_new_tokens},
    }  # fmt: skip
    ours, config = {"ppo": (PPOTrainer, PPOConfig), "apa": (APATrainer, APAConfig)}[args.method]
    peft_config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if args.lora else None
    prompts = Dataset.from_dict({"prompt": dialogues["prompt"]})
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(f"{folder}/policy")  # GRPOTrainer loads its reference from there
        del policy
        trainers = {
            name: trainer_class(
                AutoModelForCausalLM.from_pretrained(f"{folder}/policy", dtype=args.dtype),
                reward,
                args=config_class(f"{folder}/{name}", **kwargs, **shared),
                train_dataset=prompts,
                processing_class=tokenizer,
                peft_config=peft_config,
            )
            for name, trainer_class, config_class, kwargs in (
                (args.method, ours, config, {}),
                ("grpo", GRPOTrainer, GRPOConfig, {"num_generations": 2}),
            )
        }
        watches = {name: Stopwatch(trainer) for name, trainer in trainers.items()}
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
        memory: dict[str, float] = {}
        for i in range(args.rounds + 1):
            for name in sorted(trainers, reverse=bool(i % 2)):
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                trainers[name]._buffered_inputs = None  # every round begins with a generation batch
                trainers[name]._step = 0
                trainers[name].train()
                phases = watches[name].phases()
                if i:  # the first round warms up
                    rounds[name].append({k: v / args.batches for k, v in phases.items()})
                    if torch.cuda.is_available():
                        memory[name] = torch.cuda.max_memory_allocated() / 2**20

    def median(name: str, phase: str) -> float:
        return statistics.median(r[phase] for r in rounds[name])

    phases = ("generation", "scoring", "update")
    ratios = {
        phase: statistics.median(a[phase] / b[phase] for a, b in zip(rounds[args.method], rounds["grpo"], strict=True))
        for phase in phases
    }
    result = {
        "seconds_per_generation_batch": {name: {phase: median(name, phase) for phase in phases} for name in trainers},
        "ratio_to_grpo": ratios,
        "rounds": rounds,
        "peak_memory_mb": memory or None,
        "parameters": num_parameters,
        "settings": {k: Path(v).name if k == "model" and v else v for k, v in vars(args).items() if k != "output"},
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
