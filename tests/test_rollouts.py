"""Values from the policy's own completions: which prompts are completed, how they are scored, and what follows."""

import copy

import pytest
import torch
from conftest import LORA
from datasets import Dataset

from trl_lol import (
    ALoLTrainer,
    ColumnReward,
    estimate_advantages,
    sample_completions,
    score_dataset,
    toy,
    weighted_sum,
)
from trl_lol.advantages import mean_rewards
from trl_lol.data import tokenize_prompt
from trl_lol.estimation import group_by_prompt_ids, score_rollouts


ROLLOUTS = {"value_source": "rollouts", "value_num_train_epochs": 2, "value_max_completion_length": 6}
NUM_PROMPTS = 20


def num_words(prompts, completions, **columns):
    return [float(len(completion[0]["content"].split())) for completion in completions]


def by_hand(rows, model, tokenizer, seed=0, k=1):
    """Mean rewards of the completions of each distinct prompt, and their tokens."""
    distinct = Dataset.from_dict({"prompt": list({str(prompt): prompt for prompt in rows["prompt"]}.values())})
    rows = sample_completions(distinct, model.eval(), tokenizer, k, max_new_tokens=6, batch_size=8, seed=seed)
    rows = score_dataset(rows, num_words)
    prompt_ids = [tokenize_prompt(row["prompt"], row, tokenizer) for row in rows]
    return prompt_ids, [sum(rewards) / k for rewards in rows["rewards"]]


@pytest.fixture
def fitted(monkeypatch):
    """What the value heads were fitted on: prompts, rewards, weights."""
    calls = []
    monkeypatch.setattr("trl_lol.value.ValueEstimator.fit", lambda self, *args: calls.append(args), raising=True)
    monkeypatch.setattr(
        "trl_lol.value.ValueEstimator.predict_sharded", lambda self, prompts, name: torch.zeros(len(prompts))
    )
    return calls


def test_the_heads_learn_the_rewards_of_the_policys_own_completions(
    build_trainer, tiny_model, tokenizer, scored_pairs, fitted
):
    """Two completions of each of the distinct prompts of 20 rows, whatever the logged completions are worth."""
    pairs = scored_pairs.take(NUM_PROMPTS)
    settings = {**ROLLOUTS, "value_num_generations": 2, "per_device_eval_batch_size": 8, "seed": 0}
    build_trainer(ALoLTrainer, train_dataset=pairs, reward_funcs=num_words, **settings)
    ((prompts, means, counts),) = fitted
    expected_prompts, expected_means = by_hand(pairs, tiny_model(), tokenizer, k=2)
    assert prompts == expected_prompts and len(prompts) < NUM_PROMPTS
    assert means.tolist() == expected_means and counts.tolist() == [2] * len(prompts)
    logged = [*num_words(None, pairs["chosen"]), *num_words(None, pairs["rejected"])]
    assert max(means) <= 6 < max(logged)  # Control: the logged completions are longer than a rollout may be


def test_evaluation_prompts_are_completed_where_there_are_any(build_trainer, tokenizer, scored_pairs, fitted):
    train, held_out = scored_pairs.take(20), scored_pairs.select(range(100, 110))
    kwargs = {"train_dataset": train, "reward_funcs": num_words, **ROLLOUTS}
    build_trainer(ALoLTrainer, eval_dataset=held_out, **kwargs)
    expected = [tokenize_prompt(prompt, {}, tokenizer) for prompt in held_out["prompt"]]
    assert {*map(tuple, fitted[0][0])} == {*map(tuple, expected)}
    build_trainer(ALoLTrainer, eval_dataset={"a": held_out.take(4), "b": held_out.skip(4)}, **kwargs)
    assert fitted[1][0] == fitted[0][0]
    build_trainer(ALoLTrainer, value_max_prompts=3, eval_dataset=held_out, **kwargs)
    assert len(fitted[2][0]) == 3
    build_trainer(ALoLTrainer, **kwargs)
    assert not {*map(tuple, fitted[3][0])} & {*map(tuple, expected)}


def test_evaluation_sets_of_several_forms(build_trainer, scored_pairs, fitted):
    """One with a prompt and one with the prompt inside, and one of text."""
    rows = scored_pairs.select_columns(["prompt", "chosen", "rejected"])
    inside = rows.select([110]).map(lambda row: {n: row["prompt"] + row[n] for n in ("chosen", "rejected")})
    sets = {
        "with": rows.select([100]),
        "inside": inside.remove_columns("prompt"),
        "text": Dataset.from_list([{"prompt": "The kettle", "completion": " leaks."}]),
    }
    any_length = lambda prompts, completions, **columns: [float(len(str(c))) for c in completions]  # noqa: E731
    kwargs = {"train_dataset": scored_pairs.take(20), "reward_funcs": any_length, **ROLLOUTS}
    build_trainer(ALoLTrainer, eval_dataset=sets, **kwargs)
    ((prompts, means, counts),) = fitted
    assert len(prompts) == 3 and counts.tolist() == [1, 1, 1] and (means > 0).all()


def test_logged_completions_may_be_equally_good(build_trainer, scored_pairs, fitted):
    """Nothing tells good answers from each other, and the policy's own are worse: all are kept."""
    rows = Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in scored_pairs.take(20)])

    def gold(prompts, completions, **columns):
        return [float(len(c[0]["content"].split()) > 6) for c in completions]

    rows = rows.filter(lambda row: gold(None, [row["completion"]])[0])
    trainer = build_trainer(ALoLTrainer, train_dataset=rows, reward_funcs=gold, **ROLLOUTS)
    assert len(trainer.train_dataset) == len(rows) > 5 and fitted[0][1].max() == 0
    with pytest.raises(ValueError, match="rewards are 1: no completion is better"):
        build_trainer(ALoLTrainer, train_dataset=rows, reward_funcs=gold)


def test_a_stream_is_completed_at_its_head(build_trainer, scored_pairs, fitted):
    stream = scored_pairs.to_iterable_dataset()
    build_trainer(
        ALoLTrainer, train_dataset=stream, reward_funcs=num_words, max_steps=1, value_max_prompts=12, **ROLLOUTS
    )
    ((prompts, *_),) = fitted
    head = {str(prompt) for prompt in scored_pairs["prompt"][:12]}
    assert len(prompts) == len(head)


def test_estimate_advantages_agrees_with_the_trainer(build_trainer, tiny_model, tokenizer, scored_pairs, tmp_path):
    pairs = scored_pairs.take(NUM_PROMPTS)
    trainer = build_trainer(
        ALoLTrainer, train_dataset=pairs, reward_funcs=num_words, per_device_eval_batch_size=8, seed=0, **ROLLOUTS
    )
    kwargs = {"processing_class": tokenizer, "num_train_epochs": 2, "max_completion_length": 6}
    estimated = estimate_advantages(pairs, tiny_model(), num_words, value_source="rollouts", **kwargs)
    found = [a for row in estimated for a in (row["chosen_advantage"], row["rejected_advantage"]) if a > 0]
    kept = [advantages[0] for advantages in trainer.train_dataset["advantages"]]
    assert kept and kept == pytest.approx(found, rel=0, abs=1e-5)
    logged = estimate_advantages(pairs, tiny_model(), num_words, processing_class=tokenizer, num_train_epochs=2)
    assert logged["value"][:] != estimated["value"][:]
    # The logged answers are longer than the policy's six tokens may be: nearly all are better than its own
    assert sum(a > 0 for a in estimated["chosen_advantage"]) > sum(a > 0 for a in logged["chosen_advantage"])


def test_the_reference_under_an_adapter_writes_them(build_trainer, tiny_model, tokenizer, scored_pairs, fitted):
    pairs = scored_pairs.take(NUM_PROMPTS)
    settings = {**ROLLOUTS, "per_device_eval_batch_size": 8, "seed": 0}
    build_trainer(
        ALoLTrainer, train_dataset=pairs, reward_funcs=num_words, peft_config=copy.deepcopy(LORA), **settings
    )
    ((prompts, means, _),) = fitted
    assert (prompts, means.tolist()) == by_hand(pairs, tiny_model(), tokenizer)


def test_they_are_sampled_once(build_trainer, tiny_model, scored_pairs, monkeypatch):
    kwargs = {"train_dataset": scored_pairs.take(8), "reward_funcs": num_words, **ROLLOUTS}
    first = build_trainer(ALoLTrainer, **kwargs)
    model = tiny_model()
    monkeypatch.setattr(model, "generate", lambda **kwargs: pytest.fail("completions are sampled again"))
    again = build_trainer(ALoLTrainer, model, **kwargs)
    assert again.train_dataset["advantages"][:] == first.train_dataset["advantages"][:]


def test_prompts_that_are_too_long_and_rollouts_that_are_not_scored(tiny_model, tokenizer, dialogues):
    """Of 4 prompts the longest is left out; of two completions of the others the second is not scored."""

    def first_only(prompts, completions, **columns):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    rows = dialogues.take(4)
    lengths = [len(tokenize_prompt(prompt, {}, tokenizer)) for prompt in rows["prompt"]]
    kwargs = {"num_prompts": 10, "num_generations": 2, "max_completion_length": 2, "batch_size": 8, "seed": 0}
    model = tiny_model().eval()
    for limit, left in ((max(lengths), sum(n < max(lengths) for n in lengths)), (None, 4)):
        prompts, means, counts = score_rollouts(
            rows, model, first_only, tokenizer, max_length=limit, cache_dir=None, **kwargs
        )
        assert len(prompts) == left and means.tolist() == [1.0] * left and counts.tolist() == [1.0] * left
    assert left == 4 > sum(n < max(lengths) for n in lengths)


def test_mean_rewards_of_groups():
    """Prompts a, b, a: rewards (1, 3), (nan), (5): a has the mean 3 of 3 completions, b none."""
    prompts, group_ids, rewards = group_by_prompt_ids([[1], [2], [1]], [[1.0, 3.0], [float("nan")], [5.0]])
    means, counts = mean_rewards(rewards, group_ids, 2)
    assert prompts == [[1], [2]] and means[0] == 3 and counts.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "there are no `reward_funcs`"),
        ({"reward_funcs": weighted_sum([num_words, ColumnReward("score")])}, r"`ColumnReward\('score'\)` has rewards"),
        ({"reward_funcs": num_words, "baseline": "group_mean"}, "`baseline='group_mean'` has none"),
        ({"reward_funcs": num_words, "loss_type": ["wbc"]}, r"`loss_type=\['wbc'\]` has none"),
    ],
)
def test_what_cannot_be(build_trainer, tiny_model, tokenizer, scored_pairs, settings, match):
    with pytest.raises(ValueError, match=match):
        build_trainer(ALoLTrainer, train_dataset=scored_pairs.take(4), **{**ROLLOUTS, **settings})
    if "loss_type" not in settings:
        kwargs = {"processing_class": tokenizer, "value_source": "rollouts", **settings}
        with pytest.raises(ValueError, match=match):
            estimate_advantages(scored_pairs.take(4), tiny_model(), **kwargs)


def test_an_unknown_source(tiny_model, scored_pairs):
    with pytest.raises(ValueError, match=r'`value_source=\'auto\'` is unknown. Use "dataset" or "rollouts"'):
        estimate_advantages(scored_pairs.take(4), tiny_model(), toy.oracle_reward, value_source="auto")
