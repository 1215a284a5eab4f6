"""What the online trainers share: an actor and critic on TRL's generation, everything around the policy loss."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model, send_to_device
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOTrainer

from .._arguments import resolve_args
from .._cache import write_tensors, written_beside
from .._reference import copy_adapter_as_reference, copy_as_reference, starts_as_identity
from .._resume import SetEpochCallback, WholeCheckpointsMixin
from .._trl import (
    add_fused_lm_head,
    disable_gradient_checkpointing,
    is_async_callable,
)
from ..advantages import explained_variance, gae, masked_whiten, sequence_advantages, token_rewards
from ..engines import check_engine, prepare_reference
from ..losses import value_loss
from ..rewards.calling import RewardFunc, call, call_async
from ..value import StateValueHead, add_value_head
from .base_config import _ActorCriticConfig
from .checks import check_datasets, check_reward_funcs, check_weighted_rewards, checked_tokens


logger = get_logger(__name__)

ROLLOUTS_FORMAT = 2  # 1 had no `value_mask`
VALUE_HEAD_FILE = "value_head.safetensors"


class _WithValues:
    """A model as TRL's log-probability pass calls it, that keeps the values of the completion's states on the way."""

    def __init__(self, model: nn.Module, completion_len: int) -> None:
        self.model = model
        self.completion_len = completion_len
        self.values: list[Tensor] = []

    def __call__(self, **kwargs: Any) -> Any:
        outputs = self.model(**kwargs, return_values=True)
        # Token t is chosen in the state after token t − 1
        self.values.append(outputs.state_values[:, -self.completion_len - 1 : -1])
        return outputs


class _ActorCriticTrainer(WholeCheckpointsMixin, GRPOTrainer):
    """
    Base of the trainers that generate while they train. A subclass names its config and paper and writes
    [`_policy_loss`].

    It is a [`~trl.GRPOTrainer`] with advantages and a loss of its own: generation (transformers or vLLM), rewards,
    models, adapters, distribution, checkpoints and model card are TRL's. The critic is a head on the policy's trunk:
    one forward gives log-probabilities and values.
    """

    _config_class: type[_ActorCriticConfig]
    _kl_in_reward: bool

    def __init__(
        self,
        model: "str | PreTrainedModel | Any",
        reward_funcs: RewardFunc | PreTrainedModel | str | list | None = None,
        args: _ActorCriticConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: Any | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any | None = None,
        peft_config: Any | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Any | None = None,
    ) -> None:
        args = resolve_args(args, self._config_class, model, type(self))
        given = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
        if unsupported := [name for name, value in given.items() if value]:
            raise ValueError(
                f"{type(self).__name__} does not support `{unsupported[0]}`: tokens that others put into a completion "
                "would be trained on as if the policy had chosen them. Use GRPOTrainer, or leave it out."
            )
        check_datasets(train_dataset, eval_dataset, args)
        if isinstance(train_dataset, Dataset | IterableDataset):
            self._read_columns(train_dataset, args)
        check_reward_funcs(reward_funcs, args)
        if isinstance(model, nn.Module):
            base_model = model.get_base_model() if is_peft_model(model) else model
            if isinstance(getattr(base_model, "value_head", None), StateValueHead):
                del base_model.value_head  # of a trainer that had the model before

        # GRPOTrainer would load the reference from `config._name_or_path`: for a model in memory, copy that
        beta, reference = args.beta, None
        is_own = beta != 0.0 and isinstance(model, nn.Module) and peft_config is None
        if is_own:
            args.beta = 0.0
            if not is_peft_model(model):
                reference = copy_as_reference(model, "train a LoRA")
        try:
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        finally:
            args.beta = beta
        self.beta = beta
        check_engine(self)
        if reference is not None:
            add_fused_lm_head(reference, temperature=args.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
            self.ref_model = prepare_reference(reference, self.accelerator)
        elif is_own or (beta != 0.0 and not starts_as_identity(peft_config)):
            copy_adapter_as_reference(self.model)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "Nothing of the policy is trained: all its parameters are frozen. Load a saved adapter with "
                "`PeftModel.from_pretrained(..., is_trainable=True)`, or pass a `peft_config`."
            )
        # Errors name the function, and infinities do not get as far as the loss
        self.reward_funcs = [
            func if isinstance(func, nn.Module) else partial(call_async if is_async_callable(func) else call, func)
            for func in self.reward_funcs
        ]
        self.value_head: StateValueHead | None = None
        if args.advantage_estimator == "gae":
            self.value_head = add_value_head(self._base_model)
        self._passes: list[Tensor] = []  # values of the latest forwards

    def _read_columns(self, dataset: Dataset | IterableDataset, args: Any) -> None:
        """Check what a subclass takes from the train dataset beside `prompt`, before models are loaded."""

    @property
    def _base_model(self) -> PreTrainedModel:
        """The policy without its PEFT wrapper."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    # ---- Rollouts ----

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        # TRL's order depends on how often the sampler was iterated, which a resumed run has done less often
        sampler = super()._get_train_sampler(dataset)
        if self.shuffle_dataset:
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(hash((self.args.seed, epoch)))
            self.remove_callback(SetEpochCallback)
            self.add_callback(SetEpochCallback(sampler))
        return sampler

    @contextmanager
    def _without_value_head(self) -> Iterator[None]:
        """Hide the value head from what walks over the policy's modules and knows no head."""
        if self.value_head is not None:
            del self._base_model.value_head
        try:
            yield
        finally:
            if self.value_head is not None:
                self._base_model.value_head = self.value_head

    def _tokenize_prompts(self, prompts: list) -> Any:
        return checked_tokens(super()._tokenize_prompts, prompts)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_value_head():  # vLLM gets all weights of the policy, and has no place for the head's
            return super()._generate_single_turn(*args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.value_head is None or model is self.ref_model:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        recorder = _WithValues(model, logits_to_keep)
        outputs = super()._get_per_token_logps_and_entropies(
            recorder, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        self._passes.append(torch.cat(recorder.values))
        return outputs

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        # Kept, since what comes out of GRPO's scoring are advantages
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        for func, name, rewards in zip(
            self.reward_funcs, self.reward_func_names, self._rewards_per_func.T, strict=True
        ):
            # Functions are checked when they are called. To TRL a model's NaN is an unscored completion
            if isinstance(func, nn.Module) and not rewards.isfinite().all():
                raise ValueError(f"The reward model '{name}' returned {rewards[~rewards.isfinite()][0].item()}.")
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._passes.clear()
        is_train = self.model.training
        batch = super()._generate_and_score_completions(inputs)
        self.model.train(is_train)  # continuous batching leaves it in training mode
        args = self.args

        if "old_per_token_logps" not in batch:
            with torch.no_grad(), disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
                batch["old_per_token_logps"], *_ = self._get_per_token_logps_and_entropies(
                    self.model,
                    torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                    torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                    batch["completion_ids"].size(1),
                    batch_size=args.per_device_train_batch_size if is_train else args.per_device_eval_batch_size,
                )
            self._passes = self._passes[-1:]
        old_values = self._passes[0] if self._passes else None
        self._passes.clear()

        rewards = self._completion_rewards(batch)
        mask, value_mask = (m * ~rewards.isnan().unsqueeze(1) for m in self._masks(batch))
        log_ratio = None
        if "ref_per_token_logps" in batch:
            log_ratio = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]).masked_fill(value_mask == 0, 0.0)
            self._log_means({"kl/completion": ((log_ratio * mask).sum(dim=1), mask.any(dim=1))})
        num_generations = self.num_generations if is_train else self.num_generations_eval
        if old_values is None:
            batch["advantages"] = self._leave_one_out(rewards, log_ratio, num_generations).unsqueeze(1) * mask
        else:
            batch |= {"old_values": old_values, **self._gae(rewards, value_mask, log_ratio, old_values)}
        if args.whiten_advantages:
            batch["advantages"] = self._whiten(batch["advantages"], value_mask)
        self._correct_logs(batch["advantages"], mask, num_generations)
        masks = {"loss_mask": mask, "value_mask": value_mask}
        counts = torch.stack([mask.sum() for mask in masks.values()])
        num_items, num_value_items = self.accelerator.reduce(counts, reduction="sum")
        return batch | masks | {"num_items_in_batch": num_items, "num_value_items_in_batch": num_value_items}

    def _masks(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The tokens that the policy loss is over, and those that rewards, values and whitening are over."""
        return batch["completion_mask"], batch["completion_mask"]

    def _weighted_rewards(self) -> Tensor:
        """The rewards of all processes' completions, NaN for those that no function has scored."""
        weights = self.reward_weights.to(self._rewards_per_func)
        rewards = (self._rewards_per_func * weights).nansum(dim=1)
        check_weighted_rewards(rewards)
        return rewards.masked_fill(self._rewards_per_func.isnan().all(dim=1), torch.nan)

    def _completion_rewards(self, batch: dict[str, Any]) -> Tensor:
        """The rewards of this process's completions, less what a missing EOS costs."""
        rewards = self._own_rows(self._weighted_rewards(), len(batch["completion_ids"]))
        if self.args.missing_eos_penalty is not None:
            eos = torch.tensor(self.eos_token_ids, device=rewards.device)
            # Padding may be an EOS token, too
            has_eos = (torch.isin(batch["completion_ids"], eos) & batch["completion_mask"].bool()).any(dim=1)
            rewards = rewards - self.args.missing_eos_penalty * ~has_eos
        return rewards

    def _leave_one_out(self, rewards: Tensor, log_ratio: Tensor | None, num_generations: int) -> Tensor:
        """One advantage per completion, beside the others of its prompt, which may be on another process."""
        if self._kl_in_reward and log_ratio is not None:
            rewards = rewards - self.beta * log_ratio.sum(dim=1)
        everyone = self._gather_rows(rewards)
        groups = torch.arange(len(everyone), device=everyone.device) // num_generations
        advantages = sequence_advantages(everyone, group_ids=groups, baseline="leave_one_out")
        return self._own_rows(advantages, len(rewards))

    def _gae(self, rewards: Tensor, mask: Tensor, log_ratio: Tensor | None, values: Tensor) -> dict[str, Tensor]:
        """Advantages and returns of each token."""
        args = self.args
        per_token = token_rewards(rewards, mask, log_ratio, beta=self.beta if self._kl_in_reward else 0.0)
        if args.whiten_rewards:
            per_token = self._whiten(per_token, mask, shift_mean=False)
        advantages, returns = gae(per_token, values, mask, gamma=args.gamma, lam=args.lam)
        everyone = (self._gather_rows(x) for x in (values, returns, mask))
        self._log("explained_variance", explained_variance(*everyone))
        return {"advantages": advantages, "returns": returns}

    def _correct_logs(self, advantages: Tensor, mask: Tensor, num_generations: int) -> None:
        """Where GRPO has logged what is true of its own advantages. The log of completions gets means over tokens."""
        means = self._gather_rows((advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).tolist()
        logged = self._logs["advantages"]
        for i in range(1, min(len(logged), len(means)) + 1):
            logged[-i] = means[-i]
        if num_generations == 1:  # groups of one have no spread
            self._metrics["train" if self.model.training else "eval"].pop("frac_reward_zero_std")

    def _gather_rows(self, x: Tensor) -> Tensor:
        """The rows of all processes, padded to one length."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1))

    def _own_rows(self, everyone: Tensor, count: int) -> Tensor:
        """This process's `count` rows out of those of all."""
        first = self.accelerator.process_index * count
        return everyone[first : first + count]

    def _whiten(self, x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        """Whiten by the statistics of all processes, and return the rows of this one."""
        whitened = masked_whiten(self._gather_rows(x), self._gather_rows(mask), shift_mean=shift_mean)
        return self._own_rows(whitened, len(x))[:, : x.size(1)]

    # ---- Loss ----

    @abstractmethod
    def _policy_loss(self, logps: Tensor, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
        """
        The loss of each token.

        Args:
            logps (`torch.Tensor`):
                Per-token log-probabilities of the policy, of shape `(batch, completion_len)`.
            inputs (`dict[str, torch.Tensor]`):
                The batch. `advantages`, `old_per_token_logps` and, when `args.beta` is not 0, `ref_per_token_logps`
                have the shape of `logps`.
            mask (`torch.Tensor`):
                1 for the tokens of scored completions and 0 elsewhere, same shape.

        Returns:
            `torch.Tensor`: The losses, of the shape of `logps`, 0 where `mask` is.
        """

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["loss_mask"]
        logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            mask.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
        )
        policy_losses = self._policy_loss(logps, inputs, mask).masked_fill(mask == 0, 0.0)
        if "importance_sampling_ratio" in inputs:  # of the policy to vLLM's version of it
            policy_losses = policy_losses * inputs["importance_sampling_ratio"]
        metrics = {"policy_loss": (policy_losses, mask), "entropy": (entropies, mask)}
        if "ref_per_token_logps" in inputs:
            log_ratio = inputs["ref_per_token_logps"] - logps.detach()
            metrics["kl"] = (log_ratio.exp() - log_ratio - 1, mask)  # as GRPO estimates it

        # As GRPO's default does: over all completion tokens of the optimizer step. `num_items_in_batch` spans the
        # generation batch, and DDP averages over processes
        num_accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
        num_steps = self.args.steps_per_generation if self.model.training else 1
        scale = self.accelerator.num_processes * num_steps / num_accumulated
        losses = policy_losses - self.entropy_coef * entropies * mask
        loss = scale * losses.sum() / inputs["num_items_in_batch"].clamp(min=1)
        if self.value_head is not None:
            value_mask = inputs["value_mask"]
            value_losses = value_loss(
                self._passes.pop(),
                inputs["old_values"],
                inputs["returns"],
                value_mask,
                epsilon=self.args.value_epsilon,
            )
            num_value_items = inputs["num_value_items_in_batch"].clamp(min=1)
            loss = loss + self.args.vf_coef * scale * value_losses.sum() / num_value_items
            metrics["value_loss"] = (value_losses, value_mask)
        self._log_means(metrics)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / num_accumulated
            self._log("aux_loss", self.accelerator.gather(aux_loss).mean())
        return loss

    def _log(self, name: str, value: Tensor) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value.item())

    def _log_means(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Log means of values over the positions of their masks, across processes."""
        local = [
            (x.detach().masked_fill(~mask.bool(), 0.0).sum(dtype=torch.float32), mask.sum().float())
            for x, mask in metrics.values()
        ]
        sums = self.accelerator.reduce(torch.stack([torch.stack(pair) for pair in local]), reduction="sum")
        for name, (total, count) in zip(metrics, sums, strict=True):
            self._log(name, total / count)  # NaN, which TRL leaves out, where nothing is scored

    # ---- Optimizer and checkpoints ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.value_head is None:
            return optimizer
        head = set(self.value_head.parameters())
        learning_rate = self.args.value_learning_rate
        if learning_rate is not None and not is_given:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p not in head]
        # An optimizer that a user has made knows no value head
        if not any(p in head for group in optimizer.param_groups for p in group["params"]):
            if self.lr_scheduler is not None:
                raise ValueError(
                    "The value head has to be added to the optimizer that you pass, and the scheduler that you pass "
                    "with it has been made without it. Pass `optimizers=(optimizer, None)` and set "
                    "`lr_scheduler_type`."
                )
            learning_rate = self.args.learning_rate if learning_rate is None else learning_rate
            group = {"params": list(self.value_head.parameters()), "lr": learning_rate}
            optimizer.add_param_group(group | {"weight_decay": self.args.weight_decay})
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        head = None if self.value_head is None else self.value_head.state_dict()
        if head and state_dict is not None:  # gathered from the shards; saving the model takes them out
            head = {n.rpartition("value_head.")[2]: t for n, t in state_dict.items() if "value_head." in n}
        super()._save(output_dir, state_dict)
        if head and self.args.should_save:
            write_tensors(head, Path(output_dir or self.args.output_dir) / VALUE_HEAD_FILE)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._step, self._buffered_inputs = 0, None  # of an earlier call
        return super().train(*args, **kwargs)

    @property
    def _rollouts_key(self) -> list[Any]:
        """What a run must have in common with another one to go on with its rollouts."""
        args = self.args
        return [
            ROLLOUTS_FORMAT,
            self.accelerator.num_processes,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.steps_per_generation,
            args.num_iterations,
            args.beta != 0.0,
            args.advantage_estimator,
        ]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        path = Path(output_dir, f"rollouts_{self.accelerator.process_index}.pt")
        path.unlink(missing_ok=True)  # of an earlier run in the same folder
        if self._step % (self.args.steps_per_generation * self.num_iterations) != 0:
            # Otherwise a resumed run would generate anew, and be another one
            with written_beside(path) as beside:
                torch.save({"key": self._rollouts_key, "step": self._step, "batches": self._buffered_inputs}, beside)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # which brings the value head along
            return
        # The value head has a file of its own
        with self._without_value_head():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_value_head(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_rollouts(checkpoint)

    def _load_rollouts(self, checkpoint: str) -> None:
        path = Path(checkpoint, f"rollouts_{self.accelerator.process_index}.pt")
        rollouts = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        # Generating takes all processes, so that none may go on with what it has while another one has nothing
        if all(gather_object([rollouts.get("key") == self._rollouts_key])):
            self._step = rollouts["step"]
            self._buffered_inputs = send_to_device(rollouts["batches"], self.accelerator.device)
        elif rollouts:
            logger.warning("The checkpoint's rollouts are of a run with other batches: they are made anew.")

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # which keep the head with the policy
            super()._load_best_model()
            return
        with self._without_value_head():
            super()._load_best_model()
        self._load_value_head(self.state.best_model_checkpoint)

    def _load_value_head(self, folder: str) -> None:
        if self.value_head is None:
            return
        path = Path(folder, VALUE_HEAD_FILE)
        if path.exists():
            self.value_head.load_state_dict(load_file(path))
        else:
            logger.warning(f"There is no {VALUE_HEAD_FILE} in {folder}: the value head keeps its weights.")
