"""Tasks made of a file: the example of the documentation, splits, rewards, and judging by rank."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict

from benchmarks.harness import Run, measure
from benchmarks.methods import METHODS
from benchmarks.task import load_task
from benchmarks.tasks.logged import LoggedTask, load_rows, ranked, split_by_prompt
from benchmarks.tasks.smollm2 import COMPARED, GSM8K, HH
from trl_lol.generation import completion_logps


PAGE = Path(__file__).parent.parent / "benchmarks" / "OWN_TASK.md"


@pytest.fixture
def model(tmp_path, tiny_model, tokenizer):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def make_task(tmp_path, model):
    """Makes a task of rows, with what a user's class would hold."""

    def make(rows, **attributes):
        if not isinstance(rows, DatasetDict):
            rows = DatasetDict(train=rows if isinstance(rows, Dataset) else Dataset.from_list(rows))
        rows.save_to_disk(tmp_path / "rows")
        attributes = {"name": "mine", "dataset": str(tmp_path / "rows"), "model": model, **attributes}
        attributes = {"max_completion_length": 8, "num_generated": 4, **attributes}
        return type("Mine", (LoggedTask,), attributes)(tmp_path / "work")

    return make


def prompts_by_split(task):
    return {split: set(map(str, task.splits[split]["prompt"])) for split in task.splits}


# ---- The documentation ----


def test_the_example_works_as_shown(tmp_path, monkeypatch, model):
    """60 prompts with 2 completions each: 48 to train on and 6 in each held-out split. The file has 20 lines."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(block.splitlines()) <= 22
    monkeypatch.chdir(tmp_path)
    Path("my_task.py").write_text(block.replace("path/or/id/of/a/model", model))
    products = ("kettle", "toaster", "phone")
    rows = [
        {"prompt": f"Order {i}: my {products[i % 3]} is dead.", "completion": text, "product": products[i % 3]}
        for i in range(60)
        for text in (f" Try another socket for the {products[i % 3]}.", " Go away.")
    ]
    Dataset.from_list(rows).to_csv("answers.csv")

    task = load_task("my_task.py", tmp_path / "work")
    task.prepare(0)
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 48, "validation": 6, "test": 6}
    row = task.rows(0)[0]
    assert row["rewards"] == [-abs(len(text.split()) - 20) / 20 for text in row["completions"]]
    metrics = task.evaluate(task.reference(), task.reference(), "test")
    assert metrics["kl"] == 0 and 0 <= metrics["reward"] <= 1 and -1 <= metrics["train_reward"] <= 0
    assert not task.without and task.num_completions == 1600

    overrides = {"num_sequences": 32, "num_completions": 32, "num_generations": 1, "max_completion_length": 4}
    for method in ("CoPG", "PPO"):
        record = measure(Run("my_task.py", method, {"learning_rate": 1e-3}, 0, str(tmp_path / "work"), overrides))
        assert record["task"] == "support" and {"reward", "kl", "score"} <= record["metrics"]["test"].keys()


def test_no_file_is_found_with_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .*gone\.csv"):
        load_rows(str(tmp_path / "gone.csv"))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "folder"])
def test_files_of_every_kind_are_read(tmp_path, ending):
    """An answer "None" is one, also in a CSV file."""
    rows = Dataset.from_list([{"prompt": "p", "completion": "None", "reward": 0.5}])
    path = tmp_path / f"rows.{ending}"
    writers = {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet, "folder": rows.save_to_disk}
    writers[ending](path)
    assert load_rows(str(path))["train"].to_list() == rows.to_list()


# ---- Splits ----


def test_prompts_are_held_out_whatever_the_order():
    keys = [f"prompt {i % 50}" for i in range(100)]
    split_of = split_by_prompt({"train": keys}, 0.1)
    assert split_of == split_by_prompt({"train": keys[::-1]}, 0.1)
    counts = {split: list(split_of.values()).count(split) for split in ("train", "validation", "test")}
    assert counts == {"train": 40, "validation": 5, "test": 5}
    other = split_by_prompt({"train": [f"other {key}" for key in keys]}, 0.1)  # control: not the first ones
    assert [key for key, split in split_of.items() if split == "test"] != [
        key.removeprefix("other ") for key, split in other.items() if split == "test"
    ]


def test_a_prompt_of_two_splits_is_held_out():
    """b is also in the test split, c in all; validation, which is not there, takes one of the two that are left."""
    split_of = split_by_prompt({"train": ["a", "b", "c", "d"], "test": ["b", "c", "e"]}, 0.1)
    assert {key for key, split in split_of.items() if split == "test"} == {"b", "c", "e"}
    assert sorted(split_of[key] for key in "ad") == ["train", "validation"]


def test_no_prompt_is_in_two_splits(make_task, scored_pairs):
    """120 pairs of 60 prompts: both pairs of a prompt are in one split."""
    task = make_task(scored_pairs)
    found = prompts_by_split(task)
    assert [len(found[split]) for split in task.SPLITS] == [48, 6, 6] and len(set.union(*found.values())) == 60
    assert sum(map(len, task.splits.values())) == 120
    assert len(task.prompts("test")) == 6  # each once


def test_a_file_that_is_too_small_says_so(make_task):
    with pytest.raises(ValueError, match="too few prompts: none is left for train"):
        make_task([{"prompt": p, "completion": " x", "reward": 1.0} for p in "ab"]).splits  # noqa: B018


# ---- Rewards ----


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


WITH_REWARD = {"reward": staticmethod(length)}


def rewards_of(task):
    """By the first completion of each group."""
    return {row["completions"][0]: row["rewards"] for rows in task.splits.values() for row in rows}


def test_logged_rewards_stay_and_missing_ones_are_scored(make_task):
    """The function says 2 of " b" and would say 2 of " a", whose logged reward is 9."""
    rows = [{"prompt": f"{i}", "completions": [" a", " b"], "rewards": [9.0, None]} for i in range(5)]
    assert set(map(tuple, rewards_of(make_task(rows, **WITH_REWARD)).values())) == {(9.0, 2.0)}


def test_what_is_not_scored_is_dropped(make_task):
    rows = [{"prompt": f"{i}", "completions": [" a", " b"], "rewards": [9.0, None]} for i in range(5)]
    assert rewards_of(make_task(rows)) == {" a": [9.0]}


@pytest.mark.parametrize(
    ("attributes", "expected"), [({}, [1.0, 0.0]), ({"reward": staticmethod(length)}, [2.0, 3.0])]
)
def test_pairs_without_scores(make_task, attributes, expected):
    """A preference is worth 1 and 0, unless there is a function: " a" has two letters and " bb" three."""
    rows = [{"prompt": f"{i}", "chosen": " a", "rejected": " bb"} for i in range(5)]
    assert rewards_of(make_task(rows, **attributes)) == {" a": expected}


def test_rows_of_one_prompt_become_a_group(make_task):
    """Completions of each of 5 prompts, in rows of their own, with a column for the reward functions."""
    rows = [{"prompt": f"{i}", "completion": f" {c}", "reward": c, "kind": "x"} for c in (1, 2) for i in range(5)]
    task = make_task(rows)
    assert rewards_of(task) == {" 1": [1.0, 2.0]} and set(task.prompts("test").column_names) == {"prompt", "kind"}


def test_neither_rewards_nor_a_function(make_task):
    with pytest.raises(ValueError, match=r"has no rewards\. Give `Mine` a `reward` function"):
        make_task([{"prompt": f"{i}", "completion": " a"} for i in range(5)]).splits  # noqa: B018


def test_long_groups_are_left_out(make_task):
    """With more than 12 tokens in prompt, completion and EOS: those of the latter 5 prompts have 20 words."""
    rows = [{"prompt": f"{i}", "completion": " q" * (1 if i < 5 else 20), "reward": 1.0} for i in range(10)]
    task = make_task(rows, max_length=12)
    assert set(rewards_of(task)) == {" q"}
    assert sum(map(len, task.splits.values())) == 5


def test_a_seed_draws_the_training_rows(make_task, scored_pairs):
    task = make_task(scored_pairs, num_groups=10)
    first, second, again = (task.make_rows(seed)["prompt"] for seed in (0, 1, 0))
    assert len(first) == 10 and list(first) == list(again) != list(second)


# ---- Judging by rank ----


def test_ranked_by_hand():
    """
    First group: the log-ratios rank the second completion first, whose reward is 2, and order 3 > 1 and 2 > 1 right,
    3 > 2 wrong. Second group: equal log-ratios take the mean of 4 and 0, and their one pair is half right. Hence
    (2 + 2) / 2 = 2, chance (2 + 2) / 2, and 2.5 of 4 pairs.
    """
    result = ranked([[0.1, 0.3, -0.2], [0.5, 0.5]], [[3.0, 2.0, 1.0], [4.0, 0.0]])
    assert result["reward"] == 2 and result["reward_of_chance"] == 2 and result["pair_accuracy"] == 0.625
    assert 0 < result["pair_accuracy_error"] < 0.2
    assert ranked([[1.0, 0.0]], [[5.0, 1.0]]) == {
        "reward": 5.0,
        "reward_of_chance": 3.0,
        "pair_accuracy": 1.0,
        "pair_accuracy_error": 0.0,
    }


def learn(policy, rows, sign):
    """Raise the log-probability of what is better (or worse) in the held-out groups themselves."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(15):
        loss = torch.zeros(())
        for row in rows:
            for ids, reward in zip(row["completion_ids"], row["rewards"], strict=True):
                tokens = torch.tensor([row["prompt_ids"] + ids])
                logps = policy(tokens).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
                loss = (
                    loss
                    - sign
                    * (1 if reward == max(row["rewards"]) else -1)
                    * logps.gather(-1, torch.tensor(ids).unsqueeze(-1)).sum()
                )
        optimizer.zero_grad()
        (loss / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()


def test_what_has_learned_nothing_scores_the_mean(make_task, scored_pairs):
    """And one that has learned the held-out groups ranks all of them right, one that has learned the contrary none."""
    task = make_task(scored_pairs)
    task.prepare(0)
    assert task.num_completions == 0 and not task.without
    reference = task.reference()
    metrics = task.evaluate(task.reference(), reference, "test")
    assert metrics["reward"] == metrics["reward_of_chance"] and metrics["pair_accuracy"] == 0.5
    assert metrics["kl"] == 0 and {"length", "distinct_1"} <= metrics.keys()

    rows = Dataset.load_from_disk(task.folder / "ranked_test")
    values = [row["rewards"] for row in rows]
    for sign, pick, accuracy in ((1, max, 1.0), (-1, min, 0.0)):
        policy = task.reference()
        learn(policy, rows, sign)
        metrics = task.evaluate(policy, reference, "test")
        assert metrics["pair_accuracy"] == accuracy and metrics["kl"] > 0
        assert metrics["reward"] == pytest.approx(sum(map(pick, values)) / len(values))
    brief = task.evaluate(policy, reference, "test", brief=True)
    assert brief["pair_accuracy"] == 0.0


def test_the_references_log_probabilities_are_kept(make_task, scored_pairs):
    task = make_task(scored_pairs)
    task.prepare(0)
    row = Dataset.load_from_disk(task.folder / "ranked_validation")[0]
    logps = completion_logps(task.reference(), [row["prompt_ids"]] * 2, row["completion_ids"])
    torch.testing.assert_close(torch.tensor(row["ref_logps"]), logps)


def test_a_judge_alone_judges_what_is_generated(make_task, scored_pairs):
    """The rewards of the file are trained on, and there is no reward for what online methods would generate."""
    task = make_task(scored_pairs, judge=staticmethod(lambda prompts, completions, **columns: [7.0] * len(prompts)))
    task.prepare(0)
    metrics = task.evaluate(task.reference(), task.reference(), "test")
    assert metrics["reward"] == 7 and "train_reward" not in metrics and task.num_completions == 0


def test_nothing_to_rank(make_task):
    """One completion for each prompt: no contrast to learn from, and none to judge by."""
    task = make_task([{"prompt": f"{i}", "completion": " a", "reward": float(i)} for i in range(10)])
    assert task.without == {"CoPG", "DPO", "IPO"}
    with pytest.raises(ValueError, match=r"there is nothing to judge by\. Give `Mine` a `judge` function"):
        task.prepare(0)


# ---- SmolLM2 ----


@pytest.mark.parametrize("task_class", [GSM8K, HH])
def test_real_tasks_are_left_out_without_their_data(tmp_path, monkeypatch, task_class):
    monkeypatch.delenv("BENCHMARK_DATA", raising=False)
    monkeypatch.setenv("BENCHMARK_MODEL", str(tmp_path))
    task = task_class(tmp_path / "work")
    assert f"`{task.name}` needs BENCHMARK_DATA" in task.missing and "BENCHMARK_MODEL" not in task.missing
    monkeypatch.setenv("BENCHMARK_DATA", str(tmp_path))
    assert task.missing is None  # control
    assert METHODS.keys() - task.without == COMPARED and task.num_completions == 0


def test_questions_of_gsm8k(tmp_path, monkeypatch, model):
    """A question ends with a new line. A quarter of 8 training prompts is for validation; the test split is given."""
    (tmp_path / "gsm8k_groups").mkdir()
    for split, count in (("train", 8), ("test", 3)):
        rows = [
            {"prompt": f"{split} {i}?", "completions": ["A: 1", "A: 2"], "rewards": [1.0, 0.0]} for i in range(count)
        ]
        Dataset.from_list(rows).to_json(tmp_path / "gsm8k_groups" / f"{split}.jsonl")
    monkeypatch.setenv("BENCHMARK_DATA", str(tmp_path))
    monkeypatch.setenv("BENCHMARK_MODEL", model)
    task = GSM8K(tmp_path / "work")
    assert [len(task.splits[split]) for split in task.SPLITS] == [6, 2, 3]
    assert set(task.splits["test"]["prompt"]) == {"test 0?\n", "test 1?\n", "test 2?\n"}
