"""The reference policy, as a copy of the initial one in memory: a model, or an adapter."""

import copy
from typing import Any

from accelerate.logging import get_logger
from peft import PeftModel
from transformers import PreTrainedModel

from .engines import is_sharded


logger = get_logger(__name__)


def copy_as_reference(model: PreTrainedModel, instead: str) -> PreTrainedModel:
    """
    Freeze a copy of the policy. TRL would load the reference from `config._name_or_path`, which is another model when
    the policy was changed in memory, and no model at all when it was built from a config.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy, before training.
        instead (`str`):
            What a user can do who has no room for a copy, for the messages.

    Returns:
        [`~transformers.PreTrainedModel`]: The copy, in evaluation mode and without gradients.

    Raises:
        `ValueError`: If the policy is sharded already (ZeRO-3), so that there is no whole to copy.
    """
    if is_sharded(model):
        raise ValueError(
            "The policy is sharded already (ZeRO-3), and cannot be copied in memory. Pass its name or path instead of "
            f"the model, so that the reference is loaded beside it. Or: {instead}."
        )
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    logger.warning(f"Keeping a copy of the policy as the reference, {size:.2f} GiB. To save the memory: {instead}.")
    return copy.deepcopy(model).requires_grad_(False).eval()


def copy_adapter_as_reference(model: PeftModel) -> None:
    """
    Freeze a copy of the active adapter under the name `"ref"`, which TRL's trainers take as the reference.

    TRL makes such a copy of an adapter that is trained further, but of most of its parameters only, and where the
    adapter's initialisation changes the base weights (PiSSA, OLoRA, CorDA) it changes them once more.

    Args:
        model ([`~peft.PeftModel`]):
            The policy. What is no adapter gets frozen, as PEFT does whenever an adapter is added.
    """
    active = model.active_adapters[0]
    if "ref" not in model.peft_config:
        config = copy.copy(model.peft_config[active])
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # whatever it is, it is copied over
        model.add_adapter("ref", config)
    for name, parameter in model.named_parameters():
        path = name.split(".")
        if "ref" in path:
            trained = model.get_parameter(".".join(active if part == "ref" else part for part in path))
            parameter.requires_grad_(False)
            parameter.data.copy_(trained.data)


def starts_as_identity(peft_config: Any | None) -> bool:
    """Whether a model with a new adapter is the same as without it, which can then be its reference."""
    return getattr(peft_config, "init_lora_weights", True) in (True, "gaussian", "eva")
