"""The cost of trainers beside TRL's: what is compared, and that a trainer which does more is seen to."""

import json
import math
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import trl
from peft import PeftModel
from transformers import LlamaConfig
from trl import SFTTrainer

from benchmarks import speed
from benchmarks.memory import SHAPES
from benchmarks.methods import METHODS, Method
from benchmarks.speed import KINDS, Setting, Stopwatch, beside_first, make_trainer, run_speed, take_turns
from trl_lol._trl import compute_flops_per_token


SMALL = Setting(batch_size=4, steps=4, rounds=2, completion_tokens=6)


class TwiceSFTTrainer(SFTTrainer):
    """Does all of its work twice."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        super().training_step(model, dict(inputs), num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


class Twice(Method):
    trainer_class: ClassVar[type] = TwiceSFTTrainer


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """SFT, SFT again, and SFT that does its work twice."""
    sft = METHODS["SFT on all"]
    monkeypatch.setitem(METHODS, "again", sft)
    monkeypatch.setitem(METHODS, "twice", Twice(sft.trainer, sft.rows, settings=sft.settings))
    return "SFT on all", "again", "twice"


def test_ratio_of_work(methods, monkeypatch):
    """
    On a clock that counts the numbers that linear layers are given, SFT beside itself is 1 and twice the work is 2,
    exactly and in each round. That it has seen twice as many tokens is found out before.
    """
    work = [0]
    forward = torch.nn.Linear.forward

    def counted(self, x):
        work[0] += x.numel()
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    monkeypatch.setattr(speed, "clock", lambda: float(work[0]))
    rounds = take_turns(methods, SMALL)
    with pytest.raises(RuntimeError, match="not of the same number of tokens"):
        beside_first(rounds)
    for result in rounds["twice"]:
        result["tokens"] //= 2
    results = beside_first(rounds)
    assert [results[name]["range"] for name in methods] == [(1, 1), (1, 1), (2, 2)]
    assert [results[name]["ratio"] for name in methods] == [1, 1, 2]


def test_ratio_of_time(methods):
    """The real clock has noise: 1 and 2 are told apart by their geometric mean."""
    rounds = take_turns(methods, SMALL)
    for result in rounds["twice"]:
        result["tokens"] //= 2
    results = beside_first(rounds)
    assert results["again"]["ratio"] < math.sqrt(2) < results["twice"]["ratio"]


def test_drift_cancels(monkeypatch):
    """
    A machine on which each training takes e^d times as long as the one before. Forth, the third of three comes 2 after
    the first, a ratio of e^{2d}; back, it comes 2 before, e^{−2d}: the median of an even number of rounds is their
    mean, cosh 2d. The control: without the way back it would be e^{2d}.
    """
    drift, trainings = 0.01, [0]

    class Fake:
        def __init__(self, name):
            pass

        def round(self):
            trainings[0] += 1
            return {"seconds": math.exp(drift * trainings[0]), "tokens": 7, "generation": 0.0}

    monkeypatch.setattr(speed, "Stopwatch", Fake)
    monkeypatch.setattr(speed, "make_trainer", lambda name, setting, folder: name)
    results = beside_first(take_turns(("a", "b", "c"), SMALL))
    assert results["c"]["ratio"] == pytest.approx(math.cosh(2 * drift), rel=1e-12)
    assert results["c"]["range"] == pytest.approx((math.exp(-2 * drift), math.exp(2 * drift)), rel=1e-12)
    assert results["c"]["ratio"] < math.exp(2 * drift) - drift


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_same(kind, tmp_path):
    """Offline all sequences of four steps, once; online two completions of each of two prompts, four times."""
    trainers = {name: make_trainer(name, SMALL, tmp_path / name) for name in KINDS[kind]}
    rounds = {name: Stopwatch(trainer).round() for name, trainer in trainers.items()}
    counts = {name: result["tokens"] for name, result in rounds.items()}
    assert len(set(counts.values())) == 1, counts
    if kind == "offline":
        expected = sum(len(row["input_ids"]) for row in trainers["SFT on all"].train_dataset)
    else:
        trainer = trainers["GRPO"]
        prompts = [row["prompt"] for row in trainer.train_dataset.select(range(2))]
        ids = trainer.processing_class.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
        expected = 4 * sum(2 * (len(row) + SMALL.completion_tokens) for row in ids)
    assert counts[KINDS[kind][0]] == expected
    for result in rounds.values():
        assert sum(result[phase] for phase in speed.PHASES) == pytest.approx(result["seconds"])
        assert (result["generation"] > 0) == (result["scoring"] > 0) == (kind == "online")


@pytest.mark.parametrize("kind", KINDS)
def test_shape(kind, tmp_path, monkeypatch):
    """Random weights, an adapter, and 4 × 4 sequences of 5 and 6 tokens, with an EOS offline."""
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    monkeypatch.setitem(SHAPES, "tiny", config)
    setting = replace(SMALL, shape="tiny", prompt_tokens=5)
    assert setting.name == "tiny_lora_cpu"
    for name in KINDS[kind]:
        trainer = make_trainer(name, setting, tmp_path / name)
        assert isinstance(trainer.model, PeftModel) and trainer.args.bf16 and trainer.args.gradient_checkpointing
        assert Stopwatch(trainer).round()["tokens"] == 4 * 4 * (5 + 6 + (kind == "offline"))


def test_mfu(monkeypatch):
    """Three batches of 2 × 8 tokens in what a stepping clock takes for a second, on a GPU that TRL knows."""
    model, seconds = torch.nn.Module(), count()
    model.forward = lambda attention_mask: None
    model.config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    mask = torch.ones(2, 8)
    trainer = SimpleNamespace(
        model=model, args=SimpleNamespace(bf16=True), train=lambda: [model(attention_mask=mask) for _ in range(3)]
    )
    monkeypatch.setattr(speed, "clock", lambda: float(next(seconds)))
    assert "mfu" not in Stopwatch(trainer).round()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    result = Stopwatch(trainer).round()
    assert result["tokens"] == 48 and result["seconds"] == result["update"] == 1
    assert result["mfu"] == pytest.approx(100 * 48 * compute_flops_per_token(model.config, 8) / 989e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "one that TRL does not know")
    assert "mfu" not in Stopwatch(trainer).round()


def test_other_tokens_are_refused():
    turn = {"seconds": 1.0, "generation": 0.0, "tokens": 10}
    assert beside_first({"a": [turn], "b": [turn]})["b"]["ratio"] == 1
    with pytest.raises(RuntimeError, match=r"number of tokens.*'b': \[11\]"):
        beside_first({"a": [turn], "b": [turn | {"tokens": 11}]})
    with pytest.raises(RuntimeError, match="number of tokens"):
        beside_first({"a": [turn, turn | {"tokens": 9}], "b": [turn, turn | {"tokens": 9}]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 6}, "`batch_size=6` must be a multiple of 4"),
        ({"steps": 0}, "`steps=0` must be"),
        ({"rounds": 3}, "`rounds=3` must be a multiple of 2"),
        ({"methods": ["PPO", "KTO"]}, "must be some of A-LoL, CoPG"),
        ({"model": "x", "shape": "Llama-3.1-8B"}, "exclude each other"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        run_speed(**fields)


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """
    The whole of it, for one method, whose memory alone is taken in a process of its own, to save time. It is more than
    that of 1.5 million weights, their gradients and two moments, of 4 bytes each.
    """
    apart, called = speed.apart, []

    def sometimes_apart(function, *args):
        called.append((function.__name__, args[0]))
        return apart(function, *args) if args[0] == "A-LoL" else function(*args)

    monkeypatch.setattr(speed, "apart", sometimes_apart)
    path = run_speed(tmp_path, methods=["A-LoL"], **asdict(SMALL))
    names = ["SFT on all", "A-LoL"]
    assert called == [("take_turns", names), *(("peak_memory", name) for name in names)]
    result = json.loads(path.read_text())
    assert path.name == "toy_full_cpu.json" and result["kinds"].keys() == {"offline"}
    costs = result["kinds"]["offline"]
    assert list(costs) == names and costs["A-LoL"]["peak_memory_mb"] > 4 * 4 * 1.5
    assert all("mfu" not in cost["median"] and len(cost["rounds"]) == 2 for cost in costs.values())
    assert result["machine"]["threads"] == 1 and result["versions"]["trl"] == trl.__version__
    text = (tmp_path / "README.md").read_text()
    assert "## `toy_full_cpu`" in text and "| **SFT on all** | 1 |" in text
    assert f"| A-LoL | {costs['A-LoL']['ratio']:.3f} |" in text
