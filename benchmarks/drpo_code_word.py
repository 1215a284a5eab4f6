"""
A reward that PPO does not find: 1 for a code word of n tokens, 0 for everything else. A uniform policy over V symbols
meets it once in V^n completions; a rollout that restarts from a prefix of the word needs only the rest of it.

    python benchmarks/drpo_code_word.py run --output benchmarks/results/drpo_code_word
    python benchmarks/drpo_code_word.py table --output benchmarks/results/drpo_code_word

A Llama of two layers whose vocabulary is V = 8 symbols, all of which it may write: EOS, the prompt and the six that
words are made of. Its output layer starts at zero, so that it is uniform. There is one prompt and, for each seed and
n, one random word, which is every row's reference. "DR-PO, random references" is a control: a random word of its own
for every row, so that rollouts restart from prefixes that lead nowhere. "DR-PO, roll-in ≥ 1" always resets and is the
law of the paper's code, which never trains the first token: what that one's probability does is a side effect of the
weights that it shares with the others. It needs n ≥ 2.

Success is the probability of the word from the bare prompt, product of the trained policy's own probabilities:
nothing is sampled.

Every run gets 6400 completions, 100 batches of 64 that are trained on 4 times, with the same settings: β .02, which
leaves the word the optimum at every n, no whitening (once the word is found, what is left to whiten is the critic's
noise), value head at 1e-2, the rest by default. DR-PO's learning rate is 1e-3. PPO is run at 1e-3, 3e-3 and 1e-2, and
counts at each n with the one that was best on these seeds: a choice with hindsight, in its favour.

All runs are made in this process, on one thread. What a file of results exists for is not run again; `--methods`
and `--seeds` split the work.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from trl_lol import DRPOConfig, DRPOTrainer, PPOConfig, PPOTrainer


matplotlib.use("Agg")
from matplotlib import pyplot as plt


SYMBOLS = ("<eos>", "<prompt>", "a", "b", "c", "d", "e", "f")
EOS, PROMPT, FIRST_LETTER, NUM_SYMBOLS = 0, 1, 2, len(SYMBOLS)
LENGTHS = (1, 2, 3, 4, 6, 8)
BATCH_SIZE = 64
LEARNING_RATES = {"PPO": (1e-3, 3e-3, 1e-2)}
LEARNING_RATE = 1e-3  # of the others

# Method: what is DR-PO's own
METHODS: dict[str, dict[str, Any]] = {
    "PPO": {},
    "DR-PO": {"reset_prob": 1.0},
    "DR-PO, half the time": {"reset_prob": 0.5},
    "DR-PO, roll-in ≥ 1": {"reset_prob": 1.0, "min_roll_in": 1},
    "DR-PO, random references": {"reset_prob": 1.0},
}
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH_SIZE,
    "lr_scheduler_type": "constant",
    "beta": 0.02,
    "whiten_advantages": False,
    "value_learning_rate": 1e-2,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=NUM_SYMBOLS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=32**-0.5,  # with Llama's .02 attention is all but uniform here, and positions look alike
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def draw_words(rng: np.random.Generator, count: int, n: int) -> list[list[int]]:
    return rng.integers(FIRST_LETTER, NUM_SYMBOLS, (count, n)).tolist()


@torch.no_grad()
def word_probs(model: LlamaForCausalLM, word: list[int]) -> list[float]:
    """Probability of each token of a word after the prompt and the tokens before it."""
    logits = model(torch.tensor([[PROMPT, *word]])).logits[0, :-1]
    return logits.double().softmax(-1)[torch.arange(len(word)), word].tolist()


class SuccessCurve(TrainerCallback):
    """The probability of the word, each time that `every` completions have been trained on."""

    def __init__(self, model: LlamaForCausalLM, word: list[int], every: int) -> None:
        self.model, self.word, self.every = model, word, every
        self.points: list[tuple[int, float]] = []

    def record(self, completions: int) -> None:
        self.points.append((completions, float(np.prod(word_probs(self.model, self.word)))))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        completions, rest = divmod(state.global_step * BATCH_SIZE, args.num_iterations)
        if rest == 0 and completions % self.every == 0:
            self.record(completions)


def train(
    method: str, n: int, seed: int, learning_rate: float = LEARNING_RATE, num_completions: int = 6400
) -> dict[str, Any]:
    """
    Train a policy.

    Args:
        method (`str`):
            One of `METHODS`.
        n (`int`):
            Length of the code word, in tokens.
        seed (`int`):
            Seed of the word, the model and the run.
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of the policy.
        num_completions (`int`, *optional*, defaults to `6400`):
            Completions to generate, a multiple of 64.

    Returns:
        `dict[str, Any]`: What came out: `success`, its curve, the probabilities of the word's tokens.
    """
    rng = np.random.default_rng((seed, n))
    (word,) = draw_words(rng, 1, n)
    num_rows = 4 * BATCH_SIZE
    references = draw_words(rng, num_rows, n) if "random" in method else [word] * num_rows
    tokenizer, model = make_tokenizer(), make_model(seed)
    rows = {"prompt": [SYMBOLS[PROMPT]] * num_rows, "reference": [" " + tokenizer.decode(ids) for ids in references]}
    rewarded: list[int] = []  # for each generated batch

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        is_word = [float(ids == word) for ids in completion_ids]
        rewarded.append(int(sum(is_word)))
        return is_word

    trainer_class, config_class = (PPOTrainer, PPOConfig) if method == "PPO" else (DRPOTrainer, DRPOConfig)
    curve = SuccessCurve(model, word, max(num_completions // 20 // BATCH_SIZE, 1) * BATCH_SIZE)
    curve.record(0)
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            folder,
            **SETTINGS,
            **METHODS[method],
            learning_rate=learning_rate,
            max_completion_length=n,
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        config.max_steps = num_completions // BATCH_SIZE * config.num_iterations
        trainer = trainer_class(
            model,
            reward,
            args=config,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
            callbacks=[curve],
        )
        trainer.remove_callback(PrinterCallback)
        start = time.process_time()
        trainer.train()
    probs = word_probs(model, word)
    hits = np.flatnonzero(rewarded)
    return {
        "success": float(np.prod(probs)),
        "word": tokenizer.decode(word),
        "token_probs": probs,
        "num_rewarded": sum(rewarded),
        "completions_to_first_reward": int(hits[0] + 1) * BATCH_SIZE if len(hits) else None,
        "cpu_seconds": round(time.process_time() - start, 1),
        "curve": curve.points,
    }


def specs(args: argparse.Namespace) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What is run, and the file for its result."""
    for seed in args.seeds:
        for n in args.lengths:
            for method in args.methods:
                if n <= METHODS[method].get("min_roll_in", 0):
                    continue
                for learning_rate in LEARNING_RATES.get(method, (LEARNING_RATE,)):
                    spec = {"method": method, "n": n, "seed": seed, "learning_rate": learning_rate}
                    name = method.replace(", ", "_").replace(" ", "_").replace("≥_", "")
                    path = args.output / "runs" / f"{name}-n={n}-{learning_rate:g}-{seed}.json"
                    yield path, spec | {"num_completions": args.num_completions}


def run(args: argparse.Namespace) -> None:
    (args.output / "runs").mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("trl-lol", "trl", "transformers", "torch")}
    for path, spec in specs(args):
        settings = SETTINGS | METHODS[spec["method"]]
        if path.exists():
            before = json.loads(path.read_text())
            if changed := [k for k, value in (spec | {"settings": settings}).items() if before[k] != value]:
                raise ValueError(f"{path} is of a run with another {', '.join(changed)}; choose another --output.")
            continue
        result = {**spec, "settings": settings, **train(**spec), "versions": versions}
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{path.stem}: {result['success']:.4f}, {result['cpu_seconds']} s", flush=True)


def by_method(output: Path) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """The runs over n, of each method's best learning rate at that n."""
    found: dict[str, dict[int, dict[float, list]]] = {name: defaultdict(lambda: defaultdict(list)) for name in METHODS}
    for path in sorted(output.glob("runs/*.json")):
        r = json.loads(path.read_text())
        found[r["method"]][r["n"]][r["learning_rate"]].append(r)
    return {
        name: {n: max(of_rate.values(), key=mean_success) for n, of_rate in sorted(of_n.items())}
        for name, of_n in found.items()
        if of_n
    }


def mean_success(results: list[dict[str, Any]]) -> float:
    return float(np.mean([r["success"] for r in results]))


def table(output: Path) -> None:
    results = by_method(output)
    lengths = sorted({n for of_n in results.values() for n in of_n})
    chance = " | ".join(f"{NUM_SYMBOLS**-n:.1g}" for n in lengths)

    def rows(cell: Any) -> list[str]:
        return [
            f"| {name} | " + " | ".join(cell(of_n[n]) if n in of_n else "" for n in lengths) + " |"
            for name, of_n in results.items()
        ]

    def success(rs: list[dict[str, Any]]) -> str:
        of_seeds = ", ".join(f"{r['success']:.2f}" for r in rs)
        return f"{mean_success(rs):.3f} ({of_seeds})"

    def first_reward(rs: list[dict[str, Any]]) -> str:
        return ", ".join(str(r["completions_to_first_reward"] or "never") for r in rs)

    head = ["| n | " + " | ".join(map(str, lengths)) + " |", "| --- |" + " ---: |" * len(lengths)]
    some = next(iter(next(iter(results.values())).values()))[0]
    of_ppo = results.get("PPO", {})
    rates = " | ".join(f"{of_ppo[n][0]['learning_rate']:g}" if n in of_ppo else "" for n in lengths)
    lines = [
        f"Probability of the code word of n tokens from the bare prompt, after {some['num_completions']} completions: "
        "mean over the seeds (each seed).",
        "",
        *head,
        f"| before training, V^-n | {chance} |",
        *rows(success),
        f"| PPO's learning rate | {rates} |",
        "",
        "Probability of the word's first token, the mean over the seeds, and of all that follow it:",
        "",
        *head,
        *rows(lambda rs: f"{np.mean([r['token_probs'][0] for r in rs]):.3f}, "
                         f"{np.mean([np.prod(r['token_probs'][1:]) for r in rs]):.3f}"),
        "",
        f"Completions until the first reward (to a batch of {BATCH_SIZE}), each seed:",
        "",
        *head,
        *rows(first_reward),
    ]  # fmt: skip
    (output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(results, lengths, output / "success.png")


def plot(results: dict[str, dict[int, list[dict[str, Any]]]], lengths: list[int], path: Path) -> None:
    figure, (over_n, over_time) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    shown = max(n for n in lengths if n <= 6)
    for i, (name, of_n) in enumerate(results.items()):
        style = {"color": f"C{i}", "ls": "--" if "," in name else "-"}
        over_n.plot(list(of_n), [mean_success(rs) for rs in of_n.values()], label=name, **style)
        for n, rs in of_n.items():
            x = n + 0.06 * (i - len(results) / 2)  # side by side
            over_n.plot([x] * len(rs), [r["success"] for r in rs], "o", ms=4, alpha=0.6, color=f"C{i}")
        for r in of_n.get(shown, []):
            over_time.plot(*zip(*r["curve"], strict=True), lw=1, **style)
    over_n.plot(lengths, [float(NUM_SYMBOLS) ** -n for n in lengths], ":", color="grey", label="before training")
    over_n.set(xlabel="n, tokens of the code word", ylabel="probability of the code word", xticks=lengths)
    over_time.set(xlabel="completions", ylabel=f"probability of the code word, n = {shown}", yscale="log")
    figure.legend(*over_n.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_completions", type=int, default=6400)
    args = parser.parse_args()
    if args.command == "table":
        table(args.output)
        return
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    run(args)


if __name__ == "__main__":
    main()
