"""
Rows and reward functions that nobody has thought of: either they work, or the error is one of ours and says what was
found. Every test stands here twice: with few cases, the same each time, and with many others, marked slow: 10,000
without training, and 20 runs of each trainer.
"""

import json
import linecache
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trl
from conftest import cpu_args
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from strategies import EXTRA, JUDGES, MESSAGE, ODD_WEIGHTS, TEXTS, WEIGHTS, Judge, containers, rows, spoil

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
    found = members(tokenized)
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
            raw = [*dataset]
            of_rows = [members(tokenize_row(row, 0, tokenizer, tokenizer.eos_token)) for row in raw]
            found = [members(row) for row in prepared]
            if name == "A-LoL":
                assert found == [[member] for row in of_rows for member in row]
                continue
            joined: dict[str, list] = {}
            is_joined = "completion" in raw[0] and not raw[0].keys() & {"completions", "chosen"}
            for index, (row, of_row) in enumerate(zip(raw, of_rows, strict=True)):
                key = [row["prompt"], row.get("tools"), row.get("chat_template_kwargs")] if is_joined else index
                joined.setdefault(json.dumps(key), []).extend(of_row)
            assert found == [group for group in joined.values() if len(group) >= 2]


def members(row: dict[str, Any]) -> list[tuple[list[int], float]]:
    """The tokens and the reward of each completion of a row that is tokenised."""
    return [(row["prompt_ids"] + ids, r) for ids, r in zip(row["completion_ids"], row["rewards"], strict=True)]


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


@settings(FEW, max_examples=200)
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
