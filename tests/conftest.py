"""Fixtures that every test file shares. Nothing here needs a network, a hub or an accelerator."""

import gc
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: the models are too small for more

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_lol import score_dataset, toy


torch.set_num_threads(1)
datasets.disable_progress_bars()

Config = TypeVar("Config", bound=TrainingArguments)

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")


@pytest.fixture(scope="session", autouse=True)
def _freeze_imports() -> None:
    """Every `train()` collects garbage, and would walk all that was imported: half the time of the trainers' tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def dialogues() -> Dataset:
    """60 prompts with 4 answers each."""
    return toy.make_dialogues(num_prompts=60)


@pytest.fixture(scope="session")
def tokenizer(dialogues: Dataset) -> PreTrainedTokenizerFast:
    """The toy world's tokenizer. A test that changes it must work on a copy."""
    return toy.make_tokenizer(dialogues)


@pytest.fixture(scope="session")
def conversations(dialogues: Dataset) -> tuple[list, list]:
    """14 prompts of one and of three turns, with an answer each."""
    rows = dialogues.take(14)
    return rows["prompt"][:], [completions[0] for completions in rows["completions"]]


@pytest.fixture(scope="session")
def texts(conversations: tuple[list, list]) -> tuple[list[str], list[str]]:
    """The last turns of these."""
    prompts, completions = conversations
    return [p[-1]["content"] for p in prompts], [" " + c[0]["content"] for c in completions]


@pytest.fixture(scope="session")
def pairs(dialogues: Dataset) -> Dataset:
    """120 conversational preferences without scores: `prompt`, `chosen`, `rejected`, `subset`."""
    return toy.preference_pairs(dialogues)


@pytest.fixture(scope="session")
def scored_pairs(pairs: Dataset) -> Dataset:
    """The same with `chosen_reward` and `rejected_reward`."""
    return score_dataset(pairs, toy.oracle_reward)


@pytest.fixture(scope="session")
def short_pairs(scored_pairs: Dataset) -> Dataset:
    """The same, cut to one word and with a hundredth of the reward: losses below one, from sums of a few tokens, so
    that 1e-6 is above the rounding of float32."""

    def shorten(row: dict[str, Any]) -> dict[str, Any]:
        short = {
            n: [{**row[n][0], "content": " ".join(row[n][0]["content"].split()[:1])}] for n in ("chosen", "rejected")
        }
        return {**short, **{name: row[name] / 100 for name in ("chosen_reward", "rejected_reward")}}

    return scored_pairs.map(shorten)


@pytest.fixture(scope="session")
def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """Makes a fresh Llama with 2 layers of width 32. The same seed gives the same weights."""

    def make(seed: int = 0) -> PreTrainedModel:
        return toy.make_model(tokenizer, seed, hidden_size=32, num_layers=2)

    return make


@pytest.fixture(scope="session")
def groups(dialogues: Dataset) -> Dataset:
    """30 prompts with 2, 3 or 4 scored answers. The largest groups have a tie in them."""
    scored = score_dataset(dialogues.take(30), toy.oracle_reward)
    rows = []
    for i, row in enumerate(scored):
        k = 2 + i % 3
        rewards = row["rewards"][:3] + row["rewards"][2:3]
        rows.append({"prompt": row["prompt"], "completions": row["completions"][:k], "rewards": rewards[:k]})
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def short_groups(groups: Dataset) -> Dataset:
    """The same, cut to two words and with a tenth of the reward: losses below one, from sums of a few tokens, so that
    1e-6 is above the rounding of float32."""

    def shorten(row: dict[str, Any]) -> dict[str, Any]:
        texts = [" ".join(completion[0]["content"].split()[:2]) for completion in row["completions"]]
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        return {"completions": completions, "rewards": [reward / 10 for reward in row["rewards"]]}

    return groups.map(shorten)


@pytest.fixture
def build_trainer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tiny_model: Callable[..., PreTrainedModel]
) -> Callable[..., Any]:
    """Makes an offline trainer for a few steps on the CPU. What its constructor takes goes there, the rest to its
    config."""

    def build(
        trainer_class: type,
        model: PreTrainedModel | None = None,
        output_dir: Path = tmp_path,
        train_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> Any:
        names = ("peft_config", "ref_model", "eval_dataset", "reward_funcs", "compute_metrics")
        trainer_kwargs = {name: kwargs.pop(name) for name in names if name in kwargs}
        return trainer_class(
            model if model is not None else tiny_model(),
            args=cpu_args(trainer_class._config_class, output_dir, **kwargs),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            **trainer_kwargs,
        )

    return build


@pytest.fixture(scope="session")
def references(dialogues: Dataset) -> Dataset:
    """Prompts with one answer each, as DR-PO takes them."""
    rows = dialogues.map(lambda row: {"reference": row["completions"][0]})
    return rows.select_columns(["prompt", "reference"])


@pytest.fixture
def build_online_trainer(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    tiny_model: Callable[..., PreTrainedModel],
    references: Dataset,
) -> Callable[..., Any]:
    """Makes an online trainer for a few steps on the CPU, which generates 6 tokens for each prompt of `references`.
    What its constructor takes goes there, the rest to its config."""

    def build(
        trainer_class: type,
        model: PreTrainedModel | None = None,
        output_dir: Path = tmp_path,
        train_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> Any:
        names = ("peft_config", "eval_dataset", "reward_funcs", "reward_processing_classes", "optimizers", "callbacks")
        trainer_kwargs = {"reward_funcs": early_tokens}
        trainer_kwargs |= {name: kwargs.pop(name) for name in names if name in kwargs}
        return trainer_class(
            model if model is not None else tiny_model(),
            args=cpu_args(trainer_class._config_class, output_dir, **({"max_completion_length": 6} | kwargs)),
            train_dataset=train_dataset if train_dataset is not None else references,
            processing_class=tokenizer,
            **trainer_kwargs,
        )

    return build


def early_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward that depends on the tokens alone: the share of the first half of the toy world's vocabulary."""
    return [sum(token < 384 for token in ids) / len(ids) for ids in completion_ids]


def cpu_args(config_class: type[Config], output_dir: str | Path, **overrides: Any) -> Config:
    """
    A config for a few steps on the CPU that leaves nothing behind but what the trainer itself writes.

    Args:
        config_class (`type[TrainingArguments]`):
            Class of the config.
        output_dir (`str` or `Path`):
            Output directory.
        **overrides:
            Fields of the config, over the ones set here.

    Returns:
        `TrainingArguments`: The config.
    """
    fields = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
    }
    return config_class(str(output_dir), **(fields | overrides))


# Adam divides by the size of the gradient, and so makes much of rounding errors where there is little gradient
SGD = {"optim": "sgd", "learning_rate": 0.1}


def logged(trainer: Trainer, name: str) -> list[float]:
    """Every value of a metric that was logged, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of the weights that are trained."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two models' trained weights."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def run(trainer: Trainer, **kwargs: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Train, and return the losses and the weights."""
    trainer.train(**kwargs)
    return logged(trainer, "loss"), weights(trainer)


class StopAt(TrainerCallback):
    """Ends the run as a kill would, right after the checkpoint of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        control.should_training_stop = state.global_step >= self.step
