"""Reward models and classifiers as reward functions."""

import copy
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import AutoPeftModelForSequenceClassification
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Pipeline,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    pipeline,
)
from transformers.utils import find_adapter_config_file, logging

from .._cache import model_key, tokenizer_key
from .._trl import common_prefix_length, get_config_model_id, tokenize
from ..data import Messages, template_kwargs, tokenize_prompt
from ..engines import loading_whole
from .calling import Rewards


logger = logging.get_logger(__name__)


class RewardModel:
    """
    Reward function that scores prompt and completion with a sequence-classification model of one label.

    The text is tokenised as [`~trl.RewardTrainer`] does it: messages through the reward model's own chat template,
    texts one behind the other with EOS at the end. In a distributed run every process holds the model and scores what
    it is given.

    Args:
        model (`str`, `Path`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, its id, or a folder with it; the id or folder of a LoRA adapter will do. (For an adapter
            transformers reports that the base has no `score.weight`: the adapter brings it.)
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. If `None`, it is loaded from where the model is; that of an adapter without one from where
            its base model is.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of sequences in a forward. Those of like length are put together; the scores do not depend on it,
            except in 8 bits, where outliers are looked for by batch unless `llm_int8_threshold=0.0`.
        device (`str` or `torch.device`, *optional*):
            Device to put the model on. If `None`, it is this process's. A model that is on a GPU already, quantised,
            or loaded with a `device_map` stays where it is.
        max_length (`int`, *optional*):
            Number of tokens of a sequence at most. Prompts lose their beginning to fit it; a completion that does not
            fit by itself is not scored. If `None`, it is the length that the tokenizer states or that the model has
            positions for, whichever is smaller.
        **model_init_kwargs:
            Passed to `from_pretrained` when the model is loaded: `quantization_config`, `dtype` (bfloat16 on a GPU by
            default, else float32), `device_map` (`device` by default), `attn_implementation`, …

    Raises:
        `ValueError`: If the model has more than one label, if there is no tokenizer, or if that has no padding token
            and no EOS token.
        `TypeError`: If there are `model_init_kwargs` for a model that is loaded already.

    Example:

    ```python
    >>> reward = RewardModel("Skywork/Skywork-Reward-V2-Qwen3-0.6B", batch_size=32)
    >>> dataset = score_dataset(dataset, reward)
    ```
    """

    def __init__(
        self,
        model: "str | Path | PreTrainedModel | Any",
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        max_length: int | None = None,
        **model_init_kwargs: Any,
    ) -> None:
        device = PartialState().device if device is None else torch.device(device)
        if isinstance(model, str | Path):
            model_id, model = str(model), _load(str(model), device, model_init_kwargs)
        elif model_init_kwargs:
            names = ", ".join(f"`{name}`" for name in model_init_kwargs)
            raise TypeError(f"{names}: for loading a reward model, and this one is loaded already.")
        else:
            model_id = get_config_model_id(model.config)
        if model.config.num_labels != 1:
            raise ValueError(
                f"The reward model {model_id} has {model.config.num_labels} labels, and a reward is one number. A "
                "language model has to be trained into a reward model first (`trl.RewardTrainer`); of a classifier, "
                "`ClassifierReward` takes the probability of a label."
            )
        self.tokenizer = _load_tokenizer(model_id, model) if tokenizer is None else tokenizer
        self.pad_token_id = self.tokenizer.pad_token_id
        if self.pad_token_id is None:
            self.pad_token_id = self.tokenizer.eos_token_id
        if self.pad_token_id is None:
            raise ValueError(f"The tokenizer of the reward model {model_id} has no padding token. Set `pad_token`.")
        model.config.get_text_config().pad_token_id = self.pad_token_id  # by which the model finds the last token
        self.max_length = _longest(model, self.tokenizer) if max_length is None else max_length
        is_placed = any(getattr(model, name, None) for name in ("hf_device_map", "hf_quantizer"))
        if not is_placed and model.device.type == "cpu":
            model.to(device)
        self.model = model.eval()
        self.batch_size = batch_size
        self.__name__ = Path(model_id).name or type(model).__name__

    def __call__(self, prompts: list, completions: list, **columns: Any) -> Rewards:
        self.model.eval()  # whoever shares it may have trained it since
        template_columns = {n: columns[n] for n in ("tools", "chat_template_kwargs") if columns.get(n)}
        rows = [{name: values[i] for name, values in template_columns.items()} for i in range(len(prompts))]
        sequences = [self._tokenize(*row) for row in zip(prompts, completions, rows, strict=True)]
        scores: Rewards = [None] * len(sequences)
        order = sorted((i for i, ids in enumerate(sequences) if ids), key=lambda i: -len(sequences[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, score in zip(batch, self._score([sequences[i] for i in batch]).tolist(), strict=True):
                scores[i] = score
        return scores

    def _tokenize(self, prompt: str | Messages, completion: str | Messages, row: dict[str, Any]) -> list[int]:
        """Tokens of prompt and completion. Empty where the completion alone is too long."""
        kwargs, whole = {}, prompt + completion
        if isinstance(prompt, str):
            eos = self.tokenizer.eos_token or ""
            whole = whole if completion.endswith(eos) else whole + eos
        else:
            kwargs = template_kwargs(row)
        ids = tokenize(self.tokenizer, whole, **kwargs)["input_ids"]
        if self.max_length is None or len(ids) <= self.max_length:
            return list(ids)
        return _cut_prompt(ids, tokenize_prompt(prompt, row, self.tokenizer), self.tokenizer, self.max_length)

    @torch.inference_mode()
    def _score(self, sequences: Sequence[list[int]]) -> Tensor:
        ids = [torch.tensor(sequence) for sequence in sequences]
        device = self.model.device
        return (
            self.model(
                input_ids=pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id).to(device),
                attention_mask=pad_sequence([torch.ones_like(x) for x in ids], batch_first=True).to(device),
            )
            .logits[:, 0]
            .float()
        )

    @property
    def cache_key(self) -> Any:
        """What the scores depend on."""
        return "RewardModel", model_key(self.model), tokenizer_key(self.tokenizer), self.max_length


def _load(model: str, device: torch.device, kwargs: dict[str, Any]) -> PreTrainedModel:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    kwargs = {"dtype": dtype, "device_map": {"": device}, **kwargs}
    with loading_whole():
        if find_adapter_config_file(model) is not None:  # its base is a language model, whose config knows of no label
            return AutoPeftModelForSequenceClassification.from_pretrained(model, **{"num_labels": 1, **kwargs})
        return AutoModelForSequenceClassification.from_pretrained(model, **kwargs)


def _load_tokenizer(model_id: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with the model, or else with the base of an adapter."""
    base_id = get_config_model_id(model.config)
    for name in filter(None, dict.fromkeys([model_id, base_id])):
        with suppress(OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(name)
            if not _is_empty(tokenizer):
                if name != model_id:
                    logger.warning(f"There is no tokenizer with {model_id}. Using that of its base model, {name}.")
                return tokenizer
    where = f"with the reward model {model_id}" if model_id else "known for a reward model that was made in memory"
    raise ValueError(f"There is no tokenizer {where}. Pass the one that it was trained with as `tokenizer=`.")


def _is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """For some architectures, transformers makes a tokenizer of special tokens alone where there are no files."""
    return len(tokenizer) <= len(tokenizer.all_special_ids)


def _longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Number of tokens that a sequence may have. `None` if there is no limit."""
    num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    # RoBERTa and its kin count positions from behind that of padding: 512 of 514 are left
    tables = [module for name, module in model.named_modules() if name.split(".")[-1] == "position_embeddings"]
    paddings = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    num_positions -= max(paddings, default=-1) + 1
    # Tokenizers say 1e30 and XLNet says -1 where there is no limit
    return min((n for n in (num_positions, tokenizer.model_max_length) if 0 < n < sys.maxsize), default=None)


def _cut_prompt(
    ids: Sequence[int], prompt_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[int]:
    """The last of too many tokens of prompt and completion. Empty where the completion alone is too long."""
    # Encoders read the score off the first token
    begin = list(ids[:1]) if ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []
    num_completion_tokens = len(ids) - common_prefix_length(prompt_ids, ids)
    if len(begin) + num_completion_tokens > max_length:
        logger.warning_once(
            f"A completion is longer than `max_length={max_length}` of its reward function. Such completions are not "
            "scored."
        )
        return []
    return begin + list(ids[len(begin) + len(ids) - max_length :])


class ClassifierReward:
    """
    Reward function that is the probability of a label, as a text classifier sees the completion.

    Args:
        classifier (`str`, `Path` or [`~transformers.Pipeline`]):
            A text-classification pipeline, or the id or folder of a model for one.
        label (`str`):
            Name of the label.
        with_prompt (`bool`, *optional*, defaults to `False`):
            Whether the classifier reads the prompt's text before the completion's.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of texts in a forward.
        max_length (`int`, *optional*):
            Number of tokens of a text at most, as in [`RewardModel`]: prompts lose their beginning to fit it, and a
            completion that does not fit by itself is not scored.
        **kwargs:
            Passed to the pipeline, such as `function_to_apply="none"` for the logit.

    Raises:
        `ValueError`: If the classifier has no such label, or no tokenizer.

    Example:

    ```python
    >>> polite = ClassifierReward("Intel/polite-guard", "polite")
    >>> trainer = GRPOTrainer(model, reward_funcs=polite, train_dataset=dataset)
    ```
    """

    def __init__(
        self,
        classifier: str | Path | Pipeline,
        label: str,
        with_prompt: bool = False,
        batch_size: int = 16,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(classifier, str | Path):
            classifier = pipeline("text-classification", model=str(classifier), device=PartialState().device)
        labels = list(classifier.model.config.id2label.values())
        if label not in labels:
            raise ValueError(f"The classifier has the labels {', '.join(map(repr, labels))}, and not {label!r}.")
        if _is_empty(classifier.tokenizer):
            raise ValueError(
                f"There is no tokenizer with the classifier {get_config_model_id(classifier.model.config)}. Pass a "
                "pipeline with the one that it was trained with."
            )
        self.classifier = copy.copy(classifier)
        self.classifier.tokenizer = copy.deepcopy(classifier.tokenizer)
        self.classifier.tokenizer.truncation_side = "left"
        self.label, self.with_prompt, self.batch_size = label, with_prompt, batch_size
        self.max_length = _longest(classifier.model, classifier.tokenizer) if max_length is None else max_length
        self.kwargs = {"truncation": self.max_length is not None, "max_length": self.max_length, **kwargs}
        self.__name__ = label

    def __call__(self, prompts: list, completions: list, **columns: Any) -> Rewards:
        self.classifier.model.eval()  # which a pipeline leaves to whoever made the model
        texts = [as_text(completion) for completion in completions]
        wholes = texts
        if self.with_prompt:
            wholes = [as_text(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
        fits = [self._fits(whole, text) for whole, text in zip(wholes, texts, strict=True)]
        fitting = [*compress(wholes, fits)]
        outputs = iter([])
        if fitting:  # of nothing, pipelines look at the first
            outputs = iter(self.classifier(fitting, top_k=None, batch_size=self.batch_size, **self.kwargs))
        return [self._probability(next(outputs)) if is_scored else None for is_scored in fits]

    def _fits(self, whole: str, completion: str) -> bool:
        """Whether a text keeps all of its completion when it is cut."""
        tokenizer = self.classifier.tokenizer
        ids, prompt_ids = tokenizer([whole, whole.removesuffix(completion)], verbose=False)["input_ids"]
        is_short = self.max_length is None or len(ids) <= self.max_length
        return is_short or bool(_cut_prompt(ids, prompt_ids, tokenizer, self.max_length))

    def _probability(self, scores: list[dict[str, Any]]) -> float:
        return next(score["score"] for score in scores if score["label"] == self.label)

    @property
    def cache_key(self) -> Any:
        """What the scores depend on."""
        tokenizer = tokenizer_key(self.classifier.tokenizer)
        return (
            "ClassifierReward",
            model_key(self.classifier.model),
            tokenizer,
            self.label,
            self.with_prompt,
            self.kwargs,
        )


def as_text(content: str | Messages) -> str:
    """The text of a prompt or completion, of messages one per line."""
    if isinstance(content, str):
        return content
    contents = [message.get("content") or "" for message in content]
    return "\n".join(c if isinstance(c, str) else "".join(part.get("text") or "" for part in c) for c in contents)
