"""The pieces of the recipes that turn data round. That they run is what `.ci/run` checks."""

import json
import re
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification


sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import alol_hh
import apa_hh
import common
import copg_gsm8k
import ppo_hh


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


def run_recipe(monkeypatch, recipe, options):
    command = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", [f"{recipe.__name__}.py", *command])
    recipe.main()


@pytest.mark.parametrize(("recipe", "method"), [(ppo_hh, "PPO"), (apa_hh, "APA")])
def test_online_on_the_embedded_world(tmp_path, monkeypatch, recipe, method):
    """8 completions per batch and 2 passes in minibatches of 4: 4 updates, from the YAML of the recipe itself."""
    monkeypatch.setattr(common.toy, "make_model", partial(common.toy.make_model, hidden_size=32))
    options = {
        "config": recipe.TOY_CONFIG, "output_dir": tmp_path / "out", "toy_prompts": 60, "max_test_rows": 3,
        "reference_sft_steps": 1, "max_completion_length": 4, "num_answers": 1, "max_steps": 4, "use_cpu": True,
        "per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2, "logging_steps": 1,
    }  # fmt: skip
    run_recipe(monkeypatch, recipe, options)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == ["reference", "SFT on chosen", "RLOO", method]
    assert results["reference"]["kl"] == 0 != results[method]["kl"]
    assert all(0 <= x["reward"] <= 1 and -3 <= x["train_reward"] <= 3 for x in results.values())
    assert all(x["length"] <= 4 for x in results.values())
    assert (tmp_path / "out" / "training.png").exists() and (tmp_path / "out" / "value_head.safetensors").exists()
    assert not list((tmp_path / "out").glob("**/checkpoint-*"))


@pytest.fixture
def reward_model(tmp_path, tokenizer):
    """Makes a tiny reward model in a folder, with scores of about ±`scale` / 10."""

    def make(seed, scale=1.0):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=1, num_labels=1, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model = LlamaForSequenceClassification(config).eval()
        model.score.weight.data *= scale
        model.save_pretrained(tmp_path / f"reward{seed}")
        tokenizer.save_pretrained(tmp_path / f"reward{seed}")
        return model, tmp_path / f"reward{seed}"

    return make


def test_reward_models_train_and_judge(tmp_path, monkeypatch, tiny_model, tokenizer, pairs, reward_model):
    """From a folder with preferences, with LoRA. The judge's scores are a thousand times as large, so that the two are
    told apart."""
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split, rows in (("train", pairs.take(8)), ("test", pairs.skip(100).take(4))):
        rows.to_json(tmp_path / "data" / f"{split}.jsonl")
    (_, folder), (_, judge_folder) = reward_model(0), reward_model(1, scale=1000.0)
    options = {
        "config": Path(ppo_hh.__file__).parent / "configs" / "ppo_hh_lora.yaml", "output_dir": tmp_path / "out",
        "dataset_name": tmp_path / "data", "model_name_or_path": tmp_path / "model", "reward_model": folder,
        "judge_model": judge_folder, "max_completion_length": 4, "max_steps": 1, "use_cpu": True, "bf16": False,
        "dtype": "float32", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_iterations": 1,
        "steps_per_generation": 1, "reference_sft_batch_size": 4,
    }  # fmt: skip
    run_recipe(monkeypatch, ppo_hh, options)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == ["reference", "SFT on chosen", "RLOO", "PPO"]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert all(abs(x["reward"]) > 10 > 1 > abs(x["train_reward"]) > 0 for x in results.values())


def test_scores_of_a_reward_model(reward_model, pairs):
    """One at a time, without padding, it gives the same as in a batch, and the answer matters."""
    model, folder = reward_model(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = pairs.take(5)
    prompts, completions = rows["prompt"][:], rows["chosen"][:]
    scores = common.scores_of(model, tokenizer, batch_size=2)(prompts, completions)
    for score, prompt, completion in zip(scores, prompts, completions, strict=True):
        ids = tokenizer.apply_chat_template(prompt + completion, return_tensors="pt", return_dict=True)
        assert score == pytest.approx(model(**ids).logits.item(), abs=1e-6)
    assert common.scores_of(model, tokenizer)(prompts, rows["rejected"][:]) != pytest.approx(scores, abs=1e-3)
    texts = common.scores_of(model, tokenizer)(["a", "b"], [" c", " d e"])
    assert texts[1] == pytest.approx(model(**tokenizer("b d e", return_tensors="pt")).logits.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "none"}, "Give `--reward_model`"),
        ({"config": ppo_hh.TOY_CONFIG, "judge_model": "none"}, "The embedded world has rewards of its own"),
    ],
)
def test_rewards_of_the_online_recipes(tmp_path, monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        run_recipe(monkeypatch, ppo_hh, {"use_cpu": True, "bf16": False, "output_dir": tmp_path, **options})
