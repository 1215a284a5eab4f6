"""What the online trainers say about data, rewards and reward functions that will not do."""

from collections.abc import Callable, Mapping
from itertools import islice
from reprlib import repr as shortened
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import AutoConfig

from ..data import LARGEST_REWARD, column_names, is_message, is_reward
from ..rewards.calling import PASSED_BY_TRL
from .base_config import _ActorCriticConfig


def check_reward_funcs(reward_funcs: Any, args: _ActorCriticConfig) -> None:
    """
    Check that what is to score is a function or a reward model: GRPOTrainer would load a language model as a reward
    model with a random head, and train on what that says.

    Args:
        reward_funcs (`Any`):
            What the user has passed.
        args ([`GRPOConfig`]):
            Config of the trainer.

    Raises:
        `TypeError`: If it is neither.
        `ValueError`: If it is a language model, or if a weight is no finite number.
    """
    if odd := [weight for weight in args.reward_weights or [] if not is_reward(weight)]:
        raise ValueError(f"`reward_weights` holds {shortened(odd[0])}. Give one finite number for each function.")
    for func in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if not isinstance(func, str) and not callable(func):
            raise TypeError(
                f"`reward_funcs` holds {func!r}. Pass a function f(prompts, completions, **columns), a "
                "sequence-classification model, its name or path, or a list of these."
            )
        config = getattr(func, "config", None)
        if isinstance(func, str):
            config = AutoConfig.from_pretrained(func, trust_remote_code=args.trust_remote_code)
        architectures = (
            [type(func).__name__] if isinstance(func, nn.Module) else getattr(config, "architectures", None)
        )
        for name in architectures or []:
            if name.endswith(("ForCausalLM", "LMHeadModel")):
                raise ValueError(
                    f"{func if isinstance(func, str) else 'A model'} in `reward_funcs` is a {name}, a language model. "
                    "A reward model is a sequence-classification model with one label."
                )


def check_datasets(train_dataset: Any, eval_dataset: Any, args: _ActorCriticConfig) -> None:
    """
    Check that there are prompts, and as many as a generation batch takes.

    Args:
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset to train on.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], `dict` of them or `None`):
            Dataset to evaluate on.
        args ([`GRPOConfig`]):
            Config of the trainer.

    Raises:
        `ValueError`: If there is no such dataset or no such column, if a prompt is neither text nor messages, or if
            there are too few prompts.
    """
    if train_dataset is None:
        raise ValueError("`train_dataset` is required: a dataset with a column `prompt`.")
    for name, dataset in {
        "train": train_dataset,
        **(eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}),
    }.items():
        if isinstance(dataset, Dataset | IterableDataset):  # GRPOTrainer's constructor says what it accepts
            check_columns(name, column_names(dataset))
            # The other prompts of a stream, or of a dataset that makes them as they are read, are checked then
            is_made = isinstance(dataset, IterableDataset) or dataset.format["type"] == "custom"
            prompts = islice(dataset, 1) if is_made else dataset.with_format(None).select_columns("prompt")
            for index, row in enumerate(prompts):
                check_prompt(row["prompt"], f"Row {index} of the {name} dataset")
    num_prompts = args.generation_batch_size // args.num_generations
    if isinstance(train_dataset, Dataset) and len(train_dataset) < num_prompts:
        raise ValueError(
            f"The train dataset has {len(train_dataset)} prompts, and a generation batch takes {num_prompts}: "
            f"`generation_batch_size={args.generation_batch_size}` completions, `num_generations="
            f"{args.num_generations}` of each. TRL drops what does not fill a batch, so nothing would be trained on. "
            "Lower `per_device_train_batch_size`, `gradient_accumulation_steps` or `steps_per_generation`, or pass "
            "more prompts."
        )


def check_prompt(prompt: Any, where: str) -> None:
    """Check that a prompt is one, before TRL's tokenising would stumble over it. `where` begins the error."""
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, list) or not prompt or not all(isinstance(message, Mapping) for message in prompt):
        raise ValueError(
            f"{where} has the `prompt` {shortened(prompt)}. Pass text, or a list of messages with `role` and "
            "`content`: the trainer tokenises it."
        )
    if odd := [message for message in prompt if not is_message(message)]:
        raise ValueError(
            f"{where} has the message {shortened(odd[0])} in its `prompt`. A message has a `role` and a `content`, or "
            "what the chat template takes in its place, such as `tool_calls`."
        )


def checked_tokens(tokenize: Callable[[list], Any], prompts: list) -> Any:
    """
    Tokenise prompts, and let errors say what is wrong with them.

    Args:
        tokenize (`Callable[[list], tuple]`):
            TRL's, which returns the token ids first.
        prompts (`list[str]` or `list[list[dict]]`):
            The prompts.

    Returns:
        `tuple`: What `tokenize` returns.

    Raises:
        `ValueError`: If a prompt cannot be tokenised, or has no tokens.
    """
    for prompt in prompts:
        check_prompt(prompt, "A row")
    try:
        tokenized = tokenize(prompts)
    except Exception as error:  # whatever tokenizers and chat templates raise
        raise ValueError(
            f"The prompts of a batch cannot be tokenised, {type(error).__name__}: {error}. Texts must be valid "
            "Unicode, messages what the chat template takes, and all prompts of one kind."
        ) from error
    if [] in tokenized[0]:
        raise ValueError(
            f"The prompt {prompts[tokenized[0].index([])]!r} has no tokens, and nothing could be generated after it. "
            "Drop such rows, or use a tokenizer that adds a BOS token."
        )
    return tokenized


def check_weighted_rewards(rewards: Tensor) -> None:
    """Check that weighted sums of rewards, of shape `(batch,)`, are of a size that losses can hold."""
    if (rewards.abs() > LARGEST_REWARD).any():
        raise ValueError(
            f"The weighted sum of a completion's rewards is {rewards[rewards.abs().argmax()]:g}. Beyond "
            f"{LARGEST_REWARD:g} losses overflow: scale the rewards or `reward_weights` down."
        )


def check_columns(name: str, columns: list[str]) -> None:
    """
    Check the columns of a dataset.

    Args:
        name (`str`):
            What the error calls the dataset.
        columns (`list[str]`):
            Its columns.

    Raises:
        `ValueError`: If there is no prompt, or a column that trainer or TRL have another use for.
    """
    if "prompt" not in columns:
        raise ValueError(
            f"The {name} dataset has the columns {', '.join(columns)}, and completions are generated for a `prompt`, "
            "a string or a list of messages. Rename the column that holds it; `trl.extract_prompt` takes it out of "
            "preferences. Token ids will not do: the trainer tokenises."
        )
    if taken := sorted(PASSED_BY_TRL & set(columns)):
        raise ValueError(
            f"The {name} dataset has a column `{taken[0]}`. Columns go to the reward functions by name, which get "
            f"another `{taken[0]}` from the trainer. Rename or remove it."
        )
    if images := {"image", "images"} & set(columns):
        raise ValueError(
            f"The {name} dataset has a column `{images.pop()}`. Images are not supported yet: remove it, or use "
            "GRPOTrainer."
        )
