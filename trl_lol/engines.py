"""What FSDP and DeepSpeed ask for, which leave a model on the host or in shards where others have it at hand."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import deepspeed as deepspeed_integration

from ._trl import prepare_deepspeed, prepare_fsdp


def uses_fsdp(args: TrainingArguments) -> bool:
    """Whether the run is to be sharded by FSDP, before there is a trainer to ask."""
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def check_engine(trainer: Trainer) -> None:
    """
    Check that a new trainer's engine leaves whole weights on every rank until training begins, which reference and
    values are made from.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.

    Raises:
        `ValueError`: If it does not.
    """
    if not trainer.is_fsdp_enabled:
        return
    if trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP 1 hides the weights of the policy's layers, which values and log-probabilities are read from. Set "
            "`fsdp_version: 2`, as in recipes/accelerate/fsdp2.yaml, or use DeepSpeed."
        )
    if any(gather_object([any(parameter.is_meta for parameter in trainer.model.parameters())])):
        raise ValueError(
            "Only one process has loaded the policy's weights, and the reference and the values need them on all. Set "
            "`fsdp_cpu_ram_efficient_loading: false`, as in recipes/accelerate/fsdp2.yaml."
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether no process has all weights of a model (FSDP2, ZeRO-3)."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """
    All weights of a sharded model, one tensor after the other. Every rank must call it, and rank 0 gets them.

    Args:
        model (`torch.nn.Module`):
            The model.

    Returns:
        `dict[str, torch.Tensor]`: The weights by name, on the host. Empty on the other ranks.
    """
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with _gathered(tensor):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if PartialState().is_main_process:
                weights[name] = whole.detach().cpu().clone()
    return weights


@contextmanager
def loading_whole() -> Iterator[None]:
    """
    Load models as a whole that are called as they are, also under ZeRO-3. Transformers would load them in shards,
    which only a DeepSpeed engine can gather.
    """
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and reference() is not None:
            deepspeed_integration.set_hf_deepspeed_config(reference())


@contextmanager
def _gathered(tensor: Tensor) -> Iterator[None]:
    if hasattr(tensor, "ds_id"):
        import deepspeed  # only those who use it have it

        with deepspeed.zero.GatheredParameters([tensor]):
            yield
    else:
        yield


def prepare_reference(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """
    Place or shard a frozen model, as TRL's trainers do with their own reference.

    Args:
        model (`torch.nn.Module`):
            The model, whole and on the host.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.

    Returns:
        `torch.nn.Module`: What is to be called in its place.
    """
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(model, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


@contextmanager
def placed_policy(trainer: Trainer) -> Iterator[None]:
    """
    The policy where it can be called, also before training begins, when FSDP and DeepSpeed place it.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            The trainer, whose policy is then on its device.
    """
    model = trainer.model
    if trainer.is_deepspeed_enabled and trainer.model_wrapped is model and trainer._precompute_engine is None:
        trainer._precompute_engine = prepare_deepspeed(model, trainer.accelerator)  # as DPOTrainer does
    is_on_host = trainer.is_fsdp_enabled and not is_sharded(model) and model.device != trainer.accelerator.device
    if is_on_host:
        model.to(trainer.accelerator.device)
    try:
        yield
    finally:
        if is_on_host:
            model.to("cpu")


def backbone(model: PreTrainedModel) -> Callable[..., Any]:
    """
    The model without its head, to be called. One that FSDP has sharded gathers its weights when it is entered from the
    top, which is done here.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.

    Returns:
        `Callable`: Takes the arguments of `model.base_model`.
    """
    if not isinstance(model, FSDPModule):
        return model.base_model
    model._call_backbone = types.MethodType(lambda self, **kwargs: self.base_model(**kwargs), model)
    register_fsdp_forward_method(model, "_call_backbone")
    return model._call_backbone
