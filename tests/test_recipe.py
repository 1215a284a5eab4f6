"""The pieces of the recipe that turn data round. That it runs is what `.ci/run` checks."""

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset


sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import alol_hh


def test_hh_text_becomes_messages():
    talk = "\n\nHuman: Hi\n\nAssistant: Hello.\nHow can I help?\n\nHuman: Why\n\nwhy?\n\nAssistant:"
    row = alol_hh.hh_to_messages({"chosen": f"{talk} Because.", "rejected": f"{talk} No"})
    assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "user"]
    assert [m["content"] for m in row["prompt"]] == ["Hi", "Hello.\nHow can I help?", "Why\n\nwhy?"]
    assert row["chosen"] == [{"role": "assistant", "content": "Because."}]
    assert row["rejected"] == [{"role": "assistant", "content": "No"}]


def test_what_the_other_methods_train_on():
    rows = Dataset.from_dict(
        {
            "prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"], "subset": ["x", "y"],
            "chosen_reward": [1.0, 0.0], "rejected_reward": [0.0, 1.0],
        }
    )  # fmt: skip
    assert alol_hh.as_pairs(rows)[:] == {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}
    assert alol_hh.as_pairs(rows, by_score=True)["chosen"][:] == ["c", "f"]
    assert alol_hh.as_completions(rows, chosen_only=True)["completion"][:] == ["c", "d"]
    assert alol_hh.as_completions(rows, chosen_only=False)["completion"][:] == ["c", "e", "d", "f"]


def test_ranking_by_log_ratio(monkeypatch, tokenizer):
    """Three pairs with log-ratios 2 > 1, 3 > 0 and 1 < 2 for (better, worse): two of three are ranked right. A pair of
    equal rewards does not count."""
    rows = Dataset.from_dict(
        {"prompt": list("abcd"), "completions": [["x", "y"]] * 4, "rewards": [[1.0, 0.0]] * 3 + [[1.0, 1.0]]}
    )
    logps = {"policy": [2.0, 1.0, 3.0, 0.0, 1.0, 2.0, 9.0, 0.0], "reference": [0.0] * 8}
    monkeypatch.setattr(alol_hh, "completion_logps", lambda model, *args: torch.tensor(logps[model]))
    result = alol_hh.ranking("policy", "reference", tokenizer, rows)
    assert result["pair_accuracy"] == pytest.approx(2 / 3)
    assert -1 <= result["spearman"] <= 1
    singles = Dataset.from_dict({"prompt": list("abcdefgh"), "completion": ["x"] * 8, "reward": [0.0, 1.0] * 4})
    assert result.keys() - alol_hh.ranking("policy", "reference", tokenizer, singles).keys() == {"pair_accuracy"}
