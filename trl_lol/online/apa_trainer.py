import textwrap
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._cache import write_tensors
from .._reference import copy_adapter_as_reference
from ..losses import apa_loss, awr_loss
from .apa_config import APAConfig
from .trainer import _ActorCriticTrainer


logger = get_logger(__name__)

REFERENCE_FILE = "reference.safetensors"


class APATrainer(_ActorCriticTrainer):
    """
    Trainer for Advantage-Induced Policy Alignment (APA), introduced in [Fine-Tuning Language Models with
    Advantage-Induced Policy Alignment](https://huggingface.co/papers/2306.02231): per token, ln π is regressed on
    ln π_init + A/λ. The squared error anchors the policy to the initial one: there is no KL penalty in the reward and
    no ratio to clip.

    Its constructor, datasets, reward functions and generation are those of [`~trl.GRPOTrainer`]. The critic is a head
    on the policy.

    Example:

    ```python
    from datasets import Dataset
    from trl_lol import APAConfig, APATrainer


    def reward_len(completions, **kwargs):
        return [-abs(20 - len(completion)) / 20 for completion in completions]


    trainer = APATrainer(
        "Qwen/Qwen3-0.6B",
        reward_funcs=reward_len,
        args=APAConfig("out", per_device_train_batch_size=2),
        train_dataset=Dataset.from_dict({"prompt": ["The sky is", "The sun is"]}),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as for [`~trl.GRPOTrainer`]. The reference of a model in memory is a copy of it.
        reward_funcs (`Callable`, [`~transformers.PreTrainedModel`], `str` or a list of these):
            Reward functions or sequence-classification reward models, as for [`~trl.GRPOTrainer`]. A completion for
            which all of them return `None` is left out of both losses.
        args ([`APAConfig`], *optional*):
            Configuration of the trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with a column `"prompt"`, of strings or of message lists. Other columns go to the reward functions.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Dataset used for evaluation, one only with `args.reset_ref_patience`.
        processing_class, reward_processing_classes, callbacks, optimizers, quantization_config, peft_config:
            As for [`~trl.GRPOTrainer`].
        tools, rollout_func, environment_factory:
            Not supported.
    """

    _config_class = APAConfig
    _kl_in_reward = False
    _name = "APA"
    _tag_names = ["trl", "trl-lol", "apa"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "Fine-Tuning Language Models with Advantage-Induced Policy Alignment",
        "id": "2306.02231",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhu2023finetuning,
                title        = {{Fine-Tuning Language Models with Advantage-Induced Policy Alignment}},
                author       = {Banghua Zhu and Hiteshi Sharma and Felipe Vieira Frujeri and Shi Dong and Chenguang Zhu and Michael I. Jordan and Jiantao Jiao},
                year         = 2023,
                eprint       = {arXiv:2306.02231},
            }"""),  # noqa: E501
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_reference_reset = False
        if (patience := self.args.reset_ref_patience) is not None:
            if isinstance(self.eval_dataset, dict):
                raise ValueError(
                    f"`reset_ref_patience` looks at the reward on one eval dataset, and there are "
                    f"{len(self.eval_dataset)}: {', '.join(self.eval_dataset)}. Pass one of them."
                )
            if self._dist.is_fsdp or self._dist.is_zero3:
                raise ValueError(
                    "`reset_ref_patience` copies the policy into the reference, and under FSDP and ZeRO-3 no process "
                    "has all of it. Use DDP or ZeRO-2, or leave it out."
                )
            self.add_callback(_ResetReference(self, patience))

    def _policy_loss(self, logps: Tensor, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
        advantages, beta = inputs["advantages"], self.args.beta
        if self.args.loss_type == "awr":
            return awr_loss(logps, mask, advantages, beta=beta)
        return apa_loss(logps, inputs["ref_per_token_logps"], mask, advantages, beta=beta)

    def reset_reference(self) -> None:
        """
        Make the current policy the reference. With LoRA, the trained adapter is copied into a frozen one, `"ref"`,
        that [`~trl.GRPOTrainer`] takes as the reference from then on; the base weights do not change.
        """
        policy = self.accelerator.unwrap_model(self.model)
        if is_peft_model(policy):
            with self._without_value_head():  # which would be frozen, or even get an adapter
                copy_adapter_as_reference(policy)
        else:
            reference = self.accelerator.unwrap_model(self.ref_model)
            with torch.no_grad():
                reference.load_state_dict(policy.state_dict(), strict=False)  # the policy also has a value head
        self._is_reference_reset = True

    # A reference that is a model of its own is in the checkpoints once it is another than at the start. A reference
    # adapter is there anyway.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if not self.args.should_save:
            return
        path = Path(output_dir, REFERENCE_FILE)
        path.unlink(missing_ok=True)  # of an earlier run in the same folder
        if self._is_reference_reset and self.ref_model is not None:
            weights = self.accelerator.unwrap_model(self.ref_model).state_dict()
            # Tied weights are one tensor under two names, which the format refuses
            write_tensors({name: tensor.cpu().clone() for name, tensor in weights.items()}, path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint or "", REFERENCE_FILE)
        if checkpoint is not None and path.exists():
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(load_file(path))
            self._is_reference_reset = True


class _ResetReference(TrainerCallback):
    """
    Reset the reference when the eval reward has stopped improving.

    It reads everything from the log, which a resumed run has, too.
    """

    def __init__(self, trainer: APATrainer, patience: int) -> None:
        self.trainer = trainer
        self.patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.trainer.is_in_train:  # `evaluate` by hand is no part of the run
            return
        rewards: list[float] = []  # since the last reset
        num_resets = 0
        for entry in state.log_history:
            if "ref_resets" in entry:
                num_resets, rewards = entry["ref_resets"], rewards[-1:]  # what the new reference was worth
            elif entry.get("eval_reward") is not None:
                rewards.append(entry["eval_reward"])
        if rewards and len(rewards) - 1 - rewards.index(max(rewards)) >= self.patience:
            self.trainer.reset_reference()
            logger.info(f"No better reward in {self.patience} evaluations: the policy is the reference now.")
            self.trainer.log({"ref_resets": num_resets + 1})
