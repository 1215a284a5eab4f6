"""Metrics of the `evaluate` library as reward functions."""

import inspect
from itertools import compress
from typing import TYPE_CHECKING, Any

from ..data import Messages
from .calling import Rewards
from .models import as_text


if TYPE_CHECKING:
    from evaluate import EvaluationModule


class MetricReward:
    """
    Reward function that scores each completion with a metric, against the references in a column.

    Args:
        metric (`str` or [`~evaluate.EvaluationModule`]):
            A metric with `predictions`, and `references` where it has any, or its name or folder for
            [`~evaluate.load`].
        key (`str`):
            Which of its results is the reward, such as `"rougeL"`.
        references (`str`, *optional*):
            Column of the dataset with the reference of each row: a text, messages, or a list of texts. A completion
            whose reference is null or an empty list is not scored. If `None`, the metric takes predictions alone.
        **kwargs:
            Passed to `metric.compute`. With what makes a metric return one score per example (`use_aggregator=False`
            for ROUGE), it is called once for a batch, else once for each completion.

    Raises:
        `ValueError`: If there is no such column or no such result, or if a result is no number.

    Example:

    ```python
    >>> rouge = MetricReward("rouge", "rougeL", references="summary", use_aggregator=False)
    >>> dataset = score_dataset(dataset, rouge)
    ```
    """

    def __init__(
        self, metric: "str | EvaluationModule", key: str, references: str | None = None, **kwargs: Any
    ) -> None:
        if isinstance(metric, str):
            import evaluate  # which takes seconds, for those who use it

            metric = evaluate.load(metric)
        self.metric = metric
        self.key, self.references, self.kwargs = key, references, kwargs
        self.__name__ = key
        self._is_batched: bool | None = None  # known after the first call

    def __call__(self, prompts: list, completions: list, **columns: Any) -> Rewards:
        batch = {"predictions": [as_text(completion) for completion in completions]}
        is_scored = [True] * len(completions)
        if self.references is not None:
            if self.references not in columns:
                raise ValueError(
                    f"`MetricReward` finds no column {self.references!r} with references; the columns are "
                    f"{', '.join(map(repr, sorted(columns))) or 'none'}."
                )
            references = columns[self.references]
            is_scored = [reference is not None and reference != [] for reference in references]
            batch = {"predictions": [*compress(batch["predictions"], is_scored)]}
            batch["references"] = [_as_reference(reference) for reference in compress(references, is_scored)]
        scores = dict(zip(compress(range(len(completions)), is_scored), self._score(batch), strict=True))
        return [scores.get(i) for i in range(len(completions))]

    def _score(self, batch: dict[str, list]) -> Rewards:
        """Scores of completions that all have a reference, if there are any."""
        num_rows = len(batch["predictions"])
        rows = [{name: values[i : i + 1] for name, values in batch.items()} for i in range(num_rows)]
        scores = None
        if self._is_batched is None and len(rows) > 1:  # of one completion, a list of one may be anything
            scores = self._compute(batch)
            # As many entries as completions may be chance, such as BLEU's four precisions
            self._is_batched = _has_length(scores, len(rows)) and _has_length(self._compute(rows[0]), 1)
        if self._is_batched and rows:
            return self._compute(batch) if scores is None else scores
        return [self._number(self._compute(row)) for row in rows]

    @property
    def cache_key(self) -> Any:
        """What the scores depend on."""
        name = getattr(self.metric, "config_name", None)
        return (
            "MetricReward",
            inspect.getsource(inspect.getmodule(type(self.metric))),
            name,
            self.key,
            self.references,
            self.kwargs,
        )

    def _number(self, score: Any) -> float | None:
        """The score of a single completion."""
        if _has_length(score, 1):
            (score,) = score
        if score is not None and not isinstance(score, int | float):
            raise ValueError(f"The metric's {self.key!r} of one completion is {score!r}, and a reward is one number.")
        return score

    def _compute(self, batch: dict[str, list]) -> Any:
        results = self.metric.compute(**batch, **self.kwargs)
        if self.key not in results:
            raise ValueError(f"The metric returns {', '.join(map(repr, results))}, and not {self.key!r}.")
        score = results[self.key]
        return score.tolist() if hasattr(score, "tolist") else score


def _as_reference(reference: str | Messages | list[str]) -> str | list[str]:
    is_texts = isinstance(reference, list) and isinstance(reference[0], str)  # several references of one completion
    return reference if is_texts else as_text(reference)


def _has_length(scores: Any, length: int) -> bool:
    return isinstance(scores, list) and len(scores) == length
