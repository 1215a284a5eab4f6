"""What the offline trainers share: everything around the loss."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend, gather_object, is_compiled_module, is_peft_model, tqdm
from datasets import Dataset, Features, IterableDataset, Value
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOTrainer

from .. import __version__
from .._arguments import resolve_args
from .._cache import cached, content_key, model_key
from .._reference import copy_as_reference
from .._resume import SetEpochCallback, WholeCheckpointsMixin
from .._trl import (
    disable_gradient_checkpointing,
    global_then_local_main_first,
    use_adapter,
)
from ..data import (
    TOKENIZED,
    DataCollatorForGroups,
    batches_by_prompt,
    check_columns,
    group_by_prompt,
    has_single_completions,
    tokenize_row,
)
from ..engines import check_engine, placed_policy, uses_fsdp
from ..generation import evaluating
from ..rewards import RewardFunc, score_dataset
from ..shared_prompts import (
    attention_kwargs,
    check_architecture,
    check_log_probs,
    completion_tokens,
    per_completion,
)
from .base_config import _OfflineRewardConfig
from .sampling import EpochSampler


logger = get_logger(__name__)


class _OfflineRewardTrainer(WholeCheckpointsMixin, DPOTrainer):
    """
    Base of the trainers on logged, scored completions. A subclass names its config and paper and writes [`_loss`].

    It is a [`~trl.DPOTrainer`] whose rows are groups of scored completions instead of pairs, so that everything around
    the loss (models, adapters, distribution, checkpoints, metrics, model card) is TRL's.
    """

    _config_class: type[_OfflineRewardConfig]
    _min_completions = 1
    _num_unscored = 0  # completions of the training dataset

    def __init__(
        self,
        model: "str | PreTrainedModel | Any",
        ref_model: PreTrainedModel | None = None,
        args: _OfflineRewardConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any | None = None,
        peft_config: Any | None = None,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
    ) -> None:
        args = resolve_args(args, self._config_class, model, type(self))
        self.cache_dir = Path(args.output_dir) / "_cache"  # what begins with "_" is not pushed to the Hub
        self.reward_funcs = reward_funcs if isinstance(reward_funcs, list | None) else [reward_funcs]
        if compute_metrics is not None and self._trains_on_groups:
            raise ValueError(
                "`compute_metrics` gets one sequence per row, and here a row is a group of them. Leave it out, and "
                "evaluate with `GenerationEvalCallback` or the logged metrics."
            )
        if args.reward_weights is not None and reward_funcs is None:
            raise ValueError(
                "`reward_weights` is set, but there are no `reward_funcs` to weight. Pass them, or remove it."
            )
        if args.shared_prompts and data_collator is not None:
            raise ValueError(
                "`shared_prompts=True` is a layout of the default data collator, and a `data_collator` is passed. "
                "Leave it out, or set `shared_prompts=False`."
            )
        if isinstance(train_dataset, Dataset | IterableDataset):  # DPOTrainer's constructor rejects anything else
            check_columns(_column_names(train_dataset, "train"))
        is_own_reference = ref_model is None and args.precompute_ref_log_probs
        needs_copy = ref_model is None and peft_config is None and (not is_own_reference or uses_fsdp(args))
        if needs_copy and isinstance(model, PreTrainedModel):
            ref_model = copy_as_reference(model, "set `precompute_ref_log_probs=True`, or train a LoRA")

        # DPOTrainer's constructor ends by computing reference log-probabilities. Here the advantages come first, since
        # they say which rows are left: see `_finish_dataset`.
        self._constructed = False
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._constructed = True
        check_engine(self)
        if is_own_reference:
            self.ref_model = None  # under FSDP, DPOTrainer insists on one
        if data_collator is None:
            self.data_collator = DataCollatorForGroups(
                self._tokenizer.pad_token_id, args.max_length, args.pad_to_multiple_of
            )
        if args.shared_prompts:
            self._share_prompts()
        self.train_dataset = self._finish_dataset(self.train_dataset, "train", is_train=True)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._finish_dataset(d, name) for name, d in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._finish_dataset(self.eval_dataset, "eval")

    # ---- Rows ----

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: _OfflineRewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        columns = _column_names(dataset, dataset_name)
        if {"prompt_ids", "completion_ids", "rewards"} <= set(columns):  # `evaluate` passes prepared datasets, too
            return dataset
        check_columns(columns)
        is_map_style = isinstance(dataset, Dataset)
        if args.shared_prompts and not is_map_style:
            raise ValueError(
                f"`shared_prompts=True` needs the whole dataset, to try the layout on its longest group, and the "
                f"{dataset_name} dataset is an `IterableDataset`. Set it to `False`, or pass a `Dataset`."
            )
        needs_grouping = self._trains_on_groups and has_single_completions(columns)
        if needs_grouping and not is_map_style:
            raise ValueError(
                f"The {dataset_name} dataset is an `IterableDataset` with one completion per row, and completions of "
                "one prompt can only be brought together when the whole dataset is there. Pass a `Dataset`, or rows "
                "with `completions` and `rewards`."
            )
        dataset = dataset.with_format(None)  # rows as plain Python, not as tensors or arrays

        if self.reward_funcs is not None:
            dataset = score_dataset(
                dataset,
                self.reward_funcs,
                args.reward_weights,
                processing_class=processing_class,
                cache_dir=self.cache_dir,
            )
            columns = _column_names(dataset, dataset_name)
        elif not {"completion", "completions", "chosen_reward", "score_chosen"} & set(columns):
            logger.warning(
                f"The {dataset_name} dataset has preferences without scores: chosen completions get reward 1, "
                "rejected ones 0. Pass `reward_funcs` to score them."
            )

        eos_token = self._tokenizer.eos_token

        def tokenize(row: dict[str, Any], index: int, max_length: int | None, version: str) -> dict[str, Any]:
            row = tokenize_row(row, index, processing_class, eos_token)
            room = math.inf if max_length is None else max_length - len(row["prompt_ids"])
            # Where there is no room at all, the row is dropped below
            return {**row, "num_cut": sum(len(ids) > room > 0 for ids in row["completion_ids"])}

        def progress(desc: str) -> dict[str, Any]:  # `IterableDataset.map` takes neither argument
            return (
                {"num_proc": args.dataset_num_proc, "desc": f"{desc} {dataset_name} dataset"} if is_map_style else {}
            )

        with global_then_local_main_first():
            if needs_grouping:
                dataset = group_by_prompt(dataset)
                columns = dataset.column_names
            features = None
            if is_map_style:
                kept = {name: feature for name, feature in dataset.features.items() if name == "subset"}
                features = Features({**kept, **TOKENIZED, "num_cut": Value("int64")})
            dataset = dataset.map(
                tokenize,
                with_indices=True,
                features=features,
                # another version of this package does not find this one's cache
                fn_kwargs={"max_length": args.max_length, "version": __version__},
                remove_columns=[name for name in columns if name != "subset"],
                **progress("Tokenizing"),
            )
            num_dropped, num_cut = (sum(dataset[n]) if is_map_style else 0 for n in ("num_dropped", "num_cut"))
            dataset = dataset.remove_columns(["num_dropped", "num_cut"])
            num_rows = len(dataset) if is_map_style else 0
            # TRL's rule: a prompt that fills `max_length` leaves no completion token to learn from
            dataset = dataset.filter(
                _is_trainable,
                fn_kwargs={"max_length": args.max_length, "min_completions": self._min_completions},
                **progress("Dropping untrainable rows from"),
            )
        if is_map_style:
            if not self._constructed and dataset_name == "train":
                self._num_unscored = num_dropped
            if num_dropped:
                logger.warning(f"Dropped {num_dropped} completions of the {dataset_name} dataset that are not scored.")
            if num_cut:
                logger.warning(
                    f"{num_cut} completions of the {dataset_name} dataset do not fit `max_length={args.max_length}` "
                    "and are cut there, though their rewards are for the whole. Raise `max_length`, or drop them."
                )
            if len(dataset) < num_rows:
                logger.warning(
                    f"Dropped {num_rows - len(dataset)} of {num_rows} rows of the {dataset_name} dataset: the prompt "
                    f"fills `max_length={args.max_length}`, or there are fewer scored completions than the "
                    f"{self._min_completions} that are needed."
                )
            if len(dataset) == 0:
                raise ValueError(
                    f"None of the {num_rows} rows of the {dataset_name} dataset is left: each has a prompt that fills "
                    f"`max_length={args.max_length}`, or fewer than {self._min_completions} scored completions "
                    f"({num_dropped} completions are not scored). Raise `max_length`, or score more completions."
                )
        elif next(iter(dataset), None) is None:  # training on it would end before its first step, without a word
            raise ValueError(
                f"No row of the {dataset_name} stream is left: each has a prompt that fills "
                f"`max_length={args.max_length}`, or fewer than {self._min_completions} scored completions. Raise "
                "`max_length`, or score more completions."
            )
        return self._add_advantages(dataset, dataset_name) if self._constructed else dataset

    def _finish_dataset(
        self, dataset: Dataset | IterableDataset, name: str, is_train: bool = False
    ) -> Dataset | IterableDataset:
        """Do what needs the reference policy, in the order that reads the fewest rows with it."""
        dataset = self._add_advantages(dataset, name, is_train)
        if self.precompute_ref_logps:
            args = self.args
            batch_size = args.per_device_train_batch_size if is_train else args.per_device_eval_batch_size
            dataset = self._precompute_ref_logps(dataset, name, args.precompute_ref_batch_size or batch_size)
        return dataset

    def _add_advantages(
        self, dataset: Dataset | IterableDataset, name: str, is_train: bool = False
    ) -> Dataset | IterableDataset:
        """Add what the loss needs beside the rewards. Nothing unless a subclass says so."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt_ids", "completion_ids", "rewards", "advantages", "ref_logps"]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(train_dataset, Dataset) or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = EpochSampler(len(train_dataset), seed, self._sampling_weights(train_dataset))
        self.remove_callback(SetEpochCallback)
        self.add_callback(SetEpochCallback(sampler))
        return sampler

    def _sampling_weights(self, dataset: Dataset) -> Tensor | None:
        """Unnormalised sampling weights of the rows, or `None` to visit each once per epoch."""
        return None

    # ---- Reference policy ----

    @property
    def _reference_model(self) -> PreTrainedModel:
        """The reference policy, or the policy that holds it. (`or` would ask a compiled model for its length.)"""
        return self.ref_model if self.ref_model is not None else self.model

    @cached_property
    def _reference_key(self) -> tuple:
        """What the reference's outputs depend on. First read before training, when the policy is the reference."""
        return (
            *model_key(self.accelerator.unwrap_model(self._reference_model)),
            self.accelerator.mixed_precision,
        )

    @contextmanager
    def _reading(self, is_reference: bool) -> Iterator[PreTrainedModel]:
        """
        The policy or its frozen reference to be read, without wrappers, the reference without the policy's adapter.
        Within it, the other one is off limits.
        """
        read = self._reference_model if is_reference else self.model
        with ExitStack() as stack:
            if read is self.model:
                stack.enter_context(placed_policy(self))
            stack.enter_context(evaluating(read))
            stack.enter_context(disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs))
            if is_reference and read is self.model and is_peft_model(self.model):
                policy = self.accelerator.unwrap_model(self.model)
                stack.enter_context(use_adapter(policy, "ref" if "ref" in policy.peft_config else None))
            stack.enter_context(self.accelerator.autocast())
            model = self.accelerator.unwrap_model(read)
            yield model.get_base_model() if is_peft_model(model) else model

    def _reference_policy(self) -> AbstractContextManager[PreTrainedModel]:
        """The frozen reference policy, without wrappers or adapters. Within it, the policy itself is off limits."""
        return self._reading(is_reference=True)

    def compute_ref_log_probs(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """
        Per-token log-probabilities of a batch under the reference policy.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                The reference model, or the policy when the reference is within it (PEFT).
            inputs (`dict[str, torch.Tensor]`):
                The batch of [`~trl_lol.data.DataCollatorForGroups`].

        Returns:
            `torch.Tensor`: Log-probabilities in nats, of shape `(batch, seq_len - 1)`, or `(batch, branch_len - 1)`
            where prompts are shared; 0 outside the completion.
        """
        with self._reference_policy():
            outputs = model(**self._model_kwargs(inputs, self.accelerator.unwrap_model(model)), fused_lm_head=True)
        return per_completion(outputs.log_probs[:, 1 - inputs["input_ids"].size(1) :], inputs)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"`precompute_ref_log_probs=True` needs the whole dataset, and the {name} dataset is an "
                "`IterableDataset`. Set it to `False`, or pass a `Dataset`."
            )
        if not self._constructed or "ref_logps" in dataset.column_names:
            return dataset  # `_finish_dataset` comes here once the rows to keep are known
        shares = self.args.shared_prompts

        def compute() -> dict[str, Tensor]:
            prompts, completions = dataset["prompt_ids"], dataset["completion_ids"]  # read as they are needed
            batches = batches_by_prompt(prompts, completions, batch_size, shares)
            # Every rank gets as many batches, the first ones twice if need be: a forward may be collective (ZeRO-3)
            batches += batches[: -len(batches) % self.accelerator.num_processes]
            mine = batches[self.accelerator.process_index :: self.accelerator.num_processes]
            members: list[tuple[int, int]] = []
            logps: list[Tensor] = []
            for groups in tqdm(mine, desc=f"Computing reference log probs for {name} dataset"):
                members += [(row, i) for rows in groups for row in rows for i in range(len(completions[row]))]
                examples = [
                    {"prompt_ids": prompts[rows[0]], "completion_ids": [c for row in rows for c in completions[row]]}
                    for rows in groups
                ]
                batch = self._prepare_inputs(self.data_collator(examples))
                scored = completion_tokens(batch).bool().cpu()
                batch_logps = self.compute_ref_log_probs(self._reference_model, batch).cpu()
                logps += [row[kept] for row, kept in zip(batch_logps, scored, strict=True)]
            by_member = dict(gather_object(list(zip(members, logps, strict=True))))
            sequences = [by_member[member] for member in sorted(by_member)]
            return {"logps": torch.cat(sequences), "lengths": torch.tensor([len(s) for s in sequences])}

        key = (content_key(dataset, ["prompt_ids", "completion_ids"]), self._reference_key, self.args.max_length)
        key += ("shared_prompts",) if shares else ()  # the same up to rounding, but a run is to find its own again
        tensors = cached(self.cache_dir, f"ref_logps_{name}", key, compute)
        per_sequence = _list_array(pa.array(tensors["logps"].numpy()), tensors["lengths"])
        per_row = _list_array(per_sequence, torch.tensor([len(c) for c in dataset["completion_ids"]]))
        return dataset.add_column("ref_logps", per_row)

    # ---- Shared prompts ----

    @property
    def _trains_on_groups(self) -> bool:
        return self._min_completions > 1

    def _model_kwargs(self, inputs: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Any]:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        attention = attention_kwargs(inputs, model, self._is_compiled)
        return {"input_ids": inputs["input_ids"], **attention, "labels": labels, "use_cache": False}

    @cached_property
    def _is_compiled(self) -> bool:
        """Whether policy or reference are, by the trainer, accelerate or whoever made them, as a whole or in parts."""
        parts = [part for model in (self.model, self.ref_model) if model is not None for part in model.modules()]
        return (
            self.args.torch_compile
            or self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
            or any(is_compiled_module(part) or part._compiled_call_impl is not None for part in parts)
        )

    def _share_prompts(self) -> None:
        """Have prompts shared up to the length of the longest sequence, whose group the layout is tried on."""
        longest, example = self._longest_group()
        models = [
            self.accelerator.unwrap_model(model, keep_torch_compile=False)
            for model in (self.model, self.ref_model)
            if model is not None
        ]
        for model in models:
            check_architecture(model, longest)
        if self._trains_on_groups and self.aux_loss_enabled:
            raise ValueError(
                "The load-balancing loss of a mixture of experts counts the tokens of each sequence, and with "
                "`shared_prompts=True` those of a prompt count once. Set `shared_prompts=False`, or "
                "`router_aux_loss_coef=0.0`."
            )
        collator = self.data_collator
        collator.max_shared_length = longest
        configs = [model.config.get_text_config() for model in models]
        collator.is_dense = self._is_compiled or any(c._attn_implementation == "eager" for c in configs)
        # A layer of width d has about 12 d² weights, 2 operations each, and 4 d operations for a pair of tokens
        collator.pairs_per_token = 6 * min(config.hidden_size for config in configs)

        repeated, shared = (self._prepare_inputs(collator.collate([example], share)) for share in (False, True))
        # Engines can call a policy beside its reference only once it is trained
        has_engine = self.is_deepspeed_enabled or self.is_fsdp_enabled
        for is_reference in (True,) if has_engine or not self._trains_on_groups else (True, False):
            # With weights in single precision it can be tried exactly, whatever training is to be in
            with self._reading(is_reference) as model, torch.autocast(model.device.type, enabled=False):

                def log_probs(inputs: dict[str, Tensor], replaced: dict[str, Any]) -> Tensor:
                    kwargs = {**self._model_kwargs(inputs, model), **replaced}
                    return per_completion(model(**kwargs, fused_lm_head=True).log_probs, inputs)

                check_log_probs(log_probs, repeated, shared, _precision(model))

    def _longest_group(self) -> tuple[int, dict[str, Any]]:
        """Tokens of the longest prompt with a completion, and its row with up to three of the completions."""
        max_length = math.inf if self.args.max_length is None else self.args.max_length
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        longest, example = 0, {}
        for dataset in (self.train_dataset, *filter(None, evaluated)):
            rows = zip(dataset["prompt_ids"], dataset["completion_ids"], strict=True)
            lengths = [min(len(prompt) + max(map(len, completions)), max_length) for prompt, completions in rows]
            if max(lengths) > longest:
                longest = max(lengths)
                row = dataset[lengths.index(longest)]
                completions = 2 * sorted(row["completion_ids"], key=len, reverse=True)
                example = {"prompt_ids": row["prompt_ids"], "completion_ids": completions[:3]}
        return longest, example

    # ---- Loss ----

    @abstractmethod
    def _loss(
        self, logps: Tensor, ref_logps: Tensor, mask: Tensor, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        The algorithm.

        Args:
            logps (`torch.Tensor`):
                Per-token log-probabilities of the policy, of shape `(batch, seq_len - 1)`.
            ref_logps (`torch.Tensor`):
                Per-token log-probabilities of the reference, same shape.
            mask (`torch.Tensor`):
                1 for completion tokens and 0 elsewhere, same shape.
            inputs (`dict[str, torch.Tensor]`):
                The batch of [`~trl_lol.data.DataCollatorForGroups`].

        Returns:
            `tuple[torch.Tensor, dict[str, torch.Tensor]]`: The mean loss of the batch, and tensors of any shape whose
            means over all ranks are logged.
        """

    def _compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], return_outputs: bool
    ) -> "Tensor | tuple[Tensor, Any]":
        mode = "train" if self.model.training else "eval"
        kwargs = self._model_kwargs(inputs, self.model)
        if self.aux_loss_enabled:  # MoE: the load-balancing loss is made from the router logits
            kwargs["output_router_logits"] = True
        outputs = model(**kwargs, fused_lm_head=True)

        def by_completion(x: Tensor) -> Tensor:
            # Prompt-learning PEFT prepends virtual tokens to the outputs; keep the positions of the real tokens
            return per_completion(x[:, 1 - inputs["input_ids"].size(1) :], inputs)

        mask, logps = completion_tokens(inputs), by_completion(outputs.log_probs)
        ref_logps = inputs.get("ref_logps")
        if ref_logps is None:
            ref_logps = self.compute_ref_log_probs(self._reference_model, inputs)

        loss, metrics = self._loss(logps, ref_logps, mask, inputs)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"] = outputs.aux_loss

        scored = mask.bool()
        metrics["entropy"] = by_completion(outputs.entropy)[scored]
        metrics["mean_token_accuracy"] = by_completion(outputs.is_top1)[scored]
        metrics["logps/mean"] = logps.sum(1)
        metrics["logratio/mean"] = (logps - ref_logps).sum(1)
        metrics["rewards/mean"] = inputs["rewards"]
        if self.args.shared_prompts and self._trains_on_groups:
            metrics["shared_prompts"] = mask.new_tensor(float("branch_index" in inputs))
        self._log_means(metrics, mode)
        if mode == "train" and self.args.include_num_input_tokens_seen == "no":  # otherwise Trainer counts
            num_tokens = self.accelerator.reduce(inputs["attention_mask"].sum(), reduction="sum").item()
            self.state.num_input_tokens_seen += num_tokens // self._tp_size  # checkpoints keep it

        if return_outputs:  # for `compute_metrics`; the fused head builds no logits
            with torch.no_grad():
                outputs = model(**{name: value for name, value in kwargs.items() if name != "labels"})
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if metrics := self._metrics["train" if self.model.training else "eval"]:
            metrics["num_tokens"] = [self.state.num_input_tokens_seen]  # now, since Trainer counts after the loss
        super().log(logs, start_time)

    def _log_means(self, metrics: dict[str, Tensor], mode: str) -> None:
        """Log the mean of each tensor over its elements and the ranks, with one collective for all."""
        sums = [
            torch.stack([m.detach().float().sum(), m.new_tensor(m.numel(), dtype=torch.float)])
            for m in metrics.values()
        ]
        for name, (total, count) in zip(metrics, self.accelerator.reduce(torch.stack(sums)).tolist(), strict=True):
            if count > 0:
                self._metrics[mode][name].append(total / count)


def _column_names(dataset: Dataset | IterableDataset, name: str) -> list[str]:
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"The {name} dataset is empty. Pass at least one row.")
    return list(first_row)


def _is_trainable(row: dict[str, Any], max_length: int | None, min_completions: int) -> bool:
    fits = max_length is None or len(row["prompt_ids"]) < max_length
    return fits and len(row["completion_ids"]) >= min_completions


def _precision(model: PreTrainedModel) -> float:
    """Relative precision of a model's matrix products outside autocast."""
    dtype = model.dtype
    if getattr(model, "is_quantized", False):
        dtype = torch.bfloat16  # at least of some
    elif dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        dtype = torch.float16  # as many bits as TF32
    return torch.finfo(dtype).eps


def _list_array(values: pa.Array, lengths: Tensor) -> pa.Array:
    """Cut a flat array into lists of the given lengths, without building Python lists."""
    return pa.LargeListArray.from_arrays(pa.array(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).numpy()), values)
