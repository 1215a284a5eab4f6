"""What the recipes share: data, the methods to compare with, judging, and results on disk."""

import gc
import json
import os
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, load_dataset
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    RLOOConfig,
    RLOOTrainer,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_lol import RewardModel, toy
from trl_lol._resume import CHECKPOINT_FILE
from trl_lol.data import as_group, tokenize_row
from trl_lol.engines import is_sharded, loading_whole
from trl_lol.evaluation import evaluate_policy, reference_policy
from trl_lol.generation import completion_logps
from trl_lol.online.roll_in import find_reference_column
from trl_lol.rewards.calling import RewardFunc
from trl_lol.rewards.scoring import NOT_PASSED_ON


matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass
class BaseArguments(ScriptArguments):
    """
    Arguments of every recipe.

    Args:
        toy_prompts (`int`, *optional*, defaults to `1200`):
            Number of prompts of the embedded world, which is used when there is no `dataset_name`.
        max_train_rows (`int`, *optional*):
            Number of training rows to use at most.
        max_test_rows (`int`, *optional*, defaults to `200`):
            Number of test rows to use at most.
        reference_sft_steps (`int`, *optional*, defaults to `0`):
            Number of steps of supervised fine-tuning on all completions that make the reference policy.
        reference_learning_rate (`float`, *optional*, defaults to `2e-3`):
            Learning rate of that fine-tuning.
        max_eval_prompts (`int`, *optional*, defaults to `200`):
            Number of test prompts to generate on at most.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or folder. If `None`, the toy world."})
    toy_prompts: int = field(default=1200, metadata={"help": "Number of prompts of the embedded world."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Number of training rows to use at most."})
    max_test_rows: int = field(default=200, metadata={"help": "Number of test rows to use at most."})
    reference_sft_steps: int = field(default=0, metadata={"help": "SFT steps that make the reference policy."})
    reference_learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate of these steps."})
    max_eval_prompts: int = field(default=200, metadata={"help": "Number of test prompts to generate on at most."})


@dataclass
class SharedArguments(BaseArguments):
    """
    Arguments of every offline recipe, beside those of [`BaseArguments`].

    Args:
        dpo_learning_rate (`float`, *optional*):
            Learning rate of DPO. If `None`, a tenth of the learning rate.
        dpo_beta (`float`, *optional*, defaults to `0.1`):
            KL coefficient of DPO.
        num_generations (`int`, *optional*, defaults to `2`):
            Number of answers per test prompt that a policy is judged by.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Number of tokens of an answer at most.
    """

    dpo_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of DPO."})
    dpo_beta: float = field(default=0.1, metadata={"help": "KL coefficient of DPO."})
    num_generations: int = field(default=2, metadata={"help": "Answers per test prompt."})
    max_new_tokens: int = field(default=64, metadata={"help": "Number of tokens of an answer at most."})


@dataclass
class OnlineArguments(BaseArguments):
    """
    Arguments of every online recipe, beside those of [`BaseArguments`].

    Args:
        reward_model (`str`, *optional*):
            Sequence-classification reward model to train on, for data of yours.
        judge_model (`str`, *optional*):
            Another one to judge by, which nothing is trained on.
        max_prompt_length (`int`, *optional*):
            Number of tokens of a prompt at most. Longer ones, which the trainers would not cut, are left out.
        compare (`list[str]`, *optional*, defaults to `["sft", "rloo"]`):
            Methods to train with the same number of completions, for comparison: `"sft"` on the chosen ones, `"rloo"`,
            TRL's, and, where there are resets, `"ppo"`, the same without; or `"none"`.
        reference_sft_batch_size (`int`, *optional*, defaults to `16`):
            Number of completions per step of supervised fine-tuning, on each process.
        sft_learning_rate (`float`, *optional*):
            Learning rate of SFT. If `None`, the learning rate.
        rloo_learning_rate (`float`, *optional*):
            Learning rate of RLOO. If `None`, the learning rate.
        rloo_beta (`float`, *optional*, defaults to `0.05`):
            KL coefficient of RLOO.
        rloo_num_generations (`int`, *optional*, defaults to `4`):
            Number of completions per prompt of RLOO.
        num_answers (`int`, *optional*, defaults to `2`):
            Number of answers per test prompt that a policy is judged by.
    """

    reward_model: str | None = field(default=None, metadata={"help": "Reward model to train on."})
    judge_model: str | None = field(default=None, metadata={"help": "Another reward model, to judge by."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Longer prompts, in tokens, are left out."})
    compare: list[str] = field(
        default_factory=lambda: ["sft", "rloo"], metadata={"help": "Methods to compare with: 'sft', 'rloo', 'ppo'."}
    )
    reference_sft_batch_size: int = field(default=16, metadata={"help": "Completions per SFT step on each process."})
    sft_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of SFT."})
    rloo_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of RLOO."})
    rloo_beta: float = field(default=0.05, metadata={"help": "KL coefficient of RLOO."})
    rloo_num_generations: int = field(default=4, metadata={"help": "Completions per prompt of RLOO."})
    num_answers: int = field(default=2, metadata={"help": "Answers per test prompt."})


def parse(recipe_class: type, config_class: type, toy_config: Path) -> tuple[Any, Any, ModelConfig]:
    """Arguments from the command line, and from `toy_config` where it names neither a config nor data."""
    argv = sys.argv[1:]
    if not any(arg.split("=")[0] in ("--config", "--dataset_name") for arg in argv):
        argv = ["--config", str(toy_config), *argv]
    if not torch.accelerator.is_available() and "ACCELERATE_USE_DEEPSPEED" not in os.environ:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # or several processes would each train alone
    recipe, args, model_args = TrlParser((recipe_class, config_class, ModelConfig)).parse_args_and_config(argv)
    if recipe.dataset_name is None and model_args.model_name_or_path is not None:
        raise ValueError("The embedded world has a model of its own. Give `--dataset_name`, or no model.")
    if str(args.resume_from_checkpoint).lower() == "true":
        # From the last one in the output directory. Without one from the beginning, so that the command that began a
        # run goes on with it, too
        args.resume_from_checkpoint = any(Path(args.output_dir).glob(f"checkpoint-*/{CHECKPOINT_FILE}"))
    if PartialState().num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were started, and each would train alone. They found no GPU: add "
            "`--use_cpu true --bf16 false`."
        )
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return recipe, args, model_args


def announce(what: str) -> None:
    if PartialState().is_main_process:
        print(f"\n== {what} ==", flush=True)


def leave() -> None:
    """
    Take the group of processes down, once nothing of `main` holds it any more. gloo now and then aborts a process that
    ends while it stands, after all is done.
    """
    gc.collect()
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


# ---- Data ----


def load_toy(recipe: BaseArguments, seed: int) -> tuple[DatasetDict, PreTrainedModel, PreTrainedTokenizerBase]:
    """Dialogues, an untrained model and a tokenizer of the embedded world."""
    dialogues = toy.make_dialogues(recipe.toy_prompts + recipe.max_test_rows, seed=seed)
    train, test = dialogues.select(range(recipe.toy_prompts)), dialogues.skip(recipe.toy_prompts)
    tokenizer = toy.make_tokenizer(train)
    return DatasetDict(train=train, test=test), toy.make_model(tokenizer, seed), tokenizer


def load_splits(recipe: BaseArguments) -> DatasetDict:
    """Training and test rows from the Hub or a folder."""
    splits = load_dataset(recipe.dataset_name, name=recipe.dataset_config)
    if recipe.dataset_test_split in splits:
        return DatasetDict(train=splits[recipe.dataset_train_split], test=splits[recipe.dataset_test_split])
    return splits[recipe.dataset_train_split].train_test_split(test_size=0.1, seed=0)  # hold out a tenth


def limit(rows: DatasetDict, recipe: BaseArguments) -> DatasetDict:
    """The first rows of each split, as many as asked for."""
    if recipe.max_train_rows is not None:
        rows["train"] = rows["train"].take(min(recipe.max_train_rows, len(rows["train"])))
    rows["test"] = rows["test"].take(min(recipe.max_test_rows, len(rows["test"])))
    return rows


def as_pairs(rows: Dataset) -> Dataset:
    """What DPO trains on: the pair alone."""
    names = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
    return rows.select_columns([name for name in names if name in rows.column_names])


def as_completions(rows: Dataset, chosen_only: bool) -> Dataset:
    """What SFT trains on: prompt and completion."""

    def split(batch: dict[str, list]) -> dict[str, list]:
        groups = [as_group(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        pairs = [(g.prompt, c) for g in groups for c in (g.completions[:1] if chosen_only else g.completions)]
        return {"prompt": [prompt for prompt, _ in pairs], "completion": [completion for _, completion in pairs]}

    return rows.map(split, batched=True, remove_columns=rows.column_names)


def as_references(rows: Dataset, column: str) -> Dataset:
    """The same of the completions in a column. Nulls are left out, and an answer to messages may be a text."""

    def pair(row: dict[str, Any]) -> dict[str, Any]:
        prompt, completion = row["prompt"], row[column]
        if not isinstance(prompt, str) and isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        return {"prompt": prompt, "completion": completion}

    return rows.filter(lambda row: bool(row[column])).map(pair, remove_columns=rows.column_names)


def drop_long_prompts(rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Leave out prompts of more than `max_length` tokens, and say how many."""

    def fits(row: dict[str, Any]) -> bool:
        prompt = row["prompt"] if "prompt" in row else as_group(row).prompt
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        return len(ids) <= max_length

    kept = rows.filter(fits)
    counts = (f"{len(rows[name]) - len(kept[name])} of {len(rows[name])} {name} rows" for name in rows)
    announce(f"Left out for prompts of more than {max_length} tokens: {', '.join(counts)}")
    return kept


# ---- Training ----


@dataclass
class Setup:
    """What the trainers of one run share."""

    recipe: BaseArguments
    args: TrainingArguments
    model_args: ModelConfig
    model: str | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    SHARED = (
        "seed", "bf16", "fp16", "use_cpu", "ddp_backend", "learning_rate", "lr_scheduler_type", "warmup_steps",
        "weight_decay", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps",
        "gradient_checkpointing", "max_length", "logging_steps", "report_to", "disable_tqdm", "model_init_kwargs",
        "dataset_num_proc",
    )  # fmt: skip

    @classmethod
    def from_path(cls, recipe: BaseArguments, args: TrainingArguments, model_args: ModelConfig) -> "Setup":
        """The model that is named on the command line."""
        args.model_init_kwargs = {
            "dtype": model_args.dtype,
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
        }
        model = model_args.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(model, revision=model_args.model_revision)
        return cls(recipe, args, model_args, model, tokenizer)

    def config(self, config_class: type, name: str, **overrides: Any) -> Any:
        """Config of a method that is compared with, from the fields that it shares with the recipe's own."""
        shared = {field: getattr(self.args, field) for field in self.SHARED if hasattr(self.args, field)}
        return config_class(f"{self.args.output_dir}/{name}", **{**shared, "save_strategy": "no", **overrides})

    def trainer_kwargs(self) -> dict[str, Any]:
        quantization = get_quantization_config(self.model_args) if isinstance(self.model, str) else None
        return {
            "processing_class": self.tokenizer,
            "peft_config": get_peft_config(self.model_args),
            "quantization_config": quantization,
        }

    def make_reference(self, rows: Dataset, **overrides: Any) -> None:
        """Fine-tune the model on all completions if asked to, and keep what everything starts from in a folder."""
        model, steps = self.model, self.recipe.reference_sft_steps
        if isinstance(model, str) and not steps:
            return
        folder = f"{self.args.output_dir}/reference"
        if self.args.resume_from_checkpoint and Path(folder).is_dir():
            announce("The reference policy: the one that the run has begun with")
            self.model = folder
            return
        if steps and not isinstance(model, str):  # an adapter that is loaded again needs the name of its base
            self.model = f"{self.args.output_dir}/untrained"
            self._save(model, self.model)
        if steps:
            announce("The reference policy: SFT on all completions")
            model = train_sft(
                as_completions(rows, chosen_only=False),
                self,
                "reference",
                max_steps=steps,
                learning_rate=self.recipe.reference_learning_rate,
                lr_scheduler_type="cosine",
                **overrides,
            )
            model = model.merge_and_unload() if is_peft_model(model) else model
        self.model = folder
        self._save(model, self.model)

    def _save(self, model: PreTrainedModel, folder: str) -> None:
        """Keep a model that is whole on every process."""
        if PartialState().is_main_process:
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        PartialState().wait_for_everyone()


def take_engine(args: TrainingArguments) -> None:
    """
    Call it before a trainer whose arguments are older than another trainer of the process: DeepSpeed has one set of
    settings, which are now those of the other.
    """
    if args.deepspeed_plugin is not None:
        AcceleratorState._reset_state()
        args.deepspeed_plugin.set_deepspeed_weakref()


def trained_policy(trainer: Trainer) -> PreTrainedModel:
    """What was trained, to be judged: whole on every process. Where it is sharded, it is saved and loaded again."""
    if not is_sharded(trainer.model):
        return trainer.accelerator.unwrap_model(trainer.model)
    folder = f"{trainer.args.output_dir}/whole"
    trainer.save_model(folder)
    trainer.accelerator.wait_for_everyone()
    auto_class = AutoPeftModelForCausalLM if is_peft_model(trainer.model) else AutoModelForCausalLM
    with loading_whole():
        policy = auto_class.from_pretrained(folder, dtype=trainer.model.dtype)
    return policy.to(trainer.args.device)


def train_sft(rows: Dataset, setup: Setup, name: str, **overrides: Any) -> PreTrainedModel:
    args = setup.config(SFTConfig, name, completion_only_loss=True, **overrides)
    trainer = SFTTrainer(setup.model, args=args, train_dataset=rows, **setup.trainer_kwargs())
    trainer.train()
    return trained_policy(trainer)


def train_dpo(pairs: Dataset, setup: Setup, name: str, **overrides: Any) -> PreTrainedModel:
    args = setup.config(
        DPOConfig,
        name,
        # On several ranks TRL 1.16 does not find its cache of a dataset that is held in memory
        precompute_ref_log_probs=PartialState().num_processes == 1,
        **{
            "beta": setup.recipe.dpo_beta,
            "learning_rate": setup.recipe.dpo_learning_rate or setup.args.learning_rate / 10,
            **overrides,
        },
    )
    trainer = DPOTrainer(setup.model, args=args, train_dataset=as_pairs(pairs), **setup.trainer_kwargs())
    trainer.train()
    return trained_policy(trainer)


def train_rloo(prompts: Dataset, reward: RewardFunc, setup: Setup, **overrides: Any) -> PreTrainedModel:
    """TRL's RLOO on as many completions, in as many batches, each trained on once: its ratio is of whole sequences."""
    recipe, args = setup.recipe, setup.args
    same = (
        "max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs",
        "generation_batch_size", "use_vllm", "vllm_mode", "vllm_gpu_memory_utilization",
    )  # fmt: skip
    config = setup.config(
        RLOOConfig,
        "rloo",
        **{name: getattr(args, name) for name in same},
        **{"beta": recipe.rloo_beta, "num_generations": recipe.rloo_num_generations, **overrides},
    )
    trainer = RLOOTrainer(setup.model, reward, args=config, train_dataset=prompts, **setup.trainer_kwargs())
    trainer.train()
    return trained_policy(trainer)


# ---- Judging ----


class Comparison:
    """
    Policies judged on the same held-out prompts, beside their reference.

    Args:
        setup ([`Setup`]):
            What the trainers share.
        test ([`~datasets.Dataset`]):
            Held-out rows.
        policy ([`~transformers.PreTrainedModel`]):
            A trained policy: one with an adapter holds the reference.
        reward_func (`Callable`, *optional*):
            Judges new answers. If `None`, nothing does.
        is_ranking (`bool`, *optional*, defaults to `True`):
            Whether to measure how the policies rank the completions of the held-out rows.
        train_reward (`Callable`, *optional*):
            The reward that is trained on, where it is another than the judge's. What rises in it alone is not better.
        num_generations (`int`, *optional*):
            Number of answers per prompt. If `None`, the recipe's `num_generations`.
        max_new_tokens (`int`, *optional*):
            Number of tokens of an answer at most. If `None`, the recipe's `max_new_tokens`.
    """

    def __init__(
        self,
        setup: Setup,
        test: Dataset,
        policy: PreTrainedModel,
        reward_func: RewardFunc | None,
        is_ranking: bool = True,
        train_reward: RewardFunc | None = None,
        num_generations: int | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        self.num_generations = num_generations or setup.recipe.num_generations
        self.max_new_tokens = max_new_tokens or setup.recipe.max_new_tokens
        self.setup, self.test, self.is_ranking = setup, test, is_ranking
        self.reward_func, self.train_reward = reward_func, train_reward
        self.results: dict[str, dict[str, float]] = {}
        self.samples: dict[str, list[dict[str, Any]]] = {}
        self.reference = None
        announce("The reference policy: answers")
        if get_peft_config(setup.model_args) is None:
            with loading_whole():
                reference = AutoModelForCausalLM.from_pretrained(setup.model, **setup.args.model_init_kwargs or {})
            reference.to(setup.args.device)
            self._judge("reference", reference)
            self.reference = reference
        else:  # the policy without its adapter
            with reference_policy(policy, None) as model:
                self._judge("reference", model.get_base_model())

    def add(self, name: str, policy: PreTrainedModel) -> None:
        """Judge a policy."""
        self._judge(name, policy)
        if self.is_ranking:
            self.results[name] |= ranking(policy, self.reference, self.setup.tokenizer, self.test)

    def _judge(self, name: str, model: PreTrainedModel) -> None:
        recipe = self.setup.recipe
        prompts = [row["prompt"] if "prompt" in row else as_group(row).prompt for row in self.test]
        rows = list({json.dumps(prompt): row for row, prompt in enumerate(prompts)}.values())
        rows = rows[: recipe.max_eval_prompts]
        columns = {column: self.test[column] for column in self.test.column_names if column not in NOT_PASSED_ON}
        result = evaluate_policy(
            model,
            self.setup.tokenizer,
            [prompts[row] for row in rows],
            self.reward_func or unscored,
            ref_model=model if name == "reference" else self.reference,
            columns={column: [values[row] for row in rows] for column, values in columns.items()},
            num_generations=self.num_generations,
            max_new_tokens=self.max_new_tokens,
            seed=self.setup.args.seed,
        )
        self.samples[name] = result.pop("samples")
        result = {"reward": result.pop("reward"), "kl": result.pop("kl"), **result}
        if self.reward_func is None:
            del result["reward"], result["reward_std"]
        if self.train_reward is not None:
            prompts, completions = ([s[key] for s in self.samples[name]] for key in ("prompt", "completion"))
            result["train_reward"] = mean(r for r in self.train_reward(prompts, completions) if r is not None)
        self.results[name] = result

    def write(self) -> None:
        """Table, answers and the distribution of rewards, in the output directory."""
        output_dir = Path(self.setup.args.output_dir)
        write_results(self.results, output_dir)
        write_samples(self.samples, self.num_generations, output_dir)
        plot_rewards(self.samples, output_dir)


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
    right = better * ((log_ratio[:, None] - log_ratio).sign() + 1) / 2  # pairs of equal log-ratio count as half right
    result = {}
    if log_ratio.unique().numel() > 1 and rewards.unique().numel() > 1:
        result["spearman"] = float(spearmanr(log_ratio, rewards).statistic)
    if better.any():  # with one completion per prompt there is no pair
        result["pair_accuracy"] = (right.sum() / better.sum()).item()
    return result


# ---- Results ----


def write_results(
    results: dict[str, dict[str, float]], output_dir: Path, of: str = "policy", title: str = "On held-out prompts"
) -> None:
    """Print the table, and keep it as JSON and Markdown."""
    columns = list({name: None for metrics in results.values() for name in metrics if name != "reward_std"})
    table = Table(of, *(name.replace("_", " ") for name in columns), title=title)
    lines = [f"| {of} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
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


def plot_rewards(samples: dict[str, list[dict[str, Any]]], output_dir: Path) -> None:
    """The distribution of rewards of each policy."""
    rewards = {policy: [s["reward"] for s in rows if s["reward"] is not None] for policy, rows in samples.items()}
    rewards = {policy: values for policy, values in rewards.items() if values}
    if rewards:
        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        for policy, values in rewards.items():
            axis.ecdf(values, label=f"{policy}, mean {sum(values) / len(values):.2f}")
        axis.set(xlabel="held-out reward", ylabel="part of the answers below", title="Answers to held-out prompts")
        axis.legend(loc="upper left", fontsize="small", framealpha=0.6)
        figure.savefig(output_dir / "rewards.png", dpi=150)


def plot_online(trainer: Trainer, output_dir: Path) -> None:
    """
    What the policy gets while it trains, what it pays for that, and how well the critic foresees it. Where there are
    resets, completions that begin at the prompt are also shown apart: the others are in part somebody else's.
    """
    titles = {
        "reward": "Reward that is trained on",
        "kl/completion": "KL, nats per completion",
        "completions/mean_length": "Tokens per completion",
        "explained_variance": "Variance of the returns that the values explain",
    }
    labels = {"": "all", "/no_reset": "from the prompt", "/reset": "from a reset"}
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=True):
        logs = {end: [log for log in trainer.state.log_history if name + end in log] for end in labels}
        for end in labels if logs["/reset"] else [""]:
            steps, values = ([log[key] for log in logs[end]] for key in ("step", name + end))
            axis.plot(steps, values, marker=".", label=labels[end])
        if logs["/reset"]:
            axis.legend(fontsize="small")
        axis.set(xlabel="step", title=title)
    figure.savefig(output_dir / "training.png", dpi=150)


# ---- The online recipes ----


def run_online(
    trainer_class: type,
    config_class: type,
    method: str,
    toy_config: Path,
    load_rows: Callable[[OnlineArguments], DatasetDict],
    recipe_class: type[OnlineArguments] = OnlineArguments,
) -> None:
    """
    Train on new answers to prompts, scored by a reward function or model, and compare with the reference, SFT and
    TRL's RLOO, or PPO.

    Args:
        trainer_class (`type`):
            Class of the trainer.
        config_class (`type`):
            Class of its config, whose fields are arguments of the recipe.
        method (`str`):
            What the tables call it.
        toy_config (`Path`):
            Config that is used without arguments.
        load_rows (`Callable`):
            Reads the data that is named in the arguments.
        recipe_class (`type`, *optional*, defaults to [`OnlineArguments`]):
            Class of the recipe's own arguments.
    """
    recipe, args, model_args = parse(recipe_class, config_class, toy_config)
    resets = getattr(args, "reset_prob", 0) > 0
    if recipe.dataset_name is not None and recipe.reward_model is None:
        raise ValueError("The answers need a reward. Give `--reward_model`, a sequence-classification model.")
    if recipe.dataset_name is None and (recipe.reward_model or recipe.judge_model):
        raise ValueError("The embedded world has rewards of its own. Give `--dataset_name`, or no reward model.")
    if unknown := set(recipe.compare) - {"sft", "rloo", "ppo", "none"}:
        raise ValueError(f"`--compare {unknown.pop()}` is unknown. Give some of 'sft', 'rloo' and 'ppo', or 'none'.")
    if "ppo" in recipe.compare and not resets:
        raise ValueError("`--compare ppo` is the same run without resets, and this one has none. Leave it out.")
    is_main = PartialState().is_main_process
    output_dir = Path(args.output_dir)

    # The data, and the policy that everything starts from
    if recipe.dataset_name is None:
        dialogues, model, tokenizer = load_toy(recipe, args.seed)
        rows = DatasetDict({name: toy.preference_pairs(split, seed=args.seed) for name, split in dialogues.items()})
        setup = Setup(recipe, args, model_args, model, tokenizer)
        reward, judge = toy.oracle_reward, toy.heldout_reward
    else:
        rows = load_rows(recipe)
        setup = Setup.from_path(recipe, args, model_args)
        reward = RewardModel(recipe.reward_model, device=args.device)
        judge = None if recipe.judge_model is None else RewardModel(recipe.judge_model, device=args.device)
    if recipe.max_prompt_length is not None:
        rows = drop_long_prompts(rows, setup.tokenizer, recipe.max_prompt_length)
    train, columns = rows["train"], rows["train"].column_names
    reference_column = find_reference_column(columns, args.reference_column) if resets else None
    if reference_column is not None:
        references = as_references(train, reference_column)
    else:
        references = as_completions(train, chosen_only=True) if "chosen" in columns else None
    setup.make_reference(
        train if references is None or "rejected" in columns else references,
        per_device_train_batch_size=recipe.reference_sft_batch_size,
    )
    prompts = train.map(
        lambda row: {"prompt": row["prompt"] if "prompt" in row else as_group(row).prompt},
        remove_columns=[name for name in columns if name not in ("prompt", reference_column)],
    )
    ppo_args = copy(args)  # before the trainer has been at them

    announce(f"{method}: training")
    take_engine(args)
    trainer = trainer_class(setup.model, reward, args=args, train_dataset=prompts, **setup.trainer_kwargs())
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if is_main:
        trainer.create_model_card(model_name=output_dir.name)

    policy = trained_policy(trainer)
    comparison = Comparison(
        setup, rows["test"], policy, judge, False, reward, recipe.num_answers, args.max_completion_length
    )
    num_batches = trainer.state.max_steps * args.gradient_accumulation_steps
    if "sft" in recipe.compare and references is not None:
        sft = "SFT on references" if resets else "SFT on chosen"
        announce(f"For comparison: {sft}")
        # As many completions as are generated: each of them is trained on `num_iterations` times
        num_completions = num_batches * args.per_device_train_batch_size // args.num_iterations
        batch_size = recipe.reference_sft_batch_size
        sft_policy = train_sft(
            references,
            setup,
            "sft",
            max_steps=max(num_completions // (batch_size * args.gradient_accumulation_steps), 1),
            learning_rate=recipe.sft_learning_rate or args.learning_rate,
            per_device_train_batch_size=batch_size,
        )
        comparison.add(sft, sft_policy)
    if "rloo" in recipe.compare:
        announce("For comparison: TRL's RLOO")
        learning_rate = recipe.rloo_learning_rate or args.learning_rate
        max_steps = max(trainer.state.max_steps // args.num_iterations, 1)
        rloo_policy = train_rloo(prompts, reward, setup, max_steps=max_steps, learning_rate=learning_rate)
        comparison.add("RLOO", rloo_policy)
    if "ppo" in recipe.compare:
        announce("For comparison: PPO, the same without resets")
        ppo_args.output_dir, ppo_args.reset_prob, ppo_args.save_strategy = f"{output_dir}/ppo", 0.0, "no"
        take_engine(ppo_args)
        ppo = trainer_class(setup.model, reward, args=ppo_args, train_dataset=prompts, **setup.trainer_kwargs())
        ppo.train()
        comparison.add("PPO", trained_policy(ppo))
    announce(f"{method}: answers")
    comparison.add(method, policy)
    if is_main:
        comparison.write()
        plot_online(trainer, output_dir)
        print(f"Model, table, answers and plots are in {output_dir}.")
