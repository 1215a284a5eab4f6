"""
What sharing prompts saves: CoPG with `shared_prompts=True` beside CoPG without, and beside TRL's DPOTrainer.

All three train on the same completions in turn in one process, forth and back: CoPG on groups of k, DPO on pairs of
them. Log-probabilities of the reference come from the cache. A ratio is taken within a round; the result is the median
over rounds, of the CPU time of the process (one thread) or, on a GPU, of wall time between synchronisations. The
*ideal* is the ratio of the tokens that are computed, without padding. Peak memory is taken in processes apart. With
k = 1, where there is nothing to share, it is A-LoL instead of CoPG, and no DPO.

    python -m benchmarks.shared_prompts --model path/to/stories260k --batch_size 16
    python -m benchmarks.shared_prompts --model path/to/SmolLM2-135M --lora --steps 1 --rounds 2 --data HH "TL;DR"
    python -m benchmarks.shared_prompts --shape Qwen2.5-1.5B --batch_size 64     # on a GPU: random weights, LoRA, bf16
"""

import json
import random
import statistics
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import HfArgumentParser, PrinterCallback, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_lol import ALoLConfig, ALoLTrainer, CoPGConfig, CoPGTrainer, toy

from .harness import circumstances
from .meter import Meter
from .speed import ModelSetting, apart, clock, settle


OUTPUT = Path(__file__).parent / "results" / "shared_prompts"
NAMES = ("repeated", "shared", "DPO")
# Tokens of prompt and completion. Anthropic's HH and TL;DR are as counted with a vocabulary of 49 K
LENGTHS = {"short": (4, 32), "long answers": (60, 200), "even": (96, 96), "HH": (147, 45), "TL;DR": (348, 34)}


@dataclass(frozen=True)
class Case:
    """
    What is trained on.

    Args:
        data (`str`):
            One of `LENGTHS`.
        k (`int`):
            Completions of each prompt.
        is_ragged (`bool`, *optional*, defaults to `False`):
            Whether lengths are drawn between half of these and half as much again.
    """

    data: str
    k: int
    is_ragged: bool = False


CASES = (
    *(Case(data, k) for data in LENGTHS for k in (2, 4, 8)),
    *(Case("HH", k, is_ragged=True) for k in (2, 4, 8)),
    Case("HH", 1),
)


MEASURED_MEMORY = (Case("HH", 4), Case("TL;DR", 4))


@dataclass
class Setting(ModelSetting):
    """
    For how long.

    Args:
        batch_size (`int`, *optional*, defaults to `8`):
            Completions of an optimizer step, a multiple of 8.
        steps (`int`, *optional*, defaults to `8`):
            Optimizer steps in a round.
        rounds (`int`, *optional*, defaults to `8`):
            Rounds that count; one before them warms up. It is even, so that each order comes as often.
    """

    batch_size: int = 8
    steps: int = 8
    rounds: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._must_be_multiples(batch_size=8, rounds=2)


def make_groups(case: Case, num_completions: int) -> list[dict[str, Any]]:
    """Prompts of words of one token each, with their completions."""
    draw = random.Random(0)

    def words(word: str, length: int) -> str:
        return word * (draw.randint(length // 2, 3 * length // 2) if case.is_ragged else length)

    prompt, completion = LENGTHS[case.data]
    return [
        {
            "prompt": words(" a", prompt),
            # EOS is the last token
            "completions": [words(" b", completion - 1) for _ in range(case.k)],
            "rewards": [float(i) for i in range(case.k)],
        }
        for _ in range(num_completions // case.k)
    ]


def make_trainer(name: str, case: Case, setting: Setting, folder: Path) -> Trainer:
    """One of the trainers that are compared, on completions that are the same for all."""
    groups = make_groups(case, setting.batch_size * setting.steps)
    rows_per_step = setting.batch_size // case.k
    trainer_class, config_class, own = CoPGTrainer, CoPGConfig, {"shared_prompts": name == "shared"}
    if case.k == 1:
        trainer_class, config_class = ALoLTrainer, ALoLConfig
        own |= {"baseline": "none", "advantage_filter": "none", "sampling": "uniform"}
    if name == "DPO":
        trainer_class, config_class, own = DPOTrainer, DPOConfig, {}
        rows_per_step = setting.batch_size // 2
        groups = [
            {"prompt": group["prompt"], "chosen": group["completions"][i + 1], "rejected": group["completions"][i]}
            for group in groups
            for i in range(0, case.k, 2)
        ]
    args = config_class(
        str(folder), logging_steps=setting.steps, max_steps=setting.steps, per_device_train_batch_size=rows_per_step,
        max_length=None, train_sampling_strategy="sequential", precompute_ref_log_probs=True, **setting.config, **own,
    )  # fmt: skip
    tokenizer = setting.make_tokenizer(toy.make_dialogues(60))
    trainer = trainer_class(
        setting.make_model(tokenizer, folder),
        args=args,
        train_dataset=Dataset.from_list(groups),
        processing_class=tokenizer,
        peft_config=setting.peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Stopwatch(TrainerCallback):
    """Seconds of each run, from its first step to the end of its last one."""

    def __init__(self) -> None:
        self.rounds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.rounds.append(-clock())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.rounds[-1] += clock()


def take_turns(case: Case, setting: Setting) -> dict[str, Any]:
    """Seconds of each trainer in each round, and the tokens that it computes in one."""
    settle()
    names = NAMES if case.k > 1 else NAMES[:2]
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make_trainer(name, case, setting, Path(folder) / name) for name in names}
        watches = {name: Stopwatch() for name in names}
        for name, trainer in trainers.items():
            trainer.add_callback(watches[name])
        for i in range(-1, setting.rounds):
            for name in names if i % 2 else reversed(names):
                trainers[name].train()
        tokens = {name: _num_tokens(trainer) for name, trainer in trainers.items()}
    return {"seconds": {name: watch.rounds[1:] for name, watch in watches.items()}, "tokens": tokens}


def _num_tokens(trainer: Trainer) -> int:
    """Tokens of prompts and completions in a round, padding left out."""
    batches = list(trainer.get_train_dataloader())
    return int(sum(batch["attention_mask"].sum() for batch in batches))


def peak_memory(name: str, case: Case, setting: Setting) -> float:
    """Peak memory of a step, in MB, over what the process holds before the trainer is made."""
    settle()
    with tempfile.TemporaryDirectory() as folder:
        costs = Meter().measure(lambda: make_trainer(name, case, replace(setting, steps=1), Path(folder)).train())
    return costs["peak_memory_mb"]


def compare(turns: dict[str, Any]) -> dict[str, Any]:
    """
    Speed-ups out of what [`take_turns`] returns: `ideal`, `speed_up` with its `range`, and `beside_dpo`, how many
    times as long DPO takes as CoPG with shared prompts. It is an error if DPO has computed other tokens than CoPG has
    without.
    """
    seconds, tokens = turns["seconds"], turns["tokens"]
    if tokens.get("DPO", tokens["repeated"]) != tokens["repeated"]:
        raise RuntimeError(f"Not the same completions: {tokens}.")
    ratios = [a / b for a, b in zip(seconds["repeated"], seconds["shared"], strict=True)]
    result = {
        "ideal": tokens["repeated"] / tokens["shared"],
        "speed_up": statistics.median(ratios),
        "range": (min(ratios), max(ratios)),
    }
    if "DPO" in seconds:
        pairs = zip(seconds["DPO"], seconds["shared"], strict=True)
        result["beside_dpo"] = statistics.median(a / b for a, b in pairs)
    return result


def run(output: Path = OUTPUT, data: Sequence[str] = tuple(LENGTHS), **setting: Any) -> Path:
    """
    Measure, and write it down, with a table and a plot of all results in the folder.

    Args:
        output (`Path`, *optional*):
            Folder of the results.
        data (`Sequence[str]`, *optional*):
            What to train on, some of `LENGTHS`.
        **setting (`Any`):
            Fields of [`Setting`].

    Returns:
        `Path`: The file with the result.
    """
    chosen, results = Setting(**setting), []
    fields = asdict(chosen) | ({"model": Path(chosen.model).name} if chosen.model else {})
    path = output / f"{chosen.name}.json"
    output.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if case.data not in data:
            continue
        turns = apart(take_turns, case, chosen)
        results.append({**asdict(case), **compare(turns), **turns})
        if case in MEASURED_MEMORY:
            results[-1]["peak_memory_mb"] = {name: apart(peak_memory, name, case, chosen) for name in NAMES}
        last = results[-1]
        print(f"{case}: {last['speed_up']:.2f} of {last['ideal']:.2f}", flush=True)
        path.write_text(json.dumps({"setting": fields, **circumstances(), "cases": results}, indent=1) + "\n")
    (output / "README.md").write_text(table(output))
    plot(output).savefig(output / "speed.png")
    return path


def table(folder: Path) -> str:
    """All results of a folder as Markdown."""
    lines = [
        "# What sharing prompts saves",
        "",
        "By `python -m benchmarks.shared_prompts`, which says how it is measured. *Ideal* is the ratio of the tokens "
        "that are computed; *speed-up* that of the times of CoPG without and with `shared_prompts=True`, the median "
        "over paired rounds, lowest and highest; *share* is speed-up over ideal; *beside DPO* how many times as long "
        "TRL's DPOTrainer takes on the same completions in pairs. Memory is the peak of a process of its own, over "
        "what it holds before the trainer is made. Ragged lengths are drawn between half of these and half as much "
        "again; the ideal knows no padding. CoPG takes two completions at least: with k = 1 it is A-LoL. `batch_size` "
        "counts completions. The rows are synthetic, with prompts and completions of the lengths said.",
        "",
        "![Speed-up against the length of prompts](speed.png)",
    ]
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        facts = ("setting", "machine", "versions")
        lines += ["", f"## `{path.stem}`", ""]
        lines += ["; ".join(", ".join(f"{k} {v}" for k, v in result[fact].items() if v) for fact in facts) + "."]
        lines += ["", "| data | tokens | k | ideal | speed-up | range | share | beside DPO | memory, MB: repeated | "]
        lines[-1] += "shared | DPO |"
        lines += [f"| --- | {' | '.join(['---:'] * 10)} |"]
        for case in result["cases"]:
            prompt, completion = LENGTHS[case["data"]]
            cells = [f"{case['data']}{', ragged' if case['is_ragged'] else ''}", f"{prompt} + {completion}", case["k"]]
            cells += [f"{case['ideal']:.2f}", f"{case['speed_up']:.2f}"]
            cells += [" to ".join(f"{end:.2f}" for end in case["range"]), f"{case['speed_up'] / case['ideal']:.0%}"]
            cells += [f"{case['beside_dpo']:.2f}" if "beside_dpo" in case else ""]
            cells += [f"{case['peak_memory_mb'][n]:.0f}" if "peak_memory_mb" in case else "" for n in NAMES]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def plot(folder: Path) -> Figure:
    """Speed-up against the ratio of prompt to completion, with the ideal, for all results of a folder."""
    paths = sorted(folder.glob("*.json"))
    figure = Figure(figsize=(5.5 * len(paths), 4.5), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(paths), sharey=True, squeeze=False)[0]
    ratios = torch.logspace(-1, 1.2, 100).tolist()
    for axis, path in zip(axes, paths, strict=True):
        cases = [case for case in json.loads(path.read_text())["cases"] if not case["is_ragged"]]
        for k, color, marker in ((2, "#0072B2", "o"), (4, "#D55E00", "s"), (8, "#009E73", "D")):
            axis.plot(ratios, [k * (1 + r) / (k + r) for r in ratios], "--", color=color, linewidth=1, alpha=0.7)
            points = [(LENGTHS[c["data"]][0] / LENGTHS[c["data"]][1], c) for c in cases if c["k"] == k]
            x, y = zip(*sorted((r, c["speed_up"]) for r, c in points), strict=True)
            ends = [c["range"] for _, c in sorted(points, key=lambda point: point[0])]
            errors = list(zip(*((v - low, high - v) for v, (low, high) in zip(y, ends, strict=True)), strict=True))
            axis.errorbar(x, y, errors, color=color, marker=marker, linewidth=1.2, capsize=2, label=f"k = {k}")
        axis.axhline(1, color="#333333", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", title=path.stem, xlabel="prompt tokens per completion token")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.5)
    axes[0].set_ylabel("speed-up (dashed: ratio of tokens)")
    axes[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    text = __doc__ + ModelSetting.__doc__ + Setting.__doc__
    parser = HfArgumentParser(Setting, description=text, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    run(**vars(parser.parse_args()))
