"""
Completions of one prompt in one sequence, so that the prompt is computed once and not once for each of them:

    [prompt without its last token] [last prompt token, completion 1] [last prompt token, completion 2] ...

What follows the prompt are *branches*. Positions count on from the prompt in each of them, and a branch attends to the
prompt and to itself alone. The last prompt token is in every branch because it predicts the first completion token: so
a token stands one place before the one it predicts, as everywhere else. Nothing is approximated.
"""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.utils import is_torch_flex_attn_available


ATTENTION = ("sdpa", "eager", "flex_attention")
# A window or chunk that no sequence fills is none. Others, recurrent layers for one, carry from branch to branch
ATTENTION_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention", "global", "local"}
LAYER_TYPES = ("layer_types", "layers_block_type", "block_types")
# Taking tokens apart into branches and together again has its price, which a very small model does not earn back
WORTH_SHARING = 0.85


def share_prompts(
    prompts: Sequence[list[int]], completions: Sequence[list[list[int]]], max_length: int | None = None
) -> dict[str, list[Tensor]]:
    """
    Write groups as one sequence each.

    Args:
        prompts (`Sequence[list[int]]`):
            Tokens of the prompt of each group.
        completions (`Sequence[list[list[int]]]`):
            Tokens of the completions of each group.
        max_length (`int`, *optional*):
            Most tokens of prompt and completion; what is beyond is cut off.

    Returns:
        `dict[str, list[torch.Tensor]]`: For each group `input_ids`, `position_ids`, `completion_mask` (1 for what is
        predicted within a branch) and `branch_ids` (0 for the prompt, then 1, 2, ...), each of shape `(seq_len,)`; and
        for each completion `branch_index`, the places of its branch in the sequence.
    """
    names = ("input_ids", "position_ids", "completion_mask", "branch_ids", "branch_index")
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    for prompt_ids, group in zip(prompts, completions, strict=True):
        trunk, head = prompt_ids[:-1], prompt_ids[-1:]  # a prompt without tokens has no head
        trunk = trunk[:max_length]
        room = None if max_length is None else max_length - len(trunk)
        branches = [(head + completion_ids)[:room] for completion_ids in group]
        lengths = [len(trunk), *map(len, branches)]
        places = [torch.arange(length) for length in lengths]  # within the prompt, and within each branch
        row = {
            "input_ids": torch.tensor(sum(branches, trunk)),
            "position_ids": torch.cat([places[0], *(len(trunk) + place for place in places[1:])]),
            "completion_mask": torch.cat([torch.zeros_like(places[0]), *(place.clamp(max=1) for place in places[1:])]),
            "branch_ids": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        }
        for name, tensor in row.items():
            columns[name].append(tensor)
        columns["branch_index"] += torch.arange(sum(lengths)).split(lengths)[1:]
    return columns


def is_worth_sharing(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[int]],
    pairs_per_token: float = math.inf,
    is_dense: bool = False,
) -> bool:
    """
    Whether a batch gets cheaper when its prompts are shared, padding and what attention costs included.

    Args:
        prompt_lengths (`Sequence[int]`):
            Tokens of the prompt of each group.
        completion_lengths (`Sequence[Sequence[int]]`):
            Tokens of the completions of each group.
        pairs_per_token (`float`, *optional*, defaults to `inf`):
            Pairs of tokens that attention takes as much time for as the rest of the model does for a token.
        is_dense (`bool`, *optional*, defaults to `False`):
            Whether attention computes every pair of tokens of a row, also the masked ones.

    Returns:
        `bool`: Whether at most 85 % of the work is left.
    """
    groups = list(zip(prompt_lengths, completion_lengths, strict=True))
    rows, num_completions = len(groups), sum(len(cs) for _, cs in groups)
    length = max(max(prompt - 1, 0) + sum(min(prompt, 1) + c for c in cs) for prompt, cs in groups)
    repeated_length = max(prompt + max(cs) for prompt, cs in groups)
    prompt, branch = max(prompt_lengths), 1 + max(max(cs) for cs in completion_lengths)
    if is_dense:
        pairs, repeated_pairs = rows * length**2, num_completions * repeated_length**2
    else:  # half of the pairs of a causal sequence. A branch, which has a mask, computes all of its own
        pairs = rows * prompt**2 / 2 + num_completions * branch * (prompt + branch)
        repeated_pairs = num_completions * repeated_length**2 / 2
    work = rows * length + pairs / pairs_per_token
    return work <= WORTH_SHARING * (num_completions * repeated_length + repeated_pairs / pairs_per_token)


# ---- Between the layouts ----


def completion_tokens(inputs: dict[str, Tensor]) -> Tensor:
    """
    Which entries of [`per_completion`] belong to completion tokens.

    Args:
        inputs (`dict[str, torch.Tensor]`):
            The batch of [`~trl_lol.data.DataCollatorForGroups`], in either layout.

    Returns:
        `torch.Tensor`: 1 for completion tokens and 0 elsewhere, of shape `(num_completions, num_tokens)`.
    """
    if "branch_index" in inputs:
        return (inputs["branch_index"][:, 1:] >= 0).to(inputs["completion_mask"])
    return inputs["completion_mask"][:, 1:]


def per_completion(x: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """
    Next-token values of a batch with a row for each completion, whichever layout the model has read.

    Args:
        x (`torch.Tensor`):
            A value for each token but the first of a row, of shape `(num_rows, seq_len - 1)`.
        inputs (`dict[str, torch.Tensor]`):
            The batch of [`~trl_lol.data.DataCollatorForGroups`], in either layout.

    Returns:
        `torch.Tensor`: The same values, of shape `(num_completions, num_tokens)`, as in [`completion_tokens`].
    """
    if "branch_index" not in inputs:
        return x
    places = inputs["branch_index"][:, 1:]
    values = x[inputs["group_ids"].unsqueeze(1), (places - 1).clamp(min=0)]
    return values.masked_fill(places < 0, 0)


# ---- Attention ----


def attention_kwargs(inputs: dict[str, Tensor], model: PreTrainedModel, is_compiled: bool = False) -> dict[str, Any]:
    """
    What the forward pass of a model needs to see a batch as it is meant.

    Args:
        inputs (`dict[str, torch.Tensor]`):
            The batch of [`~trl_lol.data.DataCollatorForGroups`], in either layout.
        model ([`~transformers.PreTrainedModel`]):
            The model, whose attention implementation says what a mask has to be.
        is_compiled (`bool`, *optional*, defaults to `False`):
            Whether the model runs under `torch.compile`.

    Returns:
        `dict[str, Any]`: `attention_mask` and, where prompts are shared, `position_ids`.
    """
    if "branch_index" not in inputs:
        return {"attention_mask": inputs["attention_mask"]}
    branch_ids = inputs["branch_ids"]
    attention = model.config.get_text_config()._attn_implementation
    if attention == "flex_attention":
        mask = _block_mask(branch_ids)
    elif attention == "sdpa" and not is_compiled:
        mask = BranchMask.of(_Branches(branch_ids, inputs["branch_index"], inputs["group_ids"]))
    else:
        mask = dense_mask(branch_ids)
        if attention == "eager":  # adds the mask to the scores
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    return {"attention_mask": mask, "position_ids": inputs["position_ids"]}


def dense_mask(branch_ids: Tensor) -> Tensor:
    """
    The attention mask of the layout, written out.

    Args:
        branch_ids (`torch.Tensor`):
            Branch of each token, 0 for the prompt and -1 for padding, of shape `(num_rows, seq_len)`.

    Returns:
        `torch.Tensor`: True where a token (third dimension) attends to another (fourth), of shape
        `(num_rows, 1, seq_len, seq_len)`.
    """
    query, key = branch_ids.unsqueeze(2), branch_ids.unsqueeze(1)
    return ((key == query) | (key == 0)).tril().unsqueeze(1)


def _block_mask(branch_ids: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask  # imports torch's compiler

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        branch = branch_ids[row, key]
        return (key <= query) & ((branch == 0) | (branch == branch_ids[row, query]))

    rows, length = branch_ids.shape
    return create_block_mask(attends, rows, None, length, length, device=branch_ids.device)


@dataclass
class _Branches:
    """
    Attention in two parts: the prompts attend to themselves, causally; and each branch, now a row of its own, attends
    to its prompt and to itself. Together they compute few pairs of tokens that do not attend to each other, where a
    dense mask has a branch compute its scores for all other branches.
    """

    branch_ids: Tensor
    branch_index: Tensor
    row_ids: Tensor  # of the branches

    @cached_property
    def dense(self) -> Tensor:
        return dense_mask(self.branch_ids)

    def __post_init__(self) -> None:
        (rows, length), device = self.branch_ids.shape, self.branch_ids.device
        self.num_branches, self.width = self.branch_index.shape
        lengths = (self.branch_ids == 0).sum(1, keepdim=True)  # of the prompts
        self.prompt_width = int(lengths.max())
        steps = torch.arange(max(self.prompt_width, self.width), device=device)
        start = length * torch.arange(rows, device=device).unsqueeze(1)  # of a row, where rows follow each other

        # Places that tokens are taken from. A prompt is filled up with what follows it and a branch with some token of
        # its row, which nothing attends to and whose outputs nothing reads
        prompts = start + steps[: self.prompt_width]
        branches = start[self.row_ids] + self.branch_index.clamp(min=0)
        self.queries = torch.cat([prompts.view(-1), branches.view(-1)])
        self.keys = torch.cat([prompts.view(-1), torch.cat([prompts[self.row_ids], branches], dim=1).view(-1)])

        in_prompt = steps[: self.prompt_width] < lengths
        in_branch = (steps[: self.width] <= steps[: self.width].unsqueeze(1)).expand(self.num_branches, -1, -1)
        of_branch = in_prompt[self.row_ids].unsqueeze(1).expand(-1, self.width, -1)
        self.visible = torch.cat([of_branch, in_branch], dim=2).unsqueeze(1)

        # And which of the outputs is a token's own. Padding has none, and gets the first
        is_own = torch.cat([in_prompt.view(-1), self.branch_index.view(-1) >= 0])
        self.outputs = torch.zeros(rows * length, dtype=torch.long, device=device)
        self.outputs[self.queries[is_own]] = is_own.nonzero().squeeze(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **kwargs: Any) -> Tensor:
        """Takes what `scaled_dot_product_attention` takes, and returns what it does with the dense mask."""
        rows, _, length, _ = query.shape
        num_prompt_tokens = rows * self.prompt_width

        def take(x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
            taken = x.transpose(1, 2).reshape(rows * length, -1)[places].unflatten(1, (x.size(1), -1))
            prompts, branches = taken.tensor_split([num_prompt_tokens])
            return (
                prompts.unflatten(0, (rows, self.prompt_width)).transpose(1, 2),
                branches.unflatten(0, (self.num_branches, -1)).transpose(1, 2),
            )

        queries, keys, values = take(query, self.queries), take(key, self.keys), take(value, self.keys)
        parts = [
            scaled_dot_product_attention(queries[0], keys[0], values[0], is_causal=True, **kwargs),
            scaled_dot_product_attention(queries[1], keys[1], values[1], attn_mask=self.visible, **kwargs),
        ]
        outputs = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])[self.outputs]
        return outputs.unflatten(0, (rows, length)).transpose(1, 2)


class BranchMask(Tensor):
    """
    The mask of [`dense_mask`], which `scaled_dot_product_attention` does not need: where it meets this one, it
    computes attention in two parts. To everything else it is the dense mask, which is only then written out.

    A mask is what every model hands to its attention as it got it, through gradient checkpointing, adapters and
    engines, so neither the model nor its config have to be changed.
    """

    branches: _Branches

    @classmethod
    def of(cls, branches: _Branches) -> "BranchMask":
        """The mask of a batch."""
        rows, length = branches.branch_ids.shape
        placeholder = torch.zeros((), dtype=torch.bool, device=branches.branch_ids.device)
        mask = placeholder.expand(rows, 1, length, length).as_subclass(cls)
        mask.branches = branches
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            return super().__torch_function__(func, types, args, kwargs)
        if func is scaled_dot_product_attention and (output := _attend_to_all(*args, **kwargs)) is not None:
            return output
        args, kwargs = tree_map(lambda x: x.branches.dense if isinstance(x, cls) else x, (args, kwargs))
        return func(*args, **kwargs)


# What the placeholder says as the dense mask would
_FACTS = {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_cuda")}
_FACTS |= {getattr(Tensor, name).__get__ for name in ("layout", "is_meta", "is_sparse", "is_quantized")}
_FACTS |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, torch.is_floating_point}


def _attend_to_all(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: BranchMask, dropout_p: float = 0.0, **kwargs: Any
) -> Tensor | None:
    """`scaled_dot_product_attention`, unless it is of other vectors than those of all tokens, with a cache for one."""
    rows, _, length, _ = attn_mask.shape
    if query.dim() == 4 and (query.shape[0], query.shape[2], key.shape[2]) == (rows, length, length):
        return attn_mask.branches.attend(query, key, value, dropout_p=dropout_p, **kwargs)
    return None


# ---- What can be shared ----


def check_architecture(model: nn.Module, longest: int) -> None:
    """
    Check that a model reads a branch as it reads the sequence.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        longest (`int`):
            Tokens of the longest sequence of prompt and completion.

    Raises:
        `ValueError`: If it is known not to.
    """
    otherwise = "Set `shared_prompts=False`"
    if is_peft_model(model):
        for name, config in model.peft_config.items():
            by_place = getattr(config, "alora_invocation_tokens", None)
            if config.is_prompt_learning or by_place or "ADAPTION_PROMPT" in str(config.peft_type):
                raise ValueError(
                    f"The adapter {name!r} ({type(config).__name__}) adds virtual tokens, or acts from some token of "
                    "the row on, and with `shared_prompts=True` a row holds several completions. "
                    f"{otherwise}, or train a LoRA."
                )
        model = model.get_base_model()
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if attention not in ATTENTION or (attention == "flex_attention" and not is_torch_flex_attn_available()):
        raise ValueError(
            f"With `shared_prompts=True` a completion attends to its prompt and itself, not to the others, and "
            f"`attn_implementation={attention!r}` has no such mask. {otherwise}, or use one of {', '.join(ATTENTION)} "
            '(`model_init_kwargs={"attn_implementation": "sdpa"}`).'
        )
    name = type(model).__name__
    layers = {str(kind) for column in LAYER_TYPES for kind in getattr(config, column, None) or []}
    if odd := sorted(layers - ATTENTION_LAYERS):
        raise ValueError(
            f"{name} has layers of type {', '.join(odd)}, which carry from one completion to the next when they "
            f"are in one row, as with `shared_prompts=True`. {otherwise} for this model."
        )
    if "position_ids" not in inspect.signature(type(model).forward).parameters or getattr(config, "alibi", False):
        raise ValueError(
            f"{name} does not go by `position_ids`: it counts positions by itself, or carries a state from token to "
            "token. With `shared_prompts=True` a row holds several completions, and each starts again after the "
            f"prompt. {otherwise} for this model."
        )
    if layers and layers <= {"attention", "full_attention"}:
        return
    for field, size in config.to_dict().items():
        is_window = re.search(r"window(_size)?$|attention_chunk_size$", field) and type(size) is int
        if is_window and getattr(config, "use_sliding_window", True) is not False and size < longest:
            raise ValueError(
                f"{name} attends to the last `{field}={size}` tokens, and the longest prompt with a completion has "
                f"{longest}: with `shared_prompts=True` such windows are not applied. {otherwise}, or a `max_length` "
                f"of at most {size}."
            )


def check_log_probs(
    log_probs: Callable[[dict[str, Tensor], dict[str, Any]], Tensor],
    repeated: dict[str, Tensor],
    shared: dict[str, Tensor],
    eps: float,
) -> None:
    """
    Check by trying that a model gives the log-probabilities that it gives when each completion has its own prompt,
    whatever [`check_architecture`] does not know of.

    Args:
        log_probs (`Callable`):
            Log-probabilities by [`per_completion`] of a batch, given what else than [`attention_kwargs`] the
            model is to get.
        repeated (`dict[str, torch.Tensor]`):
            A group as a batch with a sequence for each completion.
        shared (`dict[str, torch.Tensor]`):
            The same group as a batch with a shared prompt.
        eps (`float`):
            Relative precision that the model computes in, as in `torch.finfo`. Beyond single precision, rounding alone
            makes a difference that is to be seen, a few times this. Then the difference must be below 16 times this,
            or well below that made by layouts that are wrong: positions that count on, branches that see each other.

    Raises:
        `ValueError`: If they differ.
    """
    mask = completion_tokens(shared).bool()
    expected = log_probs(repeated, {})[completion_tokens(repeated).bool()]

    def distance(replaced: dict[str, Any]) -> Tensor:
        return (log_probs(shared, replaced)[mask] - expected).abs()

    found = distance({})
    if eps <= torch.finfo(torch.float32).eps:
        difference, allowed = found.max().item(), 1e-4
    else:
        counted_on = torch.arange(shared["input_ids"].size(1), device=mask.device).unsqueeze(0)
        wrong = ({"position_ids": counted_on}, {"attention_mask": shared["attention_mask"]})
        difference = found.mean().item()
        allowed = max(16 * eps, min(distance(w).mean().item() for w in wrong) / 4)
    if not difference <= allowed:  # also if it is not a number
        raise ValueError(
            "With `shared_prompts=True` the model gives other log-probabilities than with a prompt for each one: on "
            f"the longest group they differ by {difference:.2g} nats per token, and up to {allowed:.2g} could be "
            "rounding. Something in it goes by the place of a token in the row. Set `shared_prompts=False` for this "
            "model."
        )
