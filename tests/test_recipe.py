"""The pieces of the recipes that turn data round. That they run is what `.ci/run` checks."""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset


sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import alol_hh
import common
import copg_gsm8k


needs_math_verify = pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed")


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
    assert common.as_pairs(rows)[:] == {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}
    assert common.as_pairs(alol_hh.by_score(rows))["chosen"][:] == ["c", "f"]
    assert common.as_completions(rows, chosen_only=True)["completion"][:] == ["c", "d"]
    assert common.as_completions(rows, chosen_only=False)["completion"][:] == ["c", "e", "d", "f"]


def test_best_against_worst():
    """The second row is tied, and so is the third once its null, which is not scored, is left out."""
    rows = Dataset.from_dict(
        {
            "prompt": list("abcd"),
            "completions": [["p", "q", "r"], ["p", "q"], ["p", "q", "r"], ["p", "q", "r"]],
            "rewards": [[0.0, 1.0, -1.0], [1.0, 1.0], [0.0, None, 0.0], [None, 0.0, 1.0]],
            "subset": list("wxyz"),
        }
    )
    pairs = copg_gsm8k.best_against_worst(rows)
    assert pairs[:] == {"prompt": ["a", "d"], "chosen": ["q", "r"], "rejected": ["r", "q"]}
    assert len(copg_gsm8k.best_against_worst(rows.select([1, 2]))) == 0


def test_prompts_from_a_template_and_messages():
    row = {"question": "1 + 1?", "completions": ["2", "3"]}
    assert copg_gsm8k.render(dict(row), "Q: {question}\n", False) == {**row, "prompt": "Q: 1 + 1?\n"}
    rendered = copg_gsm8k.render({"prompt": "1 + 1?", "completions": ["2"]}, None, True)
    assert rendered["prompt"] == [{"role": "user", "content": "1 + 1?"}]
    assert rendered["completions"] == [[{"role": "assistant", "content": "2"}]]
    pair = copg_gsm8k.render({"prompt": "a", "chosen": "b", "rejected": "c"}, None, True)
    assert pair["chosen"] == [{"role": "assistant", "content": "b"}] and pair["rejected"][0]["content"] == "c"


@needs_math_verify
def test_math_verify_reads_what_models_and_gsm8k_write():
    gold = ["24", "3 * 8 = <<3*8=24>>24 eggs\n#### 24", "1,024 in all\n#### 1,024", "\\frac{1}{2}", "no number", ""]
    right = ["3 * 8 = 24\nA: 24", "The answer is \\boxed{24}.", "#### 1024", "A: 0.5", "A: 24", "A: 24"]
    assert copg_gsm8k.math_verify([""] * 6, right, gold) == [1.0, 1.0, 1.0, 1.0, None, None]
    # The last number counts, and it is the gold solution's last that is compared with, not its first
    wrong = ["24 eggs less 2\nA: 22", "A: 3", "A: 1", "A: 2", "", ""]
    assert copg_gsm8k.math_verify([""] * 6, wrong, gold) == [0.0, 0.0, 0.0, 0.0, None, None]
    messages = [[{"role": "assistant", "content": "A: 24"}], [{"role": "assistant", "content": ""}]]
    assert copg_gsm8k.math_verify([""] * 2, messages, ["24", "24"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_template": "{question}"}, "needs text in the columns question, and the columns are prompt, answer"),
        ({"prompt_template": "{chat}"}, "needs text in the columns chat"),
        ({"answer_column": "gold", "prompt_template": ""}, "`answer_column='gold'`. Give the column"),
        ({"reward": "none"}, "nothing has scored"),
        ({"dataset_name": None}, "The embedded world has a model of its own"),
        ({"dataset_name": None, "model_name_or_path": None}, "the embedded world has none"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(tmp_path, monkeypatch, options, message):
    rows = {"prompt": ["a"] * 2, "answer": ["1"] * 2, "chat": [[{"role": "user", "content": "a"}]] * 2}
    Dataset.from_dict(rows).to_json(tmp_path / "data" / "train.jsonl")
    options = {"dataset_name": tmp_path / "data", "model_name_or_path": "none", "reward": "math_verify", **options}
    command = [str(x) for name, value in options.items() if value is not None for x in (f"--{name}", value)]
    command += (
        f"--num_completions 2 --output_dir {tmp_path}/out --dataset_config default --use_cpu true --bf16 0".split()
    )
    config = Path(copg_gsm8k.__file__).parent / "configs" / "copg_gsm8k_lora.yaml"
    monkeypatch.setattr(sys, "argv", ["copg_gsm8k.py", "--config", str(config), *command])
    monkeypatch.setattr(copg_gsm8k, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match=re.escape(message)):
        copg_gsm8k.main()
    monkeypatch.setattr(copg_gsm8k, "find_spec", lambda name: None)
    if options["dataset_name"] is not None and options["reward"] != "none":
        with pytest.raises(ImportError, match="pip install math-verify"):
            copg_gsm8k.main()


def test_ranking_by_log_ratio(monkeypatch, tokenizer):
    """Three pairs with log-ratios 2 > 1, 3 > 0 and 1 < 2 for (better, worse): two of three are ranked right. A pair of
    equal rewards does not count."""
    rows = Dataset.from_dict(
        {"prompt": list("abcd"), "completions": [["x", "y"]] * 4, "rewards": [[1.0, 0.0]] * 3 + [[1.0, 1.0]]}
    )
    logps = {"policy": [2.0, 1.0, 3.0, 0.0, 1.0, 2.0, 9.0, 0.0], "reference": [0.0] * 8}
    monkeypatch.setattr(common, "completion_logps", lambda model, *args: torch.tensor(logps[model]))
    result = common.ranking("policy", "reference", tokenizer, rows)
    assert result["pair_accuracy"] == pytest.approx(2 / 3)
    assert -1 <= result["spearman"] <= 1
    singles = Dataset.from_dict({"prompt": list("abcdefgh"), "completion": ["x"] * 8, "reward": [0.0, 1.0] * 4})
    assert result.keys() - common.ranking("policy", "reference", tokenizer, singles).keys() == {"pair_accuracy"}


def test_prompts_and_a_verifier_are_enough(tmp_path, monkeypatch, tiny_model, tokenizer):
    """Sampling, scoring, training, comparing and judging, from a folder with questions and answers."""
    pytest.importorskip("math_verify")
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split, size in (("train", 6), ("test", 2)):
        questions = {
            "question": [f"What is {i} + 1?" for i in range(size)],
            "answer": [f"{i + 1}" for i in range(size)],
        }
        Dataset.from_dict(questions).to_json(tmp_path / "data" / f"{split}.jsonl")
    options = {
        "config": Path(copg_gsm8k.__file__).parent / "configs" / "copg_gsm8k_sample.yaml",
        "dataset_name": tmp_path / "data", "dataset_config": "default", "model_name_or_path": tmp_path / "model",
        "output_dir": tmp_path / "out", "num_completions": 3, "max_new_tokens": 4, "max_steps": 1, "use_cpu": True,
        "bf16": False, "dtype": "float32", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    command = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["copg_gsm8k.py", *command])
    monkeypatch.chdir(tmp_path)
    copg_gsm8k.main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"reference", "CoPG"} <= results.keys() and results["CoPG"]["reward"] >= 0
    assert list((tmp_path / "out" / "_cache").glob("completions*"))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
