"""
DR-PO on the real trainer: what completions restart from, what reward functions and the losses see of it, against the
law of the roll-in, hand-computed metrics and float64 arithmetic. What it shares with PPO is tested with PPO.
"""

from collections import Counter
from copy import deepcopy
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LORA, StopAt, distance, early_tokens, logged, run, weights
from datasets import Dataset
from scipy.stats import chisquare

from trl_lol import DRPOTrainer, PPOTrainer


ROW = {"prompt": "The kettle", "reference": " is on the table, and"}


@pytest.fixture
def build(build_online_trainer):
    return partial(build_online_trainer, DRPOTrainer, reset_prob=0.5, learning_rate=1e-3)


def draw(trainer, row, count, prompt_ids=(0,)):
    """What `count` completions of the first generation batch of a step restart from."""
    trainer._rows, trainer._generation = [row] * count, (-1, 0)
    return trainer._draw_roll_ins([list(prompt_ids)] * count)


def answer_ids(tokenizer, prompt, answer):
    """The reference's tokens: those that its text adds to a text; in a chat, where it follows a special token, its
    own."""
    if not isinstance(prompt, str):
        return tokenizer(answer)["input_ids"]
    ids, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    assert whole[: len(ids)] == ids
    return whole[len(ids) :]


# --- PPO is the special case


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_without_resets_it_is_ppo(build, build_online_trainer, references, tmp_path, peft_config):
    """Bit for bit, also with a dataset without references. Controls: resets are another run, and need references."""
    settings = {"peft_config": peft_config, "num_iterations": 2, "max_steps": 4, "learning_rate": 1e-3}
    prompts = references.select_columns("prompt")
    ppo, ppo_weights = run(build_online_trainer(PPOTrainer, output_dir=tmp_path / "a", **settings))
    settings["reset_prob"] = 0.0
    for name, dataset in (("b", prompts), ("c", references)):
        losses, after = run(build(output_dir=tmp_path / name, train_dataset=dataset, **settings))
        assert losses == ppo and distance(after, ppo_weights) == 0
    settings["reset_prob"] = 0.5
    losses, after = run(build(output_dir=tmp_path / "d", **settings))
    assert losses != ppo and distance(after, ppo_weights) > 1e-4
    with pytest.raises(ValueError, match="reset_prob=0"):
        build(output_dir=tmp_path / "e", train_dataset=prompts, **settings)


# --- The law of the roll-in


def law(count, reset_prob, first, num_tokens):
    """Expected number of completions without a reset, and of those with a roll-in of 0, 1, … tokens."""
    each = count * reset_prob / (num_tokens - first)
    return [count * (1 - reset_prob), *[0.0] * first, *[each] * (num_tokens - first)]


def p_value(observed, expected):
    observed, expected = (np.array([*x, *[0] * (12 - len(x))]) for x in (observed, expected))
    possible = expected > 0
    return chisquare(observed[possible], expected[possible]).pvalue if not observed[~possible].any() else 0.0


@pytest.mark.parametrize("max_completion_length", [20, 4])
@pytest.mark.parametrize("min_roll_in", [0, 1])
def test_roll_in_lengths_follow_the_law(build, tokenizer, min_roll_in, max_completion_length):
    """
    Of 3000 groups half are not reset, and the others' lengths are uniform on {min, …, L − 1}, where L is 6, or
    `max_completion_length` if that is 4. Controls: the law of the other minimum, of one token more or less, and of
    60 % resets are rejected.
    """
    trainer = build(min_roll_in=min_roll_in, max_completion_length=max_completion_length)
    reference = answer_ids(tokenizer, *ROW.values())
    assert len(reference) == 6
    drawn = draw(trainer, ROW, 3000, tokenizer(ROW["prompt"])["input_ids"])
    assert all(roll_in is None or roll_in == reference[: len(roll_in)] for roll_in in drawn)
    num_tokens = min(6, max_completion_length)
    counts = Counter(-1 if roll_in is None else len(roll_in) for roll_in in drawn)
    observed = [counts[length] for length in range(-1, num_tokens)]
    assert sum(observed) == 3000
    assert p_value(observed, law(3000, 0.5, min_roll_in, num_tokens)) > 0.01
    for other in ((0.5, 1 - min_roll_in, num_tokens), (0.6, min_roll_in, num_tokens)):
        assert p_value(observed, law(3000, *other)) < 1e-6
    for other in (num_tokens - 1, num_tokens + 1):
        observed_there = observed + [0] * (other - num_tokens)
        assert p_value(observed_there, law(3000, 0.5, min_roll_in, other)) < 1e-6


@pytest.mark.parametrize("reset_prob", [0.0, 0.25, 1.0])
def test_share_of_resets(build, tokenizer, reset_prob):
    """Between 0 and 1 within 4 standard deviations, 4 · √(0.25 · 0.75 / 2000) = 0.039."""
    drawn = draw(build(reset_prob=reset_prob), ROW, 2000, tokenizer(ROW["prompt"])["input_ids"])
    share = sum(roll_in is not None for roll_in in drawn) / 2000
    assert share == (reset_prob if reset_prob in (0.0, 1.0) else pytest.approx(reset_prob, abs=0.039))


CHAT = [{"role": "user", "content": "Hello!"}]


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("prompt", "reference", "lengths"),
    [
        ("The kettle", None, {0: None, 1: None}),
        ("The kettle", "", {0: None, 1: None}),
        ("The kettle", "<|end|>", {0: None, 1: None}),
        ("The kettle", " is", {0: {0}, 1: None}),  # one token
        ("The kettle", " is on<|end|> the table", {0: {0, 1}, 1: {1}}),  # L excludes EOS and what follows
        (CHAT, None, {0: None, 1: None}),
        (CHAT, [], {0: None, 1: None}),
        (CHAT, "", {0: None, 1: None}),
        (CHAT, said(""), {0: None, 1: None}),
        (CHAT, said("is"), {0: {0}, 1: None}),
        (CHAT, "is on", {0: {0, 1}, 1: {1}}),
        (CHAT, said("is on"), {0: {0, 1}, 1: {1}}),
    ],
)
@pytest.mark.parametrize("min_roll_in", [0, 1])
def test_short_references(build, tokenizer, prompt, reference, lengths, min_roll_in):
    trainer = build(reset_prob=0.9, min_roll_in=min_roll_in)
    prompt_ids = trainer._tokenize_prompts([prompt])[0][0]
    drawn = draw(trainer, {"prompt": prompt, "reference": reference}, 40, prompt_ids)
    found = {len(roll_in) for roll_in in drawn if roll_in is not None}
    assert found == (lengths[min_roll_in] or set()) and None in drawn


def test_dataset_with_missing_references(build):
    """Rows without a reference, or with one that is too short, begin at the prompt and are trained on."""
    dataset = Dataset.from_dict({"prompt": ["The kettle"] * 4, "reference": [None, "", " is", " is on the table"]})
    trainer = build(train_dataset=dataset, reset_prob=1.0, min_roll_in=1, max_steps=2, num_iterations=1)
    drawn = recorded_draws(trainer)
    losses, _ = run(trainer)
    assert len(losses) == 2
    of_row = {"": set(), None: set(), " is": set(), " is on the table": set()}
    for given, roll_ins in drawn:
        for row, roll_in in zip(given, roll_ins, strict=True):
            of_row[row["reference"]].add(None if roll_in is None else len(roll_in))
    assert of_row[None] == of_row[""] == of_row[" is"] == {None}
    assert of_row[" is on the table"] and of_row[" is on the table"] <= {1, 2, 3}
    assert logged(trainer, "reset_fraction") == [0.25, 0.25]


def recorded_draws(trainer):
    """The rows and roll-ins of every generation batch."""
    draws, draw_roll_ins = [], trainer._draw_roll_ins

    def recorded(prompt_ids):
        roll_ins = draw_roll_ins(prompt_ids)
        draws.append((trainer._rows, roll_ins))
        return roll_ins

    trainer._draw_roll_ins = recorded
    return draws


@pytest.mark.parametrize("num_generations", [1, 2, 4])
def test_ranks_draw_what_one_process_draws(build, monkeypatch, num_generations):
    """12 completions on one process, or 6 on each of two: in groups of 4 the middle group straddles them. Control: the
    ranks differ, which they would not if each counted its own rows alone."""
    trainer = build(num_generations=num_generations, per_device_train_batch_size=12, reset_prob=0.8)
    whole = draw(trainer, ROW, 12)
    groups = [whole[i : i + num_generations] for i in range(0, 12, num_generations)]
    assert all(roll_in == group[0] for group in groups for roll_in in group)
    assert len({str(group) for group in groups}) > 1
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(process_index=rank))
        ranks.append(draw(trainer, ROW, 6))
    assert ranks[0] + ranks[1] == whole
    assert ranks[0] != ranks[1]


def test_what_the_draws_depend_on(build):
    """Seed, step and the number of the generation batch within the step, and on nothing else. 32 groups each."""
    trainer, draws = build(max_completion_length=20), {}
    for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        trainer.args.seed, trainer.state.global_step = seed, step
        draws[seed, step, 0] = draw(trainer, ROW, 32)
        draws[seed, step, 1] = trainer._draw_roll_ins([[0]] * 32)
    assert all(draws[a] != draws[b] for a, b in combinations(draws, 2))
    assert all(len({str(roll_in) for roll_in in drawn}) > 4 for drawn in draws.values())
    other = build(max_completion_length=20)
    torch.manual_seed(7)
    np.random.seed(7)
    other.args.seed, other.state.global_step = 1, 1
    assert draw(other, ROW, 32) == draws[1, 1, 0]
    assert other._draw_roll_ins([[0]] * 32) == draws[1, 1, 1]
    assert draw(other, ROW, 8) == draws[1, 1, 0][:8]  # a function of the group's place


# --- Generation


@pytest.fixture
def generated(monkeypatch):
    """Trains nothing, generates: what the model gets, without padding, what the reward function gets, the batch."""

    def generate(trainer, given):
        starts, seen, model_generate = [], {}, trainer.model.generate

        def spy(input_ids, attention_mask, **kwargs):
            starts.extend(ids[kept].tolist() for ids, kept in zip(input_ids, attention_mask.bool(), strict=True))
            return model_generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

        def reward(prompts, completions, completion_ids, **kwargs):
            seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=deepcopy(completion_ids))
            return early_tokens(completion_ids)

        monkeypatch.setattr(trainer.model, "generate", spy)
        trainer.reward_funcs = [reward]
        batch = trainer._generate_and_score_completions(given)
        return starts, seen, batch

    return generate


DATA = {
    "completion, text": ({"completion": "text"}, None),
    "completion, messages": ({"completion": "messages"}, None),
    "chosen": ({"chosen": "messages", "rejected": "messages"}, None),
    "reference, messages": ({"reference": "messages"}, None),
    "reference, the answer's text": ({"reference": "answer"}, None),
    "column that is named": ({"completion": "messages", "gold": "messages"}, "gold"),
    "column that is named, text": ({"chosen": "text", "gold": "text"}, "gold"),
}


@pytest.mark.parametrize("case", DATA)
def test_generation_starts_after_the_exact_reference_prefix(build, generated, dialogues, tokenizer, case):
    """
    24 completions of 6 tokens at most, of references of more: the roll-ins have 0 to 5 tokens. Other columns than the
    reference hold another answer.
    """
    columns, name = DATA[case]
    reference_column = name or next(iter(columns))
    rows, answers = [], []
    for row in dialogues.take(24):
        own, other = (completion[0]["content"] for completion in row["completions"][:2])
        is_text = columns[reference_column] == "text"
        made = {"prompt": row["prompt"][-1]["content"] if is_text else row["prompt"]}
        for column, kind in columns.items():
            text = own if column == reference_column else other
            made[column] = said(text) if kind == "messages" else f" {text}" if kind == "text" else text
        rows.append(made)
        answers.append(f" {own}" if is_text else own)
    trainer = build(
        train_dataset=Dataset.from_list(rows), reference_column=name, per_device_train_batch_size=24, reset_prob=0.9
    )
    assert trainer._reference_column == reference_column
    trainer.model.train()
    starts, seen, batch = generated(trainer, rows)
    lengths = []
    for i, (row, start, completion, ids) in enumerate(
        zip(rows, starts, seen["completions"], seen["completion_ids"], strict=True)
    ):
        prompt_ids = trainer._tokenize_prompts([row["prompt"]])[0][0]
        reference = answer_ids(tokenizer, row["prompt"], answers[i])
        assert len(reference) > 6
        assert start[: len(prompt_ids)] == prompt_ids
        roll_in = start[len(prompt_ids) :]
        assert roll_in == reference[: len(roll_in)] == ids[: len(roll_in)]
        assert len(roll_in) < len(ids) <= 6
        text = completion if isinstance(completion, str) else completion[0]["content"]
        assert isinstance(completion, str) == isinstance(row["prompt"], str)
        prefix = tokenizer.decode(roll_in)
        assert text.startswith(prefix) and answers[i].startswith(prefix)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        # The batch: the prompt without, the completion with the roll-in, and the loss over the rest
        assert batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist() == prompt_ids
        assert batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist() == ids
        expected = [0] * len(roll_in) + [1] * (len(ids) - len(roll_in))
        assert batch["loss_mask"][i].tolist() == expected + [0] * (batch["loss_mask"].size(1) - len(ids))
        lengths.append(len(roll_in))
    assert min(lengths) == 0 and max(lengths) == 5 and len(set(lengths)) == 6
    assert seen["prompts"] == [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("prompt", "reference"),
    [
        ("The kettle", " é" * 4),  # é is two tokens: between them a roll-in ends within a character
        ("The pri", "nter is on the table"),  # " printer" is one token of the text, which the prompt cuts
    ],
)
def test_roll_ins_are_not_tokenized_again(build, generated, tokenizer, prompt, reference):
    """Control: their text has other tokens."""
    rows = [{"prompt": prompt, "reference": reference}] * 16
    trainer = build(train_dataset=Dataset.from_list(rows), per_device_train_batch_size=16, reset_prob=1.0)
    trainer.model.train()
    starts, seen, batch = generated(trainer, rows)
    prompt_ids, whole = (tokenizer(text)["input_ids"] for text in (prompt, reference))
    again = []
    for start, ids, padded in zip(starts, seen["completion_ids"], batch["completion_ids"].tolist(), strict=True):
        roll_in = start[len(prompt_ids) :]
        assert start == prompt_ids + whole[: len(roll_in)]
        assert ids[: len(roll_in)] == padded[: len(roll_in)] == roll_in
        again.append(tokenizer(tokenizer.decode(start))["input_ids"] != start)
    assert any(again)
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in seen["completion_ids"]] == seen["completions"]


@pytest.mark.parametrize("estimator", ["gae", "leave_one_out"])
def test_a_group_shares_its_roll_in(build, generated, references, estimator):
    trainer = build(
        num_generations=4, advantage_estimator=estimator, per_device_train_batch_size=16, reset_prob=0.9,
        max_completion_length=12,
    )  # fmt: skip
    trainer.model.train()
    given = [references[i // 4] for i in range(16)]
    starts, seen, batch = generated(trainer, given)
    groups = [starts[i : i + 4] for i in range(0, 16, 4)]
    assert all(start == group[0] for group in groups for start in group)
    lengths = batch["completion_mask"].sum(dim=1) - batch["loss_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) > 2
    assert len({str(ids) for ids in seen["completion_ids"]}) > 12  # Control: the continuations are drawn for each


def test_no_resets_in_evaluation(build, generated, references):
    """Nor a need for references. Control: in training every completion has a roll-in."""
    prompts = references.select_columns("prompt")
    trainer = build(reset_prob=1.0, min_roll_in=1, eval_dataset=prompts.take(8), per_device_train_batch_size=8)
    metrics = trainer.evaluate()
    assert {"eval_reward", "eval_loss", "eval_value_loss"} <= metrics.keys()
    assert not [name for name in metrics if "reset" in name or "roll_in" in name]
    trainer.model.eval()
    starts, _, batch = generated(trainer, list(prompts.take(8)))
    prompt_ids = trainer._tokenize_prompts(prompts[:8]["prompt"])[0]
    assert starts == prompt_ids
    assert torch.equal(batch["loss_mask"], batch["completion_mask"])
    trainer.model.train()
    starts, _, _ = generated(trainer, list(references.take(8)))
    assert all(len(start) > len(ids) for start, ids in zip(starts, prompt_ids, strict=True))


def test_evaluation_changes_no_draw(build, references, tmp_path):
    settings = {"max_steps": 3, "eval_dataset": references.take(4), "num_iterations": 1}
    trainers = [build(output_dir=tmp_path / name, **settings) for name in "ab"]
    trainers[1].args.eval_strategy, trainers[1].args.eval_steps = "steps", 1
    draws = [recorded_draws(trainer) for trainer in trainers]
    for trainer in trainers:
        trainer.train()
    in_training = [[roll_ins for given, roll_ins in drawn if any(roll_ins)] for drawn in draws]
    assert in_training[0] == in_training[1] and len(in_training[0]) > 1


# --- Metrics and the table of completions


def test_metrics_are_logged(build):
    """Of a run: in the log of the steps that generate, and consistent with TRL's mean over all completions."""
    trainer = build(num_iterations=2, max_steps=6, per_device_train_batch_size=8)
    drawn = recorded_draws(trainer)
    trainer.train()
    assert len(drawn) == 3
    entries = [entry for entry in trainer.state.log_history if "reset_fraction" in entry]
    assert len(entries) == 3
    for entry, (_, roll_ins) in zip(entries, drawn, strict=True):
        resets = [len(roll_in) for roll_in in roll_ins if roll_in is not None]
        assert entry["reset_fraction"] == len(resets) / 8 and 0 < len(resets) < 8
        assert entry["roll_in/mean_length"] == pytest.approx(sum(resets) / len(resets))
        share = sum(length > 0 for length in resets) / 8
        for total, name in (("reward", "reward"), ("completions/mean_length", "completions/mean_length")):
            mixed = share * entry[f"{name}/reset"] + (1 - share) * entry[f"{name}/no_reset"]
            assert entry[total] == pytest.approx(mixed, rel=1e-5)


def test_table_of_completions_shows_the_roll_in(build, references, tmp_path, tokenizer):
    """Eight completions in training and four in evaluation for each step: the last eight are in its table."""
    texts = Dataset.from_list(
        [
            {"prompt": row["prompt"][-1]["content"], "reference": f" {row['reference'][0]['content']}"}
            for row in references
        ]
    )
    trainer = build(
        train_dataset=texts, eval_dataset=texts.take(4), log_completions=True, eval_strategy="steps", eval_steps=1,
        max_steps=2, per_device_train_batch_size=8, reset_prob=0.9, max_completion_length=8, num_iterations=1,
        output_dir=tmp_path,
    )  # fmt: skip
    drawn = recorded_draws(trainer)
    trainer.train()
    of_training = [roll_ins for _, roll_ins in drawn[::2]]
    for step in (1, 2):
        logged_rows = pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert len(logged_rows) == 8
        shown = logged_rows["roll_in"].tolist()
        assert shown == [tokenizer.decode(roll_in or []) for roll_in in of_training[step - 1][4:]] + [""] * 4
        assert any(shown[:4])
        for completion, roll_in in zip(logged_rows["completion"], shown, strict=True):
            assert completion.startswith(roll_in) and completion != roll_in


# --- Runs


@pytest.mark.parametrize("kind", ["iterable", "unused columns"])
def test_other_datasets_are_the_same_run(build, references, tmp_path, kind):
    """A stream, or columns that are removed: as the dataset in memory, bit for bit. Control: it resets."""
    rows = references.add_column("unused", list(range(60)))
    settings = {"shuffle_dataset": False, "max_steps": 3, "num_iterations": 1, "reset_prob": 0.8}
    other = {"train_dataset": rows.to_iterable_dataset()} if kind == "iterable" else {"remove_unused_columns": True}
    losses, expected = run(build(output_dir=tmp_path / "a", train_dataset=rows, **settings))
    trainer = build(output_dir=tmp_path / "b", **({"train_dataset": rows} | settings | other))
    draws = recorded_draws(trainer)
    assert run(trainer)[0] == losses and distance(weights(trainer), expected) == 0
    assert all("reference" in row and ("unused" in row) == (kind == "iterable") for given, _ in draws for row in given)
    assert any(roll_in for _, roll_ins in draws for roll_in in roll_ins)


def test_several_generations_in_a_step(build, tmp_path):
    """Four micro-batches to a step, two to a generation: each generation has draws of its own, and a run that is
    resumed after step 2 is the whole run."""
    settings = {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 1, "max_steps": 3}
    build = partial(build, per_device_train_batch_size=2, reset_prob=0.9, **settings)
    whole = build(output_dir=tmp_path / "a")
    draws, keys = recorded_draws(whole), []
    draw_roll_ins = whole._draw_roll_ins
    whole._draw_roll_ins = lambda prompt_ids: (draw_roll_ins(prompt_ids), keys.append(whole._generation))[0]
    whole.train()
    assert keys == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    lengths = [[len(roll_in or "") for roll_in in roll_ins] for _, roll_ins in draws]
    assert all(a != b for a, b in combinations(lengths, 2))
    saved = {"output_dir": tmp_path / "b", "save_strategy": "steps", "save_steps": 2}
    build(callbacks=[StopAt(2)], **saved).train()
    resumed = build(**saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert distance(weights(resumed), weights(whole)) == 0


def test_a_trainer_that_is_used_again_draws_the_same(build, tmp_path):
    """Interrupted after step 4, behind the generation at step 3, and resumed from step 2 without being made anew."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "num_iterations": 3}
    whole = build(output_dir=tmp_path / "a", **settings)
    whole_draws = recorded_draws(whole)
    whole.train()
    resumed, stop = build(output_dir=tmp_path / "b", **settings), StopAt(4)
    resumed.add_callback(stop)
    resumed.train()
    resumed.remove_callback(stop)
    draws = recorded_draws(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert [roll_ins for _, roll_ins in draws] == [roll_ins for _, roll_ins in whole_draws[1:]]
    assert distance(weights(whole), weights(resumed)) == 0
