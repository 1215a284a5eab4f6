# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-lol[bench]"]
# ///
"""
A-LoL on helpful-and-harmless dialogues, beside its reference, more SFT and DPO.

Offline, as it is: a small language world made in code, about 5 minutes on 2 CPU cores. Everything lands in
runs/alol_hh.

    accelerate launch recipes/alol_hh.py

Your own preference or scored data, from the Hub or a folder, with any model:

    accelerate launch recipes/alol_hh.py --config recipes/configs/alol_hh_lora.yaml \\
        --dataset_name path/to/data --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from common import (
    Comparison,
    Setup,
    SharedArguments,
    announce,
    as_completions,
    leave,
    limit,
    load_splits,
    load_toy,
    parse,
    take_engine,
    train_dpo,
    train_sft,
    trained_policy,
)
from datasets import Dataset, DatasetDict

from trl_lol import ALoLConfig, ALoLTrainer, score_dataset, toy


TOY_CONFIG = Path(__file__).parent / "configs" / "alol_hh_toy.yaml"


@dataclass
class RecipeArguments(SharedArguments):
    """
    Arguments of the recipe, beside those of [`ALoLConfig`] and [`~trl.ModelConfig`].

    Args:
        compare (`list[str]`, *optional*, defaults to `["sft", "dpo"]`):
            Methods to train on the same rows, with the same number of completions, for comparison: `"sft"` on the
            chosen completions, `"dpo"`, and `"dpo_by_score"`, which orders each pair by its scores.
    """

    compare: list[str] = field(
        default_factory=lambda: ["sft", "dpo"],
        metadata={"help": "Methods to compare with: 'sft', 'dpo', 'dpo_by_score'."},
    )


def hh_to_messages(row: dict[str, Any]) -> dict[str, Any]:
    """Turn HH's raw text, "\\n\\nHuman: ...\\n\\nAssistant: ...", into a prompt and two answers of messages."""

    def messages(text: str) -> list[dict[str, str]]:
        turns = text.replace("\n\nHuman:", "\0user\n").replace("\n\nAssistant:", "\0assistant\n").split("\0")[1:]
        return [{"role": role, "content": content.strip()} for role, content in (t.split("\n", 1) for t in turns)]

    chosen, rejected = messages(row["chosen"]), messages(row["rejected"])
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def as_scored_pairs(dialogues: DatasetDict, seed: int) -> DatasetDict:
    """Preferences of the embedded world, with the rewards to train on."""
    rows = DatasetDict({name: toy.preference_pairs(split, seed=seed) for name, split in dialogues.items()})
    rows["train"] = score_dataset(rows["train"], toy.oracle_reward)
    return rows


def load_rows(recipe: RecipeArguments) -> DatasetDict:
    """Rows from the Hub or a folder."""
    rows = load_splits(recipe)
    first = rows["train"][0]
    if isinstance(first.get("chosen"), str) and first["chosen"].lstrip().startswith("Human:"):
        rows = rows.map(hh_to_messages)
        # As the paper does: about one row in eight breaks off
        rows = rows.filter(lambda row: not any(row[n][0]["content"].endswith(":") for n in ("chosen", "rejected")))
    return limit(rows, recipe)


def by_score(pairs: Dataset) -> Dataset:
    """The same pairs, in which the completion that scores higher is the chosen one."""

    def order(row: dict[str, Any]) -> dict[str, Any]:
        pair = (row["chosen"], row["rejected"])
        chosen, rejected = pair if row["chosen_reward"] >= row["rejected_reward"] else pair[::-1]
        return {"chosen": chosen, "rejected": rejected}

    return pairs.map(order)


def main() -> None:
    recipe, args, model_args = parse(RecipeArguments, ALoLConfig, TOY_CONFIG)
    is_main = PartialState().is_main_process
    output_dir = Path(args.output_dir)

    # The data, and the policy that everything starts from
    is_toy = recipe.dataset_name is None
    if is_toy:
        dialogues, model, tokenizer = load_toy(recipe, args.seed)
        rows = as_scored_pairs(dialogues, args.seed)
        setup = Setup(recipe, args, model_args, model, tokenizer)
    else:
        rows = load_rows(recipe)
        setup = Setup.from_path(recipe, args, model_args)
        if "chosen" not in rows["train"].column_names:
            print("The rows are not preferences: there is no chosen completion for SFT and DPO to learn from.")
            recipe.compare = []
    setup.make_reference(rows["train"])

    announce("A-LoL: values, advantages, training")
    take_engine(args)
    trainer = ALoLTrainer(setup.model, args=args, train_dataset=rows["train"], **setup.trainer_kwargs())
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if is_main:
        trainer.create_model_card(model_name=output_dir.name)

    # Without an independent judge of new answers: how the policies rank the logged ones
    reward_func, train_reward = (toy.heldout_reward, toy.oracle_reward) if is_toy else (None, None)
    policy = trained_policy(trainer)
    comparison = Comparison(setup, rows["test"], policy, reward_func, not is_toy, train_reward)
    max_steps = trainer.state.max_steps
    if "sft" in recipe.compare:
        announce("For comparison: SFT on chosen completions")
        sft_rows = as_completions(rows["train"], chosen_only=True)
        comparison.add("SFT on chosen", train_sft(sft_rows, setup, "sft", max_steps=max_steps))
    for name, label in (("dpo", "DPO"), ("dpo_by_score", "DPO on pairs by score")):
        if name in recipe.compare:
            announce(f"For comparison: {label}")
            pairs = by_score(rows["train"]) if name == "dpo_by_score" else rows["train"]
            # A pair is two completions: as many completions per step as the other methods
            batch_size = max(args.per_device_train_batch_size // 2, 1)
            dpo_policy = train_dpo(pairs, setup, name, max_steps=max_steps, per_device_train_batch_size=batch_size)
            comparison.add(label, dpo_policy)
    announce("A-LoL: answers")
    comparison.add("A-LoL", policy)
    if is_main:
        comparison.write()
        trainer.advantage_report.plot(output_dir / "advantages")
        print(f"Model, table, answers and plots are in {output_dir}.")


if __name__ == "__main__":
    main()
    leave()
