"""What tests/test_properties.py draws: rows of any format, containers, and reward functions that mean no good."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, LargeList, List, Value
from hypothesis import strategies as st


# ---- Rows ----

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "\n\t ", "\x00", "a", "a b", "مرحبا بك", "🦜e\u0301\u200b\u2028", "<|end|>", "b<|end|>"]
    ),
)
ODD_TEXTS = st.sampled_from(
    ["\ud800", "a\udfff b", "x y " * 25_000, "ﷺ" * 2_000, None, 7, 0.5, b"bytes", [], {}, ["a"]]
)
NUMBERS = st.one_of(
    st.floats(-1e3, 1e3), st.integers(-3, 3), st.booleans(), st.none(), st.sampled_from([-1e15, 1e14, 1e-300])
)
ODD_NUMBERS = st.sampled_from(
    [math.nan, math.inf, -math.inf, 1e308, 10**400, "1.0", "good", [1.0], {}, Decimal("NaN")]
)
MESSAGE = st.builds(
    lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), TEXTS
)
ODD_MESSAGES = st.sampled_from(
    [
        {"role": "user"},
        {"content": "a"},
        {"role": "assistant", "content": None},
        {"role": None, "content": "a"},
        {"role": "user", "content": 5},
        {"role": "alien", "content": "\ud800"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        "a",
        None,
        7,
    ]
)
EXTRA = {
    "subset": st.sampled_from(["x", 1, None]),
    "score": NUMBERS,
    "tools": st.sampled_from([None, "[]", "[{", "7", [], '[{"type": "function", "function": {"name": "f"}}]']),
    "chat_template_kwargs": st.sampled_from([None, {}, {"mood": "glad"}, {"tokenize": False}, "a"]),
    "prompts": TEXTS,
    "trainer_state": TEXTS,
    "log_metric": NUMBERS,
    "completion_ids": st.lists(st.integers(0, 5), max_size=3),
    "completion_index": st.integers(0, 3),
    "reward_funcs": TEXTS,
    "image": st.none(),
}
FORMATS = ("completion", "label", "completions", "preference", "chosen_reward", "score_chosen", "implicit", "union")


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """One to four rows of one format, of few prompts, of which half have something odd in them."""
    form = draw(st.sampled_from(FORMATS))
    is_chat = draw(st.booleans())
    completion = st.lists(MESSAGE, min_size=1, max_size=2) if is_chat else TEXTS
    pool = draw(st.lists(completion, min_size=1, max_size=2))
    is_scored = draw(st.booleans()) or draw(st.booleans())
    extra = draw(st.lists(st.sampled_from(sorted(EXTRA)), max_size=2, unique=True)) if draw(st.booleans()) else []

    def make() -> dict[str, Any]:
        k = draw(st.integers(0, 9))
        prompt = draw(st.sampled_from(pool))
        row = {"prompt": prompt}
        if form in ("completion", "label"):
            row |= {"completion": draw(completion)}
            if is_scored:
                row["label" if form == "label" else "reward"] = draw(
                    NUMBERS if form == "completion" else st.booleans()
                )
        elif form == "completions":
            row["completions"] = draw(st.lists(completion, min_size=k, max_size=k))
            if is_scored:
                row["rewards"] = draw(st.lists(NUMBERS, min_size=k, max_size=k))
        elif form == "union":
            row |= {
                "completion": draw(completion),
                "completions": None,
                "chosen": None,
                "rejected": None,
                "reward": 1.0,
            }
            if draw(st.booleans()):
                row |= {"chosen": draw(completion), "rejected": draw(completion)}
        else:
            row |= {"chosen": draw(completion), "rejected": draw(completion)}
            if form in ("chosen_reward", "score_chosen"):
                other = {"chosen_reward": "rejected_reward", "score_chosen": "score_rejected"}[form]
                row |= {form: draw(NUMBERS), other: draw(NUMBERS)}
            if form == "implicit":
                del row["prompt"]
                row |= {name: prompt + row[name] for name in ("chosen", "rejected")}
        return row | {name: draw(EXTRA[name]) for name in extra}

    made = [make() for _ in range(draw(st.integers(1, 4)))]
    if draw(st.booleans()):
        spoil(draw, made[draw(st.integers(0, len(made) - 1))])
    return made


def spoil(draw: st.DrawFn, row: dict[str, Any]) -> None:
    """Put something odd into a row."""
    name = draw(st.sampled_from(sorted(row)))
    if draw(st.integers(0, 9)) == 0:
        del row[name]
    elif isinstance(row[name], list) and row[name] and draw(st.booleans()):
        values = row[name] = list(row[name])
        if draw(st.integers(0, 3)) == 0:
            values.pop()
        elif isinstance(values[0], dict):
            values[0] = draw(ODD_MESSAGES)
        else:
            values[-1] = draw(st.one_of(ODD_TEXTS, ODD_NUMBERS))
    else:
        row[name] = draw(st.one_of(ODD_TEXTS, ODD_NUMBERS, st.lists(ODD_MESSAGES, max_size=2)))


LARGE = {"string": Value("large_string"), "list": LargeList}


@st.composite
def containers(draw: st.DrawFn, made: list[dict[str, Any]] | None = None) -> Dataset | IterableDataset:
    """The rows as a dataset, where Arrow can hold them, or as a stream."""
    made = draw(rows()) if made is None else made
    kind = draw(st.sampled_from(["dataset", "dataset", "large", "stream"]))
    if kind != "stream":
        try:
            dataset = Dataset.from_list(made)
            return dataset.cast(large(dataset.features)) if kind == "large" else dataset
        except Exception:  # types that do not go together, and what is no Unicode
            pass
    return IterableDataset.from_generator(lambda: iter([dict(row) for row in made]))


def large(features: Any) -> Any:
    """The same features with Arrow's large strings and lists."""
    if isinstance(features, dict):
        return type(features)({name: large(feature) for name, feature in features.items()})
    if isinstance(features, List):
        return LargeList(large(features.feature))
    return Value("large_string") if features == Value("string") else features


# ---- Reward functions ----


def honest(completions: list) -> list[float | None]:
    """A reward that depends on the text alone; every few texts are not scored."""
    return [None if size % 5 == 3 else size % 7 - 3.0 for size in map(len, map(str, completions))]


def complete(completions: list) -> list[float]:
    return [0.5 if reward is None else reward for reward in honest(completions)]


def breaks_off(rewards: list) -> Iterator[float | None]:
    yield from rewards[:-1]
    raise KeyError("answer")


def fails(error: BaseException) -> Callable:
    def raises(rewards: list) -> None:
        raise error

    return raises


async def later(rewards: list) -> list:
    return rewards


# What becomes of the rewards on their way back
FINE = {
    "list": (honest, list),
    "tuple": (honest, tuple),
    "iterator": (honest, iter),
    "values": (honest, lambda rewards: dict(enumerate(rewards)).values()),
    "array": (complete, np.array),
    "half": (complete, lambda rewards: np.array(rewards, dtype=np.float16)),
    "tensor": (complete, lambda rewards: torch.tensor(rewards, requires_grad=True)),
    "tensors": (complete, lambda rewards: [torch.tensor([r]) for r in rewards]),
    "decimals": (complete, lambda rewards: [*map(Decimal, rewards)]),
    "scalars": (honest, lambda rewards: [None if r is None else np.float32(r) for r in rewards]),
}
NOT_FINE = {
    "text": lambda rewards: "1" * len(rewards),
    "texts": lambda rewards: ["1.0"] * len(rewards),
    "bytes": lambda rewards: b"1" * len(rewards),
    "dict": lambda rewards: dict.fromkeys(range(len(rewards)), 1.0),
    "set": lambda rewards: {float(i) for i in range(len(rewards))},
    "none": lambda rewards: None,
    "number": lambda rewards: 1.0,
    "0-d tensor": lambda rewards: torch.tensor(1.0),
    "0-d array": lambda rewards: np.array(1.0),
    "nested": lambda rewards: [[1.0]] * len(rewards),
    "2-d": lambda rewards: np.zeros((len(rewards), 1)),
    "complex": lambda rewards: [1j] * len(rewards),
    "short": lambda rewards: rewards[:-1],
    "long": lambda rewards: [*rewards, 0.0],
    "nan": lambda rewards: [*rewards[:-1], math.nan],
    "inf": lambda rewards: torch.full((len(rewards),), -math.inf),
    "huge": lambda rewards: [*rewards[:-1], 1e308],
    "long integer": lambda rewards: [*rewards[:-1], 10**400],
    "endless": lambda rewards: count(0.0),
    "coroutine": later,
    "breaks off": breaks_off,
    **{
        type(e).__name__: fails(e)
        for e in (ValueError("no"), StopIteration(), RecursionError(), AssertionError(), OSError(5))
    },
}
EXITS = {type(e).__name__: fails(e) for e in (SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError())}


def mutates(prompts: list, completions: list, columns: dict[str, Any]) -> None:
    for values in (prompts, completions, *columns.values()):
        if isinstance(values, list):
            values.clear()


class Judge:
    """A reward function that does something to its rewards before it returns them, in one of several ways."""

    def __init__(self, name: str, manner: str) -> None:
        self.manner = manner
        self.base, self.form = FINE.get(name) or (honest, {**NOT_FINE, **EXITS}[name])
        self.is_fine = name in FINE
        self.__name__ = f"judge {name}"

    def __call__(self, prompts: list, completions: list, completion_ids: list | None, **columns: Any) -> Any:
        assert len(prompts) == len(completions) == len(columns.get("completion_index", completions))
        assert completion_ids is None or len(completion_ids) == len(completions)
        rewards = self.base(completions)
        if self.manner == "mutating":
            mutates(prompts, completions, columns)
        elif self.manner == "printing":
            print(prompts, completions)
        elif self.manner == "slow":
            time.sleep(0.002)
        return self.form(rewards)


class AsyncJudge(Judge):
    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0.001 if self.manner == "slow" else 0)
        result = super().__call__(*args, **kwargs)
        return await result if asyncio.iscoroutine(result) else result


def as_lambda(judge: Judge) -> Callable:
    def function(*args: Any, **kwargs: Any) -> Any:
        return judge(*args, **kwargs)

    function.__name__ = judge.__name__
    function.judge = judge
    return function


MANNERS = st.sampled_from(["plain", "mutating", "printing", "slow"])
SYNC = st.builds(Judge, st.sampled_from([*FINE, *FINE, *NOT_FINE]), MANNERS)
ASYNC = st.builds(
    AsyncJudge, st.sampled_from([*FINE, *FINE, *(n for n in NOT_FINE if n != "coroutine"), *EXITS]), MANNERS
)
JUDGES = st.lists(st.one_of(SYNC, ASYNC, SYNC.map(as_lambda), SYNC.map(partial)), min_size=1, max_size=3)
WEIGHTS = st.one_of(st.none(), st.lists(st.sampled_from([1.0, -2, 0.5, 0, True, 1e3]), min_size=1, max_size=3))
ODD_WEIGHTS = st.sampled_from([[math.nan], [math.inf], ["a"], [None], [1e300], 0.5, "1", {0: 1.0}, [], [[1.0]]])
