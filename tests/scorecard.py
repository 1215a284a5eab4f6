"""
How far apart runs are that should be one and the same, for every trainer, full and LoRA.

`python tests/scorecard.py` measures and writes docs/reliability.md. `test_scorecard.py` asserts the same numbers.
"""

import functools
import itertools
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import tqdm
from conftest import LORA, cpu_args
from conftest import distance as weight_distance
from conftest import weights as trained_weights
from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from trl import GRPOTrainer


sys.path.insert(0, str(Path(__file__).parent / "distributed"))

from worker import look_up, share_of_early_tokens
from worlds import launch, leave, short_rows

from trl_lol import (
    ALoLTrainer,
    APATrainer,
    CoPGTrainer,
    DRPOTrainer,
    PPOTrainer,
    score_dataset,
    toy,
    weighted_sum,
)


BEGIN, END = "<!-- measured -->", "<!-- end -->"
PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
SGD = {"optim": "sgd", "lr_scheduler_type": "constant"}  # Adam makes much of rounding errors where gradients are small
BATCH = 8


@dataclass(frozen=True)
class Method:
    """A trainer, and settings that make its losses and steps of a size at which differences can be told."""

    trainer_class: type[Trainer]
    settings: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.1

    @property
    def is_online(self) -> bool:
        return issubclass(self.trainer_class, GRPOTrainer)

    @property
    def each_step_generates(self) -> dict[str, Any]:
        return {"num_iterations": 1} if self.is_online else {}


FITTED = {"value_num_train_epochs": 2, "value_max_prompts": 20}
CRITIC = {
    "num_iterations": 2,
    "max_completion_length": 8,
    "whiten_advantages": True,
    "whiten_rewards": True,
    "value_learning_rate": 0.3,
}
METHODS = {
    "A-LoL": Method(ALoLTrainer, FITTED),
    "A-LoL seq": Method(ALoLTrainer, {**FITTED, "loss_type": ["alol_seq"]}),
    "A-LoL ref-free": Method(ALoLTrainer, {**FITTED, "loss_type": ["alol_ref_free"]}),
    "A-LoL KL": Method(ALoLTrainer, {**FITTED, "loss_type": ["alol_kl"]}),
    "CoPG": Method(CoPGTrainer),
    "CoPG, shared prompts": Method(CoPGTrainer, {"shared_prompts": True}),
    "PPO": Method(PPOTrainer, {**CRITIC, "beta": 0.05}),
    "APA": Method(APATrainer, {**CRITIC, "beta": 1.0}, learning_rate=0.02),
    # The seed decides on resets: some of the first groups are reset and some are not
    "DR-PO": Method(DRPOTrainer, {**CRITIC, "beta": 0.05, "reset_prob": 0.5, "seed": 10}),
}
POLICIES = {"full": None, "LoRA": LORA}


@dataclass
class Run:
    """What a run has come to."""

    weights: dict[str, Tensor]
    log: list[dict[str, float]]
    steps: int
    forwards: int

    def column(self, name: str) -> list[float]:
        """Every logged value of a metric."""
        return [entry[name] for entry in self.log if name in entry]


@functools.cache
def dialogues() -> Dataset:
    """31 prompts with 4 answers each."""
    return toy.make_dialogues(num_prompts=31)


@functools.cache
def dataset_for(trainer_class: type[Trainer]) -> Dataset:
    """Rows with short completions and small rewards: losses below one, so that 1e-6 is above float32's rounding."""
    if issubclass(trainer_class, GRPOTrainer):
        rows = dialogues().take(16).map(lambda row: {"reference": row["completions"][0]})
        return rows.select_columns(["prompt", "reference"])
    pairs, groups = short_rows(dialogues())
    rows, scale = (groups, 0.1) if trainer_class is CoPGTrainer else (pairs, 0.01)
    return score_dataset(rows, weighted_sum([toy.oracle_reward], [scale]))


@dataclass
class Bench:
    """Trains one method with one kind of policy, in folders that it removes."""

    method: Method
    policy: str
    folder: Path

    def train(
        self,
        name: str = "run",
        resume: str | None = None,
        replayed: bool = False,
        prepare: Callable[[Trainer], None] | None = None,
        **settings: Any,
    ) -> Run:
        """
        A run of 3 steps, unless the settings say something else.

        Args:
            name (`str`): Output directory. Runs of one name share it.
            resume (`str`, *optional*): Name of the checkpoint to go on from.
            replayed (`bool`): Look completions up instead of generating them, so that they are the same on any number
                of ranks.
            prepare (`Callable`, *optional*): What to do with the trainer before it trains.
            **settings: Fields of the config.
        """
        method = self.method
        tokenizer = toy.make_tokenizer(dialogues())
        kwargs = {"reward_funcs": share_of_early_tokens} if method.is_online else {}
        trainer = method.trainer_class(
            toy.make_model(tokenizer, hidden_size=32, num_layers=2),
            args=cpu_args(
                method.trainer_class._config_class,
                self.folder / name,
                **({"learning_rate": method.learning_rate, **SGD, **method.settings} | settings),
            ),
            train_dataset=dataset_for(method.trainer_class),
            processing_class=tokenizer,
            peft_config=POLICIES[self.policy],
            **kwargs,
        )
        calls: list[None] = []
        first_mlp = next(module for name, module in trainer.model.named_modules() if name.endswith("layers.0.mlp"))
        first_mlp.register_forward_pre_hook(lambda *_: calls.append(None))
        if prepare is not None:
            prepare(trainer)
        generate = look_up if replayed else GRPOTrainer._generate_single_turn
        with patch.object(GRPOTrainer, "_generate_single_turn", generate):
            trainer.train(resume_from_checkpoint=resume and str(self.folder / name / resume))
        log = [
            {key: value for key, value in entry.items() if "time" not in key}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        return Run(trained_weights(trainer), log, trainer.state.global_step, len(calls))


def distance(a: Run, b: Run) -> float:
    """The largest difference of two runs, in any trained weight or logged number."""
    assert [entry.keys() for entry in a.log] == [entry.keys() for entry in b.log] and a.steps == b.steps
    pairs = ((x[key], y[key]) for x, y in zip(a.log, b.log, strict=True) for key in x)
    return max(weight_distance(a.weights, b.weights), *(abs(x - y) for x, y in pairs))


def loss_distance(a: Run, b: Run) -> float:
    """The largest difference of two runs' losses."""
    assert len(a.column("loss")) == a.steps == b.steps
    return max(abs(x - y) for x, y in zip(a.column("loss"), b.column("loss"), strict=True))


# ---- Checks: what is measured, and a control that has to be larger ----

Measured = dict[str, tuple[float, float]]


def same_seed(bench: Bench) -> Measured:
    first, again, other = (bench.train(seed=seed) for seed in (3, 3, 4))
    return {"same seed again": (distance(first, again), weight_distance(first.weights, other.weights))}


def resumed(bench: Bench) -> Measured:
    """
    Two epochs of at least 4 steps; the whole run writes a checkpoint after each, and the others write none. The
    control reads the data from its beginning, in the epoch that it is in.
    """
    settings = {
        "learning_rate": 1e-2, "optim": "adamw_torch", "lr_scheduler_type": "linear", "num_train_epochs": 2,
        "max_steps": -1, "save_strategy": "steps", "save_steps": 1, "seed": 3,
    }  # fmt: skip
    settings |= bench.method.each_step_generates
    whole = bench.train("whole", **settings)
    half = whole.steps // 2
    assert half >= 4 and whole.steps == 2 * half
    found, settings = {}, settings | {"save_strategy": "no"}
    places = {"middle of epoch 1": half // 2, "end of epoch 1": half, "middle of epoch 2": half * 3 // 2}
    for where, step in places.items():
        shutil.copytree(bench.folder / "whole" / f"checkpoint-{step}", bench.folder / where / f"checkpoint-{step}")
        run = bench.train(where, f"checkpoint-{step}", **settings)
        control = math.inf
        if where != "end of epoch 1":  # where there is nothing to skip
            ignoring = bench.train(where, f"checkpoint-{step}", ignore_data_skip=True, **settings)
            control = weight_distance(ignoring.weights, whole.weights)
        found[f"resumed, {where}"] = distance(run, whole), control
    return found


def accumulated(bench: Bench) -> Measured:
    one = bench.train(per_device_train_batch_size=BATCH, replayed=True)
    two = bench.train(per_device_train_batch_size=2, gradient_accumulation_steps=4, replayed=True)
    half = bench.train(per_device_train_batch_size=BATCH // 2, replayed=True)
    return {
        "accumulated 4 × 2, loss": (loss_distance(one, two), loss_distance(one, half)),
        "accumulated 4 × 2, weights": (
            weight_distance(one.weights, two.weights),
            weight_distance(one.weights, half.weights),
        ),
    }


def checkpointed(bench: Bench) -> Measured:
    """The control is the number of forwards through the first layer's MLP that recomputing has added."""
    without, with_it = (bench.train(gradient_checkpointing=on) for on in (False, True))
    return {"gradient checkpointing": (distance(without, with_it), with_it.forwards - without.forwards)}


def cached_reference(bench: Bench) -> Measured:
    """The control has another reference for one completion of each row, which at least the logged log-ratio shows."""
    if bench.method.is_online:  # which has no logged completions to do it for
        return {}

    def change(trainer: Trainer) -> None:
        trainer.train_dataset = trainer.train_dataset.map(
            lambda row: {"ref_logps": [[x - 0.05 for x in row["ref_logps"][0]], *row["ref_logps"][1:]]}
        )

    live = bench.train(per_device_train_batch_size=BATCH)
    settings = {"per_device_train_batch_size": BATCH, "precompute_ref_log_probs": True}
    cached, other = (bench.train("cached", prepare=prepare, **settings) for prepare in (None, change))
    found = max(loss_distance(live, cached), weight_distance(live.weights, cached.weights))
    return {"cached reference": (found, distance(live, other))}


def first_log_ratio(bench: Bench) -> Measured:
    """The control is the log-ratio of the third step."""
    settings = {"per_device_train_batch_size": BATCH, "replayed": True, **bench.method.each_step_generates}
    name = "kl/completion" if bench.method.is_online else "logratio/mean"
    first, _, third = bench.train(**settings).column(name)
    return {"first log-ratio": (abs(first), abs(third))}


def two_ranks(bench: Bench) -> Measured:
    """The control has half the batch, as if one rank's share had been lost."""
    name = next(name for name, method in METHODS.items() if method is bench.method)
    one, two = (world()[name][bench.policy] for world in (one_rank_world, two_rank_world))
    return {"two ranks, loss": (loss_distance(one["whole"], two["whole"]), loss_distance(one["half"], two["whole"]))}


CHECKS = [same_seed, resumed, accumulated, checkpointed, two_ranks, cached_reference, first_log_ratio]
# The most that is allowed, and what a control has to exceed
LIMITS = {
    "same seed again": (0.0, 1e-4),
    "resumed, middle of epoch 1": (0.0, 1e-3),
    "resumed, end of epoch 1": (0.0, 1e-3),
    "resumed, middle of epoch 2": (0.0, 1e-3),
    "accumulated 4 × 2, loss": (1e-6, 1e-4),
    "accumulated 4 × 2, weights": (5e-6, 1e-4),
    "gradient checkpointing": (0.0, 0.5),
    "two ranks, loss": (1e-6, 1e-4),
    "cached reference": (1e-6, 1e-4),
    "first log-ratio": (1e-6, 1e-6),
}


# ---- Ranks ----


def world_of(num_ranks: int) -> dict[str, dict[str, dict[str, Run]]]:
    """Every method and policy on a number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        written = launch(Path(__file__), num_ranks, Path(folder))
    return {
        name: {policy: {run: Run(**fields) for run, fields in runs.items()} for policy, runs in policies.items()}
        for name, policies in written.items()
    }


one_rank_world, two_rank_world = (functools.cache(functools.partial(world_of, n)) for n in (1, 2))


def work(num_ranks: int, folder: Path) -> None:
    """On each rank: train, and write down what has come of it."""
    state = PartialState(cpu=True)
    assert state.num_processes == num_ranks
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for name, method in METHODS.items():
        for policy in POLICIES:
            bench = Bench(method, policy, folder / name / policy)
            sizes = {"whole": BATCH, "half": BATCH // 2}
            found = {
                run: bench.train(run, per_device_train_batch_size=size // num_ranks, replayed=True)
                for run, size in sizes.items()
            }
            runs.setdefault(name, {})[policy] = {run: vars(result) for run, result in found.items()}
    if state.is_main_process:
        torch.save(runs, folder / "results.pt")


# ---- The page ----


@dataclass
class Row:
    """What a check has found for every method."""

    cells: dict[str, list[float]] = field(default_factory=dict)
    controls: list[float] = field(default_factory=list)


def measure() -> dict[str, Row]:
    """Every check of every method and policy. Nothing is shown but how far it is."""
    rows = {what: Row() for what in LIMITS}
    cells = [*itertools.product(METHODS, POLICIES, CHECKS)]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for name, policy, check in tqdm(cells, desc="Measuring", file=sys.__stderr__):
            with tempfile.TemporaryDirectory() as folder:
                for what, (value, control) in check(Bench(METHODS[name], policy, Path(folder))).items():
                    rows[what].cells.setdefault(name, []).append(value)
                    rows[what].controls.append(control)
    return rows


def table(rows: dict[str, Row]) -> str:
    """Markdown. What is beyond its limit is bold."""

    def cell(values: list[float], limit: float) -> str:
        texts = ("0" if value == 0 else f"{value:.0e}" for value in values)
        return " · ".join(t if v <= limit else f"**{t}**" for t, v in zip(texts, values, strict=True)) or "–"

    lines = [["", "allowed", *METHODS, "controls from"], ["---"] * (len(METHODS) + 3)]
    for what, row in rows.items():
        limit, _ = LIMITS[what]
        cells = [cell(row.cells.get(name, []), limit) for name in METHODS]
        control = "–" if math.isinf(min(row.controls)) else f"{min(row.controls):.0e}"
        lines.append([what, f"{limit:.0e}" if limit else "0", *cells, control])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl", "transformers", "peft", "accelerate"))
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(measure())}\n\n{versions}\n\n{END}{after}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        work(int(sys.argv[1]), Path(sys.argv[2]))
        leave()
    else:
        main()
