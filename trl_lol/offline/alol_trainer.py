import math
import textwrap
from collections.abc import Iterable
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..advantages import mean_rewards, priority_weights, sequence_advantages
from ..data import flatten_groups
from ..estimation import check_scores_rollouts, group_by_prompt_ids, score_rollouts, with_rewards
from ..losses import alol_loss, importance_ratio
from ..report import AdvantageReport
from ..value import ValueEstimator
from .alol_config import ALoLConfig
from .trainer import _OfflineRewardTrainer


logger = get_logger(__name__)


class ALoLTrainer(_OfflineRewardTrainer):
    """
    Trainer for Advantage-Leftover Lunch RL (A-LoL), introduced in [Leftover Lunch: Advantage-based Offline
    Reinforcement Learning for Language Models](https://huggingface.co/papers/2305.14718).

    A whole completion is one action. Its advantage is its reward minus the reference policy's value of the prompt;
    completions without a positive advantage are dropped, the rest is drawn by advantage.

    It takes the place of [`~trl.DPOTrainer`]: the constructor, the datasets and the arguments are the same, and
    `reward_funcs` is new. See the README for the row formats.

    Example:

    ```python
    from datasets import Dataset
    from trl_lol import ALoLConfig, ALoLTrainer

    dataset = Dataset.from_dict({"prompt": ["1 + 1 ="] * 2, "completion": [" 2", " 3"], "reward": [1.0, 0.0]})
    trainer = ALoLTrainer("Qwen/Qwen3-0.6B", args=ALoLConfig("out"), train_dataset=dataset)
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as for [`~trl.DPOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference policy. If `None`, it is the initial policy: the model without its adapter when training one,
            else a copy in memory, which `args.precompute_ref_log_probs=True` makes unnecessary.
        args ([`ALoLConfig`], *optional*):
            Configuration of the trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function that makes a batch. Defaults to [`~trl_lol.data.DataCollatorForGroups`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset of prompts, completions and rewards, in any of the accepted row formats.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Dataset used for evaluation: every row, without filter or priority sampling.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded from the model's name.
        compute_metrics, callbacks, optimizers, quantization_config, peft_config:
            As for [`~trl.DPOTrainer`].
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Reward functions in the signature of [`~trl.GRPOTrainer`], which score the completions before training.
            They take precedence over reward columns.

    Attributes:
        advantage_report ([`~trl_lol.report.AdvantageReport`] or `None`):
            What was kept of the training data; also written to `advantage_report.json` in the output directory.
    """

    _config_class = ALoLConfig
    _name = "A-LoL"
    _tag_names = ["trl", "trl-lol", "alol"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "Leftover Lunch: Advantage-based Offline Reinforcement Learning for Language Models",
        "id": "2305.14718",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{baheti2024leftover,
                title        = {{Leftover Lunch: Advantage-based Offline Reinforcement Learning for Language Models}},
                author       = {Ashutosh Baheti and Ximing Lu and Faeze Brahman and Ronan Le Bras and Maarten Sap and Mark Riedl},
                year         = 2024,
                booktitle    = {The Twelfth International Conference on Learning Representations, {ICLR} 2024},
            }"""),  # noqa: E501
    }

    advantage_report: AdvantageReport | None = None
    # The datasets as they were passed, whose prompts are completed when the values come from rollouts
    _rows: dict[str, Dataset | IterableDataset] = {}  # noqa: RUF012

    def _loss(
        self, logps: Tensor, ref_logps: Tensor, mask: Tensor, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        args = self.args
        advantages = weight = inputs["advantages"]
        if self.model.training and not args.advantage_weighting:
            weight = (advantages > 0).to(advantages)  # priority sampling has drawn in proportion to A⁺ already
        losses = {
            loss_type: alol_loss(
                logps,
                ref_logps,
                mask,
                weight,
                loss_type=loss_type,
                epsilon=args.epsilon,
                beta=args.beta,
                clamp=args.advantage_filter == "positive",
            )
            for loss_type in self.loss_types
        }
        loss = sum(w * losses[t].mean() for t, w in zip(self.loss_types, self.loss_weights, strict=True))

        log_ratio = logps - ref_logps
        log_ratio = log_ratio[mask.bool()] if "alol_seq" in self.loss_types else log_ratio.sum(1)
        ratio = importance_ratio(log_ratio, args.epsilon)
        metrics = {"importance_ratio/mean": ratio, "importance_ratio/clipped": ratio != importance_ratio(log_ratio)}
        if args.uses_advantages:
            metrics["advantages/mean"] = advantages
            kept = (advantages > 0).float()
            if self.model.training:  # the batches hold what was kept, or everything
                kept = kept.new_tensor(self.advantage_report.kept_fraction if args.filters_advantages else 1.0)
            metrics["advantages/kept_fraction"] = kept
        return loss, metrics

    def _sampling_weights(self, dataset: Dataset) -> Tensor | None:
        if not self.args.uses_priority_sampling:
            return None
        return priority_weights(torch.tensor([advantages[0] for advantages in dataset["advantages"]]))

    # ---- Advantages ----

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: ALoLConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        if args.uses_rollouts and not self._constructed:
            check_scores_rollouts(self.reward_funcs)
            self._rows = {**self._rows, dataset_name: dataset}
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    @cached_property
    def value_estimator(self) -> ValueEstimator:
        """Values of prompts under the reference policy."""
        args = self.args
        return ValueEstimator(
            self._reference_policy,
            cache_dir=self.cache_dir,
            cache_key=self._reference_key,
            batch_size=args.per_device_eval_batch_size,
            max_prompts=args.value_max_prompts,
            seed=args.seed,
            value_range=args.value_range,
            learning_rate=args.value_learning_rate,
            num_train_epochs=args.value_num_train_epochs,
        )

    @property
    def _uses_values(self) -> bool:
        return self.args.uses_advantages and self.args.baseline == "value"

    def _add_advantages(
        self, dataset: Dataset | IterableDataset, name: str, is_train: bool = False
    ) -> Dataset | IterableDataset:
        if isinstance(dataset, IterableDataset):
            return self._stream_advantages(dataset, is_train)
        prompts, group_ids, rewards = group_by_prompt_ids(dataset["prompt_ids"], dataset["rewards"])
        values = None
        if self._uses_values:
            if is_train:
                values = self._fit_values(prompts, group_ids, rewards)[group_ids]
            else:
                values = self.value_estimator.predict_sharded(prompts, name)[group_ids]
        advantages = self._advantages(rewards, group_ids, values)
        if is_train:
            self._report(rewards, advantages, group_ids, dataset)
        dataset = dataset.add_column("advantages", _split_by_row(advantages, dataset["rewards"]))
        return dataset.map(
            flatten_groups,
            batched=True,
            fn_kwargs={"keep_positive": is_train and self.args.filters_advantages},
            desc=f"Selecting completions of {name} dataset",
        )

    def _stream_advantages(self, dataset: IterableDataset, is_train: bool) -> IterableDataset:
        args = self.args
        if self._uses_values and args.dataloader_num_workers > 0:
            raise ValueError(
                "With an `IterableDataset`, values are computed while the rows are read. Set "
                '`dataloader_num_workers=0`, use another `baseline` than "value", or pass a `Dataset`.'
            )
        if args.uses_advantages and args.baseline == "batch_mean":
            raise ValueError(
                '`baseline="batch_mean"` needs the whole dataset, and a dataset is an `IterableDataset`. Use another '
                "`baseline`, or pass a `Dataset`."
            )
        if is_train:  # the head of the stream stands for the whole of it
            rows = list(islice(dataset, args.value_max_prompts))
            columns = ([row[name] for row in rows] for name in ("prompt_ids", "rewards"))
            prompts, group_ids, rewards = group_by_prompt_ids(*columns)
            values = self._fit_values(prompts, group_ids, rewards)[group_ids] if self._uses_values else None
            row_ids = torch.tensor([i for i, row in enumerate(rows) for _ in row["rewards"]])
            advantages = self._advantages(rewards, row_ids, values)
            self._report(rewards, advantages, group_ids, Dataset.from_list(rows))
        if is_train and args.uses_priority_sampling:
            logger.warning("An `IterableDataset` is read in its own order: completions are not drawn by advantage.")

        def add_advantages(batch: dict[str, list]) -> dict[str, list]:
            rewards = torch.tensor([reward for row in batch["rewards"] for reward in row], dtype=torch.float64)
            rows = torch.tensor([i for i, row in enumerate(batch["rewards"]) for _ in row])
            values = self.value_estimator.predict(batch["prompt_ids"])[rows] if self._uses_values else None
            advantages = _split_by_row(self._advantages(rewards, rows, values), batch["rewards"])
            return flatten_groups({**batch, "advantages": advantages}, is_train and args.filters_advantages)

        return dataset.map(add_advantages, batched=True, batch_size=args.per_device_eval_batch_size)

    def _advantages(self, rewards: Tensor, group_ids: Tensor, values: Tensor | None) -> Tensor:
        if not self.args.uses_advantages:
            return rewards
        return sequence_advantages(rewards, group_ids=group_ids, values=values, baseline=self.args.baseline)

    def _fit_values(self, prompts: list[list[int]], group_ids: Tensor, rewards: Tensor) -> Tensor:
        # Rollouts of the policy may differ where the logged completions are all equally good
        if rewards.min() == rewards.max() and not self.args.uses_rollouts:
            raise ValueError(
                f"All {len(rewards)} rewards are {rewards[0]:.4g}: no completion is better than the policy's value of "
                'its prompt. Check the rewards, or set `baseline="none"` to train on every completion alike.'
            )
        rewarded = prompts, *mean_rewards(rewards, group_ids, len(prompts))
        if self.args.uses_rollouts:
            rewarded = self._score_rollouts()
        rewarded = with_rewards(*rewarded)
        _, means, _ = rewarded
        if (value_range := self.args.value_range) and not (
            value_range[0] <= means.min() <= means.max() <= value_range[1]
        ):
            raise ValueError(
                f"`value_range={value_range}` does not hold the rewards, whose means by prompt go from "
                f"{means.min():.4g} to {means.max():.4g}. Widen it, or set it to `None`."
            )
        self.value_estimator.fit(*rewarded)
        return self.value_estimator.predict_sharded(prompts, "train")

    def _score_rollouts(self) -> tuple[list[list[int]], Tensor, Tensor]:
        """Prompts with the mean rewards of the reference policy's own completions."""
        args = self.args
        # The policy has seen nothing of the evaluation prompts that the training prompts do not show
        held_out = [dataset for name, dataset in self._rows.items() if name != "train"]
        datasets = held_out or list(self._rows.values())
        num_prompts = math.ceil(args.value_max_prompts / len(datasets))
        prompts, rewards = [], []
        with self._reference_policy() as model:
            for rows in datasets:  # whose columns may differ
                if isinstance(rows, IterableDataset):
                    rows = Dataset.from_list([*islice(rows, num_prompts)])
                completed, means, counts = score_rollouts(
                    rows,
                    model,
                    self.reward_funcs,
                    self.processing_class,
                    reward_weights=args.reward_weights,
                    num_prompts=num_prompts,
                    num_generations=args.value_num_generations,
                    max_completion_length=args.value_max_completion_length,
                    max_length=args.max_length,
                    batch_size=args.per_device_eval_batch_size,
                    seed=args.seed,
                    cache_dir=self.cache_dir,
                )
                prompts += completed
                rewards += [[mean] * int(count) for mean, count in zip(means.tolist(), counts, strict=True)]
        prompts, group_ids, flat = group_by_prompt_ids(prompts, rewards)
        return prompts, *mean_rewards(flat, group_ids, len(prompts))

    def _report(self, rewards: Tensor, advantages: Tensor, group_ids: Tensor, dataset: Dataset) -> None:
        args = self.args
        if not args.uses_advantages:
            if set(args.loss_type) != {"nll"} and rewards.min() < 0:
                logger.warning(
                    f"Rewards go down to {rewards.min():.4g}, and {args.loss_type} pushes the probability of "
                    "completions with a negative reward down without bound. Shift or clip the rewards."
                )
            return
        subsets = None
        if "subset" in dataset.column_names:
            subsets = [s for s, row in zip(dataset["subset"], dataset["rewards"], strict=True) for _ in row]
        completions = [(row, ids) for row, completions in enumerate(dataset["completion_ids"]) for ids in completions]
        distinct = {(g, *ids) for g, (_, ids) in zip(group_ids.tolist(), completions, strict=True)}

        def examples(positions: list[int]) -> list[tuple[str, str]]:
            rows = [(dataset[completions[i][0]]["prompt_ids"], completions[i][1]) for i in positions]
            return [tuple(self._tokenizer.batch_decode(ids, skip_special_tokens=True)) for ids in rows]

        report = self.advantage_report = AdvantageReport.from_tensors(
            rewards,
            rewards - advantages,
            advantages,
            subsets,
            group_ids=group_ids,
            num_missing=self._num_unscored,
            num_duplicates=len(completions) - len(distinct),
            examples=examples,
        )
        if args.filters_advantages and report.num_kept == 0:
            raise ValueError(
                "No completion has a positive advantage, so there is nothing to train on.\n"
                f"{report}\nCheck that a higher reward means a better completion and that prompts have completions of "
                "different rewards, or use another `baseline`."
                + (
                    " The values are of the reference policy's own completions, of up to `value_max_completion_length="
                    f"{args.value_max_completion_length}` tokens: a reward that grows with the length favours them."
                    if args.uses_rollouts
                    else ""
                )
            )
        if self.is_world_process_zero():
            report.save(Path(args.output_dir) / "advantage_report.json")
        if self.is_local_process_zero():
            print(f"Advantages of the training data:\n{report}")
        if "alol_kl" in args.loss_type and (num_low := int(((advantages > 0) & (advantages < args.beta)).sum())):
            logger.warning(
                f"{num_low} kept completions have an advantage below `beta={args.beta}`. 'alol_kl' pushes their "
                "probability down without bound. Lower `beta`, or watch `logratio/mean`."
            )


def _split_by_row(x: Tensor, rows: Iterable[list]) -> list[list[float]]:
    return [part.tolist() for part in x.split([len(row) for row in rows])]
