"""Metrics as reward functions, and bounds and scales of others."""

import asyncio
import copy
import importlib.util
import inspect
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cpu_args, logged
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification, pipeline
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_lol import score_dataset
from trl_lol._trl import is_async_callable
from trl_lol.rewards import (
    ClassifierReward,
    ColumnReward,
    MetricReward,
    RewardModel,
    cache_rewards,
    call_reward_funcs,
    clip,
    sigmoid,
    standardize,
    weighted_sum,
)


# A metric as users have it, in a file of its own: how many words the prediction shares with the (best) reference
METRIC = """
import datasets
import evaluate
import numpy as np

CALLS = []


class Overlap(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        references = {"text": text, "texts": datasets.Sequence(text)}
        features = {"predictions": text}
        if self.config_name in references:
            features["references"] = references[self.config_name]
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references=None, use_aggregator=True):
        CALLS.append(len(predictions))
        scores = []
        for i, prediction in enumerate(predictions):
            texts = [prediction] if references is None else references[i]
            texts = [texts] if isinstance(texts, str) else texts
            scores.append(max(float(len(set(prediction.split()) & set(text.split()))) for text in texts))
        mean = sum(scores) / len(scores)
        return {
            "overlap": np.float64(mean) if use_aggregator else scores,
            "array": np.array(scores),
            "list_of_one": [mean],
            "four": [mean + i for i in range(4)],
            "text": "many",
        }
"""


@pytest.fixture
def overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The metric's module, whose `CALLS` has the number of predictions of each call. Nothing is written elsewhere."""
    (tmp_path / "overlap").mkdir()
    path = tmp_path / "overlap" / "overlap.py"
    path.write_text(METRIC)
    spec = importlib.util.spec_from_file_location("overlap", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "overlap", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "metrics")
    module.CALLS.clear()
    yield module


def message(content: str, role: str = "assistant") -> list[dict]:
    return [{"role": role, "content": content}]


THREE = {"prompts": ["p"] * 3, "completions": ["a b", "a c", "d"], "gold": ["a b c", "a d", "e"]}


# --- MetricReward ---


def test_a_metric_with_one_score_per_example_is_called_once_for_a_batch(overlap):
    """
    "a b" and "a b c" share 2 words, "a c" and "a d" one, "d" and "e" none. The first batch is followed by a call with
    its first completion, to know a score per example from a list that has three entries by chance.
    """
    reward = MetricReward(overlap.Overlap("text"), "overlap", references="gold", use_aggregator=False)
    assert reward.__name__ == "overlap"
    assert reward(**THREE) == [2.0, 1.0, 0.0]
    assert overlap.CALLS == [3, 1]
    assert reward(**THREE) == [2.0, 1.0, 0.0]
    assert overlap.CALLS == [3, 1, 3]


def test_arrays_are_scores_per_example(overlap):
    reward = MetricReward(overlap.Overlap("text"), "array", references="gold")
    assert reward(**THREE) == reward(**THREE) == [2.0, 1.0, 0.0]
    assert overlap.CALLS == [3, 1, 3]


def test_an_aggregating_metric_is_called_for_each_completion(overlap):
    reward = MetricReward(overlap.Overlap("text"), "overlap", references="gold")
    assert reward(**THREE) == [2.0, 1.0, 0.0] and overlap.CALLS == [3, 1, 1, 1]
    assert reward(**THREE) == [2.0, 1.0, 0.0] and overlap.CALLS == [3, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("key", ["overlap", "array", "list_of_one"])
def test_a_batch_of_one_decides_nothing(overlap, key):
    """Of one completion, a list of one entry may be a score per example, or the mean in a list."""
    reward = MetricReward(overlap.Overlap("text"), key, references="gold")
    assert reward(["p"], ["a b"], gold=["a b c"]) == [2.0]
    assert reward(**THREE) == [2.0, 1.0, 0.0]
    assert reward(["p"], ["a b"], gold=["a b c"]) == [2.0]


def test_a_list_of_another_kind_is_no_score_per_example(overlap):
    """Four entries for four completions, as BLEU's precisions; of one completion it is still four."""
    four = {"prompts": ["p"] * 4, "completions": ["a"] * 4, "gold": ["a"] * 4}
    with pytest.raises(ValueError, match=r"'four' of one completion is \[1.0, 2.0, 3.0, 4.0\]"):
        MetricReward(overlap.Overlap("text"), "four", references="gold")(**four)
    with pytest.raises(ValueError, match="'text' of one completion is 'many'"):
        MetricReward(overlap.Overlap("text"), "text", references="gold")(**four)


def test_references_are_texts_messages_or_lists_of_texts(overlap):
    messages = {**THREE, "completions": [message(c) for c in THREE["completions"]]}
    messages["gold"] = [message(g) for g in THREE["gold"]]
    assert MetricReward(overlap.Overlap("text"), "array", references="gold")(**messages) == [2.0, 1.0, 0.0]
    several = {**THREE, "gold": [["b", "a b"], ["x"], ["d d", "e", "d"]]}
    assert MetricReward(overlap.Overlap("texts"), "array", references="gold")(**several) == [2.0, 0.0, 1.0]


@pytest.mark.parametrize(("key", "calls"), [("array", [2, 1]), ("overlap", [2, 1, 1])])
def test_completions_without_a_reference_are_not_scored(overlap, key, calls):
    """Neither with null nor with no texts; the metric sees the other two only. An empty text is a reference."""
    reward = MetricReward(overlap.Overlap("text"), key, references="gold")
    row = {"prompts": ["p"] * 4, "completions": ["a", "a b", "d", "a"], "gold": [None, "a b c", "", None]}
    assert reward(**row) == [None, 2.0, 0.0, None] and calls == overlap.CALLS
    assert reward(["p"] * 2, ["a", "b"], gold=[None, None]) == [None, None] and calls == overlap.CALLS
    several = MetricReward(overlap.Overlap("texts"), key, references="gold")
    assert several(["p"] * 3, ["a b", "a", "a c"], gold=[["b", "a b"], [], ["c"]]) == [2.0, None, 1.0]
    messages = {"prompts": ["p"] * 2, "completions": [message("a b")] * 2, "gold": [None, message("a")]}
    assert reward(**messages) == [None, 1.0]
    assert reward([], [], gold=[]) == []
    scored = score_dataset(Dataset.from_dict({"prompt": ["p"], "completion": ["a"], "gold": [None]}), reward)
    assert scored["reward"][:] == [None]


def test_metrics_without_references(overlap):
    """The number of different words."""
    reward = MetricReward(overlap.Overlap("none"), "array")
    assert reward(["p", "p"], ["a b c", "a a"], gold=["a", "a"]) == [3.0, 1.0]


def test_missing_columns_and_results(overlap):
    with pytest.raises(ValueError, match=r"no column 'gold'.*columns are 'other', 'summary'"):
        MetricReward(overlap.Overlap("text"), "array", references="gold")(["p"], ["a"], summary=["a"], other=[1])
    with pytest.raises(ValueError, match=r"no column 'gold'.*none"):
        MetricReward(overlap.Overlap("text"), "array", references="gold")(["p"], ["a"])
    with pytest.raises(ValueError, match="returns 'overlap', 'array', 'list_of_one', 'four', 'text', and not 'f1'"):
        MetricReward(overlap.Overlap("text"), "f1", references="gold")(**THREE)


def test_a_metric_in_a_folder(overlap, tmp_path, monkeypatch):
    import evaluate

    modules = evaluate.loading.init_dynamic_modules("metric_modules", hf_modules_cache=tmp_path / "modules")
    monkeypatch.setattr("evaluate.loading.init_dynamic_modules", lambda *args, **kwargs: modules)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    reward = MetricReward(str(tmp_path / "overlap"), "array")
    assert reward(["p", "p"], ["a b c", "a a"]) == [3.0, 1.0]


# --- clip and standardize ---

CALLS: list[int] = []  # completions of each call of `length`. Global, so that it is no part of the function's hash


@pytest.fixture(autouse=True)
def _no_calls_yet() -> None:
    CALLS.clear()


def length(prompts, completions, **kwargs):
    """The number of letters; "-" is not scored."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    CALLS.append(len(texts))
    return [None if text == "-" else float(len(text)) for text in texts]


async def slow_length(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return length(prompts, completions)


def same(prompts, completions, **kwargs):
    return [0.1] * len(completions)


def fourth(prompts, completions, **kwargs):
    return [len(c) / 10 + 1e9 for c in completions]


def unscored(prompts, completions, **kwargs):
    return [None] * len(completions)


def test_clip():
    completions = ["", "a", "abc", "-", "abcdef"]
    args = (["p"] * 5, completions)
    assert clip(length, 1.0, 3.5)(*args) == [1.0, 1.0, 3.0, None, 3.5]
    assert clip(length, low=1.0)(*args) == [1.0, 1.0, 3.0, None, 6.0]
    assert clip(length, high=2)(*args) == [0.0, 1.0, 2.0, None, 2.0]
    assert clip(length)(*args) == length(*args)
    assert clip(length, 2.0, 2.0)(*args) == [2.0, 2.0, 2.0, None, 2.0]
    assert clip(length).__name__ == "clip(length)"
    for low, high in ((2.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="is above"):
            clip(length, low, high)
    with pytest.raises(TypeError, match="reward function"):
        clip([length])


def test_standardize_with_known_numbers():
    """(length − 2) / 0.5."""
    reward = standardize(length, mean=2.0, std=0.5)
    assert reward(["p"] * 4, ["", "ab", "-", "abc"]) == [-4.0, 0.0, None, 2.0]
    assert reward.__name__ == "standardize(length)"


def test_async_functions_stay_async():
    reward = standardize(clip(slow_length, high=3.0), mean=1.0, std=2.0)
    assert reward.__name__ == "standardize(clip(slow_length))"
    assert is_async_callable(reward) and not is_async_callable(standardize(clip(length), mean=1.0, std=2.0))
    assert asyncio.run(reward(["p"] * 3, ["a", "-", "abcd"])) == [0.0, None, 1.0]
    assert call_reward_funcs([reward, length], [2.0, 1.0], ["p"] * 3, ["a", "-", "abcd"]) == [1.0, None, 6.0]
    rows = Dataset.from_dict({"prompt": ["p"] * 2, "completion": ["a", "abc"]})
    assert asyncio.run(standardize(slow_length, rows)(["p"], ["abcd"])) == [2.0]


# Lengths 1, 3, 1, 3 in each: mean 2, standard deviation 1
FORMATS = {
    "rows": {"prompt": ["p"] * 5, "completion": ["a", "abc", "-", "b", "abd"]},
    "conversations": {"prompt": [message("p", "user")] * 2, "completion": [message("a"), message("abc")]},
    "pairs": {"prompt": ["p"] * 2, "chosen": ["a", "abc"], "rejected": ["abd", "b"]},
    "groups": {"prompt": ["p"] * 3, "completions": [["a"], ["-", "abc", "abd", "b"], []]},
}


@pytest.mark.parametrize("form", FORMATS)
def test_standardize_is_fitted_once(form):
    """On all completions of the dataset. A batch of its own makes no difference: "abcde" is (5 − 2) / 1 everywhere."""
    reward = standardize(length, Dataset.from_dict(FORMATS[form]))
    fitted = len(CALLS)
    assert fitted == 1
    assert reward(["p"], ["abcde"]) == [3.0]
    assert reward(["p"] * 3, ["abcde", "abcdefg", "-"]) == [3.0, 5.0, None]
    assert len(CALLS) == fitted + 2
    scored = score_dataset(Dataset.from_dict({"prompt": ["p"] * 2, "completion": ["abcde"] * 2}), reward)
    assert scored["reward"][:] == [3.0, 3.0] and len(CALLS) == fitted + 3


def test_standardize_reckons_in_float64():
    """
    Rewards 1e9 + 0, 0.1 and 0.2: in float32, whose neighbours of 1e9 are 64 apart, they would all be equal. Standard
    deviation √(2/3) / 10.
    """
    rows = Dataset.from_dict({"prompt": ["p"] * 3, "completion": ["", "a", "ab"]})
    scores = standardize(fourth, rows)(["p"] * 3, ["", "a", "ab"])
    assert scores == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)], abs=1e-5)  # 1e-16 · 1e9 / 0.08
    assert statistics.pstdev(scores) == pytest.approx(1, abs=1e-6)


def test_the_scale_is_saved_and_read_again(tmp_path):
    """Nothing is scored the second time, not even with another dataset."""
    path = tmp_path / "run" / "scale.json"
    rows = Dataset.from_dict(FORMATS["rows"])
    first = standardize(length, rows, path=path)
    assert json.loads(path.read_text()) == {"mean": 2.0, "std": 1.0} and CALLS == [5]
    assert list(path.parent.iterdir()) == [path]
    other = Dataset.from_dict({"prompt": ["p"] * 2, "completion": ["abcdefg", ""]})
    for again in (standardize(length, other, path=str(path)), standardize(length, path=path)):
        assert CALLS == [5]
        assert again(["p"], ["abcd"]) == [2.0]
        CALLS.pop()
    assert standardize(length, other)(["p"], ["abcd"]) == [(4.0 - 3.5) / 3.5] != first(["p"], ["abcd"])
    standardize(length, mean=5.0, std=2.0, path=tmp_path / "known.json")
    assert standardize(length, path=tmp_path / "known.json")(["p"], ["abc"]) == [-1.0]


def test_a_saved_scale_and_other_numbers(tmp_path):
    """Neither takes the place of the other without a word; the same numbers will do, as when a run is resumed."""
    path, rows = tmp_path / "scale.json", Dataset.from_dict(FORMATS["rows"])
    standardize(length, mean=5.0, std=0.1 + 0.2, path=path)
    for known in ({"mean": 5.0, "std": 0.1 + 0.2}, {"mean": 5.0}, {}):
        assert standardize(length, path=path, **known)(["p"], ["abc"]) == [-2 / (0.1 + 0.2)]
    for known in ({"mean": 5.0, "std": 0.3}, {"mean": 5.1, "std": 0.1 + 0.2}, {"mean": 0.0}):
        with pytest.raises(ValueError, match=rf"{path} holds the (mean 5.0|std 0.30000000000000004) of this run"):
            standardize(length, path=path, **known)
    for known in ({"mean": 2.0, "std": 1.0}, {"mean": 2.0}, {"std": 1.0}):
        with pytest.raises(ValueError, match="not both"):
            standardize(length, rows, **known)
    assert CALLS == [1, 1, 1]


def test_what_cannot_be_standardised(tmp_path):
    rows, path = Dataset.from_dict(FORMATS["rows"]), tmp_path / "scale.json"
    with pytest.raises(ValueError, match=r"do not differ"):
        standardize(same, rows, path=path)
    with pytest.raises(ValueError, match=r"No completion of the dataset is scored"):
        standardize(unscored, rows, path=path)
    for std in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"do not differ"):
            standardize(length, mean=0.0, std=std, path=path)
    for known in ({}, {"mean": 1.0}, {"std": 1.0}, {"path": path}):
        with pytest.raises(ValueError, match=r"needs a dataset"):
            standardize(length, **known)
    with pytest.raises(TypeError, match="reward function"):
        standardize("gpt2", rows)
    assert not path.exists()


# --- the cache ---


def test_clipped_and_standardised_rewards_are_found_again(tmp_path):
    rows = Dataset.from_dict(FORMATS["pairs"])

    def score(reward: Any) -> list:
        return score_dataset(rows, reward, cache_dir=tmp_path)["chosen_reward"][:]

    def make(high: float = 2.0, mean: float = 1.0) -> Any:
        return standardize(clip(length, high=high), mean=mean, std=2.0)

    assert score(make()) == score(make()) == [0.0, 0.5] and CALLS == [4]
    assert score(make(high=3.0)) == [0.0, 1.0] and score(make(mean=0.0)) == [0.5, 1.0] and CALLS == [4, 4, 4]


def test_scores_of_metrics_are_found_again(tmp_path, monkeypatch, overlap):
    """Until something in the metric's file is changed."""
    reward = MetricReward(overlap.Overlap("none"), "array")
    rows = Dataset.from_dict(FORMATS["pairs"])
    scored = [score_dataset(rows, reward, cache_dir=tmp_path / "cache")["chosen_reward"][:] for _ in range(2)]
    assert scored[0] == scored[1] == [1.0, 1.0]
    assert overlap.CALLS == [4, 1]
    key = reward.cache_key
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda x: source(x).replace("CALLS = []", "CALLS = list()"))
    assert reward.cache_key != key


# --- TRL's own trainers ---


@pytest.mark.parametrize("conversational", [False, True], ids=["standard", "conversational"])
@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)], ids=["GRPO", "RLOO"]
)
def test_adapters_work_in_trls_trainers(
    tmp_path, tokenizer, tiny_model, references, overlap, trainer_class, config_class, conversational
):
    """
    Two steps with all of them at once. What is logged for each is its mean over the completions, scored again by
    `score_dataset` afterwards; the clipped and standardised ones are (mean − 1) / 2 of those below 2, and so on.
    """
    if conversational:
        rows = references.take(8)
    else:
        texts = [{"prompt": r["prompt"][-1]["content"], "reference": r["reference"][0]["content"]} for r in references]
        rows = Dataset.from_list(texts[:8])
    rows = rows.add_column("score", [2.0] * 8)
    config = tiny_model().config
    config.num_labels = 1
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}, "num_hidden_layers": 1}
    bert = BertConfig(vocab_size=768, hidden_size=32, intermediate_size=32, num_attention_heads=2, **labels)
    torch.manual_seed(0)
    classifier = pipeline(
        "text-classification",
        model=BertForSequenceClassification(bert),
        tokenizer=copy.deepcopy(tokenizer),
        device="cpu",
    )
    reward_model = RewardModel(LlamaForSequenceClassification(config), copy.deepcopy(tokenizer))
    reward_model.__name__ = "model"
    adapters = [
        reward_model,
        ClassifierReward(classifier, "good", with_prompt=True),
        MetricReward(overlap.Overlap("text"), "array", references="reference"),
        MetricReward(overlap.Overlap("text"), "overlap", references="reference"),
        clip(reward_model, 0.0, 0.5),
        standardize(ColumnReward("score"), mean=1.0, std=2.0),
        weighted_sum([clip(slow_length, high=2.0), ColumnReward("score")], [1.0, 0.5]),
        cache_rewards(sigmoid(reward_model), tmp_path / "cache"),
    ]
    seen = []

    def scored_again(prompts, completions, completion_ids, reference, score, **kwargs):
        columns = {"reference": reference, "score": score}
        seen.append([call_reward_funcs(f, None, prompts, completions, **columns) for f in adapters])
        return [0.0] * len(completions)

    options = {"num_generations": 4, "max_completion_length": 6, "max_steps": 2, "beta": 0.0}
    trainer = trainer_class(
        tiny_model(),
        reward_funcs=[*adapters, scored_again],
        args=cpu_args(config_class, tmp_path / "out", **options),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(seen) == 2
    for i, func in enumerate(adapters):
        means = logged(trainer, f"rewards/{func.__name__}/mean")
        assert means == pytest.approx([statistics.fmean(scores[i]) for scores in seen], abs=1e-5), func.__name__
    assert logged(trainer, "rewards/standardize(score)/mean") == [0.5, 0.5]
    assert all(len(set(scores[0])) > 1 and len(set(scores[1])) > 1 for scores in seen)
    assert all(scores[2] == scores[3] for scores in seen)
