"""
The memory that a step of LoRA takes on each GPU: a formula, and what it says of the 7 B recipes. `memory_check.py`
says how far off it is.

    python benchmarks/memory.py     # writes the tables of docs/memory.md, from the recipes' YAMLs and the checks
"""

import argparse
import json
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config


ROOT = Path(__file__).parent.parent
CHECKS = Path(__file__).parent / "results" / "memory" / "checks.json"
DOCS = ROOT / "docs" / "memory.md"
GIB = 2**30
FIXED = ("weights", "adapter and its Adam states", "critic and its Adam states", "reward models")
ONLINE = ("ppo", "apa", "drpo")
SHAPES: dict[str, PreTrainedConfig] = {
    "SmolLM2-135M": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768,
    ),
    "Qwen2.5-1.5B": Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768,
    ),
    "Qwen2.5-7B": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, tie_word_embeddings=False, max_position_embeddings=32768,
    ),
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False, max_position_embeddings=131072,
    ),
}  # fmt: skip
# Parameters of the reward models in the YAMLs
REWARD_MODELS = {
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": 0.60e9,
    "Ray2333/GRM-Gemma2-2B-rewardmodel-ft": 2.61e9,
    "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr": 1.01e9,
    "cleanrl/EleutherAI_pythia-6.9b-deduped__reward__tldr": 6.86e9,
}


# ---- The formula ----


@dataclass(frozen=True)
class Step:
    """
    What the memory of a step depends on beside the model. Everything is of one GPU.

    Args:
        sequences (`int`):
            Sequences in a forward. Of CoPG all completions of its prompts, of a reward model both of each pair.
        tokens (`int`):
            Tokens of the longest sequence, prompt and completion.
        lora_r (`int`, *optional*, defaults to `16`):
            Rank of the adapter, on all linear layers.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of the adapter.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether the linear layers are in 4 bits.
        accumulates (`bool`, *optional*, defaults to `True`):
            Whether gradients are accumulated over several forwards.
        num_gpus (`int`, *optional*, defaults to `1`):
            Number of GPUs (DDP).
        has_lm_head (`bool`, *optional*, defaults to `True`):
            Whether there is a language-model head. A reward model has none.
        has_value_head (`bool`, *optional*, defaults to `False`):
            Whether there is a critic (online trainers).
        generated (`int`, *optional*, defaults to `0`):
            Completions that are generated at a time: of the whole generation batch.
        prompt_tokens (`int`, *optional*, defaults to `0`):
            Tokens of the longest prompt that is generated from.
        frozen_bytes (`float`, *optional*, defaults to `0.0`):
            Bytes of reward models that lie beside the policy.
        on_cpu (`bool`, *optional*, defaults to `False`):
            Whether the fused head works as on the CPU, where torch operations do what a kernel does in place on a GPU.
    """

    sequences: int
    tokens: int
    lora_r: int = 16
    lora_dropout: float = 0.0
    load_in_4bit: bool = False
    accumulates: bool = True
    num_gpus: int = 1
    has_lm_head: bool = True
    has_value_head: bool = False
    generated: int = 0
    prompt_tokens: int = 0
    frozen_bytes: float = 0.0
    on_cpu: bool = False


@cache
def sizes(shape: str) -> tuple[int, int, int]:
    """Parameters of a model, those of its linear layers without the head, and inputs + outputs of these."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape])
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    return (
        model.num_parameters(),
        sum(m.weight.numel() for m in linear),
        sum(m.in_features + m.out_features for m in linear),
    )


def predict(shape: str, step: Step) -> dict[str, float]:
    """
    Peak memory of one GPU, in bytes, for a model built as Llama, with bf16 weights, gradient checkpointing, SDPA
    attention, TRL's fused head and AdamW. docs/memory.md says the same in words.

    Args:
        shape (`str`):
            One of `SHAPES`.
        step ([`Step`]):
            The step.

    Returns:
        `dict[str, float]`: What lies there all the time by kind, what the training step and generation add, and the
        peak.
    """
    config = SHAPES[shape]
    num_parameters, num_linear, linear_sizes = sizes(shape)
    hidden, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head_dim = hidden // config.num_attention_heads
    kv = config.num_key_value_heads * head_dim
    if not step.has_lm_head and not config.tie_word_embeddings:
        num_parameters -= config.vocab_size * hidden

    # All the time
    weights = 2.0 * num_parameters
    if step.load_in_4bit:
        weights -= (2 - 0.5 - 4 / 64) * num_linear  # half a byte, and one float32 for 64 of them
    adapter = (2 if step.load_in_4bit else 4) * step.lora_r * linear_sizes  # TRL: bf16 beside 4 bits, else float32
    critic = 4 * (hidden + 2) * (hidden + 1) if step.has_value_head else 0
    trained = 3 * (adapter + critic)  # with two moments of Adam
    fixed = weights + trained + step.frozen_bytes

    # Forward and backward. Every layer keeps its input, and one layer at a time all that its backward needs
    tokens = step.sequences * step.tokens
    gradients = adapter + critic
    inputs = 2 * hidden * layers * tokens
    held = gradients if step.accumulates else 0  # of the forwards before
    buckets = gradients if step.num_gpus > 1 else 0  # DDP's
    layer = (14 * mlp + 32 * hidden) * tokens + 5 * step.sequences * step.tokens**2
    if step.lora_dropout:
        layer += (6 * hidden + mlp) * tokens  # one byte for each input of an adapter that may be dropped
    if step.load_in_4bit:
        layer += 2 * hidden * mlp  # the weight of the layer that is multiplied with, in bf16
    cast = 0 if step.load_in_4bit else adapter / 2  # autocast's bf16 copies, until the end of a forward
    # The fused head has logits of 4096 tokens and 32768 words at a time
    rows, words = min(tokens, 4096), min(config.vocab_size, 32768)
    tile = 2 * rows * 32768
    if step.on_cpu:  # float32 copies on the way, of the logits or of the weights
        tile += max(29 * rows * words, 4 * (rows + hidden) * words)
    if not step.has_lm_head:
        tile = 0
    head = tile + max(cast + 6 * hidden * tokens, 14 * hidden * tokens)
    if step.has_value_head:
        head += 20 * hidden * tokens
    # From layer to layer inputs go, and gradients come, unless they are there already
    training = buckets + max(inputs + held + head, max(inputs + held, gradients) + layer)

    # Generation: the cache, and one layer's work on the prompts or on one more token
    prompts, rollouts = step.generated * step.prompt_tokens, step.generated * step.tokens
    cached = 4 * kv * layers
    decoding = (4 * hidden + 8 * kv) * rollouts + 12 * config.vocab_size * step.generated
    generation = max(cached * prompts + 8 * mlp * prompts, cached * rollouts + decoding)
    generation += cast if step.generated else 0

    return {
        "weights": weights,
        "adapter and its Adam states": 3 * adapter,
        "critic and its Adam states": 3 * critic,
        "reward models": step.frozen_bytes,
        "gradients": gradients + buckets,
        "activations": training - gradients - buckets,
        "generation": generation,
        "peak": fixed + max(training, generation),
    }


# ---- Recipes ----


def step_of(path: Path, num_gpus: int) -> Step:
    """The step of a recipe's YAML."""
    recipe = yaml.safe_load(path.read_text())
    method = path.name.split("_")[0]
    per_device = recipe["per_device_train_batch_size"]
    is_online = method in ONLINE
    prompt = recipe.get("max_prompt_length", 0)
    models = [recipe[name] for name in ("reward_model", "judge_model") if name in recipe]
    return Step(
        sequences=per_device * {"copg": recipe.get("num_completions", 1), "reward": 2}.get(method, 1),
        tokens=prompt + recipe["max_completion_length"] if is_online else recipe["max_length"],
        lora_r=recipe["lora_r"],
        lora_dropout=0.0 if recipe.get("disable_dropout", True) else recipe.get("lora_dropout", 0.0),
        load_in_4bit=recipe.get("load_in_4bit", False),
        accumulates=recipe["gradient_accumulation_steps"] // num_gpus > 1,
        num_gpus=num_gpus,
        has_lm_head=method != "reward",
        has_value_head=is_online,
        generated=per_device * recipe["steps_per_generation"] // num_gpus if is_online else 0,
        prompt_tokens=prompt,
        frozen_bytes=sum(2 * REWARD_MODELS[name] for name in models),
    )


def tables(num_gpus: int) -> str:
    """The recipes' memory by the formula, and the checks of it, as Markdown."""
    columns = ["weights", "adapter, Adam", "critic, Adam", "reward models", "gradients", "activations", "generation"]
    lines = [
        f"| recipe | model | {' | '.join(columns)} | peak, GiB |",
        f"| --- | --- | {' | '.join(['---:'] * (len(columns) + 1))} |",
    ]
    for path in sorted((ROOT / "recipes" / "configs").glob("*_7b.yaml")):
        step = step_of(path, num_gpus)
        for shape in ("Qwen2.5-1.5B", "Qwen2.5-7B"):
            cells = [f"{value / GIB:.1f}" if value else "" for value in predict(shape, step).values()]
            cells[-1] = f"**{cells[-1]}**"
            lines.append(f"| `{path.stem}` | {shape} | {' | '.join(cells)} |")
    lines += [
        "",
        "| found by | trainer | model | sequences × tokens | LoRA r | generated | predicted, GiB | found | ratio | "
        "of the rest |",
        f"| --- | --- | --- | {' | '.join(['---:'] * 7)} |",
    ]
    for entry in json.loads(CHECKS.read_text()):
        step = Step(**entry["step"])
        where = "CPU" if entry["device"] == platform.machine() else entry["device"]
        by = entry["by"] if entry["by"] == "simulated" else f"measured, {where}"
        lines.append(
            f"| {by} | {entry['method']} | {entry['shape']} | {step.sequences} × {step.tokens} | {step.lora_r} | "
            f"{step.generated or ''} | {entry['predicted_gib']:.2f} | {entry['found_gib']:.2f} | "
            f"{entry['ratio']:.3f} | {entry['ratio_of_the_rest']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_gpus", type=int, default=4)
    args = parser.parse_args()
    marked = re.compile("(<!-- tables -->\n).*(\n<!-- end -->)", re.DOTALL)
    DOCS.write_text(marked.sub(lambda m: f"{m[1]}\n{tables(args.num_gpus)}\n{m[2]}", DOCS.read_text()))


if __name__ == "__main__":
    main()
