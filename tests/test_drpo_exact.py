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
from conftest import LORA, SGD, StopAt, distance, early_tokens, logged, run, weights
from datasets import Dataset
from scipy.stats import chisquare
from test_online_exact import (
    CLOSE,
    LENGTHS,
    PARTLY,
    SCORES,
    advantages_by_hand,
    assert_same,
    forward_by_hand,
    loss_and_gradient,
    losses_by_hand,
    off_policy,
    returning,
    roll_out,
    shake,
    table,
)
from trl import GRPOTrainer

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


# --- Losses, on the table of `test_online_exact` behind fixed roll-ins

ROLL_IN_LENGTHS = [0, 0, 3, 5, 0, 2, 1, 0]
IS_RESET = [False, True, True, True, False, True, True, False]  # row 1 with a roll-in of length 0
ROLL_INS = [
    list(range(300 + 10 * i, 300 + 10 * i + n)) if is_reset else None
    for i, (n, is_reset) in enumerate(zip(ROLL_IN_LENGTHS, IS_RESET, strict=True))
]
WHOLE_LENGTHS = [roll_in + own for roll_in, own in zip(ROLL_IN_LENGTHS, LENGTHS, strict=True)]
NUM_GENERATED, NUM_ALL = 33, 44


@pytest.fixture
def table_trainer(build_online_trainer, tokenizer, monkeypatch):
    """Makes a trainer that replays the table as continuations of fixed roll-ins, with a policy that has left its
    reference."""

    def make(scores=SCORES, **kwargs):
        settings = {"per_device_train_batch_size": 8, "max_completion_length": 10, "reward_funcs": returning(scores)}
        trainer = build_online_trainer(DRPOTrainer, **(settings | kwargs))
        continuations = table(tokenizer)

        def replay(trainer, prompt_ids, *args, **kwargs):
            return [list(ids) for ids in continuations[: len(prompt_ids)]], None

        monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", replay)
        trainer._draw_roll_ins = lambda prompt_ids: ROLL_INS[: len(prompt_ids)]
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer.model.train()
        shake(trainer.model)
        return trainer

    return make


def span_by_hand(batch, scores, with_roll_in, monkeypatch, **settings):
    """Advantages and returns as for PPO, of tokens that begin with the roll-in or behind it, and 0 elsewhere."""
    starts = [0] * 8 if with_roll_in else ROLL_IN_LENGTHS
    shifted = {
        name: torch.stack([row.roll(-start) for row, start in zip(batch[name], starts, strict=True)])
        for name in ("old_per_token_logps", "ref_per_token_logps", "old_values")
    }
    with monkeypatch.context() as context:
        context.setattr("test_online_exact.LENGTHS", WHOLE_LENGTHS if with_roll_in else LENGTHS)
        both = advantages_by_hand(shifted, scores, **({"beta": 0.05} | settings))
    length = batch["completion_ids"].size(1)
    return [
        torch.tensor([([0.0] * start + row + [0.0] * length)[:length] for start, row in zip(starts, x, strict=True)])
        for x in both
    ]


@pytest.mark.parametrize("with_roll_in", [False, True])
@pytest.mark.parametrize(
    ("kwargs", "settings"),
    [
        ({}, {}),
        ({"whiten_rewards": True, "gamma": 0.9}, {"whiten_rewards": True, "gamma": 0.9}),
        ({"beta": 0.3, "whiten_advantages": False}, {"beta": 0.3, "whiten_advantages": False}),
        ({"missing_eos_penalty": 1.5}, {"penalty": 1.5}),
        ({"scores": PARTLY, "whiten_rewards": True}, {"whiten_rewards": True}),
        ({"mask_truncated_completions": True}, {}),
    ],
)
def test_advantages_by_hand(table_trainer, monkeypatch, kwargs, settings, with_roll_in):
    """KL penalty, whitening, GAE and returns over the generated tokens, or over the roll-in as well. Control: over the
    other tokens they are other numbers."""
    trainer = table_trainer(train_on_roll_in_values=with_roll_in, **kwargs)
    batch = roll_out(trainer)
    scores = kwargs.get("scores", SCORES)
    if trainer.mask_truncated_completions:  # rows 0 and 7
        scores = [None, *SCORES[1:7], None]
    advantages, returns = span_by_hand(batch, scores, with_roll_in, monkeypatch, **settings)
    kept = batch["value_mask"].bool()
    torch.testing.assert_close(batch["advantages"][kept].float(), advantages[kept].float(), **CLOSE)
    torch.testing.assert_close(batch["returns"][kept].float(), returns[kept].float(), **CLOSE)
    others, _ = span_by_hand(batch, scores, not with_roll_in, monkeypatch, **settings)
    generated = batch["loss_mask"].bool()
    if trainer.args.whiten_advantages:
        assert (others - batch["advantages"])[generated].abs().max() > 1e-2

    is_scored = torch.tensor([score is not None for score in scores])
    position = torch.arange(10)
    roll_in, whole = (torch.tensor(x).unsqueeze(1) for x in (ROLL_IN_LENGTHS, WHOLE_LENGTHS))
    expected = (position >= roll_in) & (position < whole) & is_scored.unsqueeze(1)
    assert torch.equal(generated, expected)
    assert torch.equal(kept, (position < whole) & is_scored.unsqueeze(1) if with_roll_in else expected)
    assert batch["num_items_in_batch"] == expected.sum() and batch["num_value_items_in_batch"] == kept.sum()
    # The log: means over the generated tokens
    log_ratio = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]).double()
    sums = [log_ratio[i][generated[i]].sum().item() for i in range(8) if generated[i].any()]
    assert trainer._metrics["train"]["kl/completion"] == [pytest.approx(sum(sums) / len(sums), rel=1e-4)]
    shown = [row[m].mean().item() if m.any() else 0.0 for row, m in zip(batch["advantages"], generated, strict=True)]
    assert list(trainer._logs["advantages"]) == pytest.approx(shown, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("with_roll_in", [False, True])
@pytest.mark.parametrize(
    "kwargs", [{}, {"vf_coef": 0.7, "entropy_coef": 0.3, "scores": PARTLY}, {"peft_config": LORA}]
)
def test_losses_and_metrics_by_hand(table_trainer, kwargs, with_roll_in):
    """Loss = Σ (policy − entropy_coef · H) / 33 + vf_coef · Σ value / 33, or 44 with the roll-ins. Control: both parts
    divided by the number of the other."""
    trainer = table_trainer(train_on_roll_in_values=with_roll_in, **deepcopy(kwargs))
    inputs = off_policy(roll_out(trainer))
    num_generated, num_values = (inputs[name].sum().item() for name in ("loss_mask", "value_mask"))
    if "scores" not in kwargs:
        assert (num_generated, num_values) == (NUM_GENERATED, NUM_ALL if with_roll_in else NUM_GENERATED)
    trainer.model.zero_grad()
    tokens = losses_by_hand(trainer, inputs)
    tokens["value_loss"] = losses_by_hand(trainer, inputs | {"loss_mask": inputs["value_mask"]})["value_loss"]
    policy = (tokens["policy_loss"] - trainer.args.entropy_coef * tokens["entropy"]).sum()
    value = trainer.args.vf_coef * tokens["value_loss"].sum()
    loss = policy / num_generated + value / num_values
    loss.backward()
    gradient = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer._metrics["train"].clear()
    found = loss_and_gradient(trainer, inputs)
    assert_same(found, (loss.detach(), gradient), **CLOSE)
    for name, x in tokens.items():
        assert trainer._metrics["train"][name] == [pytest.approx(x.mean().item(), rel=1e-4, abs=1e-6)], name
    if with_roll_in:
        for other in (num_generated, num_values):
            assert abs((policy + value).item() / other - found[0].item()) > 1e-3


def test_old_log_probs_and_values_are_those_of_the_whole_completion(table_trainer):
    """The continuation is conditioned on the roll-in: log-probabilities and values are those behind it."""
    trainer = table_trainer()
    batch = roll_out(trainer)
    kept = batch["completion_mask"].bool()
    with torch.no_grad():
        logps, _, values = forward_by_hand(trainer, batch)
    torch.testing.assert_close(batch["old_per_token_logps"].double()[kept], logps[kept], **CLOSE)
    torch.testing.assert_close(batch["old_values"].double()[kept], values[kept], **CLOSE)


@pytest.mark.parametrize("with_roll_in", [False, True])
def test_policy_loss_knows_no_roll_in(table_trainer, with_roll_in):
    """
    Whatever log-probabilities and advantages roll-in tokens have, and without `train_on_roll_in_values` whatever
    values and returns: loss and gradient are the same, bit for bit. Control: at generated tokens they are felt.
    """
    trainer = table_trainer(train_on_roll_in_values=with_roll_in, entropy_coef=0.1)
    inputs = off_policy(roll_out(trainer))
    generated = inputs["loss_mask"].bool()
    is_roll_in = inputs["completion_mask"].bool() & ~generated
    assert is_roll_in.sum() == 11
    reference = loss_and_gradient(trainer, inputs)

    def replaced(names, where, by):
        return inputs | {name: inputs[name].masked_fill(where, by) for name in names}

    of_policy = ["old_per_token_logps", "ref_per_token_logps", "advantages"]
    of_values = ["old_values", "returns"]
    names = of_policy if with_roll_in else of_policy + of_values
    for garbage in (float("nan"), float("inf"), 1e4):
        assert_same(loss_and_gradient(trainer, replaced(names, is_roll_in, garbage)), reference, rtol=0, atol=0)
    for name in ("old_per_token_logps", "advantages", "returns"):
        assert abs(loss_and_gradient(trainer, replaced([name], generated, 0.5))[0] - reference[0]) > 1e-3
    if with_roll_in:
        assert abs(loss_and_gradient(trainer, replaced(of_values, is_roll_in, 0.5))[0] - reference[0]) > 1e-3


@pytest.mark.parametrize("with_roll_in", [False, True])
def test_gradient_at_log_probs_of_the_roll_in_is_zero(table_trainer, with_roll_in):
    trainer = table_trainer(train_on_roll_in_values=with_roll_in)
    inputs, kept = off_policy(roll_out(trainer)), []
    policy_loss = trainer._policy_loss

    def retaining(logps, *args):
        logps.retain_grad()
        kept.append(logps)
        return policy_loss(logps, *args)

    trainer._policy_loss = retaining
    loss_and_gradient(trainer, inputs)
    generated = inputs["loss_mask"].bool()
    assert (kept[0].grad[~generated] == 0).all()
    assert (kept[0].grad[generated] != 0).float().mean() > 0.5  # the others are clipped


@pytest.mark.parametrize("with_roll_in", [False, True])
def test_gradient_accumulation_is_one_batch(table_trainer, tmp_path, with_roll_in):
    """Two optimizer steps in one batch or in four of two. Control: without the roll-ins it is another run."""

    def train(name, batch_size, **kwargs):
        settings = {"train_on_roll_in_values": with_roll_in, "max_steps": 2, "lr_scheduler_type": "constant"} | SGD
        return run(
            table_trainer(
                output_dir=tmp_path / name, per_device_train_batch_size=batch_size, max_grad_norm=0.0,
                gradient_accumulation_steps=8 // batch_size, **(settings | kwargs),
            )
        )  # fmt: skip

    losses, expected = train("a", 8)
    accumulated_losses, accumulated = train("b", 2)
    assert distance(accumulated, expected) < 1e-6
    assert accumulated_losses == pytest.approx(losses, abs=1e-6)
    assert distance(train("c", 8, train_on_roll_in_values=not with_roll_in)[1], expected) > 1e-4


def test_continuations_are_cut_to_what_the_roll_in_leaves(table_trainer, tokenizer):
    """At 6 tokens for both: row 3 keeps 1 of its 5 generated tokens, and its EOS is lost."""
    trainer = table_trainer(max_completion_length=6, missing_eos_penalty=1.0, whiten_advantages=False)
    batch = roll_out(trainer)
    wholes = [[*(roll_in or []), *ids][:6] for roll_in, ids in zip(ROLL_INS, table(tokenizer), strict=True)]
    assert [x[m].tolist() for x, m in zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)] == (
        wholes
    )
    assert batch["loss_mask"].sum(dim=1).tolist() == [6, 3, 1, 1, 6, 2, 4, 6]
    rewards = trainer._completion_rewards(batch).tolist()
    lost = [1.0 if tokenizer.eos_token_id not in whole else 0.0 for whole in wholes]
    assert lost == [1, 0, 0, 1, 0, 0, 0, 1]
    assert rewards == pytest.approx([score - x for score, x in zip(SCORES, lost, strict=True)])


# --- Metrics


MIXED = {
    "reset_fraction": 5 / 8,
    "roll_in/mean_length": (0 + 3 + 5 + 2 + 1) / 5,
    "reward/no_reset": (0.7 - 1.2 - 0.4 + 3.0) / 4,  # rows 0, 1, 4 and 7 begin at the prompt
    "reward/reset": (2.0 + 0.1 + 1.5 + 0.0) / 4,
    "completions/mean_length/no_reset": (6 + 3 + 6 + 6) / 4,
    "completions/mean_length/reset": (4 + 10 + 4 + 5) / 4,
}
ALL = {"reset_fraction": 1.0, "roll_in/mean_length": 1.0, "reward/reset": 5.7 / 8}
ALL["completions/mean_length/reset"] = (sum(LENGTHS) + 8) / 8
NONE = {"reset_fraction": 0.0, "reward/no_reset": 5.7 / 8, "completions/mean_length/no_reset": sum(LENGTHS) / 8}
ZERO = NONE | {"reset_fraction": 1.0, "roll_in/mean_length": 0.0}


@pytest.mark.parametrize(
    ("kwargs", "roll_ins", "expected"),
    [
        ({}, ROLL_INS, MIXED),
        ({"train_on_roll_in_values": True}, ROLL_INS, MIXED),
        ({"missing_eos_penalty": 1.0}, ROLL_INS, MIXED),
        ({"scores": PARTLY}, ROLL_INS, MIXED | {"reward/no_reset": (0.7 + 3.0) / 2}),  # rows 1 and 4 are not scored
        ({"scores": [0.7, -1.2, None, None, -0.4, None, None, 3.0]}, ROLL_INS, MIXED | {"reward/reset": None}),
        ({"mask_truncated_completions": True}, ROLL_INS, MIXED),
        ({}, [[300]] * 8, ALL),
        ({}, [None] * 8, NONE),
        ({}, [[]] * 8, ZERO),
    ],
    ids=["mixed", "on roll-in", "penalty", "partly", "no reset scored", "truncated", "all", "none", "length 0"],
)
def test_metrics_by_hand(table_trainer, kwargs, roll_ins, expected):
    """Scores sum to 5.7. Where there is no completion of a kind there is no key."""
    trainer = table_trainer(**kwargs)
    trainer._draw_roll_ins = lambda prompt_ids: roll_ins
    roll_out(trainer)
    metrics = trainer._metrics["train"]
    found = {name: values for name, values in metrics.items() if "reset" in name or "roll_in" in name}
    expected = {name: [pytest.approx(value, rel=1e-6)] for name, value in expected.items() if value is not None}
    assert found == expected


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
