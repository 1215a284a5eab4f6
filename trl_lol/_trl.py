"""
Everything that is borrowed from TRL beyond its public names (`trl.__all__`), in one place.

A new TRL release can break this file and no other; `tests/test_trl_seams.py` pins what is relied on below.
"""

from trl.data_utils import (
    _tokenize as tokenize,  # one message list or string -> {"input_ids": flat list}, through the chat template
)
from trl.data_utils import (
    common_prefix_length,  # where the tokens of prompt and prompt+completion part
    get_dataset_column_names,  # also of a streamed dataset without known features
)
from trl.kernels import (
    chunked_logprob,  # the fused LM head's kernels, which benchmarks/memory_check.py stands in for
)
from trl.models.utils import (
    disable_gradient_checkpointing,  # for forwards without gradient
    prepare_deepspeed,  # an engine for a model that is not trained
    prepare_fsdp,  # shards a model that is not trained
    unwrap_model_for_generation,  # gathers ZeRO-3 shards, lifts gradient checkpointing
)
from trl.trainer.utils import (
    FusedCausalLMOutput,  # what a model with a fused LM head returns: the base of ours with values
    add_fused_lm_head,  # log-probabilities without logits, for a reference model of our own
    compute_flops_per_token,  # of forward and backward, for the MFU in benchmarks/speed.py
    compute_mfu,  # in percent
    get_callable_name,  # a reward function's name in logs and errors
    get_config_model_id,  # `_name_or_path` across config types
    get_peak_flops,  # of a GPU by its name, None if TRL does not know it
    global_then_local_main_first,  # dataset caches are written once, then read
    hash_module,  # content hash of the reference weights, keys the caches
    is_async_callable,  # coroutine functions, partials and callable classes
    pad,  # list of tensors -> padded tensor, `pad_to_multiple_of`
    start_event_loop_in_daemon,  # async reward functions, also below a running loop
    use_adapter,  # the reference policy inside a PEFT model
)


__all__ = [
    "FusedCausalLMOutput",
    "add_fused_lm_head",
    "chunked_logprob",
    "common_prefix_length",
    "compute_flops_per_token",
    "compute_mfu",
    "disable_gradient_checkpointing",
    "get_callable_name",
    "get_config_model_id",
    "get_dataset_column_names",
    "get_peak_flops",
    "global_then_local_main_first",
    "hash_module",
    "is_async_callable",
    "pad",
    "prepare_deepspeed",
    "prepare_fsdp",
    "start_event_loop_in_daemon",
    "tokenize",
    "unwrap_model_for_generation",
    "use_adapter",
]
