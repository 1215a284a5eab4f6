"""Completions of a policy and their log-probabilities, without a trace in the training that goes on around them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import tqdm
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ._trl import pad, tokenize
from .data import Messages


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout and gradients. Each module gets its own mode back: some may have been frozen by the user."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _batches(lengths: list[int], batch_size: int, desc: str) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, so that what does not fit fails at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in tqdm(range(0, len(order), batch_size), desc=desc):
        yield order[start : start + batch_size]


def generate_completions(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    **generation_kwargs: Any,
) -> tuple[list[str] | list[Messages], list[list[int]], list[list[int]]]:
    """
    Complete prompts, from the model's own distribution unless told otherwise.

    Neither the model nor the random state that training draws from is changed.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy, not wrapped for distributed training.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer or processor.
        prompts (`list[str]` or `list[list[dict]]`):
            Prompts, as text or as messages.
        max_new_tokens (`int`):
            Maximum length of a completion, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; `0.0` is greedy decoding.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of completions per batch.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        **generation_kwargs:
            Further fields of [`~transformers.GenerationConfig`], such as `top_p`.

    Returns:
        `tuple`: Completions in the order of the prompts (text for a text, a list with one assistant message for
        messages), token IDs of the prompts, and token IDs of the completions, up to and with the first EOS token.

    Raises:
        `ValueError`: If a prompt has no tokens.
    """
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    prompt_ids = [
        tokenize(processing_class, prompt, **({} if isinstance(prompt, str) else {"add_generation_prompt": True}))
        for prompt in prompts
    ]
    prompt_ids = [list(encoded["input_ids"]) for encoded in prompt_ids]
    if not all(prompt_ids):
        raise ValueError(f"Prompt {prompt_ids.index([])} has no tokens, so there is nothing to continue. Drop it.")

    declared = model.generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    pad_id = next((i for i in (tokenizer.pad_token_id, *sorted(eos_ids)) if i is not None), 0)
    # What is not set here would be taken from the model's own generation config
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = {
        **(sampling if temperature > 0 else {"do_sample": False}),
        "repetition_penalty": 1.0,
        "use_cache": True,
        "disable_compile": True,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": sorted(eos_ids) or None,
        "pad_token_id": pad_id,
        **generation_kwargs,
    }

    completion_ids: list[list[int]] = [[]] * len(prompts)
    with evaluating(model), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for batch in _batches([len(ids) for ids in prompt_ids], batch_size, "Generating"):
            inputs = [torch.tensor(prompt_ids[i]) for i in batch]
            mask = pad([torch.ones_like(ids) for ids in inputs], 0, padding_side="left").to(model.device)
            inputs = pad(inputs, pad_id, padding_side="left").to(model.device)
            output = model.generate(
                input_ids=inputs, attention_mask=mask, generation_config=GenerationConfig(**config)
            )
            for i, ids in zip(batch, output[:, inputs.size(1) :].tolist(), strict=True):
                end = next((position + 1 for position, token in enumerate(ids) if token in eos_ids), len(ids))
                completion_ids[i] = ids[:end]

    contents = [ids[:-1] if ids and ids[-1] in eos_ids else ids for ids in completion_ids]
    texts = tokenizer.batch_decode(contents, skip_special_tokens=True)
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return completions, prompt_ids, completion_ids


def completion_logps(
    model: PreTrainedModel, prompt_ids: list[list[int]], completion_ids: list[list[int]], batch_size: int = 16
) -> Tensor:
    """
    Log-probability of whole completions, at temperature 1.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Language model.
        prompt_ids (`list[list[int]]`):
            Token IDs of the prompts, at least one each.
        completion_ids (`list[list[int]]`):
            Token IDs of the completions.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of sequences per forward.

    Returns:
        `torch.Tensor`: Sum over the tokens of each completion, in nats, of shape `(num_completions,)`, on the CPU.
    """
    sequences = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    logps = torch.zeros(len(sequences))
    with evaluating(model):
        for batch in _batches([len(ids) for ids in sequences], batch_size, "Log-probabilities"):
            ids = [torch.tensor(sequences[i], device=model.device) for i in batch]
            # Padded on the right, so that positions are right without naming them
            mask = pad([torch.ones_like(row) for row in ids], 0, padding_side="right")
            outputs = model(input_ids=pad(ids, 0, padding_side="right"), attention_mask=mask, use_cache=False)
            # Prompt-learning PEFT prepends virtual tokens to the outputs; keep the positions of the real tokens
            for i, row, logits in zip(batch, ids, outputs.logits[:, -mask.size(1) :], strict=True):
                start = len(prompt_ids[i])
                scores = logits[start - 1 : len(row) - 1].float()
                logps[i] = -F.cross_entropy(scores, row[start:], reduction="sum").cpu()
    return logps
