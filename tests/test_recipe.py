"""The pieces of the recipes that turn data round. That they run is what `.ci/run` checks."""

import json
import re
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig


sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import alol_hh
import apa_hh
import common
import copg_gsm8k
import drpo_tldr
import ppo_hh
import reward_model as reward_recipe

from trl_lol import ALoLConfig, APAConfig, CoPGConfig, DRPOConfig, PPOConfig, RewardModel


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    common.plt.close("all")


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


def test_references_to_train_on():
    """A null and an empty one are none, an answer to messages becomes a message, and no other column is left."""
    texts = Dataset.from_dict({"prompt": list("abcd"), "human": ["c", None, "", "f"], "completion": list("wxyz")})
    assert common.as_references(texts, "human")[:] == {"prompt": ["a", "d"], "completion": ["c", "f"]}
    assert common.as_references(texts, "completion")["completion"][:] == list("wxyz")
    user, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    for reference in ("b", answer):
        rows = common.as_references(Dataset.from_list([{"prompt": user, "reference": reference}]), "reference")
        assert rows[:] == {"prompt": [user], "completion": [answer]}


def test_long_prompts_are_left_out_and_counted(tokenizer, capsys):
    """`ab ab` is at most 5 bytes, so that a limit of its own length lets it in, and one less does not. Around a
    message the template puts 3 tokens: the user's, the end's and the assistant's."""
    size = len(tokenizer("ab ab")["input_ids"])
    rows = Dataset.from_dict({"prompt": ["ab ab", "ab ab ab ab", "ab ab"], "reference": list("xyz")})
    kept = common.drop_long_prompts(DatasetDict(train=rows, test=rows.take(1)), tokenizer, size)
    assert kept["train"]["reference"][:] == ["x", "z"] and len(kept["test"]) == 1
    assert f"more than {size} tokens: 1 of 3 train rows, 0 of 1 test rows" in capsys.readouterr().out
    assert not common.drop_long_prompts(DatasetDict(test=rows), tokenizer, size - 1)["test"]
    messages = DatasetDict(test=Dataset.from_dict({"prompt": [[{"role": "user", "content": "ab ab"}]]}))
    assert len(common.drop_long_prompts(messages, tokenizer, size + 3)["test"]) == 1
    assert not common.drop_long_prompts(messages, tokenizer, size + 2)["test"]


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


@pytest.mark.parametrize(
    ("recipe", "policies"),
    [
        (ppo_hh, ["reference", "SFT on chosen", "RLOO", "PPO"]),
        (apa_hh, ["reference", "SFT on chosen", "RLOO", "APA"]),
        (drpo_tldr, ["reference", "SFT on references", "PPO", "DR-PO"]),
    ],
)
def test_online_on_the_embedded_world(tmp_path, monkeypatch, recipe, policies):
    """8 completions per batch and 2 passes in minibatches of 4: 4 updates, from the YAML of the recipe itself."""
    monkeypatch.setattr(common.toy, "make_model", partial(common.toy.make_model, hidden_size=32))
    options = {
        "config": recipe.TOY_CONFIG, "output_dir": tmp_path / "out", "toy_prompts": 60, "max_test_rows": 3,
        "reference_sft_steps": 1, "max_completion_length": 4, "num_answers": 1, "max_steps": 4, "use_cpu": True,
        "per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2, "logging_steps": 1,
    }  # fmt: skip
    run_recipe(monkeypatch, recipe, options)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == policies
    assert results["reference"]["kl"] == 0 and len({x["kl"] for x in results.values()}) == 4
    assert all(0 <= x["reward"] <= 1 and -3 <= x["train_reward"] <= 3 for x in results.values())
    assert all(x["length"] <= 4 for x in results.values())
    assert (tmp_path / "out" / "training.png").exists() and (tmp_path / "out" / "value_head.safetensors").exists()
    assert not list((tmp_path / "out").glob("**/checkpoint-*"))


def test_one_command_begins_a_run_and_goes_on_with_it(tmp_path, monkeypatch, capsys):
    """The second time after a kill: its last checkpoint is half-written, and its results are missing."""
    monkeypatch.setattr(common.toy, "make_model", partial(common.toy.make_model, hidden_size=32))
    out = tmp_path / "out"
    options = {
        "config": ppo_hh.TOY_CONFIG, "output_dir": out, "toy_prompts": 60, "max_test_rows": 3, "compare": "none",
        "reference_sft_steps": 1, "max_completion_length": 4, "num_answers": 1, "max_steps": 4, "use_cpu": True,
        "per_device_train_batch_size": 4, "steps_per_generation": 1, "num_iterations": 2, "save_strategy": "steps",
        "save_steps": 1, "resume_from_checkpoint": "true",
    }  # fmt: skip
    run_recipe(monkeypatch, ppo_hh, options)
    whole = (out / "results.json").read_text()
    reference = (out / "reference" / "model.safetensors").stat().st_mtime_ns
    assert "the one that the run has begun with" not in capsys.readouterr().out
    (out / "results.json").unlink()
    (out / "checkpoint-4" / "trl_lol.json").unlink()
    run_recipe(monkeypatch, ppo_hh, options)
    assert (out / "results.json").read_text() == whole
    assert "the one that the run has begun with" in capsys.readouterr().out
    assert (out / "reference" / "model.safetensors").stat().st_mtime_ns == reference
    assert (out / "checkpoint-4" / "trl_lol.json").exists()


@pytest.mark.parametrize("min_roll_in", [0, 2])
def test_ppo_beside_drpo_is_the_same_without_resets(tmp_path, monkeypatch, min_roll_in):
    """Only what makes it PPO differs in the arguments, and where the results go. DR-PO's completions are reset to
    chosen answers, and PPO's are not."""
    trainers = []

    class Recorded(drpo_tldr.DRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(drpo_tldr, "DRPOTrainer", Recorded)
    monkeypatch.setattr(common.toy, "make_model", partial(common.toy.make_model, hidden_size=32))
    options = {
        "config": drpo_tldr.TOY_CONFIG, "output_dir": tmp_path / "out", "toy_prompts": 30, "max_test_rows": 1,
        "reference_sft_steps": 0, "max_completion_length": 8, "num_answers": 1, "max_steps": 2, "use_cpu": True,
        "per_device_train_batch_size": 8, "steps_per_generation": 1, "num_iterations": 1, "logging_steps": 1,
        "reset_prob": 1, "min_roll_in": min_roll_in, "compare": "ppo", "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    run_recipe(monkeypatch, drpo_tldr, options)
    drpo, ppo = trainers
    arguments, other = drpo.args.to_dict(), ppo.args.to_dict()
    assert {name for name in arguments if arguments[name] != other[name]} == {
        "output_dir", "reset_prob", "save_strategy",
    }  # fmt: skip
    assert [log["reset_fraction"] for log in drpo.state.log_history if "reset_fraction" in log] == [1.0, 1.0]
    assert [log["reset_fraction"] for log in ppo.state.log_history if "reset_fraction" in log] == [0.0, 0.0]
    chosen = {row[0]["content"] for row in drpo.train_dataset["chosen"]}
    prefixes = [drpo._tokenizer.decode(roll_in) for roll_in in drpo._roll_ins if roll_in]
    assert prefixes and all(any(text.startswith(prefix) for text in chosen) for prefix in prefixes)
    folders = {path.parent for path in (tmp_path / "out").glob("**/checkpoint-*")}
    assert folders == {tmp_path / "out"}  # of the recipe's own method only


def test_plots_show_completions_from_the_prompt_apart(tmp_path):
    """All, from the prompt and from a reset, of the reward and the length; one line where there are no resets."""
    log = {"step": 1, "reward": 2.0, "completions/mean_length": 9.0, "kl/completion": 0.5, "explained_variance": 0.1}
    ppo = {**log, "reward/no_reset": 2.0, "completions/mean_length/no_reset": 9.0}
    drpo = {**log, "reward/no_reset": 1.0, "reward/reset": 3.0}
    drpo |= {"completions/mean_length/no_reset": 8.0, "completions/mean_length/reset": 10.0}
    for entry, expected in (
        (log, [[2.0], [0.5], [9.0], [0.1]]),
        (ppo, [[2.0], [0.5], [9.0], [0.1]]),
        (drpo, [[2.0, 1.0, 3.0], [0.5], [9.0, 8.0, 10.0], [0.1]]),
    ):
        common.plot_online(SimpleNamespace(state=SimpleNamespace(log_history=[entry])), tmp_path)
        axes = common.plt.gcf().axes
        assert [[line.get_ydata()[0] for line in axis.lines] for axis in axes] == expected
        assert [axis.get_legend() is not None for axis in axes] == [len(lines) > 1 for lines in expected]


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


@pytest.mark.parametrize("reference", ["completion", "reference", "chosen", "summary"])
def test_references_from_a_folder(tmp_path, monkeypatch, tiny_model, tokenizer, pairs, reward_model, reference):
    """Texts with `completion`, as TL;DR on the Hub, or `reference`, or a column that is named, and preferences with
    the prompt inside. The model is fine-tuned on them first. A prompt of more than 200 tokens is left out."""
    rows = pairs.take(12)
    if reference == "chosen":
        inside = {n: [p + c for p, c in zip(rows["prompt"], rows[n], strict=True)] for n in ("chosen", "rejected")}
        rows = Dataset.from_dict(inside)
    else:
        prompts = [f"POST: {p[-1]['content']} TL;DR:" for p in rows["prompt"][:11]] + ["a " * 300]
        rows = Dataset.from_dict({"prompt": prompts, reference: [f" {c[0]['content']}" for c in rows["chosen"]]})
    for split, part in (("train", rows.select(range(2, 12))), ("test", rows.take(2))):
        part.to_json(tmp_path / "data" / f"{split}.jsonl")
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    columns = []

    class Recorded(drpo_tldr.DRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            columns.append((len(self.train_dataset), self.train_dataset.column_names, self._reference_column))

    monkeypatch.setattr(drpo_tldr, "DRPOTrainer", Recorded)
    options = {
        "config": Path(drpo_tldr.__file__).parent / "configs" / "drpo_tldr_lora.yaml", "output_dir": tmp_path / "out",
        "dataset_name": tmp_path / "data", "model_name_or_path": tmp_path / "model",
        "reward_model": reward_model(0)[1], "judge_model": reward_model(1)[1], "max_completion_length": 8,
        "max_steps": 1, "use_cpu": True, "bf16": False, "dtype": "float32", "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1, "lora_r": 4, "reference_sft_batch_size": 4, "reference_sft_steps": 1,
        "max_prompt_length": 200, "compare": "sft",
    }  # fmt: skip
    if reference == "summary":
        options["reference_column"] = "summary"
    run_recipe(monkeypatch, drpo_tldr, options)
    [(size, found, column)] = columns
    assert column == reference and sorted(found) == sorted(["prompt", reference])
    assert size == (10 if reference == "chosen" else 9)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == ["reference", "SFT on references", "DR-PO"]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "none"}, "Give `--reward_model`"),
        ({"config": ppo_hh.TOY_CONFIG, "judge_model": "none"}, "The embedded world has rewards of its own"),
        ({"config": ppo_hh.TOY_CONFIG, "compare": "ppo"}, "is the same run without resets, and this one has none"),
    ],
)
def test_rewards_of_the_online_recipes(tmp_path, monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        run_recipe(monkeypatch, ppo_hh, {"use_cpu": True, "bf16": False, "output_dir": tmp_path, **options})


def test_accuracy_of_a_reward_model():
    """Of one pair ranked right, one wrong and one tied, one and a half are right: 1/2 ± √(1/2 · 1/2 / 3). A pair with
    a completion that is not scored does not count."""
    pairs = Dataset.from_dict({"chosen_reward": [2.0, 0.0, 1.0, None], "rejected_reward": [1.0, 3.0, 1.0, 0.0]})
    assert reward_recipe.accuracy(pairs) == pytest.approx({"accuracy": 0.5, "standard_error": (1 / 12) ** 0.5})
    assert reward_recipe.accuracy(pairs.take(1)) == {"accuracy": 1.0, "standard_error": 0.0}


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("from_folder", [False, True])
def test_a_reward_model_is_trained_saved_and_used(
    tmp_path, monkeypatch, tiny_model, tokenizer, scored_pairs, from_folder, peft
):
    """What `RewardModel` loads from the folder scores as what was trained, and not as what training started from: 4
    steps at 1e-2 move the scores. A-LoL then trains on them."""
    trainers = []

    class Recorded(reward_recipe.ResumableRewardTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)
            if peft:
                assert isinstance(self.model, PeftModel)
            self.initial_scores = scores(RewardModel(self.model, self.processing_class))

    def scores(reward):
        return torch.tensor(reward(scored_pairs["prompt"][:8], scored_pairs["chosen"][:8]))

    monkeypatch.setattr(reward_recipe, "ResumableRewardTrainer", Recorded)
    monkeypatch.setattr(common.toy, "make_model", partial(common.toy.make_model, hidden_size=32))
    options = {
        "config": reward_recipe.TOY_CONFIG, "output_dir": tmp_path / "out", "toy_prompts": 20, "max_test_rows": 3,
        "reference_sft_steps": 1, "max_steps": 4, "learning_rate": 1e-2, "max_new_tokens": 4, "num_generations": 1,
        "per_device_train_batch_size": 4, "use_cpu": True, "use_peft": peft, "lora_target_modules": "all-linear",
    }  # fmt: skip
    if from_folder:
        tiny_model().save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        for split, rows in (("train", scored_pairs.take(20)), ("test", scored_pairs.skip(100).take(4))):
            rows.to_json(tmp_path / "data" / f"{split}.jsonl")
        options |= {"dataset_name": tmp_path / "data", "model_name_or_path": tmp_path / "model", "dtype": "float32"}
    run_recipe(monkeypatch, reward_recipe, options)

    [trainer] = trainers
    assert (tmp_path / "out" / "adapter_config.json").exists() == peft
    loaded = scores(RewardModel(str(tmp_path / "out")))
    torch.testing.assert_close(loaded, scores(RewardModel(trainer.model, trainer.processing_class)), atol=1e-5, rtol=0)
    assert (loaded - trainer.initial_scores).abs().max() > 1e-3
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    expected = (
        ["the scores in the data"]
        if from_folder
        else ["oracle reward", "reward model, where the annotator does not err"]
    )
    assert list(results) == ["reward model", "length", *expected]
    assert all(0 <= result["accuracy"] <= 1 for result in results.values())
    policies = json.loads((tmp_path / "out" / "policy" / "results.json").read_text())
    assert list(policies) == ["reference", "SFT on chosen", "A-LoL"]
    assert all(("reward" in metrics) != from_folder and "train_reward" in metrics for metrics in policies.values())
    assert ("pair_accuracy" in policies["A-LoL"]) == from_folder


CONFIGS = Path(common.__file__).parent / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_one_of_its_recipe(tmp_path, monkeypatch, path):
    """Each field is known to the recipe, and reaches it. Control: an unknown one does not pass."""
    recipe, config_class = {
        "alol_hh": (alol_hh.RecipeArguments, ALoLConfig),
        "apa_hh": (common.OnlineArguments, APAConfig),
        "copg_gsm8k": (copg_gsm8k.RecipeArguments, CoPGConfig),
        "drpo_tldr": (drpo_tldr.RecipeArguments, DRPOConfig),
        "ppo_hh": (common.OnlineArguments, PPOConfig),
        "reward_model": (reward_recipe.RecipeArguments, RewardConfig),
    }["_".join(path.stem.split("_")[:2])]
    fields = yaml.safe_load(path.read_text())
    command = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", str(path), *command])
    found = {name: value for part in common.parse(recipe, config_class, path) for name, value in vars(part).items()}
    for name in fields.keys() - {"output_dir", "use_cpu", "bf16", "report_to"}:
        assert found[name] == fields[name], name

    (tmp_path / "other.yaml").write_text(path.read_text() + "\nno_such_field: 1\n")
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", str(tmp_path / "other.yaml"), *command])
    with pytest.raises(ValueError, match="no_such_field"):
        common.parse(recipe, config_class, path)
