"""
Evaluation by generating. A validation loss does not show when a policy trained on rewards collapses; its own
completions do.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ._trl import unwrap_model_for_generation, use_adapter
from .data import Messages, as_group
from .generation import completion_logps, generate_completions
from .rewards.calling import RewardFunc, call_reward_funcs, check_reward_funcs
from .rewards.scoring import NOT_PASSED_ON


def distinct_n(texts: Sequence[str], n: int) -> float:
    """
    Diversity of texts: the number of different word n-grams over the number of all word n-grams.

    Args:
        texts (`list[str]`):
            Texts, split at whitespace.
        n (`int`):
            Number of words of an n-gram.

    Returns:
        `float`: Between 0 (also for texts without any n-gram) and 1.
    """
    words = [text.split() for text in texts]
    ngrams = [tuple(text[start : start + n]) for text in words for start in range(len(text) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def evaluate_policy(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    *,
    reward_weights: Sequence[float] | None = None,
    ref_model: torch.nn.Module | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    num_generations: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Generate on prompts and measure the completions. In a distributed run, every rank takes a share of the prompts and
    all ranks get all results.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy, not wrapped for distributed training.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer or processor.
        prompts (`list[str]` or `list[list[dict]]`):
            Prompts, as text or as messages.
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions, `f(prompts, completions, **columns) -> list[float | None]`.
        reward_weights (`list[float]`, *optional*):
            One weight per function. If `None`, every function weighs 1.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference policy of the KL. If `None`, it is the policy without its adapter, or with its adapter `"ref"`,
            for a [`~peft.PeftModel`], and otherwise no KL is measured.
        columns (`dict[str, list]`, *optional*):
            Columns for the reward functions, one entry per prompt.
        num_generations (`int`, *optional*, defaults to `1`):
            Number of completions per prompt.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Maximum length of a completion, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; `0.0` is greedy decoding. The KL is that of the policy only at `1.0`.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of sequences per batch on each rank.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling; the rank is added to it.

    Returns:
        `dict[str, Any]`: Means over the completions: `reward` and its standard deviation `reward_std` (NaN if none is
        scored), `kl` (ln π − ln π_ref, in nats per completion) and `entropy` (−ln π, in nats per token) if there is a
        reference, `length` in tokens, EOS included, and `distinct_1` to `distinct_3`. `samples` holds `prompt`,
        `completion`, `reward`, `kl`, `logp` and `length` of each completion.

    Raises:
        `ValueError`: If there are no prompts.
    """
    if not len(prompts):
        raise ValueError("There are no prompts to evaluate on.")
    columns = columns or {}
    state = PartialState()
    tasks = list(enumerate(i for i in range(len(prompts)) for _ in range(num_generations)))
    # Some tasks are done twice rather than having a rank with fewer forwards: a sharded reference would wait for it
    with state.split_between_processes(tasks, apply_padding=True) as mine:
        rows = [row for _, row in mine]
        prompts = [prompts[row] for row in rows]
        completions, prompt_ids, completion_ids = generate_completions(
            model,
            processing_class,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            seed=seed + state.process_index,
        )
        rewards = call_reward_funcs(
            reward_funcs,
            reward_weights,
            prompts,
            completions,
            completion_ids,
            **{name: [column[row] for row in rows] for name, column in columns.items()},
        )
        kls: list[float | None] = [None] * len(rows)
        logps: list[float | None] = [None] * len(rows)
        sequences = (prompt_ids, completion_ids, batch_size)
        with reference_policy(model, ref_model) as reference:
            ref_logps = None if reference is None else completion_logps(reference, *sequences)
        if ref_logps is not None:
            policy_logps = completion_logps(model, *sequences)
            logps, kls = policy_logps.tolist(), (policy_logps - ref_logps).tolist()
        lengths = [len(ids) for ids in completion_ids]
    fields = ("prompt", "completion", "reward", "kl", "logp", "length")
    values = zip(prompts, completions, rewards, kls, logps, lengths, strict=True)
    done = gather_object(
        [(task, dict(zip(fields, v, strict=True))) for (task, _), v in zip(mine, values, strict=True)]
    )
    return _summary([sample for _, sample in sorted(dict(done).items())])


@contextmanager
def reference_policy(model: torch.nn.Module, ref_model: torch.nn.Module | None) -> Iterator[torch.nn.Module | None]:
    """The reference of a policy: `ref_model`, or what a PEFT model started from. `None` if there is neither."""
    if ref_model is None and isinstance(model, PeftModel):
        # The trainers keep the initial weights of an adapter that is trained further under this name
        with use_adapter(model, "ref" if "ref" in model.peft_config else None):
            yield model
    else:
        yield ref_model


def _summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    rewards = torch.tensor([s["reward"] for s in samples if s["reward"] is not None], dtype=torch.float64)
    texts = [s["completion"] if isinstance(s["completion"], str) else s["completion"][0]["content"] for s in samples]
    mean = rewards.mean()
    metrics = {"reward": mean.item(), "reward_std": (rewards - mean).square().mean().sqrt().item()}
    if samples[0]["kl"] is not None:
        metrics["kl"] = sum(s["kl"] for s in samples) / len(samples)
        metrics["entropy"] = -sum(s["logp"] for s in samples) / sum(s["length"] for s in samples)
    metrics["length"] = sum(s["length"] for s in samples) / len(samples)
    return {**metrics, **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)}, "samples": samples}


class GenerationEvalCallback(TrainerCallback):
    """
    Generates on a fixed sample of prompts at every evaluation and logs `eval_generation/reward`, `…/reward_std`,
    `…/kl`, `…/entropy`, `…/length` and `…/distinct_1` to `…/distinct_3` (see [`evaluate_policy`]). The metrics can
    pick the best checkpoint: `metric_for_best_model="eval_generation/reward"`.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer to which the callback will be added.
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `list`):
            Prompts, or rows with one; the reward functions get the other columns.
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions. Best not the rewards that are trained on: those rise even when the text gets worse.
        num_prompts (`int`, *optional*, defaults to `64`):
            Number of prompts, drawn once; the first ones of an [`~datasets.IterableDataset`].
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Maximum length of a completion, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; `0.0` is greedy decoding.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of sequences per batch on each device.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw of the prompts and of the sampling, which is the same at every evaluation.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference policy of the KL. If `None`, it is the trainer's `ref_model`, or the policy without its adapter.

    Example:

    ```python
    >>> trainer.add_callback(GenerationEvalCallback(trainer, dataset, reward_funcs=judge))
    ```
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset | IterableDataset | Sequence[str | Messages],
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        num_prompts: int = 64,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        batch_size: int = 16,
        seed: int = 0,
        ref_model: torch.nn.Module | None = None,
    ) -> None:
        self.reward_funcs, _ = check_reward_funcs(reward_funcs, None)
        self.trainer = trainer
        self.ref_model = ref_model
        self.generation = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "batch_size": batch_size,
            "seed": seed,
        }
        if isinstance(dataset, IterableDataset):
            rows = list(islice(dataset, num_prompts))
        else:
            count = min(num_prompts, len(dataset))
            rows = [dataset[i] for i in sorted(random.Random(seed).sample(range(len(dataset)), count))]
        if not rows:
            raise ValueError("`dataset` has no rows, so there are no prompts to evaluate on.")
        rows = [row if isinstance(row, Mapping) else {"prompt": row} for row in rows]
        self.prompts = [row["prompt"] if "prompt" in row else as_group(row).prompt for row in rows]
        self.columns = {name: [row[name] for row in rows] for name in rows[0] if name not in NOT_PASSED_ON}
        self.samples: list[dict[str, Any]] = []
        self._evaluated: tuple[int, set[str]] = (-1, set())

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        # Called once per evaluation set. A set that was already seen at this step begins another evaluation, maybe
        # of other weights: `load_best_model_at_end` leaves the step as it is.
        runtime = next((name for name in metrics if name.endswith("_runtime")), "")
        step, seen = self._evaluated
        if step == state.global_step and runtime not in seen:
            seen.add(runtime)
            return
        self._evaluated = (state.global_step, {runtime})
        trainer = self.trainer
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        ) as model:
            result = evaluate_policy(
                model,
                trainer.processing_class,
                self.prompts,
                self.reward_funcs,
                ref_model=self.ref_model if self.ref_model is not None else getattr(trainer, "ref_model", None),
                columns=self.columns,
                **self.generation,
            )
        self.samples = result.pop("samples")
        result = {f"eval_generation/{name}": value for name, value in result.items()}
        metrics.update(result)
        trainer.log(result)
