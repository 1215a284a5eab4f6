"""
What the values of A-LoL cost: memory, time and forwards of the value pass beside a plain forward of the same model
over the same batches of prompts.

Four runs, each measured in a process of its own:

- `load`: nothing but the model. What the others need beyond it is theirs.
- `forward`: one plain forward of the causal language model on each batch of prompts, longest first.
- `backbone`: the same without the language-model head, which makes logits that values have no need of.
- `values`: [`~trl_lol.value.ValueEstimator`] fits a head on the first prompts and predicts the others.

Memory is the peak, from when the model is loaded, of the process's resident set on a CPU (Linux), and of what PyTorch
has allocated on a GPU.

    python benchmarks/value_pass_cost.py --output result.json                     # random weights
    python benchmarks/value_pass_cost.py --model path/to/model --output result.json
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trl_lol import value as value_module


PASSES = ("load", "forward", "backbone", "values")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; random weights if not given")
    parser.add_argument("--hidden_size", type=int, default=512, help="of the model with random weights")
    parser.add_argument("--num_layers", type=int, default=8, help="likewise")
    parser.add_argument("--vocab_size", type=int, default=32_000, help="likewise")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--fitted", type=int, default=48, help="of the prompts, those that the head is fitted on")
    parser.add_argument("--prompt_length", type=int, default=256, help="of the longest; the shortest has an eighth")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10, help="of the head")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each pass, of which the median counts")
    parser.add_argument("--output", type=Path, help="JSON file to write the result to")
    parser.add_argument("--measure", choices=PASSES, help="run one pass here and print what it took")
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args)))
        return

    runs = {name: [] for name in PASSES}
    for _ in range(args.rounds):
        for name in PASSES:
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {name: {key: median(run[key] for run in runs[name]) for key in runs[name][0]} for name in PASSES}
    peak = {name: medians[name]["peak_mib"] for name in PASSES}
    reading = medians["values"]["seconds"] - medians["values"]["fitting_seconds"]
    result = {
        "peak_ratio": peak["values"] / peak["forward"],
        "peak_ratio_to_backbone": peak["values"] / peak["backbone"],
        "beyond_the_model_mib": {name: peak[name] - peak["load"] for name in PASSES[1:]},
        "reading_time_ratio": reading / medians["forward"]["seconds"],
        "seconds_per_prompt": {name: medians[name]["seconds"] / args.prompts for name in PASSES[1:]},
        "passes": medians,
        "runs": runs,
        "settings": {
            key: Path(value).name if key == "model" and value else value
            for key, value in vars(args).items()
            if key not in ("output", "measure")
        },
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Run one pass, and return its peak of memory in MiB, its seconds and its forwards of each prompt."""
    model = load(args)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(args.prompt_length / 8, args.prompt_length, args.prompts).long()
    # Small ids, for any vocabulary; shuffled, so that those that are fitted are of all lengths
    prompts = [torch.randint(3, 1000, (length,), generator=generator).tolist() for length in lengths]
    prompts = [prompts[i] for i in torch.randperm(len(prompts), generator=generator)]
    forwards = dict.fromkeys(map(tuple, prompts), 0)

    def count(module: torch.nn.Module, _: tuple, kwargs: dict) -> None:
        for ids, mask in zip(kwargs["input_ids"].cpu(), kwargs["attention_mask"].cpu(), strict=True):
            forwards[tuple(ids[mask.bool()].tolist())] += 1

    model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    fitting = []
    cross_fit = value_module.cross_fit_values

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        fitted = cross_fit(*args, **kwargs)
        fitting.append(time.perf_counter() - begin)
        return fitted

    value_module.cross_fit_values = timed
    reset_peak()
    start = time.perf_counter()
    if args.measure == "values":
        rewards = torch.rand(args.prompts, generator=generator)
        settings = {"batch_size": args.batch_size, "max_prompts": args.fitted, "num_train_epochs": args.epochs}
        estimator = value_module.ValueEstimator(lambda: nullcontext(model), **settings)
        estimator.fit(prompts, rewards)
        assert estimator.predict_sharded(prompts, "all").isfinite().all()
    elif args.measure != "load":
        forward(model, prompts, args)
    peak = peak_mib()
    counts = forwards.values()
    num_tokens = sum(map(len, prompts)) * min(args.fitted / args.prompts, 1)
    return {
        "peak_mib": peak,
        # What the fit keeps in the memory of the host, on average over the choice of prompts
        "hidden_states_mib": num_tokens * model.config.hidden_size * model.dtype.itemsize / 2**20,
        "seconds": time.perf_counter() - start,
        "fitting_seconds": sum(fitting),
        "least_forwards": min(counts),
        "most_forwards": max(counts),
    }


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**10


def load(args: argparse.Namespace) -> PreTrainedModel:
    """The model, in evaluation mode, on the GPU if there is one."""
    dtype = getattr(torch, args.dtype)
    if args.model is not None:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        config = LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 3,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.hidden_size // 64,
            dtype=dtype,
        )
        model = LlamaForCausalLM(config).to(dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def forward(model: PreTrainedModel, prompts: list[list[int]], args: argparse.Namespace) -> None:
    """A forward of each batch, of which nothing is kept."""
    callee = model if args.measure == "forward" else model.base_model
    prompts = sorted(prompts, key=len, reverse=True)
    for start in range(0, len(prompts), args.batch_size):
        batch = [torch.tensor(ids) for ids in prompts[start : start + args.batch_size]]
        masks = [torch.ones_like(ids) for ids in batch]
        inputs = {"input_ids": batch, "attention_mask": masks}
        padded = {
            name: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(model.device)
            for name, tensors in inputs.items()
        }
        callee(**padded, use_cache=False)


if __name__ == "__main__":
    main()
