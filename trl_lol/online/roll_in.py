"""The reference completions that rollouts restart from."""

import re
from itertools import islice
from typing import Any

from accelerate.utils import tqdm
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging
from trl import is_conversational

from .._trl import common_prefix_length, tokenize
from ..data import Messages


logger = logging.get_logger(__name__)

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
        `ValueError`: If there is none, or if it has been found beside labels that tell good completions from bad ones.
    """
    names = REFERENCE_COLUMNS if reference_column is None else (reference_column,)
    if found := [name for name in names if name in columns]:
        if reference_column is None and "label" in columns:
            raise ValueError(
                "The train dataset has a column 'label', by which some of its completions are bad ones. Keep the good "
                f"ones, and name their column with `reference_column={found[0]!r}`."
            )
        if len(found) > 1:
            others = " or ".join(map(repr, found[1:]))
            logger.warning(
                f"The references are taken from the column {found[0]!r}, and not from {others}. Name the right one "
                "with `reference_column`."
            )
        return found[0]
    raise ValueError(
        f"Rollouts restart from reference completions, which are looked for in {' or '.join(map(repr, names))}, and "
        f"the train dataset has the columns {', '.join(map(repr, columns))}. Name the one that holds them with "
        "`reference_column`, or set `reset_prob=0`, which is PPO."
    )


def check_references(dataset: Dataset | IterableDataset, column: str) -> None:
    """
    Check the references of a dataset, all rows of one that is not streamed: a wrong one would stop a run that has gone
    on for long.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with prompts and references.
        column (`str`):
            Column with the references.

    Raises:
        `ValueError`: If a reference is no completion of its prompt, if all repeat their prompts, or if there is none.
    """
    if isinstance(dataset, IterableDataset):
        for row in islice(dataset, 1):
            reference_message(row["prompt"], row[column])
        return
    rows = dataset.with_format(None).select_columns(["prompt", column])
    num_missing = num_repeating = 0
    for row in tqdm(rows, desc="Checking references"):
        prompt, reference = row["prompt"], row[column]
        num_missing += reference_message(prompt, reference) is None
        num_repeating += isinstance(prompt, str) and bool(prompt) and (reference or "").startswith(prompt)
    if num_missing == len(rows):
        raise ValueError(
            f"None of the {len(rows)} rows has a reference in the column {column!r}, so that nothing would be reset. "
            "Name another column with `reference_column`, or set `reset_prob=0`, which is PPO."
        )
    if num_repeating == len(rows) - num_missing:  # a single one may begin as its prompt does
        raise ValueError(
            f"The references in the column {column!r} repeat their prompts. They must be what follows: cut the "
            "prompts off."
        )
    if num_missing:
        logger.warning(f"{num_missing} of {len(rows)} rows have no reference, and are never reset.")


def reference_message(prompt: str | Messages, reference: str | Messages | None) -> dict[str, Any] | None:
    """
    The reference completion of a prompt as one message, also where both are texts.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt, as text or as messages.
        reference (`str` or `list[dict]`, *optional*):
            The completion. For a prompt of messages also a text, the answer; of several messages the first counts.

    Returns:
        `dict`: The assistant's message, or `None` where there is no reference or an empty one.

    Raises:
        `ValueError`: If the reference is no completion of the prompt.
    """
    if reference is None or reference in ("", []):
        return None
    message, expected = {"role": "assistant", "content": reference}, "a text, as the prompt is, or null"
    if isinstance(prompt, list):
        message = reference[0] if is_conversational({"prompt": reference}) else message
        expected = (
            "a text, messages of which the first is the assistant's, its content a text, or null. "
            "`trl.extract_prompt` takes the prompt out of whole conversations"
        )
    content = message.get("content")
    # Half of a surrogate pair is no Unicode, which tokenizers refuse
    if message["role"] != "assistant" or not isinstance(content, str) or re.search("[\ud800-\udfff]", content):
        raise ValueError(
            f"The reference completion of the prompt {str(prompt)[-80:]!r} is {str(reference)[:80]!r}. It must be "
            f"{expected}."
        )
    return message if content else None


def tokenize_reference(
    prompt: str | Messages,
    reference: str | Messages | None,
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
            The completion (see [`reference_message`]).
        prompt_ids (`list[int]`):
            Tokens of the prompt that the completion is to follow.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor.
        eos_token_ids (`list[int]`):
            Tokens that end a completion.
        **template_kwargs:
            Arguments of the chat template.

    Returns:
        `list[int]`: The tokens before the first that ends the completion. Empty where there is no reference.

    Raises:
        `ValueError`: If the reference is no completion of the prompt.
    """
    message = reference_message(prompt, reference)
    if message is None:
        return []
    if isinstance(prompt, str):
        ids = tokenize(processing_class, prompt + message["content"])["input_ids"]
    else:
        try:  # with nothing behind the answer, and no end of turn
            ids = tokenize(processing_class, [*prompt, message], continue_final_message=True, **template_kwargs)[
                "input_ids"
            ]
        except ValueError:  # the template does not render the answer as it is
            ids = []
    if ids[: len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids) :]
    else:  # the answer's own tokens
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        # The text may still be the same: two spaces behind a line break can be one token with it
        if isinstance(prompt, list) and not tokenizer.decode(ids).startswith(tokenizer.decode(prompt_ids)):
            tail = tokenizer.decode(prompt_ids[common_prefix_length(prompt_ids, ids) :])
            logger.warning_once(
                "The chat template does not continue a prompt by the answer that stands in a reference completion. "
                f"Rollouts restart from the answer's text right behind the prompt, which ends with {tail[-80:]!r}. If "
                "that opens a block of thoughts, let the references begin with them."
            )
        # Behind a line break: tokenizers may put a space before the first word of a text
        first, ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", f"\n{message['content']}")
        )
        if ids[: len(first)] == first:
            ids = ids[len(first) :]
        else:
            ids = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
    end = next((i for i, token in enumerate(ids) if token in eos_token_ids), None)
    return list(ids[:end])
