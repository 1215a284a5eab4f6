# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-lol[bench]", "math-verify>=0.9"]
# ///
"""
CoPG on several scored completions per prompt, beside its reference, SFT on the best one, DPO and IPO.

Offline, as it is: a small language world made in code, about 5 minutes on 2 CPU cores. Everything lands in
runs/copg_gsm8k.

    accelerate launch recipes/copg_gsm8k.py

Your own groups of completions, from the Hub or a folder, with their rewards or a verifier:

    accelerate launch recipes/copg_gsm8k.py --config recipes/configs/copg_gsm8k_lora.yaml \\
        --dataset_name path/to/data --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct

Prompts with a gold answer alone: the completions are sampled from the model first (here GSM8K from the Hub).

    accelerate launch recipes/copg_gsm8k.py --config recipes/configs/copg_gsm8k_sample.yaml \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from string import Formatter
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
from matplotlib import pyplot as plt
from transformers import AutoModelForCausalLM
from trl import get_quantization_config

from trl_lol import CoPGConfig, CoPGTrainer, sample_completions, score_dataset, toy
from trl_lol.data import as_group, group_by_prompt
from trl_lol.engines import loading_whole


TOY_CONFIG = Path(__file__).parent / "configs" / "copg_gsm8k_toy.yaml"


@dataclass
class RecipeArguments(SharedArguments):
    """
    Arguments of the recipe, beside those of [`CoPGConfig`] and [`~trl.ModelConfig`].

    Args:
        prompt_template (`str`, *optional*):
            Makes a prompt of text from the columns of a row, such as `"{question}\\n"`. If empty or `None`, the
            column `prompt` is the prompt.
        as_messages (`bool`, *optional*, defaults to `False`):
            Whether to turn prompts and completions of text into messages, for a model with a chat template.
        reward (`str`, *optional*, defaults to `"none"`):
            Scores the completions, in place of rewards in the rows, and the answers to test prompts.
            `"math_verify"` compares them with a gold answer. `"none"`: the rows have rewards.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column of the gold answers: a number or expression, or a solution that ends in "#### 24".
        num_completions (`int`, *optional*, defaults to `0`):
            Number of completions to sample per training prompt first, each of at most `max_new_tokens`. They take
            the place of completions in the rows. 0: the rows have completions.
        sampling_batch_size (`int`, *optional*, defaults to `64`):
            Number of completions that each process samples at a time.
        compare (`list[str]`, *optional*, defaults to `["sft", "dpo", "ipo"]`):
            Methods to train on the same prompts for comparison: `"sft"` on the best completion, `"dpo"` and `"ipo"`
            on the best against the worst.
        sft_learning_rate (`float`, *optional*):
            Learning rate of SFT. If `None`, the learning rate.
        ipo_beta (`float`, *optional*, defaults to `1.0`):
            KL coefficient of IPO. TRL's IPO takes means over tokens, so that it has another scale than the others.
    """

    prompt_template: str | None = field(default=None, metadata={"help": "Makes the prompt from a row's columns."})
    as_messages: bool = field(default=False, metadata={"help": "Turn text into messages."})
    reward: str = field(
        default="none", metadata={"help": "What scores the completions.", "choices": ["none", "math_verify"]}
    )
    answer_column: str = field(default="answer", metadata={"help": "Column of the gold answers."})
    num_completions: int = field(default=0, metadata={"help": "Completions to sample per training prompt first."})
    sampling_batch_size: int = field(default=64, metadata={"help": "Completions that a process samples at a time."})
    compare: list[str] = field(
        default_factory=lambda: ["sft", "dpo", "ipo"],
        metadata={"help": "Methods to compare with: 'sft', 'dpo', 'ipo'."},
    )
    sft_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of SFT."})
    ipo_beta: float = field(default=1.0, metadata={"help": "KL coefficient of IPO."})


# ---- Rewards ----


def math_verify(prompts: list, completions: list, answer: list[str], **columns: Any) -> list[float | None]:
    """
    1 for a completion whose last answer equals the gold one, else 0; `None` where the gold answer cannot be read.

    TRL's `accuracy_reward` reads LaTeX only, and would find no answer in "A: 24".
    """
    from math_verify import parse, verify

    rewards: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        gold = parse(str(gold).rsplit("####", 1)[-1].strip())  # GSM8K's solutions end in "#### 24"
        rewards.append(float(verify(gold, parse(text))) if gold else None)
    return rewards


# ---- Data ----


def load_rows(recipe: RecipeArguments) -> DatasetDict:
    """Rows from the Hub or a folder, with a `prompt`, and an `answer` where they have a gold one."""
    rows = limit(load_splits(recipe), recipe)
    columns = rows["train"].column_names
    if recipe.as_messages and not recipe.prompt_template and "prompt" not in columns:
        raise ValueError(f"`--as_messages` needs a `prompt`, and the columns are {', '.join(columns)}.")
    if recipe.reward == "math_verify":
        if recipe.answer_column not in columns:
            raise ValueError(
                f"The columns are {', '.join(columns)}, and `--reward math_verify` compares with `answer_column="
                f"{recipe.answer_column!r}`. Give the column of the gold answers, or `--reward none`."
            )
        if recipe.answer_column != "answer":
            rows = rows.rename_column(recipe.answer_column, "answer")
    slots = {name for _, name, _, _ in Formatter().parse(recipe.prompt_template or "") if name}
    texts = {name for name in slots & set(columns) if isinstance(rows["train"][0][name], str | int | float)}
    if slots != texts:
        raise ValueError(
            f"`prompt_template={recipe.prompt_template!r}` needs text in the columns {', '.join(sorted(slots))}, and "
            f'the columns are {", ".join(columns)}. Name columns of text, or set `--prompt_template ""` for rows '
            "with a `prompt`."
        )
    rows = rows.map(render, fn_kwargs={"template": recipe.prompt_template, "as_messages": recipe.as_messages})
    return DatasetDict({name: group_by_prompt(split) for name, split in rows.items()})


def render(row: dict[str, Any], template: str | None, as_messages: bool) -> dict[str, Any]:
    """Make the prompt from the columns of a row, and messages from text."""
    if template:
        row["prompt"] = template.format(**row)
    if as_messages and isinstance(row["prompt"], str):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        for name in {"completion", "chosen", "rejected"} & row.keys():
            row[name] = [{"role": "assistant", "content": row[name]}]
        if "completions" in row:
            row["completions"] = [[{"role": "assistant", "content": text}] for text in row["completions"]]
    return row


def has_completions(rows: Dataset) -> bool:
    return bool({"completions", "completion", "chosen"} & set(rows.column_names))


def sample(rows: Dataset, setup: Setup) -> Dataset:
    """The model's own completions of the training prompts."""
    recipe, args = setup.recipe, setup.args
    announce(f"{recipe.num_completions} completions of each of {len(rows)} prompts")
    with loading_whole():
        model = AutoModelForCausalLM.from_pretrained(
            setup.model,
            device_map={"": args.device},
            quantization_config=get_quantization_config(setup.model_args),
            **args.model_init_kwargs,
        )
    return sample_completions(
        rows,
        model,
        setup.tokenizer,
        recipe.num_completions,
        max_new_tokens=recipe.max_new_tokens,
        batch_size=recipe.sampling_batch_size,
        seed=args.seed,
        cache_dir=Path(args.output_dir) / "_cache",
    )


def best_against_worst(rows: Dataset) -> Dataset:
    """One pair for each group whose rewards are not all equal."""

    def scored(row: dict[str, Any]) -> list[tuple[float, Any]]:
        group = as_group(row)
        return [(r, c) for r, c in zip(group.rewards, group.completions, strict=True) if r is not None]

    def pair(row: dict[str, Any]) -> dict[str, Any]:
        completions = scored(row)
        (_, best), (_, worst) = max(completions, key=lambda c: c[0]), min(completions, key=lambda c: c[0])
        return {"prompt": as_group(row).prompt, "chosen": best, "rejected": worst}

    rows = rows.filter(lambda row: len({reward for reward, _ in scored(row)}) > 1)
    kept = ("tools", "chat_template_kwargs")
    return rows.map(pair, remove_columns=[name for name in rows.column_names if name not in kept])


# ---- Results ----


def plot_training(trainer: CoPGTrainer, output_dir: Path) -> None:
    """How the policy comes to rank the completions of a group, and how far it moves for that."""
    logs = [log for log in trainer.state.log_history if "logratio/mean" in log]
    steps = [log["step"] for log in logs]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    axes[0].plot(steps, [log.get("rewards/accuracies") for log in logs], marker=".")  # none where all groups are tied
    axes[0].axhline(0.5, color="gray", linestyle=":")
    axes[0].set(xlabel="step", ylabel="rewards/accuracies", title="Pairs that the log-ratio ranks by reward")
    axes[1].plot(steps, [log["logratio/mean"] for log in logs], marker=".")
    axes[1].set(xlabel="step", ylabel="logratio/mean, nats", title="Log-ratio of the logged completions")
    figure.savefig(output_dir / "training.png", dpi=150)


def main() -> None:
    recipe, args, model_args = parse(RecipeArguments, CoPGConfig, TOY_CONFIG)
    if recipe.num_completions and recipe.reward == "none":
        raise ValueError("`--num_completions` samples completions that nothing has scored. Give `--reward` too.")
    if recipe.reward != "none" and recipe.dataset_name is None:
        raise ValueError("`--reward` scores rows of yours, and the embedded world has none. Give `--dataset_name`.")
    if recipe.reward == "math_verify" and find_spec("math_verify") is None:
        raise ImportError("`--reward math_verify` needs math-verify: pip install math-verify")
    is_main = PartialState().is_main_process
    output_dir = Path(args.output_dir)

    # The data, and the policy that everything starts from
    if recipe.dataset_name is None:
        rows, model, tokenizer = load_toy(recipe, args.seed)
        setup = Setup(recipe, args, model_args, model, tokenizer)
        rows["train"] = score_dataset(rows["train"], toy.oracle_reward)
        judge, train_reward, is_ranking = toy.heldout_reward, toy.oracle_reward, False
    else:
        rows = load_rows(recipe)
        setup = Setup.from_path(recipe, args, model_args)
        if recipe.num_completions:
            rows["train"] = sample(rows["train"], setup)
        judge, train_reward = math_verify if recipe.reward == "math_verify" else None, None
        if judge is not None:
            announce("Rewards")
            for name in rows:
                if has_completions(rows[name]):
                    rows[name] = score_dataset(rows[name], judge)
                    unread = sum(None in as_group(row).rewards for row in rows[name])
                    if unread:
                        announce(f"{unread} {name} rows have a gold answer that is no number or expression")
        is_ranking = has_completions(rows["test"])
    # As many completions per step as CoPG sees
    batch_size = args.per_device_train_batch_size * len(as_group(rows["train"][0]).completions)
    setup.make_reference(rows["train"], per_device_train_batch_size=batch_size)

    announce("CoPG: training")
    take_engine(args)
    trainer = CoPGTrainer(setup.model, args=args, train_dataset=rows["train"], **setup.trainer_kwargs())
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if is_main:
        trainer.create_model_card(model_name=output_dir.name)

    policy = trained_policy(trainer)
    comparison = Comparison(setup, rows["test"], policy, judge, is_ranking, train_reward)
    max_steps = trainer.state.max_steps
    pairs = best_against_worst(rows["train"])
    if not len(pairs) and recipe.compare:
        announce("Every prompt's completions have equal rewards: SFT, DPO and IPO have no best one to learn from.")
        recipe.compare = []
    if "sft" in recipe.compare:
        announce("For comparison: SFT on the best completion")
        learning_rate = recipe.sft_learning_rate or args.learning_rate
        best = as_completions(pairs, chosen_only=True)
        sft_policy = train_sft(best, setup, "sft", max_steps=max_steps, learning_rate=learning_rate)
        comparison.add("SFT on the best", sft_policy)
    if "dpo" in recipe.compare:
        announce("For comparison: DPO on the best against the worst")
        comparison.add("DPO", train_dpo(pairs, setup, "dpo", max_steps=max_steps))
    if "ipo" in recipe.compare:
        announce("For comparison: IPO on the best against the worst")
        ipo_policy = train_dpo(pairs, setup, "ipo", max_steps=max_steps, beta=recipe.ipo_beta, loss_type=["ipo"])
        comparison.add("IPO", ipo_policy)
    announce("CoPG: answers")
    comparison.add("CoPG", policy)
    if is_main:
        comparison.write()
        plot_training(trainer, output_dir)
        print(f"Model, table, answers and plots are in {output_dir}.")


if __name__ == "__main__":
    main()
    leave()
