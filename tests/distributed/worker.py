"""Trains on however many ranks it is launched with, and writes down what must not depend on their number."""

import gc
import random
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback
from trl import GRPOTrainer
from worlds import leave, short_rows

from trl_lol import (
    ALoLTrainer,
    APATrainer,
    CoPGTrainer,
    DRPOTrainer,
    GenerationEvalCallback,
    PPOTrainer,
    toy,
    weighted_sum,
)
from trl_lol._resume import SetEpochCallback
from trl_lol.offline.trainer import _OfflineRewardTrainer
from trl_lol.online.trainer import _ActorCriticTrainer


GLOBAL_BATCH = 8
UNSCORED = 700  # a completion that begins with this token gets no reward
ONLINE_METRICS = (
    "loss", "reward", "kl/completion", "explained_variance", "policy_loss", "value_loss", "entropy",
    "reset_fraction", "roll_in/mean_length", "reward/no_reset", "reward/reset", "completions/mean_length/no_reset",
    "completions/mean_length/reset",
)  # fmt: skip


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def main(expected_world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # every `train()` collects garbage, and would walk all that was imported
    state = PartialState(cpu=True)
    assert state.num_processes == expected_world_size
    dialogues = toy.make_dialogues(num_prompts=31)
    tokenizer = toy.make_tokenizer(dialogues)
    pairs, groups = short_rows(dialogues)
    value_settings = {"value_num_train_epochs": 2, "value_max_prompts": 20}
    results = {
        "alol": train_all(ALoLTrainer, pairs, 0.01, tokenizer, state, folder / "alol", value_settings),
        "copg": train_all(CoPGTrainer, groups, 0.1, tokenizer, state, folder / "copg", {}),
        "ppo": train_online(
            PPOTrainer, dialogues, tokenizer, state, folder / "ppo", {"beta": 0.05, "learning_rate": 0.1}
        ),
        "apa": train_online(
            APATrainer, dialogues, tokenizer, state, folder / "apa", {"beta": 1.0, "learning_rate": 0.02}
        ),
        "drpo": train_online(
            DRPOTrainer,
            dialogues,
            tokenizer,
            state,
            folder / "drpo",
            # The seed decides on resets: of the groups of four, the second is reset and the first is not
            {"beta": 0.05, "learning_rate": 0.1, "reset_prob": 0.5, "seed": 10},
        ),
    }
    if state.is_main_process:
        torch.save(results, folder / "results.pt")


def trained_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of the weights that are trained, and a check that the ranks agree on them."""
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    flat = torch.cat([w.flatten() for w in weights.values()])
    everyone = trainer.accelerator.gather(flat[None])
    assert (everyone == everyone[0]).all(), "the ranks' parameters differ"
    return weights


def train_all(
    trainer_class: type[_OfflineRewardTrainer],
    rows: Dataset,
    reward_scale: float,
    tokenizer: PreTrainedTokenizerFast,
    state: PartialState,
    folder: Path,
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Every run of one method, by name."""
    results = {}

    def trainer(name: str, **kwargs) -> _OfflineRewardTrainer:
        trainer_kwargs = {k: kwargs.pop(k) for k in ("peft_config", "eval_dataset") if k in kwargs}
        args = trainer_class._config_class(
            str(folder / name),
            **{
                "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
                "gradient_checkpointing": False, "logging_steps": 1, "max_steps": 3,
                # Adam divides by the size of the gradient, and so makes much of rounding errors
                "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
                "per_device_train_batch_size": GLOBAL_BATCH // state.num_processes,
                "per_device_eval_batch_size": GLOBAL_BATCH // state.num_processes,
                **settings,
                **kwargs,
            },
        )  # fmt: skip
        model = toy.make_model(tokenizer, hidden_size=32, num_layers=2)
        return trainer_class(
            model,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=weighted_sum([toy.oracle_reward], [reward_scale]),
            **trainer_kwargs,
        )

    def record(name: str, trainer: _OfflineRewardTrainer) -> None:
        history = trainer.state.log_history
        results[name] = {
            "weights": trained_weights(trainer),
            **{
                key: [entry[key] for entry in history if key in entry]
                for key in ("loss", "logratio/mean", "eval_loss")
            },
        }

    # Training on scores, values, advantages and reference log-probabilities that were shared out and gathered
    cached = trainer("cached", precompute_ref_log_probs=True, eval_dataset=rows.select(range(12)))
    cached.add_callback(GenerationEvalCallback(cached, rows, toy.heldout_reward, num_prompts=5, max_new_tokens=4))
    cached.train()
    assert {"eval_loss", "eval_generation/reward"} <= cached.evaluate().keys()
    record("cached", cached)
    half = trainer("half", per_device_train_batch_size=GLOBAL_BATCH // 2 // state.num_processes)
    half.train()
    record("half", half)
    lora = trainer("lora", peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    lora.train()
    record("lora", lora)
    live = trainer("live")
    live.train()
    record("live", live)

    # Resume in the middle of the second epoch
    kwargs = {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "steps", "save_steps": 1}
    whole = trainer("whole", **kwargs)
    whole.train()
    record("whole", whole)
    steps_per_epoch = whole.state.global_step // 2
    step = steps_per_epoch + steps_per_epoch // 2
    interrupted = trainer("interrupted", **kwargs)
    interrupted.add_callback(StopAt(step))
    interrupted.train()
    checkpoint = str(folder / "interrupted" / f"checkpoint-{step}")
    for name in ("resumed", "resumed without the callback"):
        resumed = trainer("interrupted", **kwargs)
        if name != "resumed":
            on_epoch_begin = SetEpochCallback.on_epoch_begin
            SetEpochCallback.on_epoch_begin = TrainerCallback.on_epoch_begin
        resumed.train(resume_from_checkpoint=checkpoint)
        record(name, resumed)
    SetEpochCallback.on_epoch_begin = on_epoch_begin
    return results


def share_of_early_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    return [None if ids[0] == UNSCORED else sum(t < 384 for t in ids) / len(ids) for ids in completion_ids]


def look_up(
    trainer: _ActorCriticTrainer, prompt_ids: list[list[int]], images: None, fields: dict, num_generations: int
) -> tuple[list[list[int]], None]:
    """Completions from a table: a function of step, row in all ranks' batch and sample, in place of a generator that
    every rank seeds by itself. In evaluation, where a rank has several batches, of the prompt."""
    completions = []
    for i, prompt in enumerate(prompt_ids):
        row = trainer.accelerator.process_index * len(prompt_ids) + i
        key = (trainer.state.global_step, row // num_generations, row % num_generations)
        rng = random.Random(str(key if trainer.model.training else (trainer.state.global_step, prompt)))
        ids = [rng.randrange(6, 768) for _ in range(rng.randint(1, 6))]
        # The first rows are all on the first of two ranks: none scored there after step 2, some before
        is_unscored = trainer.model.training and num_generations == 1 and row < (4 if key[0] >= 2 else 2)
        completions.append([UNSCORED if is_unscored else 6, *ids])
    return completions, None


def train_online(
    trainer_class: type[_ActorCriticTrainer],
    dialogues: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    state: PartialState,
    folder: Path,
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Every run of one online method, by name."""
    results, generate = {}, GRPOTrainer._generate_single_turn
    prompts = dialogues.select_columns("prompt")
    if trainer_class is DRPOTrainer:
        prompts = prompts.add_column("reference", [completions[0] for completions in dialogues["completions"]])

    def train(name: str, resume: str | None = None, replayed: bool = True, **kwargs) -> None:
        trainer_kwargs = {k: kwargs.pop(k) for k in ("peft_config", "callbacks") if k in kwargs}
        global_batch = kwargs.pop("global_batch", GLOBAL_BATCH)
        args = trainer_class._config_class(
            str(folder / kwargs.pop("folder", name)),
            **{
                "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
                "gradient_checkpointing": False, "logging_steps": 1, "max_steps": 4, "num_iterations": 2,
                # Adam divides by the size of the gradient, and so makes much of rounding errors
                "optim": "sgd", "lr_scheduler_type": "constant", "max_completion_length": 8,
                "per_device_train_batch_size": global_batch // state.num_processes,
                "per_device_eval_batch_size": GLOBAL_BATCH // state.num_processes,
                "num_generations_eval": 1,
                **settings,
                **kwargs,
            },
        )  # fmt: skip
        trainer = trainer_class(
            toy.make_model(tokenizer, hidden_size=32, num_layers=2),
            reward_funcs=share_of_early_tokens,
            args=args,
            train_dataset=prompts,
            eval_dataset=prompts.take(16),
            processing_class=tokenizer,
            **trainer_kwargs,
        )
        with patch.object(GRPOTrainer, "_generate_single_turn", look_up if replayed else generate):
            trainer.train(resume_from_checkpoint=resume)
        history = trainer.state.log_history
        results[name] = {
            key: [entry[key] for entry in history if key in entry]
            for key in (*ONLINE_METRICS, *(f"eval_{metric}" for metric in ONLINE_METRICS), "ref_resets")
        }
        results[name]["weights"] = trained_weights(trainer)

    def lora() -> LoraConfig:
        return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

    settings = settings | {"whiten_advantages": True, "whiten_rewards": True, "value_learning_rate": 0.3}
    train("full", eval_strategy="steps", eval_steps=2)
    train("half", global_batch=GLOBAL_BATCH // 2, max_steps=1)
    train("lora", peft_config=lora(), gradient_checkpointing=True)
    # Completions of unlike lengths are spread over two micro-batches, other ones on two ranks than on one
    halves = {"global_batch": GLOBAL_BATCH // 2, "gradient_accumulation_steps": 2}
    train("accumulated", gradient_checkpointing=True, **halves)
    # Groups of 4 in a batch of 4: on two ranks each has one half of the group
    groups = {"global_batch": 4, "num_generations": 4}
    train("groups", **groups)
    settings = {name: value for name, value in settings.items() if not name.startswith(("whiten", "value"))}
    train("leave one out", advantage_estimator="leave_one_out", **groups)

    # Resume in the middle of a generation, which every rank made for itself
    policies = {"full": None} if trainer_class is PPOTrainer else {"full": None, "lora": lora()}
    if state.num_processes == 2:
        for name, peft_config in policies.items():
            kwargs = {"replayed": False, "max_steps": 8, "num_iterations": 3, "peft_config": peft_config}
            if trainer_class is APATrainer:  # with resets on the way
                kwargs |= {"reset_ref_patience": 1, "eval_strategy": "steps", "eval_steps": 1}
            train(f"{name}, whole", **kwargs)
            kwargs |= {"save_strategy": "steps", "save_steps": 5, "folder": f"{name}, interrupted"}
            train(f"{name}, interrupted", callbacks=[StopAt(5)], **kwargs)
            train(f"{name}, resumed", resume=str(folder / f"{name}, interrupted" / "checkpoint-5"), **kwargs)
    return results


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    leave()
