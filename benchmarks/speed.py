"""
What a step of each trainer costs beside one of TRL's SFTTrainer, or online of its GRPOTrainer, on the same tokens.

All trainers of a kind train in turn in one process, forth and back, so that a machine that gets slower or faster does
so for all. A ratio is taken within a round; the result is the median over rounds. On the CPU it is of the CPU time of
the process (one thread), on a GPU of wall time between synchronisations. Peak memory is taken in processes apart.

- *Offline*, every trainer goes over the same four completions of each prompt: A-LoL and SFT one by one, DPO in pairs,
  CoPG in fours. Log-probabilities of the reference come from the cache, and A-LoL has no baseline to estimate.
- *Online*, the policy generates as many tokens each time (EOS is not sampled; a roll-in of DR-PO counts). Every
  trainer goes over the same prompts with as many passes, and holds a reference.

    python -m benchmarks.speed                                              # embedded world, full training
    python -m benchmarks.speed --model path/to/model --lora --dtype bfloat16 --batch_size 4 --steps 4 --rounds 4
    python -m benchmarks.speed --shape Llama-3.1-8B --prompt_tokens 512 --completion_tokens 256 --batch_size 16
"""

import json
import multiprocessing
import re
import statistics
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
)
from transformers import logging as transformers_logging

from trl_lol import toy
from trl_lol._trl import compute_flops_per_token, compute_mfu, get_peak_flops

from .harness import circumstances
from .memory import SHAPES
from .meter import Meter
from .methods import METHODS


OUTPUT = Path(__file__).parent / "results" / "speed"
KINDS = {"offline": ("SFT on all", "A-LoL", "CoPG", "DPO"), "online": ("GRPO", "RLOO", "PPO", "APA", "DR-PO")}
COMPARED = [name for names in KINDS.values() for name in names[1:]]
GROUP = 4  # completions of a prompt
TIMED = ("_generate_single_turn", "_generate_and_score_completions")  # the second contains the first
PHASES = ("generation", "scoring", "update")
PASSES = 4  # over what was generated, each an optimizer step
OWN: dict[str, dict[str, Any]] = {"A-LoL": {"baseline": "none", "sampling": "uniform"}}  # settings


@dataclass
class ModelSetting:
    """
    What model is trained.

    Args:
        model (`str`, *optional*):
            Folder or Hub id of a model. If neither this nor `shape` is given, it is the embedded world's, untrained.
        shape (`str`, *optional*):
            One of the shapes of memory.py: a model with random weights, trained with LoRA in bfloat16 and with
            gradient checkpointing.
        lora (`bool`, *optional*, defaults to `False`):
            Whether to train an adapter, of rank 16 on all linear layers.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Of the weights. With `"bfloat16"` training is in bf16, too.
        attn_implementation (`str`, *optional*, defaults to `"sdpa"`):
            Attention of the model.
    """

    model: str | None = None
    shape: str | None = field(default=None, metadata={"choices": list(SHAPES)})
    lora: bool = False
    dtype: str = "float32"
    attn_implementation: str = "sdpa"

    def __post_init__(self) -> None:
        if self.shape is not None:
            if self.model is not None:
                raise ValueError(f"`model={self.model!r}` and `shape={self.shape!r}` exclude each other.")
            self.lora, self.dtype = True, "bfloat16"  # in full training GRPOTrainer would load a reference

    def _must_be_multiples(self, **units: int) -> None:
        for name, unit in units.items():
            if getattr(self, name) < 1 or getattr(self, name) % unit:
                raise ValueError(f"`{name}={getattr(self, name)}` must be a multiple of {unit}.")

    @property
    def name(self) -> str:
        """File name of the result."""
        model = self.shape or (Path(self.model).name if self.model else "toy")
        attention = "" if self.attn_implementation == "sdpa" else f"_{self.attn_implementation}"
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return re.sub(r"[^\w.]+", "-", f"{model}_{'lora' if self.lora else 'full'}{attention}_{device}").lower()

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that all trainers get."""
        return {
            "use_cpu": not torch.cuda.is_available(), "bf16": self.dtype == "bfloat16", "report_to": "none",
            "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": self.shape is not None,
            "learning_rate": 1e-6,
        }  # fmt: skip

    @property
    def peft_config(self) -> LoraConfig | None:
        """Adapter to train."""
        return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if self.lora else None

    def make_tokenizer(self, dialogues: Dataset) -> PreTrainedTokenizerBase:
        """The model's, or the embedded world's from these dialogues."""
        return AutoTokenizer.from_pretrained(self.model) if self.model else toy.make_tokenizer(dialogues)

    def make_model(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
        """The policy. The embedded world's is saved in `folder`, since GRPOTrainer loads its reference from there."""
        settings = {"dtype": getattr(torch, self.dtype), "attn_implementation": self.attn_implementation}
        if self.shape:
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                return AutoModelForCausalLM.from_config(SHAPES[self.shape], **settings)
        if self.model is None:
            toy.make_model(tokenizer).save_pretrained(folder / "policy")
        return AutoModelForCausalLM.from_pretrained(self.model or folder / "policy", **settings)


@dataclass
class Setting(ModelSetting):
    """
    On how much. Every method has the same.

    Args:
        prompt_tokens (`int`, *optional*):
            Tokens of each prompt. If `None`, the embedded world's dialogues are trained on.
        completion_tokens (`int`, *optional*, defaults to `48`):
            Tokens of each completion that is generated; with `prompt_tokens` also of those that are not.
        batch_size (`int`, *optional*, defaults to `8`):
            Sequences of an optimizer step, a multiple of 4.
        steps (`int`, *optional*, defaults to `12`):
            Optimizer steps in a round, a multiple of 4: what was generated is gone over as often.
        rounds (`int`, *optional*, defaults to `8`):
            Rounds that count; one before them warms up. It is even, so that each order comes as often.
    """

    prompt_tokens: int | None = None
    completion_tokens: int = 48
    batch_size: int = 8
    steps: int = 12
    rounds: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._must_be_multiples(batch_size=GROUP, steps=PASSES, rounds=2)


def make_trainer(name: str, setting: Setting, folder: Path) -> Trainer:
    """The trainer of a method, on tokens that are the same for all methods of its kind."""
    method = METHODS[name]
    dialogues = toy.make_dialogues(setting.steps * setting.batch_size // GROUP, answers_per_prompt=GROUP)
    tokenizer = setting.make_tokenizer(dialogues)
    groups = [(row["prompt"], row["completions"]) for row in dialogues]
    if setting.prompt_tokens:  # one token each
        groups = [(" a" * setting.prompt_tokens, [" b" * setting.completion_tokens] * GROUP)] * len(groups)
    k = {"CoPG": GROUP, "DPO": 2}.get(method.trainer, 1)
    config = setting.config | {
        "logging_steps": setting.steps,
        "max_steps": setting.steps,
        "per_device_train_batch_size": setting.batch_size // k,
    }
    if method.is_online:
        config |= {
            "num_iterations": PASSES, "num_generations": 2, "shuffle_dataset": False, "beta": 0.05,
            "max_completion_length": setting.completion_tokens,
            "generation_kwargs": {"min_new_tokens": setting.completion_tokens},
        }  # fmt: skip
    else:
        config |= {"max_length": None, "train_sampling_strategy": "sequential"}
        config |= {} if method.trainer == "SFT" else {"precompute_ref_log_probs": True}
    trainer = method.trainer_class(
        setting.make_model(tokenizer, folder),
        args=method.config_class(str(folder), **{**method.settings, **config, **OWN.get(name, {})}),
        train_dataset=Dataset.from_list(_rows(method.trainer, groups, k)),
        processing_class=tokenizer,
        peft_config=setting.peft_config,
        **({"reward_funcs": _reward} if method.is_online else {}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _rows(trainer: str, groups: list[tuple[Any, list]], k: int) -> list[dict[str, Any]]:
    """All completions in the same order, `k` to a row, in the columns that the trainer takes."""
    parts = [(prompt, answers[i : i + k]) for prompt, answers in groups for i in range(0, GROUP, k)]
    if trainer in ("ALoL", "CoPG"):
        rewards = [1.0 + i for i in range(k)]
        return [{"prompt": prompt, "completions": answers, "rewards": rewards} for prompt, answers in parts]
    columns = ("chosen", "rejected") if trainer == "DPO" else ("completion",)  # online, the reference of DR-PO
    return [{"prompt": prompt, **dict(zip(columns, answers, strict=True))} for prompt, answers in parts]


def _reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]


def clock() -> float:
    """Seconds: of the wall when the GPU is done, or of the process on the CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Stopwatch:
    """Time and tokens of a trainer's rounds."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.seconds = trainer, defaultdict(float)
        trainer.model.register_forward_pre_hook(self._count, with_kwargs=True)
        for name in filter(partial(hasattr, trainer), TIMED):
            setattr(trainer, name, self._timed(name, getattr(trainer, name)))

    def _count(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.tokens = self.tokens + kwargs["attention_mask"].sum()
            self.sequences += len(kwargs["attention_mask"])

    def _timed(self, name: str, method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            result = method(*args, **kwargs)
            self.seconds[name] += clock() - start
            return result

        return call

    def round(self) -> dict[str, float]:
        """
        Train once: `seconds`, of these `generation`, `scoring` (rewards, and log-probabilities and values before the
        update) and `update`; `tokens` trained on, every pass counted; on a GPU `mfu`, in percent, of the updates.
        """
        self.seconds.clear()
        self.tokens, self.sequences, start = 0, 0, clock()
        self.trainer.train()
        seconds, tokens = clock() - start, int(self.tokens)
        generation, scored = (self.seconds[name] for name in TIMED)
        phases = {"generation": generation, "scoring": scored - generation, "update": seconds - scored}
        result = {"seconds": seconds, **phases, "tokens": tokens}
        in_bf16 = torch.cuda.is_available() and self.trainer.args.bf16  # TRL knows no peak of float32
        if in_bf16 and (peak := get_peak_flops(torch.cuda.get_device_name(), "bfloat16")):
            flops = compute_flops_per_token(self.trainer.model.config, tokens // self.sequences)
            result["mfu"] = compute_mfu(flops, tokens / result["update"], 1, peak)
        return result


def take_turns(names: Sequence[str], setting: Setting) -> dict[str, list[dict[str, float]]]:
    """Train with methods of one kind in turn, forth in one round and back in the next. See [`Stopwatch.round`]."""
    settle()
    with tempfile.TemporaryDirectory() as folder:
        watches = {name: Stopwatch(make_trainer(name, setting, Path(folder) / name)) for name in names}
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for i in range(-1, setting.rounds):
            for name in names if i % 2 else reversed(names):
                rounds[name].append(watches[name].round())
    return {name: results[1:] for name, results in rounds.items()}  # the first one warms up


def peak_memory(name: str, setting: Setting) -> float:
    """
    Peak memory of a trainer over what the process holds before it is made, in MB: of its process on the CPU, of what
    the allocator hands out on a GPU. Meant for a process of its own, in which it goes over one generation batch.
    """
    settle()
    METHODS[name].trainer_class, METHODS[name].config_class  # what they import is not to count
    with tempfile.TemporaryDirectory() as folder:
        costs = Meter().measure(lambda: make_trainer(name, replace(setting, steps=PASSES), Path(folder)).train())
    return costs["peak_memory_mb"]


def settle() -> None:
    """Quiet libraries, and one thread on the CPU."""
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # waiting threads would count as CPU time


def apart(function: Callable, *args: Any) -> Any:
    """Call a function in a process of its own. A fork would count libraries that it shares as memory when used."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def beside_first(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Hold methods against the first of them. It is an error if they have not trained on as many tokens."""
    tokens = {name: [turn["tokens"] for turn in turns] for name, turns in rounds.items()}
    if len(set().union(*tokens.values())) != 1:
        raise RuntimeError(f"A round is not of the same number of tokens for all methods: {tokens}.")
    first, results = next(iter(rounds.values())), {}
    phases = PHASES if first[0]["generation"] else ()
    for name, turns in rounds.items():
        pairs = list(zip(turns, first, strict=True))
        ratios = [turn["seconds"] / other["seconds"] for turn, other in pairs]
        median = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        results[name] = {
            "ratio": statistics.median(ratios),
            "range": (min(ratios), max(ratios)),
            "ratio_of": {p: statistics.median(turn[p] / other[p] for turn, other in pairs) for p in phases},
            "tokens_per_s": median["tokens"] / median["seconds"],
            "median": median,
            "rounds": turns,
        }
    return results


def run_speed(output: Path = OUTPUT, *, methods: Sequence[str] | None = None, **setting: Any) -> Path:
    """
    Measure what the trainers cost and write it down, with a table of all results in the folder.

    Args:
        output (`Path`, *optional*):
            Folder of the results.
        methods (`Sequence[str]`, *optional*):
            Methods to hold against SFT or GRPO, names as in `KINDS`. If `None`, all.
        **setting (`Any`):
            Fields of [`Setting`].

    Returns:
        `Path`: The file with the result.

    Raises:
        `ValueError`: If a method is not measured here, or if a field is wrong.
    """
    settle()
    chosen, kinds = Setting(**setting), {}
    if methods is not None and not set(methods) <= set(COMPARED):
        raise ValueError(f"`methods={methods}` must be some of {', '.join(COMPARED)}.")
    for kind, (first, *others) in KINDS.items():
        names = [name for name in others if methods is None or name in methods]
        if names:
            kinds[kind] = beside_first(apart(take_turns, [first, *names], chosen))
            for name, result in kinds[kind].items():
                result["peak_memory_mb"] = apart(peak_memory, name, chosen)
                print(f"{name}: {result['ratio']:.3f} of {first}, {result['peak_memory_mb']:.0f} MB", flush=True)
    fields = asdict(chosen) | ({"model": Path(chosen.model).name} if chosen.model else {})
    path = output / f"{chosen.name}.json"
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"setting": fields, **circumstances(), "kinds": kinds}, indent=1) + "\n")
    (output / "README.md").write_text(table(output))
    return path


def table(folder: Path) -> str:
    """All results of a folder as Markdown."""
    lines = [
        "# Cost of a step beside TRL's on the same tokens",
        "",
        "By `python -m benchmarks.speed`, which says how it is measured. Times are ratios to the method above in "
        "bold, the median over paired rounds, lowest and highest: of CPU time on a CPU, since other work ran beside, "
        "of wall time on a GPU. Tokens per second, of the same time, are those trained on, every pass counted. Memory "
        "is the peak of a process of its own, over what it holds before the trainer is made; on a CPU two runs differ "
        "by up to 4 %. MFU is TRL's `compute_mfu` over the time of updates; it counts no activations computed again, "
        "but does count the gradients of weights that LoRA has frozen.",
    ]
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        facts = ("setting", "machine", "versions")
        lines += ["", f"## `{path.stem}`", ""]
        lines += ["; ".join(", ".join(f"{k} {v}" for k, v in result[fact].items() if v) for fact in facts) + "."]
        lines += ["", "| method | time | range | generation | scoring | update | tokens/s | memory, MB | MFU, % |"]
        lines += [f"| --- | {' | '.join(['---:'] * 8)} |"]
        for methods in result["kinds"].values():
            for i, (name, cost) in enumerate(methods.items()):
                phases = [f"{cost['ratio_of'][p]:.2f}" if p in cost["ratio_of"] else "" for p in PHASES]
                ends = " to ".join(f"{end:.3f}" for end in cost["range"])
                rest = [f"{cost['tokens_per_s']:.0f}", f"{cost['peak_memory_mb']:.0f}"]
                mfu = f"{cost['median']['mfu']:.1f}" if "mfu" in cost["median"] else ""
                cells = [name, f"{cost['ratio']:.3f}", ends, *phases, *rest, mfu]
                lines.append(f"| {' | '.join(cells if i else [f'**{name}**', '1', '', *cells[3:]])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = __doc__ + ModelSetting.__doc__ + Setting.__doc__
    parser = HfArgumentParser(Setting, description=text, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=COMPARED)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    run_speed(**vars(parser.parse_args()))
