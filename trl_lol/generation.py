"""Completions of a policy and their log-probabilities, without a trace in the training that goes on around them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object, tqdm
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ._cache import cached, model_key
from ._trl import pad
from .data import PREFERENCE_REWARDS, Messages, tokenize_prompt
from .engines import is_sharded


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
        `ValueError`: If a prompt has no tokens, or a field of the generation config is unknown.
    """
    prompt_ids = _encode(processing_class, prompts, [{}] * len(prompts))
    completion_ids = _generate(
        model, processing_class, prompt_ids, max_new_tokens, temperature, batch_size, seed, **generation_kwargs
    )
    completions = _decode(model, processing_class, prompts, prompt_ids, completion_ids)
    return completions, prompt_ids, completion_ids


def sample_completions(
    dataset: Dataset,
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    num_completions: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    **generation_kwargs: Any,
) -> Dataset:
    """
    Sample several completions of every prompt of a dataset, for [`score_dataset`] to score and [`CoPGTrainer`] to
    train on.

    In a distributed run every rank samples for its share of the prompts, and all ranks get all completions. Neither
    the model nor the random state that training draws from is changed.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with a `prompt`, as text or as messages; `tools` and `chat_template_kwargs` go to the chat template.
        model ([`~transformers.PreTrainedModel`]):
            Policy to sample from, not wrapped for distributed training. Each rank holds all of it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer or processor.
        num_completions (`int`):
            Number of completions per prompt.
        max_new_tokens (`int`):
            Maximum length of a completion, in tokens. One that is cut off there is trained on as if it ended there.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. At `1.0` the completions are the model's own.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of completions per batch on each rank.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling; the rank is added to it.
        cache_dir (`str` or `Path`, *optional*):
            Folder to keep the completions in. They are found again as long as the prompts, the model and the
            sampling stay the same, the batch size aside. If `None`, nothing is kept.
        **generation_kwargs:
            Further fields of [`~transformers.GenerationConfig`], such as `top_p`.

    Returns:
        [`~datasets.Dataset`]: The same rows with the column `completions` (one list per row), in place of earlier
        completions and their rewards.

    Raises:
        `ValueError`: If there is no `prompt` column, if a prompt has no tokens, if `num_completions` is less than 1,
            or if the model is sharded.

    Example:

    ```python
    dataset = sample_completions(dataset, model, tokenizer, 4, max_new_tokens=256, cache_dir="samples")
    dataset = score_dataset(dataset, reward_func)
    ```
    """
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"The dataset's columns are {', '.join(dataset.column_names)}. Sampling needs a `prompt`: rename the "
            "column that holds it."
        )
    if not len(dataset):
        raise ValueError("The dataset is empty, so there are no prompts to complete.")
    if num_completions < 1:
        raise ValueError(f"`num_completions={num_completions}` must be at least 1.")
    if is_sharded(model):
        raise ValueError(
            "The model is sharded (FSDP or ZeRO-3), and each process samples for prompts of its own, in a time of its "
            "own. Sample before training with a model that is loaded as a whole, or use DDP or ZeRO-2."
        )
    rows = dataset.with_format(None)
    rows = rows.select_columns([n for n in ("prompt", "tools", "chat_template_kwargs") if n in rows.column_names])
    prompts = list(rows["prompt"])
    prompt_ids = _encode(processing_class, prompts, rows)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, **generation_kwargs}

    def compute() -> dict[str, Tensor]:
        state = PartialState()
        with state.split_between_processes([ids for ids in prompt_ids for _ in range(num_completions)]) as mine:
            completion_ids = _generate(
                model, processing_class, mine, batch_size=batch_size, seed=seed + state.process_index, **sampling
            )
        completion_ids = gather_object(completion_ids)
        return {
            "ids": torch.tensor(list(chain.from_iterable(completion_ids)), dtype=torch.int64),
            "lengths": torch.tensor([len(ids) for ids in completion_ids], dtype=torch.int64),
        }

    # The tokens are kept: what they say is up to the tokenizer
    policy = None if cache_dir is None else model_key(model)
    key = (prompt_ids, policy, _eos_ids(model, processing_class), num_completions, sampling, seed)
    tensors = cached(cache_dir, "completions", key, compute)
    completion_ids = [ids.tolist() for ids in tensors["ids"].split(tensors["lengths"].tolist())]
    repeated, repeated_ids = ([x for x in column for _ in range(num_completions)] for column in (prompts, prompt_ids))
    completions = _decode(model, processing_class, repeated, repeated_ids, completion_ids)
    groups = [completions[start : start + num_completions] for start in range(0, len(completions), num_completions)]
    earlier = {
        "completion",
        "completions",
        "chosen",
        "rejected",
        "reward",
        "rewards",
        "label",
        *chain(*PREFERENCE_REWARDS),
    }
    dataset = dataset.remove_columns([name for name in dataset.column_names if name in earlier])
    return dataset.add_column("completions", groups)


def _tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def _eos_ids(model: PreTrainedModel, processing_class: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and what the model's generation config declares."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({_tokenizer(processing_class).eos_token_id, *declared} - {None})


def _encode(
    processing_class: PreTrainedTokenizerBase, prompts: Sequence[str | Messages], rows: Iterable[Mapping[str, Any]]
) -> list[list[int]]:
    prompt_ids = [tokenize_prompt(prompt, row, processing_class) for prompt, row in zip(prompts, rows, strict=True)]
    if not all(prompt_ids):
        raise ValueError(f"Prompt {prompt_ids.index([])} has no tokens, so there is nothing to continue. Drop it.")
    return prompt_ids


def _generate(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    **generation_kwargs: Any,
) -> list[list[int]]:
    """Token IDs of the completions, up to and with the first EOS token."""
    if unknown := generation_kwargs.keys() - (vars(GenerationConfig()).keys() - {"num_return_sequences"}):
        raise ValueError(f"{', '.join(sorted(unknown))}: not among the fields of `GenerationConfig` that may be set.")
    eos_ids = _eos_ids(model, processing_class)
    pad_id = next((i for i in (_tokenizer(processing_class).pad_token_id, *eos_ids) if i is not None), 0)
    # What is not set here would be taken from the model's own generation config
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = {
        **(sampling if temperature > 0 else {"do_sample": False}),
        "repetition_penalty": 1.0,
        "use_cache": True,
        "disable_compile": True,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": eos_ids or None,
        "pad_token_id": pad_id,
        **generation_kwargs,
    }

    completion_ids: list[list[int]] = [[]] * len(prompt_ids)
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
    return completion_ids


def _decode(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
) -> list[str] | list[Messages]:
    """Text for a text, a list with one assistant message for messages."""
    tokenizer, eos_ids = _tokenizer(processing_class), _eos_ids(model, processing_class)
    contents = [ids[:-1] if ids and ids[-1] in eos_ids else ids for ids in completion_ids]
    texts = tokenizer.batch_decode(contents, skip_special_tokens=True)
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            # Some tokenizers drop the space before the first token they decode; here it parts prompt and completion
            start = tokenizer.decode(prompt_ids[i], skip_special_tokens=True)
            whole = tokenizer.decode(prompt_ids[i] + contents[i], skip_special_tokens=True)
            texts[i] = whole[len(start) :] if whole.startswith(start) else texts[i]
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


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
