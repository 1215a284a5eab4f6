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

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, load_dataset
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import (
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_lol import ALoLConfig, ALoLTrainer, score_dataset, toy
from trl_lol.data import as_group, tokenize_row
from trl_lol.evaluation import evaluate_policy, reference_policy
from trl_lol.generation import completion_logps


matplotlib.use("Agg")
from matplotlib import pyplot as plt


TOY_CONFIG = Path(__file__).parent / "configs" / "alol_hh_toy.yaml"


@dataclass
class RecipeArguments(ScriptArguments):
    """
    Arguments of the recipe, beside those of [`ALoLConfig`] and [`~trl.ModelConfig`].

    Args:
        toy_prompts (`int`, *optional*, defaults to `1200`):
            Number of prompts of the embedded world, which is used when there is no `dataset_name`.
        max_train_rows (`int`, *optional*):
            Number of training rows to use at most.
        max_test_rows (`int`, *optional*, defaults to `200`):
            Number of test rows to use at most.
        compare (`list[str]`, *optional*, defaults to `["sft", "dpo"]`):
            Methods to train on the same rows, with the same number of completions, for comparison: `"sft"` on the
            chosen completions, `"dpo"`, and `"dpo_by_score"`, which orders each pair by its scores.
        reference_sft_steps (`int`, *optional*, defaults to `0`):
            Number of steps of supervised fine-tuning on all completions that make the reference policy.
        reference_learning_rate (`float`, *optional*, defaults to `2e-3`):
            Learning rate of that fine-tuning.
        dpo_learning_rate (`float`, *optional*):
            Learning rate of DPO. If `None`, a tenth of the learning rate.
        dpo_beta (`float`, *optional*, defaults to `0.1`):
            KL coefficient of DPO.
        max_eval_prompts (`int`, *optional*, defaults to `200`):
            Number of test prompts to generate on at most.
        num_generations (`int`, *optional*, defaults to `2`):
            Number of answers per test prompt that a policy is judged by.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Number of tokens of an answer at most.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or folder. If `None`, the toy world."})
    toy_prompts: int = field(default=1200, metadata={"help": "Number of prompts of the embedded world."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Number of training rows to use at most."})
    max_test_rows: int = field(default=200, metadata={"help": "Number of test rows to use at most."})
    compare: list[str] = field(
        default_factory=lambda: ["sft", "dpo"],
        metadata={"help": "Methods to compare with: 'sft', 'dpo', 'dpo_by_score'."},
    )
    reference_sft_steps: int = field(default=0, metadata={"help": "SFT steps that make the reference policy."})
    reference_learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate of these steps."})
    dpo_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of DPO."})
    dpo_beta: float = field(default=0.1, metadata={"help": "KL coefficient of DPO."})
    max_eval_prompts: int = field(default=200, metadata={"help": "Number of test prompts to generate on at most."})
    num_generations: int = field(default=2, metadata={"help": "Answers per test prompt."})
    max_new_tokens: int = field(default=64, metadata={"help": "Number of tokens of an answer at most."})


# ---- Data ----


def hh_to_messages(row: dict[str, Any]) -> dict[str, Any]:
    """Turn HH's raw text, "\\n\\nHuman: ...\\n\\nAssistant: ...", into a prompt and two answers of messages."""

    def messages(text: str) -> list[dict[str, str]]:
        turns = text.replace("\n\nHuman:", "\0user\n").replace("\n\nAssistant:", "\0assistant\n").split("\0")[1:]
        return [{"role": role, "content": content.strip()} for role, content in (t.split("\n", 1) for t in turns)]

    chosen, rejected = messages(row["chosen"]), messages(row["rejected"])
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def load_toy(recipe: RecipeArguments, seed: int) -> tuple[DatasetDict, PreTrainedModel, PreTrainedTokenizerBase]:
    """Rows, an untrained model and a tokenizer of the embedded world."""
    dialogues = toy.make_dialogues(recipe.toy_prompts + recipe.max_test_rows, seed=seed)
    train, test = dialogues.select(range(recipe.toy_prompts)), dialogues.skip(recipe.toy_prompts)
    tokenizer = toy.make_tokenizer(train)
    train = score_dataset(toy.preference_pairs(train, seed=seed), toy.oracle_reward)
    return (
        DatasetDict(train=train, test=toy.preference_pairs(test, seed=seed)),
        toy.make_model(tokenizer, seed),
        tokenizer,
    )


def load_rows(recipe: RecipeArguments) -> DatasetDict:
    """Rows from the Hub or a folder."""
    splits = load_dataset(recipe.dataset_name, name=recipe.dataset_config)
    if recipe.dataset_test_split in splits:
        rows = DatasetDict(train=splits[recipe.dataset_train_split], test=splits[recipe.dataset_test_split])
    else:  # hold out a tenth
        rows = splits[recipe.dataset_train_split].train_test_split(test_size=0.1, seed=0)
    first = rows["train"][0]
    if isinstance(first.get("chosen"), str) and first["chosen"].lstrip().startswith("Human:"):
        rows = rows.map(hh_to_messages)
        # As the paper does: about one row in eight breaks off
        rows = rows.filter(lambda row: not any(row[n][0]["content"].endswith(":") for n in ("chosen", "rejected")))
    if recipe.max_train_rows is not None:
        rows["train"] = rows["train"].take(min(recipe.max_train_rows, len(rows["train"])))
    rows["test"] = rows["test"].take(min(recipe.max_test_rows, len(rows["test"])))
    return rows


def as_pairs(rows: Dataset, by_score: bool = False) -> Dataset:
    """What DPO trains on: the pair alone. With `by_score`, the completion that scores higher is the chosen one."""

    def order(row: dict[str, Any]) -> dict[str, Any]:
        pair = (row["chosen"], row["rejected"])
        chosen, rejected = pair if row["chosen_reward"] >= row["rejected_reward"] else pair[::-1]
        return {"chosen": chosen, "rejected": rejected}

    rows = rows.map(order) if by_score else rows
    names = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
    return rows.select_columns([name for name in names if name in rows.column_names])


def as_completions(rows: Dataset, chosen_only: bool) -> Dataset:
    """What SFT trains on: prompt and completion."""

    def split(batch: dict[str, list]) -> dict[str, list]:
        groups = [as_group(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        pairs = [(g.prompt, c) for g in groups for c in (g.completions[:1] if chosen_only else g.completions)]
        return {"prompt": [prompt for prompt, _ in pairs], "completion": [completion for _, completion in pairs]}

    return rows.map(split, batched=True, remove_columns=rows.column_names)


# ---- Training ----


def announce(what: str) -> None:
    if PartialState().is_main_process:
        print(f"\n== {what} ==", flush=True)


def train_sft(rows: Dataset, model: Any, setup: "Setup", name: str, **overrides: Any) -> PreTrainedModel:
    args = setup.config(SFTConfig, name, completion_only_loss=True, **overrides)
    trainer = SFTTrainer(model, args=args, train_dataset=rows, **setup.trainer_kwargs(model))
    trainer.train()
    return trainer.model


def train_dpo(rows: Dataset, setup: "Setup", name: str, max_steps: int) -> PreTrainedModel:
    recipe, args = setup.recipe, setup.args
    args = setup.config(
        DPOConfig,
        name,
        max_steps=max_steps,
        beta=recipe.dpo_beta,
        learning_rate=recipe.dpo_learning_rate or args.learning_rate / 10,
        # A pair is two completions: as many completions per step as the other methods
        per_device_train_batch_size=max(args.per_device_train_batch_size // 2, 1),
        # On several ranks TRL 1.16 does not find its cache of a dataset that is held in memory
        precompute_ref_log_probs=PartialState().num_processes == 1,
    )
    trainer = DPOTrainer(setup.model, args=args, train_dataset=rows, **setup.trainer_kwargs(setup.model))
    trainer.train()
    return trainer.model


@dataclass
class Setup:
    """What the trainers of one run share."""

    recipe: RecipeArguments
    args: ALoLConfig
    model_args: ModelConfig
    model: str
    tokenizer: PreTrainedTokenizerBase

    SHARED = (
        "seed", "bf16", "fp16", "use_cpu", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
        "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
        "max_length", "logging_steps", "report_to", "disable_tqdm", "model_init_kwargs", "dataset_num_proc",
    )  # fmt: skip

    def config(self, config_class: type, name: str, **overrides: Any) -> Any:
        """Config of a method that is compared with, from the fields that it shares with A-LoL's."""
        shared = {field: getattr(self.args, field) for field in self.SHARED}
        return config_class(f"{self.args.output_dir}/{name}", **{**shared, "save_strategy": "no", **overrides})

    def trainer_kwargs(self, model: Any) -> dict[str, Any]:
        quantization = get_quantization_config(self.model_args) if isinstance(model, str) else None
        return {
            "processing_class": self.tokenizer,
            "peft_config": get_peft_config(self.model_args),
            "quantization_config": quantization,
        }


# ---- Judging ----


def judge(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    setup: Setup,
    test: Dataset,
    is_toy: bool,
    is_reference: bool = False,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics of a policy on test prompts, and its answers."""
    recipe = setup.recipe
    groups = [as_group(row) for row in test]
    prompts = list({json.dumps(group.prompt): group.prompt for group in groups}.values())
    result = evaluate_policy(
        model,
        setup.tokenizer,
        prompts[: recipe.max_eval_prompts],
        toy.heldout_reward if is_toy else unscored,
        ref_model=None if is_reference else reference,
        num_generations=recipe.num_generations,
        max_new_tokens=recipe.max_new_tokens,
        seed=setup.args.seed,
    )
    samples = result.pop("samples")
    result = {"reward": result.pop("reward"), "kl": 0.0, **result}
    if not is_toy:  # without an independent judge of new answers: how it ranks the logged ones
        del result["reward"], result["reward_std"]
        if not is_reference:
            result |= ranking(model, reference, setup.tokenizer, test)
    return result, samples


def unscored(prompts: list, completions: list, **kwargs: Any) -> list[None]:
    """There is no evaluator for data from outside; pass one of your own to `evaluate_policy`."""
    return [None] * len(prompts)


def ranking(
    model: PreTrainedModel, reference: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> dict[str, float]:
    """How well the log-ratio to the reference ranks held-out completions by reward. Chance is 0 and 0.5."""
    tokenized = [tokenize_row(row, i, tokenizer, tokenizer.eos_token) for i, row in enumerate(rows)]
    prompts = [row["prompt_ids"] for row in tokenized for _ in row["completion_ids"]]
    completions = [ids for row in tokenized for ids in row["completion_ids"]]
    log_ratio = completion_logps(model, prompts, completions)
    with reference_policy(model, reference) as policy:
        log_ratio = log_ratio - completion_logps(policy, prompts, completions)
    rewards = torch.tensor([reward for row in tokenized for reward in row["rewards"]])
    group = torch.tensor([i for i, row in enumerate(tokenized) for _ in row["rewards"]])
    better = (rewards[:, None] > rewards) & (group[:, None] == group)
    right = better & (log_ratio[:, None] > log_ratio)
    result = {"spearman": float(spearmanr(log_ratio, rewards).statistic)}
    if better.any():  # with one completion per prompt there is no pair
        result["pair_accuracy"] = (right.sum() / better.sum()).item()
    return result


# ---- Results ----


def write_results(results: dict[str, dict[str, float]], output_dir: Path) -> None:
    """Print the table, and keep it as JSON and Markdown."""
    columns = list({name: None for metrics in results.values() for name in metrics if name != "reward_std"})
    table = Table("policy", *(name.replace("_", " ") for name in columns), title="On held-out prompts")
    lines = ["| policy | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for policy, metrics in results.items():
        cells = [f"{metrics[name]:.3f}" if name in metrics else "" for name in columns]
        table.add_row(policy, *cells)
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    Console().print(table)
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (output_dir / "results.md").write_text("\n".join(lines) + "\n")


def write_samples(samples: dict[str, list[dict[str, Any]]], num_generations: int, output_dir: Path) -> None:
    """Answers of every policy to the same prompts, side by side."""

    def text(content: Any) -> str:
        return content if isinstance(content, str) else "\n".join(f"{m['role']}: {m['content']}" for m in content)

    lines = []
    for i in range(0, min(8 * num_generations, len(next(iter(samples.values())))), num_generations):
        lines += ["", "---", "", "```", text(next(iter(samples.values()))[i]["prompt"]), "```"]
        for policy, answers in samples.items():
            reward = answers[i]["reward"]
            score = "" if reward is None else f" ({reward:.2f})"
            lines += ["", f"**{policy}**{score}: {text(answers[i]['completion']).removeprefix('assistant: ')}"]
    (output_dir / "samples.md").write_text("# Answers before and after\n" + "\n".join(lines) + "\n")


def plot(trainer: ALoLTrainer, samples: dict[str, list[dict[str, Any]]], output_dir: Path) -> None:
    """Histogram of the kept advantages, and the distribution of rewards of each policy."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.hist([row[0] for row in trainer.train_dataset["advantages"]], bins=40)
    report = trainer.advantage_report
    axis.set(title=f"Kept: {report.kept_fraction:.0%} of {report.num_completions} completions")
    axis.set(xlabel="advantage over the reference policy", ylabel="completions")
    figure.savefig(output_dir / "advantages.png", dpi=150)
    rewards = {policy: [s["reward"] for s in rows if s["reward"] is not None] for policy, rows in samples.items()}
    rewards = {policy: values for policy, values in rewards.items() if values}
    if rewards:
        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        for policy, values in rewards.items():
            axis.ecdf(values, label=f"{policy}, mean {sum(values) / len(values):.2f}")
        axis.set(xlabel="held-out reward", ylabel="part of the answers below", title="Answers to held-out prompts")
        axis.legend(loc="upper left", fontsize="small", framealpha=0.6)
        figure.savefig(output_dir / "rewards.png", dpi=150)


def main() -> None:
    argv = sys.argv[1:]
    if not any(arg.split("=")[0] in ("--config", "--dataset_name") for arg in argv):
        argv = ["--config", str(TOY_CONFIG), *argv]
    parser = TrlParser((RecipeArguments, ALoLConfig, ModelConfig))
    recipe, args, model_args = parser.parse_args_and_config(argv)
    is_main = PartialState().is_main_process
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    # The data, and the policy that everything starts from
    is_toy = recipe.dataset_name is None
    if is_toy:
        rows, model, tokenizer = load_toy(recipe, args.seed)
    else:
        rows, model = load_rows(recipe), model_args.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(model, revision=model_args.model_revision)
        args.model_init_kwargs = {
            "dtype": model_args.dtype,
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
        }
        if "chosen" not in rows["train"].column_names:
            print("The rows are not preferences: there is no chosen completion for SFT and DPO to learn from.")
            recipe.compare = []
    setup = Setup(recipe, args, model_args, model, tokenizer)
    if recipe.reference_sft_steps:
        announce("The reference policy: SFT on all completions")
        setup.model = str(output_dir / "reference")
        model = train_sft(
            as_completions(rows["train"], chosen_only=False),
            model,
            setup,
            "reference",
            max_steps=recipe.reference_sft_steps,
            learning_rate=recipe.reference_learning_rate,
            lr_scheduler_type="cosine",
        )
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        if is_main:
            model.save_pretrained(setup.model)
            tokenizer.save_pretrained(setup.model)
        PartialState().wait_for_everyone()

    announce("A-LoL: values, advantages, training")
    trainer = ALoLTrainer(setup.model, args=args, train_dataset=rows["train"], **setup.trainer_kwargs(setup.model))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if is_main:
        trainer.create_model_card(model_name=output_dir.name)

    announce("The reference policy: answers")
    results, samples = {}, {}
    if get_peft_config(model_args) is None:
        reference = AutoModelForCausalLM.from_pretrained(setup.model, **args.model_init_kwargs or {})
        reference.to(trainer.accelerator.device)
        judged = judge(reference, None, setup, rows["test"], is_toy, is_reference=True)
    else:  # the policy without its adapter
        reference = None
        with reference_policy(trainer.model, None) as policy:
            judged = judge(policy.get_base_model(), None, setup, rows["test"], is_toy, is_reference=True)
    results["reference"], samples["reference"] = judged

    def compare(name: str, policy: PreTrainedModel) -> None:
        results[name], samples[name] = judge(policy, reference, setup, rows["test"], is_toy)

    if "sft" in recipe.compare:
        announce("For comparison: SFT on chosen completions")
        sft_rows = as_completions(rows["train"], chosen_only=True)
        compare("SFT on chosen", train_sft(sft_rows, setup.model, setup, "sft", max_steps=trainer.state.max_steps))
    for name, label in (("dpo", "DPO"), ("dpo_by_score", "DPO on pairs by score")):
        if name in recipe.compare:
            announce(f"For comparison: {label}")
            pairs = as_pairs(rows["train"], by_score=name == "dpo_by_score")
            compare(label, train_dpo(pairs, setup, name, trainer.state.max_steps))
    announce("A-LoL: answers")
    compare("A-LoL", trainer.model)
    if is_main:
        write_results(results, output_dir)
        write_samples(samples, recipe.num_generations, output_dir)
        plot(trainer, samples, output_dir)
        print(f"Model, table, answers and plots are in {output_dir}.")


if __name__ == "__main__":
    main()
