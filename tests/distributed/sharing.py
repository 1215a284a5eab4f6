"""How the ranks share out scoring, values, draws and groups. Runs on however many ranks it is launched with."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Trainer
from trl import GRPOTrainer
from worker import GLOBAL_BATCH, look_up, share_of_early_tokens
from worlds import leave, short_rows

from trl_lol import (
    ALoLTrainer,
    CoPGTrainer,
    PPOTrainer,
    estimate_advantages,
    sample_completions,
    score_dataset,
    toy,
    weighted_sum,
)


def collect(folder: Path) -> dict[str, Any]:
    """What must not depend on the number of ranks."""
    torch.set_num_threads(1)
    dialogues = toy.make_dialogues(num_prompts=31)
    tokenizer = toy.make_tokenizer(dialogues)
    pairs, groups = short_rows(dialogues)

    def oracle(scale: float) -> Callable:
        return weighted_sum([toy.oracle_reward], [scale])

    values = {"value_num_train_epochs": 2, "value_max_prompts": 20}
    return {
        # Also when there are fewer rows than ranks
        "scores": [
            score_dataset(pairs.select(range(n)), toy.oracle_reward, cache_dir=cache_dir).to_dict()
            for n in (1, 7)
            for cache_dir in (None, folder / "scores", folder / "scores")
        ],
        "advantages": [estimate(pairs.select(range(n)), tokenizer, folder) for n in (2, 30)],
        "samples": [sample(dialogues.select(range(n)), tokenizer, folder) for n in (1, 5)],
        "alol": train(ALoLTrainer, pairs, oracle(0.01), tokenizer, folder, num_train_epochs=2, **values),
        "copg": train(CoPGTrainer, groups, oracle(0.1), tokenizer, folder, num_train_epochs=2),
        "ppo": train(
            PPOTrainer,
            dialogues.select_columns("prompt"),
            share_of_early_tokens,
            tokenizer,
            folder,
            advantage_estimator="leave_one_out",
            num_generations=4,
            max_completion_length=8,
            num_iterations=2,
            max_steps=4,
            beta=0.05,
        ),
    }


def sample(rows: Dataset, tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[list]:
    """Groups of two greedy completions, and a check that the ranks agree where chance has its share."""
    model = toy.make_model(tokenizer, hidden_size=32, num_layers=2)
    settings = {"max_new_tokens": 4, "cache_dir": folder / "samples"}
    drawn = sample_completions(rows, model, tokenizer, 2, **settings)["completions"][:]
    assert all(other == drawn for other in gather_object([drawn]))
    return sample_completions(rows, model, tokenizer, 2, temperature=0.0, **settings)["completions"][:]


def estimate(rows: Dataset, tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[float]:
    """Advantages over values from the dataset, and a check that the ranks agree on those from rollouts, which are the
    policy's own and of another seed on each rank."""
    model = toy.make_model(tokenizer, hidden_size=32, num_layers=2)
    arguments = (rows, model, toy.oracle_reward, tokenizer)
    settings = {"max_prompts": 10, "num_train_epochs": 2, "cache_dir": folder / "advantages"}
    rollouts = estimate_advantages(*arguments, value_source="rollouts", max_completion_length=4, **settings)
    drawn = rollouts["chosen_advantage"][:]
    assert all(other == drawn for other in gather_object([drawn]))
    estimated = estimate_advantages(*arguments, **settings)
    assert estimated["chosen_advantage"][:] != drawn
    return [*estimated["chosen_advantage"], *estimated["rejected_advantage"]]


def train(
    trainer_class: type[Trainer],
    rows: Dataset,
    reward: Callable,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    **kwargs: Any,
) -> dict[str, Any]:
    """A short run: its losses, its prepared dataset, and what all ranks together were given in each step."""
    state = PartialState()
    is_online = issubclass(trainer_class, GRPOTrainer)
    if not is_online:
        kwargs["precompute_ref_log_probs"] = True
    batch_size = GLOBAL_BATCH // state.num_processes
    args = trainer_class._config_class(
        str(folder / trainer_class.__name__), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, logging_steps=1, optim="sgd", learning_rate=0.1,
        lr_scheduler_type="constant", per_device_train_batch_size=batch_size, per_device_eval_batch_size=batch_size,
        dataloader_drop_last=True, **kwargs,
    )  # fmt: skip
    model = toy.make_model(tokenizer, hidden_size=32, num_layers=2)
    trainer = trainer_class(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer, reward_funcs=reward
    )
    steps: list[list[Any]] = []
    name = "_generate_and_score_completions" if is_online else "_compute_loss"
    method = getattr(trainer, name)

    def recording(*arguments: Any) -> Any:
        if is_online:
            steps.append([str(row["prompt"]) for row in arguments[0]])
        else:
            inputs = arguments[1]
            ids = [
                row[mask.bool()].tolist()
                for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            steps.append([*zip(ids, inputs["rewards"].tolist(), strict=True)])
        return method(*arguments)

    with patch.object(trainer, name, recording), patch.object(GRPOTrainer, "_generate_single_turn", look_up):
        trainer.train()
    everyone = gather_object([steps])
    return {
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rows": [sorted(row for rank in ranks for row in rank) for ranks in zip(*everyone, strict=True)],
        "dataset": {} if is_online else trainer.train_dataset.to_dict(),
    }


if __name__ == "__main__":
    world_size, out = int(sys.argv[1]), Path(sys.argv[2])
    partial_state = PartialState(cpu=True)
    assert partial_state.num_processes == world_size
    results = collect(out)
    if partial_state.is_main_process:
        torch.save(results, out / "results.pt")
    leave()
