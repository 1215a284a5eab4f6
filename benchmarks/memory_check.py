"""
How far the formula of `memory.py` is off: beside a step on tensors that have shapes and no data, and beside the
trainers themselves, on models with random weights.

    python benchmarks/memory_check.py --simulate                                           # 1.5 B to 8 B, a minute
    python benchmarks/memory_check.py --measure alol copg ppo apa drpo                     # on the CPU
    python benchmarks/memory_check.py --measure alol ppo --shape Llama-3.1-8B --device cuda --tokens 768
    python benchmarks/memory.py                                                            # then the tables

`--measure` counts what the allocator hands out. On the CPU the model has the embedded world's small vocabulary: there
TRL's fused head works on float32 copies of its logits, which would outweigh all else.
"""

import argparse
import gc
import json
import platform
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, replace
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from memory import CHECKS, FIXED, GIB, ONLINE, SHAPES, Step, predict
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_lol import (
    ALoLConfig,
    ALoLTrainer,
    APAConfig,
    APATrainer,
    CoPGConfig,
    CoPGTrainer,
    DRPOConfig,
    DRPOTrainer,
    PPOConfig,
    PPOTrainer,
    toy,
)
from trl_lol._trl import add_fused_lm_head, chunked_logprob
from trl_lol.value import add_value_head


TRAINERS: dict[str, tuple[type, type]] = {
    "alol": (ALoLTrainer, ALoLConfig),
    "copg": (CoPGTrainer, CoPGConfig),
    "ppo": (PPOTrainer, PPOConfig),
    "apa": (APATrainer, APAConfig),
    "drpo": (DRPOTrainer, DRPOConfig),
}


class Meter(TorchDispatchMode):
    """
    Bytes of the tensors that are alive, and their peak. (torch's own MemTracker hooks every parameter, and fails on
    the frozen ones beside an adapter.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if (
                isinstance(tensor, Tensor)
                and (key := (storage := tensor.untyped_storage())._cdata) not in self.storages
            ):
                self.storages.add(key)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.free, key, storage.nbytes())
        return outputs

    def free(self, key: int, num_bytes: int) -> None:
        self.storages.discard(key)
        self.alive -= num_bytes


@contextmanager
def head_as_on_a_gpu() -> Iterator[None]:
    """Without the float32 copies that only the CPU's version of TRL's fused head makes."""
    names = ("_forward_tile", "_backward_tile", "_addmm_fp32")
    originals = {name: getattr(chunked_logprob, name) for name in names}
    try:
        for name in names:
            setattr(chunked_logprob, name, lambda *args, **kwargs: None)
        yield
    finally:
        for name, original in originals.items():
            setattr(chunked_logprob, name, original)


def lora(step: Step) -> LoraConfig:
    return LoraConfig(
        r=step.lora_r,
        lora_alpha=16,
        lora_dropout=step.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def random_model(shape: str, device: str) -> PreTrainedModel:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16, attn_implementation="sdpa")


def simulate(shape: str, step: Step) -> int:
    """
    Peak bytes of two optimizer steps, like the trainers', on tensors that have shapes and no data.

    Args:
        shape (`str`):
            One of `SHAPES`.
        step ([`Step`]):
            The step, on one GPU, without generation.

    Returns:
        `int`: Peak of the bytes of all tensors.
    """
    model = random_model(shape, "meta")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    policy = get_peft_model(model, lora(step))
    if step.has_value_head:
        add_value_head(model)
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.enable_input_require_grads()
    policy.train()
    meter = Meter()
    with FakeTensorMode(allow_non_fake_inputs=True), meter, head_as_on_a_gpu():
        replaced: dict[Tensor, nn.Parameter] = {}  # tied weights stay tied
        for module in policy.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    if p not in replaced:
                        trained = p.requires_grad or "value_head" in name
                        replaced[p] = nn.Parameter(torch.empty_like(p, device="cpu"), requires_grad=trained)
                    module._parameters[name] = replaced[p]
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], foreach=False)
        input_ids = torch.zeros(step.sequences, step.tokens, dtype=torch.long)
        kwargs = {"return_values": True} if step.has_value_head else {}
        for i in range(4 if step.accumulates else 2):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = policy(
                    input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=input_ids, use_cache=False,
                    fused_lm_head=True, **kwargs,
                )  # fmt: skip
            loss = outputs.log_probs.sum()
            if step.has_value_head:
                loss = loss + outputs.state_values.sum()
            loss.backward()
            del outputs, loss
            if i % 2 or not step.accumulates:
                optimizer.step()
                optimizer.zero_grad()
    return meter.peak


def peak_bytes(run: Callable[[], Any], model: nn.Module, device: str) -> int:
    """Peak of what the allocator hands out during `run`, with the model that lies there before."""
    gc.collect()  # what was before is not to be freed during the run
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = sum(p.numel() * p.element_size() for p in model.parameters())
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def measure(method: str, shape: str, step: Step, completion_tokens: int, device: str) -> tuple[Step, int]:
    """
    Train two optimizer steps with the trainer itself, on random weights and sequences of one length.

    Args:
        method (`str`):
            `"alol"`, `"copg"`, `"ppo"`, `"apa"` or `"drpo"`.
        shape (`str`):
            One of `SHAPES`.
        step ([`Step`]):
            Sequences, tokens and adapter.
        completion_tokens (`int`):
            Tokens of each completion (online).
        device (`str`):
            `"cpu"` or `"cuda"`.

    Returns:
        `tuple[Step, int]`: The step as it was, with what follows from the method, and the peak in bytes.
    """
    dialogues = toy.make_dialogues(8)
    tokenizer = toy.make_tokenizer(dialogues)
    model = random_model(shape, device)
    is_online = method in ONLINE
    trainer_class, config_class = TRAINERS[method]
    k = 4 if method == "copg" else 1
    shared = {
        "use_cpu": device == "cpu", "bf16": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "per_device_train_batch_size": step.sequences // k, "logging_steps": 100, "max_steps": 2,
        "gradient_accumulation_steps": 2 if step.accumulates else 1,
    }  # fmt: skip
    text = " a" * step.tokens  # one token each
    if is_online:
        prompt = text[: 2 * (step.tokens - completion_tokens)]
        shared |= {
            "max_completion_length": completion_tokens, "num_iterations": 1,
            "steps_per_generation": step.generated // step.sequences,
            "generation_kwargs": {"min_new_tokens": completion_tokens},
        }  # fmt: skip
        count = max(step.generated, 4 * step.sequences)
        rows = {"prompt": [prompt] * count, "completion": [" b" * completion_tokens] * count}
    else:
        count = 4 * step.sequences // k
        shared |= {"max_length": step.tokens, "precompute_ref_log_probs": True}
        if method == "alol":
            shared |= {"baseline": "none", "sampling": "uniform"}
        rows = {
            "prompt": [" a"] * count,
            "completions": [[text] * k] * count,
            "rewards": [[1.0, 2.0, 3.0, 4.0][:k]] * count,
        }
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model,
            *([lambda completions, **kwargs: [float(len(c)) for c in completions]] if is_online else []),
            args=config_class(folder, **shared),
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
            peft_config=lora(step),
        )
        peak = peak_bytes(trainer.train, trainer.model, device)
    step = replace(step, on_cpu=device == "cpu", has_value_head=is_online)
    if is_online:
        return replace(step, prompt_tokens=step.tokens - completion_tokens), peak
    return replace(step, generated=0), peak


def check(by: str, method: str, shape: str, step: Step, found: int, device: str) -> None:
    """Print a check, and keep it in place of an earlier one of the same."""
    predicted = predict(shape, step)
    fixed = sum(predicted[name] for name in FIXED)
    entry = {
        "by": by,
        "method": method,
        "shape": shape,
        "vocab_size": SHAPES[shape].vocab_size,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "step": asdict(step),
        "predicted_gib": predicted["peak"] / GIB,
        "found_gib": found / GIB,
        "ratio": predicted["peak"] / found,
        # without what lies there all the time, which is only counted
        "ratio_of_the_rest": (predicted["peak"] - fixed) / (found - fixed),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
    }
    print(json.dumps({name: entry[name] for name in list(entry)[:-1]}), flush=True)
    checks = json.loads(CHECKS.read_text()) if CHECKS.exists() else []
    same = ("by", "method", "shape", "vocab_size", "device", "step")
    checks = [old for old in checks if any(old[name] != entry[name] for name in same)]
    CHECKS.parent.mkdir(parents=True, exist_ok=True)
    CHECKS.write_text(json.dumps([*checks, entry], indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="check by tensors without data")
    parser.add_argument("--measure", nargs="+", default=[], choices=list(TRAINERS), help="trainers to run")
    parser.add_argument("--shape", choices=list(SHAPES), default="Qwen2.5-0.5B")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sequences", type=int, default=4, help="in a forward")
    parser.add_argument("--tokens", type=int, default=128, help="of prompt and completion")
    parser.add_argument("--completion_tokens", type=int, default=32, help="online")
    parser.add_argument("--generated", type=int, default=8, help="completions generated at a time, online")
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--no_accumulation", action="store_true", help="one forward per optimizer step")
    args = parser.parse_args()

    if args.simulate:
        for shape in ("Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.1-8B"):
            for step in (
                Step(4, 768, 64),
                Step(4, 768, 16, has_value_head=True),
                Step(1, 4096, 16, accumulates=False),
            ):
                method = "online" if step.has_value_head else "offline"
                check("simulated", method, shape, step, simulate(shape, step), "cpu")
    if args.device == "cpu":
        SHAPES[args.shape] = config = copy(SHAPES[args.shape])
        config.vocab_size = 768
    for method in args.measure:
        step = Step(args.sequences, args.tokens, args.lora_r, accumulates=not args.no_accumulation)
        step = replace(step, generated=args.generated)
        step, found = measure(method, args.shape, step, args.completion_tokens, args.device)
        check("measured", method, args.shape, step, found, args.device)


if __name__ == "__main__":
    main()
