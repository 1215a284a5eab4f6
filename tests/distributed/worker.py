"""Trains on however many ranks it is launched with, and writes down what must not depend on their number."""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, TrainerCallback

from trl_lol import (
    ALoLTrainer,
    CoPGTrainer,
    GenerationEvalCallback,
    sample_completions,
    score_dataset,
    toy,
    weighted_sum,
)
from trl_lol.offline.sampling import SetEpochCallback
from trl_lol.offline.trainer import _OfflineRewardTrainer


GLOBAL_BATCH = 8


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def first_word(completion: list[dict]) -> list[dict]:
    return [{**completion[0], "content": " ".join(completion[0]["content"].split()[:1])}]


def main(expected_world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    assert state.num_processes == expected_world_size
    dialogues = toy.make_dialogues(num_prompts=31)
    tokenizer = toy.make_tokenizer(dialogues)
    # In memory on every rank: DPOTrainer's own cache of reference log-probabilities fails on such a dataset. The
    # completions are short and the rewards small: losses below one, from sums of a few tokens, so that 1e-6 is above
    # the rounding of float32.
    pairs = toy.preference_pairs(dialogues).map(lambda row: {n: first_word(row[n]) for n in ("chosen", "rejected")})
    groups = dialogues.map(
        lambda row, i: {"completions": [first_word(completion) for completion in row["completions"][: 2 + i % 3]]},
        with_indices=True,
        remove_columns="qualities",
    )
    value_settings = {"value_num_train_epochs": 2, "value_max_prompts": 20}
    results = {
        "alol": train_all(ALoLTrainer, pairs, 0.01, tokenizer, state, folder / "alol", value_settings),
        "copg": train_all(CoPGTrainer, groups, 0.1, tokenizer, state, folder / "copg", {}),
        # Scores and greedy completions do not depend on how rows are dealt out, also when there are fewer than ranks
        "scores": [score_dataset(pairs.select(range(n)), toy.oracle_reward).to_dict() for n in (1, 7)],
        "samples": [sample(dialogues.select(range(n)), tokenizer, folder) for n in (1, 5)],
    }
    if state.is_main_process:
        torch.save(results, folder / "results.pt")
    state.destroy_process_group()


def sample(rows: Dataset, tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[list]:
    """Groups of two greedy completions, and a check that the ranks agree where chance has its share."""
    model = toy.make_model(tokenizer, hidden_size=32, num_layers=2)
    settings = {"max_new_tokens": 4, "cache_dir": folder / "samples"}
    drawn = sample_completions(rows, model, tokenizer, 2, **settings)["completions"][:]
    assert all(other == drawn for other in gather_object([drawn]))
    return sample_completions(rows, model, tokenizer, 2, temperature=0.0, **settings)["completions"][:]


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
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        flat = torch.cat([w.flatten() for w in weights.values()])
        everyone = trainer.accelerator.gather(flat[None])
        assert (everyone == everyone[0]).all(), "the ranks' parameters differ"
        history = trainer.state.log_history
        results[name] = {
            "weights": weights,
            "dataset": trainer.train_dataset.to_dict(),
            **{
                key: [entry[key] for entry in history if key in entry]
                for key in ("loss", "logratio/mean", "eval_loss")
            },
        }

    # Scores, values, advantages and reference log-probabilities, shared out and gathered; training on them
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


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
