"""The reference policy, as a copy of the initial one in memory."""

import copy

from accelerate.logging import get_logger
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled


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
        `ValueError`: If the policy is sharded (ZeRO-3), so that there is no whole to copy.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(f"Under ZeRO-3 the policy is sharded and cannot be copied in memory. {instead}.")
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    logger.warning(f"Keeping a copy of the policy as the reference, {size:.2f} GiB. To save the memory: {instead}.")
    return copy.deepcopy(model).requires_grad_(False).eval()
