# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-lol[bench]"]
# ///
"""
A reward model from preference pairs with TRL's RewardTrainer, and what it is good for: it ranks held-out pairs, and
A-LoL trains a policy on its scores.

Offline, as it is: a small language world made in code, about 4 minutes on 2 CPU cores. The reward model lands in
runs/reward_model, where `RewardModel` loads it from, and the policy in runs/reward_model/policy.

    accelerate launch recipes/reward_model.py

Your own preferences, from the Hub or a folder, with any model; `--train_policy true` goes on to the policy:

    accelerate launch recipes/reward_model.py --config recipes/configs/reward_model_lora.yaml \\
        --dataset_name path/to/data --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from alol_hh import load_rows
from common import (
    BaseArguments,
    Comparison,
    Setup,
    announce,
    as_completions,
    leave,
    load_toy,
    parse,
    take_engine,
    train_sft,
    trained_policy,
    write_results,
)
from datasets import Dataset, DatasetDict
from trl import RewardConfig, RewardTrainer

from trl_lol import ALoLConfig, ALoLTrainer, RewardModel, score_dataset, toy
from trl_lol._resume import WholeCheckpointsMixin
from trl_lol.rewards import RewardFunc


TOY_CONFIG = Path(__file__).parent / "configs" / "reward_model_toy.yaml"


@dataclass
class RecipeArguments(BaseArguments):
    """
    Arguments of the recipe, beside those of [`~trl.RewardConfig`] and [`~trl.ModelConfig`].

    Args:
        train_policy (`bool`, *optional*, defaults to `False`):
            Whether to train a policy on the reward model's scores of the training pairs, with A-LoL.
        policy_learning_rate (`float`, *optional*, defaults to `2e-4`):
            Learning rate of A-LoL, and of SFT on the chosen completions, which it is compared with.
        num_generations (`int`, *optional*, defaults to `2`):
            Number of answers per test prompt that a policy is judged by.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Number of tokens of an answer at most.
    """

    train_policy: bool = field(default=False, metadata={"help": "Train a policy on the scores, with A-LoL."})
    policy_learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate of A-LoL and SFT."})
    num_generations: int = field(default=2, metadata={"help": "Answers per test prompt."})
    max_new_tokens: int = field(default=64, metadata={"help": "Number of tokens of an answer at most."})


def num_words(prompts: list, completions: list, **columns: Any) -> list[float]:
    """What a reward model learns first, and should not stop at."""
    return [len((c if isinstance(c, str) else c[0]["content"]).split()) for c in completions]


def accuracy(pairs: Dataset) -> dict[str, float]:
    """Part of the pairs whose chosen completion scores higher. Equal scores are half right."""
    scores = [s for s in zip(pairs["chosen_reward"], pairs["rejected_reward"], strict=True) if None not in s]
    p = sum((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in scores) / len(scores)
    return {"accuracy": p, "standard_error": math.sqrt(p * (1 - p) / len(scores))}


def train_policy(setup: Setup, train: Dataset, test: Dataset, reward: RewardFunc, judge: RewardFunc | None) -> None:
    """A-LoL on the reward model's scores, beside SFT on the chosen completions."""
    args = setup.config(
        ALoLConfig,
        "policy",
        learning_rate=setup.recipe.policy_learning_rate,
        num_train_epochs=setup.args.num_train_epochs,
        max_steps=setup.args.max_steps,
        precompute_ref_log_probs=True,
    )
    setup = replace(setup, args=args)
    announce("A-LoL on the reward model's scores")
    trainer = ALoLTrainer(setup.model, args=args, train_dataset=train, reward_funcs=reward, **setup.trainer_kwargs())
    trainer.train()
    trainer.save_model()
    policy = trained_policy(trainer)
    comparison = Comparison(setup, test, policy, judge, judge is None, reward)
    announce("For comparison: SFT on chosen completions")
    chosen = as_completions(train, chosen_only=True)
    comparison.add("SFT on chosen", train_sft(chosen, setup, "sft", max_steps=trainer.state.max_steps))
    announce("A-LoL: answers")
    comparison.add("A-LoL", policy)
    if PartialState().is_main_process:
        comparison.write()


class ResumableRewardTrainer(WholeCheckpointsMixin, RewardTrainer):
    """TRL's, which goes on from its last whole checkpoint when it is killed while it saves."""


def main() -> None:
    recipe, args, model_args = parse(RecipeArguments, RewardConfig, TOY_CONFIG)
    output_dir = args.output_dir

    # The data, and the model that everything starts from
    is_toy = recipe.dataset_name is None
    if is_toy:
        dialogues, model, tokenizer = load_toy(recipe, args.seed)
        rows = DatasetDict({name: toy.preference_pairs(split, seed=args.seed) for name, split in dialogues.items()})
        setup = Setup(recipe, args, model_args, model, tokenizer)
    else:
        rows = load_rows(recipe)
        if "chosen" not in rows["train"].column_names:
            raise ValueError("A reward model is trained on preferences, and the rows have no `chosen` and `rejected`.")
        setup = Setup.from_path(recipe, args, model_args)
    setup.make_reference(rows["train"])

    announce("The reward model: training")
    kwargs = setup.trainer_kwargs()
    if kwargs["peft_config"] is not None:
        kwargs["peft_config"].task_type = "SEQ_CLS"  # keeps the head, which is new, beside the adapter
    take_engine(args)
    trainer = ResumableRewardTrainer(setup.model, args=args, train_dataset=rows["train"], **kwargs)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()

    announce("The reward model: held-out pairs")
    # From the folder, as anyone would use it
    reward = RewardModel(output_dir, batch_size=args.per_device_eval_batch_size, max_length=args.max_length)
    test = score_dataset(rows["test"], reward)
    results = {"reward model": accuracy(test), "length": accuracy(score_dataset(rows["test"], num_words))}
    if "chosen_reward" in rows["test"].column_names:
        results["the scores in the data"] = accuracy(rows["test"])
    if is_toy:
        results["oracle reward"] = accuracy(score_dataset(rows["test"], toy.oracle_reward))
        sure = toy.preference_pairs(dialogues["test"], seed=args.seed, label_noise=0.0)
        results["reward model, where the annotator does not err"] = accuracy(score_dataset(sure, reward))
    if PartialState().is_main_process:
        write_results(results, Path(output_dir), of="ranked by", title="Held-out pairs ranked right")
        trainer.create_model_card(model_name=Path(output_dir).name)

    if recipe.train_policy:
        # Without an independent judge of new answers: how the policies rank the logged ones, by the reward model
        train_policy(setup, rows["train"], test, reward, toy.heldout_reward if is_toy else None)
    if PartialState().is_main_process:
        print(f"Reward model and table are in {output_dir}. Use it: RewardModel({output_dir!r}).")


if __name__ == "__main__":
    main()
    leave()
