"""
Rows and reward functions that nobody has thought of: either they work, or the error is one of ours and says what was
found. Every test stands here twice: with a few hundred cases, the same each time, and with thousands, marked slow.
"""

import asyncio
import json
import linecache
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import trl
from conftest import cpu_args
from datasets import Dataset, IterableDataset, LargeList, List, Value
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import trl_lol
from trl_lol import (
    ALoLConfig,
    ALoLTrainer,
    APAConfig,
    APATrainer,
    CoPGConfig,
    CoPGTrainer,
    DRPOConfig,
    DRPOTrainer,
    PPOConfig,
    PPOTrainer,
)
from trl_lol.data import as_group, check_row, tokenize_row
from trl_lol.rewards import score_dataset


SECONDS_PER_CASE = 30
CHECKS = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
]
COMMON = {"deadline": None, "database": None, "suppress_health_check": CHECKS}
FEW = settings(max_examples=150, derandomize=True, phases=[Phase.explicit, Phase.generate], **COMMON)
MANY = settings(max_examples=3400, **COMMON)  # of each of three tests


# ---- What an error must be ----


@contextmanager
def time_limit() -> Iterator[None]:
    """A case that hangs fails."""

    def stop(*_: object) -> None:
        raise AssertionError(f"This case takes more than {SECONDS_PER_CASE} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_PER_CASE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def is_ours(error: BaseException, *folders: Path) -> bool:
    """Whether an error was raised on purpose, by a `raise` in the package, and shows something that it is about."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    path, line = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
    is_raised_here = any(Path(path).is_relative_to(f) for f in (Path(trl_lol.__file__).parent, *folders))
    is_meant = linecache.getline(path, line).strip().startswith("raise")
    names_something = any(
        word in str(error) for word in ("Row ", "row", "prompt", "column", "weights", "reward function '", "`")
    )
    return isinstance(error, ValueError | TypeError | RuntimeError) and is_raised_here and is_meant and names_something


def test_what_counts_as_ours():
    """Control: what Python raises within the package, or others for it, does not."""
    with pytest.raises(ValueError) as meant:
        check_row({"prompt": "a"}, 0)
    with pytest.raises(AttributeError) as stumbled:
        check_row(5, 0)
    with pytest.raises(ValueError) as others:
        json.loads("{")
    assert [is_ours(e.value) for e in (meant, stumbled, others)] == [True, False, False]


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


@pytest.fixture(scope="module")
def prepare(tmp_path_factory, tiny_model, tokenizer) -> dict[str, Callable[..., Dataset | IterableDataset]]:
    """Prepares a dataset as the constructors of the offline trainers do."""
    rows = Dataset.from_dict({"prompt": ["a"], "completions": [["b", "c"]], "rewards": [[1.0, 0.0]]})

    def of(trainer_class: type, config_class: type, **settings: Any) -> Callable[..., Dataset | IterableDataset]:
        args = cpu_args(config_class, tmp_path_factory.mktemp("out"), max_length=None, **settings)
        trainer = trainer_class(tiny_model(), args=args, train_dataset=rows, processing_class=tokenizer)
        return partial(trainer._prepare_dataset, processing_class=tokenizer, args=trainer.args, dataset_name="train")

    return {
        "A-LoL": of(ALoLTrainer, ALoLConfig, baseline="none", advantage_filter="none"),
        "CoPG": of(CoPGTrainer, CoPGConfig),
    }


def check_tokens(row: dict[str, Any], index: int, tokenizer: Any) -> dict[str, Any]:
    """Tokenise a row, and compare with what the tokenizer makes of its completions one by one."""
    tokenized = tokenize_row(row, index, tokenizer, tokenizer.eos_token)
    group = as_group(row)
    scored = [(c, r) for c, r in zip(group.completions, group.rewards, strict=True) if r is not None]
    expected = []
    for completion, reward in scored:
        if isinstance(completion, str):
            text = completion if completion.endswith(tokenizer.eos_token) else completion + tokenizer.eos_token
            ids = tokenizer(group.prompt + text)["input_ids"]
        elif completion:
            kwargs = dict(row.get("chat_template_kwargs") or {})
            tools = row.get("tools")
            kwargs["tools"] = json.loads(tools) if isinstance(tools, str) else tools
            ids = tokenizer.apply_chat_template(group.prompt + completion, return_dict=True, **kwargs)["input_ids"]
        else:
            continue
        expected.append((ids, float(reward)))
    found = [
        (tokenized["prompt_ids"] + ids, reward)
        for ids, reward in zip(tokenized["completion_ids"], tokenized["rewards"], strict=True)
    ]
    assert found == [(ids, r) for ids, r in expected if len(ids) > len(tokenized["prompt_ids"])]
    assert len(found) + tokenized["num_dropped"] == len(group.completions)
    if isinstance(group.prompt, str):  # which EOS remains of
        assert len(found) == len(scored)
    return tokenized


def check_rows(made: list[dict[str, Any]], tokenizer: Any) -> None:
    for index, row in enumerate(made):
        with time_limit():
            try:
                check_tokens(row, index, tokenizer)
            except (ValueError, TypeError, RuntimeError) as error:
                assert is_ours(error) and f"Row {index}" in str(error), repr(error)


def check_dataset(dataset: Dataset | IterableDataset, tokenizer: Any, prepare: dict[str, Callable]) -> None:
    """What the trainers train on is what the rows say, in their order."""
    for name, of in prepare.items():
        with time_limit():
            try:
                prepared = [*of(dataset)]
            except (ValueError, TypeError, RuntimeError) as error:
                assert is_ours(error), repr(error)
                continue
            tokenized = [tokenize_row(row, 0, tokenizer, tokenizer.eos_token) for row in dataset]
            members = [
                (row["prompt_ids"] + ids, reward)
                for row in tokenized
                for ids, reward in zip(row["completion_ids"], row["rewards"], strict=True)
            ]
            found = [
                (row["prompt_ids"] + ids, reward)
                for row in prepared
                for ids, reward in zip(row["completion_ids"], row["rewards"], strict=True)
            ]
            if name == "A-LoL":
                assert found == members
                continue
            assert all(len(row["completion_ids"]) >= 2 for row in prepared)
            if "completion" not in (dataset.column_names or ()):  # or rows are joined by their prompts
                sizes = [len(row["rewards"]) for row in tokenized]
                starts = np.cumsum([0, *sizes])
                groups = [members[start : start + k] for start, k in zip(starts, sizes, strict=False) if k >= 2]
                assert found == [member for group in groups for member in group]
            else:
                assert all(member in members for member in found) and len(found) <= len(members)


REGRESSIONS = [
    [{"chosen": "Yes. ", "rejected": "No."}],  # nothing in common: TRL cuts at the last space
    [{"chosen": "", "rejected": "a"}],
    [{"prompt": [], "completion": [], "reward": 1.0}],
    [{"prompt": "a", "completions": "abc", "rewards": [1.0, 2.0, 3.0]}],
    [{"prompt": "a", "completion": "b", "reward": 10**400}],
    [{"prompt": "a", "completion": "\ud800", "reward": 1.0}],
    [{"prompt": [{"content": "a"}], "completion": [{"role": "assistant", "content": "b"}], "reward": 1.0}],
    [{"prompt": [{"role": "user", "content": 5}], "completion": [{"role": "user", "content": "b"}], "reward": 1.0}],
    [{"prompt": [{"role": "user", "content": "a"}], "completion": [], "reward": 1.0, "tools": "[{"}],
]


def regressions(test: Callable) -> Callable:
    for made in REGRESSIONS:
        test = example(made=made)(test)
    return test


@regressions
@FEW
@given(made=rows())
def test_rows(made, tokenizer):
    check_rows(made, tokenizer)


@pytest.mark.slow
@MANY
@given(made=rows())
def test_many_rows(made, tokenizer):
    check_rows(made, tokenizer)


@settings(FEW, max_examples=60)
@given(dataset=containers())
def test_datasets(dataset, tokenizer, prepare):
    check_dataset(dataset, tokenizer, prepare)


@pytest.mark.slow
@MANY
@given(dataset=containers())
def test_many_datasets(dataset, tokenizer, prepare):
    check_dataset(dataset, tokenizer, prepare)


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


def judge_of(func: Any) -> Judge:
    return func.func if isinstance(func, partial) else getattr(func, "judge", func)


def check_scores(dataset: Any, funcs: list, weights: Any, batch_size: int, tokenizer: Any) -> None:
    """Every completion gets the weighted sum of its own rewards, or the error names the row or the function."""
    fine = all(judge_of(func).is_fine for func in funcs)
    with time_limit():
        try:
            found = [*score_dataset(dataset, funcs, weights, processing_class=tokenizer, batch_size=batch_size)]
        except (ValueError, TypeError, RuntimeError) as error:
            assert is_ours(error), repr(error)
            if "reward function '" in str(error):
                assert any(f"'{judge_of(f).__name__}'" in str(error) for f in funcs if not judge_of(f).is_fine)
            return
    new = ("reward", "rewards", "chosen_reward", "rejected_reward", "score_chosen", "score_rejected")
    rows = [{name: value for name, value in row.items() if name not in new} for row in dataset]
    assert fine or not any(as_group(row).completions for row in rows), "what is not fine has been taken"
    assert len(found) == len(rows)
    for index, (row, scored) in enumerate(zip(rows, found, strict=True)):
        group = check_row(scored, index)
        assert group.completions == as_group(row).completions
        per_func = [judge_of(func).base(group.completions) for func in funcs] if fine else []
        expected = []
        for rewards in zip(*per_func, strict=True):
            parts = [w * r for w, r in zip(weights or [1.0] * len(funcs), rewards, strict=True) if r is not None]
            expected.append(sum(parts) if parts else None)
        assert group.rewards == pytest.approx(expected)
        assert {name: value for name, value in scored.items() if name not in new} == row


CASE = {
    "dataset": containers(),
    "funcs": JUDGES,
    "weights": st.one_of(WEIGHTS, WEIGHTS, WEIGHTS, ODD_WEIGHTS),
    "batch_size": st.sampled_from([1, 2, 3, 32]),
    "is_tokenised": st.booleans(),
}


@settings(FEW, max_examples=300)
@given(**CASE)
def test_scores(dataset, funcs, weights, batch_size, is_tokenised, tokenizer):
    check_scores(dataset, funcs, weights, batch_size, tokenizer if is_tokenised else None)


@pytest.mark.slow
@MANY
@given(**CASE)
def test_many_scores(dataset, funcs, weights, batch_size, is_tokenised, tokenizer):
    check_scores(dataset, funcs, weights, batch_size, tokenizer if is_tokenised else None)


# ---- Whole runs ----

CONFIGS = {
    ALoLTrainer: ALoLConfig,
    CoPGTrainer: CoPGConfig,
    PPOTrainer: PPOConfig,
    APATrainer: APAConfig,
    DRPOTrainer: DRPOConfig,
}


@st.composite
def prompts(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows for the online trainers, with references, of which half have something odd in them."""
    messages = st.lists(MESSAGE, min_size=1, max_size=2)
    text = draw(st.sampled_from([TEXTS.filter(bool), messages]))
    extra = draw(st.lists(st.sampled_from(sorted(EXTRA)), max_size=1)) if draw(st.booleans()) else []
    references = st.one_of(text, text, TEXTS, st.none())

    def make() -> dict[str, Any]:
        return {"prompt": draw(text), "reference": draw(references)} | {name: draw(EXTRA[name]) for name in extra}

    made = [make() for _ in range(draw(st.integers(2, 5)))]
    if draw(st.integers(0, 2)) == 0:
        spoil(draw, made[draw(st.integers(0, len(made) - 1))])
    return made


def check_run(trainer_class: type, data: st.DataObject, tiny_model: Callable, tokenizer: Any) -> None:
    """Two steps leave finite weights, or the error is ours or TRL's own."""
    settings, is_offline = (
        {"max_steps": 2, "per_device_train_batch_size": 2},
        trainer_class in (ALoLTrainer, CoPGTrainer),
    )
    if is_offline:
        made = data.draw(rows(), label="rows")
        settings |= {"max_length": data.draw(st.sampled_from([8, 64, None]), label="max_length")}
        if trainer_class is ALoLTrainer:
            settings |= {"baseline": data.draw(st.sampled_from(["value", "group_mean", "none"]), label="baseline")}
    else:
        made = data.draw(prompts(), label="rows")
        settings |= {"max_completion_length": 4, "num_generations": data.draw(st.sampled_from([1, 2]), label="k")}
    for row in made:  # 50,000 tokens are too many for attention
        row.update((name, value[:1000]) for name, value in row.items() if isinstance(value, str))
    dataset = data.draw(containers(made), label="dataset")
    funcs = data.draw(st.one_of(st.none(), JUDGES) if is_offline else JUDGES, label="funcs")
    with TemporaryDirectory() as folder, time_limit():
        args = cpu_args(CONFIGS[trainer_class], folder, **settings)
        try:
            trainer = trainer_class(
                tiny_model(), reward_funcs=funcs, args=args, train_dataset=dataset, processing_class=tokenizer
            )
            trainer.train()
        except (ValueError, TypeError, RuntimeError) as error:
            assert is_ours(error, Path(trl.__file__).parent), repr(error)
            assert not [*Path(folder).rglob("*.tmp")]
        else:
            assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("trainer_class", CONFIGS)
@settings(FEW, max_examples=3)
@given(data=st.data())
def test_runs(trainer_class, data, tiny_model, tokenizer):
    check_run(trainer_class, data, tiny_model, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", CONFIGS)
@settings(MANY, max_examples=20)
@given(data=st.data())
def test_many_runs(trainer_class, data, tiny_model, tokenizer):
    check_run(trainer_class, data, tiny_model, tokenizer)
