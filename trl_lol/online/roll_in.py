"""The reference completions that rollouts restart from."""

from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import is_conversational

from .._trl import tokenize


REFERENCE_COLUMNS = ("completion", "chosen", "reference")


def find_reference_column(columns: list[str], reference_column: str | None) -> str:
    """
    The column that holds the reference completions.

    Args:
        columns (`list[str]`):
            Column names of the dataset.
        reference_column (`str`, *optional*):
            The column that the user has named.

    Returns:
        `str`: That one, or else the first of `completion`, `chosen` and `reference` that there is.

    Raises:
        `ValueError`: If there is none.
    """
    names = REFERENCE_COLUMNS if reference_column is None else (reference_column,)
    if found := [name for name in names if name in columns]:
        return found[0]
    raise ValueError(
        f"Rollouts restart from reference completions, which are looked for in {' or '.join(map(repr, names))}, and "
        f"the train dataset has the columns {', '.join(map(repr, columns))}. Name the one that holds them with "
        "`reference_column`, or set `reset_prob=0`, which is PPO."
    )


def tokenize_reference(
    prompt: str | list[dict[str, Any]],
    reference: str | list[dict[str, Any]] | None,
    prompt_ids: list[int],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    eos_token_ids: list[int],
    **template_kwargs: Any,
) -> list[int]:
    """
    Tokens of a reference completion, as they follow those of its prompt.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt, as text or as messages.
        reference (`str` or `list[dict]`, *optional*):
            The completion. For a prompt of messages also a text, the answer; of several messages the first counts.
        prompt_ids (`list[int]`):
            Tokens of the prompt that the completion is to follow.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor.
        eos_token_ids (`list[int]`):
            Tokens that end a completion.
        **template_kwargs:
            Arguments of the chat template.

    Returns:
        `list[int]`: The tokens before the first that ends the completion. None where there is no reference.

    Raises:
        `ValueError`: If the reference is no completion of the prompt.
    """
    if not reference:
        return []
    answer, expected = reference, "a text, as the prompt is"
    if isinstance(prompt, list):
        expected = "a text, or messages of which the first is the assistant's"
        if is_conversational({"prompt": reference}):
            answer = reference[0]["content"] if reference[0]["role"] == "assistant" else None
    if not isinstance(answer, str):
        raise ValueError(
            f"The reference completion of the prompt {str(prompt)[-80:]!r} is {str(reference)[:80]!r}. It must be "
            f"{expected}; null where there is none."
        )
    if not answer:
        return []
    if isinstance(prompt, str):
        tokenized = tokenize(processing_class, prompt + answer)
    else:  # with nothing behind the answer, and no end of turn
        whole = [*prompt, {"role": "assistant", "content": answer}]
        tokenized = tokenize(processing_class, whole, continue_final_message=True, **template_kwargs)
    ids = tokenized["input_ids"]
    if ids[: len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids) :]
    else:  # their tokens run into each other, or the template renders a prompt otherwise when an answer follows
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    end = next((i for i, token in enumerate(ids) if token in eos_token_ids), None)
    return list(ids[:end])
