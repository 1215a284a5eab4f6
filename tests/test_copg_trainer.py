"""CoPG through the real trainer: the optimum, rows, metrics, files and errors. What holds for all is tested in
`test_offline_trainers.py`."""

import math
import statistics
from functools import partial
from itertools import combinations

import pytest
import torch
from conftest import LORA, cpu_args, distance, logged, run
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_lol import ALoLTrainer, CoPGConfig, CoPGTrainer, toy
from trl_lol.losses import copg_loss


@pytest.fixture
def build(build_trainer, groups):
    """Makes a trainer on 30 groups, 90 completions."""
    return partial(build_trainer, CoPGTrainer, train_dataset=groups, learning_rate=1e-3, lr_scheduler_type="constant")


def log_probs(model, row):
    """Log-probabilities of a group's completions, each by a plain forward of its own, without padding."""
    sums = []
    for completion_ids in row["completion_ids"]:
        ids = torch.tensor([row["prompt_ids"] + completion_ids])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        sums.append(logps[0, -len(completion_ids) :].sum())
    return torch.stack(sums)


def loss_of(trainer, rows):
    """The loss that the trainer trains on."""
    trainer.model.train()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()


# ---- The loss that is trained on ----


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_loss_is_the_papers(build, peft_config):
    """The trainer's loss is the mean over the groups of `copg_loss` on log-probabilities computed here, at the first
    and at a later step."""
    trainer = build(beta=0.3, peft_config=peft_config)
    rows = [trainer.train_dataset[i] for i in range(6)]
    assert [len(row["rewards"]) for row in rows] == [2, 3, 4, 2, 3, 4]
    reference = [log_probs(trainer.model.eval(), row) for row in rows]

    def expected():
        policy = [log_probs(trainer.model.eval(), row) for row in rows]
        losses = [
            copg_loss(logps[None], ref_logps[None], torch.tensor([row["rewards"]]), beta=0.3)
            for logps, ref_logps, row in zip(policy, reference, rows, strict=True)
        ]
        return torch.cat(losses).mean().item()

    first = loss_of(trainer, rows)
    assert first == pytest.approx(expected(), rel=1e-5)
    trainer.train()
    later = loss_of(trainer, rows)
    assert later == pytest.approx(expected(), rel=1e-4)
    assert abs(later - first) > 1e-2 * first  # Control


def test_one_loss_value_per_group(build):
    """A group of 2 and one of 4: the mean over the two groups, not over 6 completions or 1 + 6 pairs."""
    trainer = build()
    pair, four = trainer.train_dataset[0], trainer.train_dataset[2]
    assert (len(pair["rewards"]), len(four["rewards"])) == (2, 4)
    of_pair, of_four, of_both = loss_of(trainer, [pair]), loss_of(trainer, [four]), loss_of(trainer, [pair, four])
    assert of_both == pytest.approx((of_pair + of_four) / 2, rel=1e-5)
    for other in ((2 * of_pair + 4 * of_four) / 6, (of_pair + 6 * of_four) / 7):  # Control
        assert of_both != pytest.approx(other, rel=1e-2)


def test_logged_loss_is_in_the_papers_normalisation(build, groups):
    """At the first step h = 0, so that the loss is the mean over the groups of Σ_{i>j} (R_i − R_j)² / ((k−1) · 2β)."""
    trainer = build(max_steps=1, train_dataset=groups.take(6), per_device_train_batch_size=6, beta=0.25)
    trainer.train()
    losses = [
        sum((a - b) ** 2 for a, b in combinations(row["rewards"], 2)) / ((len(row["rewards"]) - 1) * 2 * 0.25)
        for row in groups.take(6)
    ]
    assert logged(trainer, "loss") == [pytest.approx(statistics.mean(losses), rel=1e-5)]


# ---- The optimum ----

COMPLETIONS = (" a", " b", " c")
REWARDS = (2.5, 2.0, 1.0)
LOPSIDED = ((0.1, 0.2, 0.7), (0.05, 0.05, 0.9))


@pytest.fixture(scope="module")
def words():
    """A tokenizer of whole words: a completion of the bandit is one of them and EOS."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "q": 2, "a": 3, "b": 4, "c": 5}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


@pytest.fixture
def bandit(tmp_path, words):
    """The paper's bandit on a transformer: one prompt, three completions of one token, and 512 pairs of them, whose
    members are drawn from two distributions."""

    def build(trainer_class=CoPGTrainer, behaviours=LOPSIDED, rewards=REWARDS, ref_model=None, seed=0, **kwargs):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.multinomial(torch.tensor(mu), 512, True, generator=generator).tolist() for mu in behaviours]
        rows = [
            {"prompt": "q", "completions": [COMPLETIONS[i] for i in pair], "rewards": [rewards[i] for i in pair]}
            for pair in zip(*drawn, strict=True)
        ]
        settings = {
            "learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_steps": 100, "per_device_train_batch_size": 32,
            "logging_steps": 100,
        }  # fmt: skip
        return trainer_class(
            toy.make_model(words, seed, hidden_size=32),
            ref_model,
            cpu_args(trainer_class._config_class, tmp_path, **(settings | kwargs)),
            train_dataset=Dataset.from_list(rows),
            processing_class=words,
        )

    return build


def contrasts(trainer):
    """How much larger the log-ratios h of the three completions are than that of the last."""
    row = {"prompt_ids": [2], "completion_ids": [[3, 1], [4, 1], [5, 1]]}
    h = log_probs(trainer.model.eval(), row) - log_probs(trainer.ref_model, row)
    return (h - h[2]).tolist()


def optimum(beta):
    """π* ∝ π_ref e^{R/β}, so that h_i − h_j = (R_i − R_j)/β, whatever the probability of EOS."""
    return [(reward - REWARDS[2]) / beta for reward in REWARDS]


def test_log_ratios_reach_the_optimum(bandit):
    """With β = 0.5: (2.5 − 1)/0.5 = 3 and (2 − 1)/0.5 = 2, although the first is drawn least."""
    trainer = bandit(beta=0.5)
    assert len(trainer.train_dataset) == 512  # 0.1·0.05 + 0.2·0.05 + 0.7·0.9 = 65% are pairs of the same completion
    assert contrasts(trainer) == [0, 0, 0]
    trainer.train()
    assert contrasts(trainer) == pytest.approx([3, 2, 0], abs=0.05)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_optimum_does_not_depend_on_who_wrote_the_completions(bandit, seed):
    """Two random distributions of full support, another model and another β for each seed."""
    generator = torch.Generator().manual_seed(seed)
    behaviours = [(0.05 + 0.85 * mu).tolist() for mu in torch.randn(2, 3, generator=generator).mul(2).softmax(1)]
    beta = 0.25 + 0.25 * seed
    trainer = bandit(behaviours=behaviours, beta=beta, seed=seed)
    trainer.train()
    assert contrasts(trainer) == pytest.approx(optimum(beta), abs=0.05)


def test_another_loss_has_another_optimum(bandit):
    """Control: A-LoL raises the better completion of a pair without end, and what it reaches is not the optimum."""
    trainer = bandit(ALoLTrainer, baseline="group_mean")
    trainer.train()
    assert contrasts(trainer) != pytest.approx(optimum(0.5), abs=0.5)


def test_ties_pull_to_the_reference(bandit, words):
    """Rewards that are all equal say nothing but that the policy is to be the reference: all contrasts end at 0."""
    trainer = bandit(rewards=(1.0, 1.0, 1.0), ref_model=toy.make_model(words, seed=7, hidden_size=32), beta=0.5)
    assert len(trainer.train_dataset) == 512
    assert max(map(abs, contrasts(trainer))) > 0.5
    trainer.train()
    assert contrasts(trainer) == pytest.approx([0, 0, 0], abs=0.05)


# ---- Equalities ----


def test_loss_does_not_depend_on_padding_order_or_split(build, tiny_model, short_groups):
    trainer = build(train_dataset=short_groups, precompute_ref_log_probs=True, ref_model=tiny_model(seed=1))
    rows = [trainer.train_dataset[i] for i in range(8)]
    whole = loss_of(trainer, rows)
    assert loss_of(trainer, rows[::-1]) == pytest.approx(whole, rel=1e-6)
    assert sum(loss_of(trainer, rows[i : i + 2]) for i in (0, 2, 4, 6)) / 4 == pytest.approx(whole, rel=1e-6)
    lists = ("completion_ids", "rewards", "ref_logps")
    turned = [{**row, **{name: row[name][::-1] for name in lists}} for row in rows]
    assert loss_of(trainer, turned) == pytest.approx(whole, rel=1e-6)
    # Control: fewer rows, and rewards that go to the wrong completions
    assert loss_of(trainer, rows[:7]) != pytest.approx(whole, rel=1e-3)
    mixed = [{**row, "rewards": row["rewards"][::-1]} for row in rows]
    assert loss_of(trainer, mixed) != pytest.approx(whole, rel=1e-3)
    trainer.data_collator.pad_to_multiple_of = 128
    assert loss_of(trainer, rows) == pytest.approx(whole, rel=1e-6)


# ---- Rows ----


def text_rows(*rows):
    """Rows of texts, given as (prompt, completions, rewards)."""
    return Dataset.from_list([dict(zip(("prompt", "completions", "rewards"), row, strict=True)) for row in rows])


def test_text_and_messages_train(build, tmp_path, groups):
    as_text = groups.map(
        lambda row: {
            "prompt": " ".join(m["content"] for m in row["prompt"]),
            "completions": [f" {c[0]['content']}" for c in row["completions"]],
        },
        remove_columns=["prompt", "completions"],
    )
    trainers = [build(train_dataset=rows, output_dir=tmp_path / str(i)) for i, rows in enumerate((groups, as_text))]
    for trainer in trainers:
        assert [len(c) for c in trainer.train_dataset["completion_ids"]] == [2, 3, 4] * 10
        assert all(map(math.isfinite, run(trainer)[0]))
    assert trainers[0].train_dataset["rewards"][:] == trainers[1].train_dataset["rewards"][:] == groups["rewards"][:]
    assert trainers[0].train_dataset["prompt_ids"][:] != trainers[1].train_dataset["prompt_ids"][:]


def test_rows_of_one_completion_are_grouped_by_their_prompts(build, tmp_path, groups):
    """Dealt out so that the completions of a prompt do not follow each other, they make the same groups."""
    singles = [
        {"prompt": row["prompt"], "completion": row["completions"][i], "reward": row["rewards"][i]}
        for i in range(4)
        for row in groups
        if i < len(row["rewards"])
    ]
    grouped = build(train_dataset=Dataset.from_list(singles), output_dir=tmp_path / "a")
    assert grouped.train_dataset[:] == build(output_dir=tmp_path / "b").train_dataset[:]
    assert len(grouped.train_dataset) == 30 and len(singles) == 90
    assert all(map(math.isfinite, run(grouped)[0]))


def test_a_prompt_that_tokenising_trims_stays_one_group(build):
    """The toy tokenizer joins the prompt's last space with the word behind it where there is one for both: another end
    of the prompt for every completion, were they tokenised before they are grouped."""
    rows = {"prompt": ["My phone is "] * 3, "completion": ["hot", "the", "9"], "reward": [0.5, 1.0, 0.0]}
    trainer = build(train_dataset=Dataset.from_dict(rows))
    assert trainer.train_dataset["rewards"][:] == [[0.5, 1.0, 0.0]]
    group = text_rows(("My phone is ", ["hot", "the", "9"], [0.5, 1.0, 0.0]))
    assert build(train_dataset=group).train_dataset[:] == trainer.train_dataset[:]


def test_rewards_of_unit_tests(build, tmp_path):
    """True and False, and whole numbers, train like 1.0 and 0.0: (1 − 0)²/(2·0.1) = 5 at the first step."""
    rows = [text_rows(("a", [" x", " y"], r), ("b", [" z", " w"], r)) for r in ([True, False], [1, 0], [1.0, 0.0])]
    losses = [run(build(train_dataset=r, output_dir=tmp_path / str(i)))[0] for i, r in enumerate(rows)]
    assert losses[0] == losses[1] == losses[2] and losses[0][0] == pytest.approx(5, rel=1e-5)


def test_completions_that_are_cut_are_counted(build, caplog):
    rows = text_rows(("a", [" x", " x y z w x y z w"], [1.0, 0.0]))
    build(train_dataset=rows, max_length=6)
    assert "1 completions of the train dataset do not fit `max_length=6`" in caplog.text
    caplog.clear()
    build(train_dataset=rows)
    assert "do not fit" not in caplog.text


def test_compute_metrics_is_refused(build):
    """Trainer gathers what it gets by rows: sequences of groups would be lost, and on two ranks it would hang."""
    with pytest.raises(ValueError, match="`compute_metrics` gets one sequence per row"):
        build(compute_metrics=lambda prediction: {})


def test_the_reference_is_told_by_the_same_key_in_every_process(build):
    """The modules that LoRA adapts to are a set, whose order is another in every process."""

    class Backwards(set):
        def __repr__(self):
            return "{" + ", ".join(map(repr, sorted(self, reverse=True))) + "}"

    keys = []
    for kind in (set, Backwards):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        trainer = build(peft_config=config)
        adapter = trainer.model.peft_config["default"]
        adapter.target_modules = kind(adapter.target_modules)
        keys.append(trainer._reference_key[1])
    assert keys[0] == keys[1]


def test_labels_are_grouped_by_their_prompts(build):
    rows = {"prompt": list("abab"), "completion": [" x", " y", " z", " w"], "label": [True, True, False, False]}
    assert build(train_dataset=Dataset.from_dict(rows)).train_dataset["rewards"][:] == [[1.0, 0.0], [1.0, 0.0]]


def test_preferences_are_groups_of_two(build, tmp_path, pairs, scored_pairs, caplog):
    scored = build(train_dataset=scored_pairs, output_dir=tmp_path / "a")
    expected = [[row["chosen_reward"], row["rejected_reward"]] for row in scored_pairs]
    torch.testing.assert_close(torch.tensor(scored.train_dataset["rewards"][:]), torch.tensor(expected))
    assert "without scores" not in caplog.text
    plain = build(train_dataset=pairs, output_dir=tmp_path / "b")
    assert plain.train_dataset["rewards"][:] == [[1.0, 0.0]] * 120  # pairs that share a prompt stay pairs
    assert "without scores" in caplog.text
    assert plain.train_dataset["completion_ids"][:] == scored.train_dataset["completion_ids"][:]


def test_groups_with_tied_rewards_are_kept(build, caplog):
    rows = text_rows(("a", [" x", " y"], [1.0, 1.0]), ("b", [" x", " y", " z"], [0.0, 0.0, 0.0]))
    assert build(train_dataset=rows).train_dataset["rewards"][:] == [[1.0, 1.0], [0.0, 0.0, 0.0]]
    assert "In every group the rewards are equal" in caplog.text
    caplog.clear()
    build(train_dataset=text_rows(("a", [" x", " y"], [1.0, 1.0]), ("b", [" x", " y"], [0.0, 1.0])))
    assert "In every group" not in caplog.text


def test_groups_that_are_too_small_are_dropped_and_counted(build, caplog):
    """Null rewards leave 2 of 3 completions, which is a group, and 1 of 2, which is none."""
    rows = text_rows(
        ("a", [" x", " y"], [1.0, 0.0]),
        ("b", [" x"], [1.0]),
        ("c", [" x", " y", " z"], [0.5, None, 0.25]),
        ("d", [" x", " y"], [None, 1.0]),
        ("e", [], []),
    )
    trainer = build(train_dataset=rows)
    assert trainer.train_dataset["rewards"][:] == [[1.0, 0.0], [0.5, 0.25]]
    assert "Dropped 2 completions of the train dataset that are not scored" in caplog.text
    assert "Dropped 3 of 5 rows of the train dataset" in caplog.text and "fewer scored completions" in caplog.text
    caplog.clear()
    build(train_dataset=rows.select([0, 0]))
    assert "Dropped" not in caplog.text


def test_no_group_is_left(build):
    """The error says what to do."""
    rows = Dataset.from_dict({"prompt": list("abcd"), "completion": [" x"] * 4, "reward": [0.0, 1.0, 2.0, None]})
    message = r"None of the 4 rows.*fewer than 2 scored completions \(1 completions are not scored\).*score more"
    with pytest.raises(ValueError, match=message):
        build(train_dataset=rows)


def test_stream(build, groups):
    """A stream is trained on with a live reference, in its own order, and its groups are its rows."""
    rows = Dataset.from_list(
        [*groups.take(12), {**groups[0], "completions": groups[0]["completions"][:1], "rewards": [1.0]}]
    )
    trainer = build(train_dataset=rows.to_iterable_dataset(), eval_dataset=groups.take(4).to_iterable_dataset())
    whole = build(train_dataset=groups.take(12))
    assert [row["completion_ids"] for row in trainer.train_dataset] == whole.train_dataset["completion_ids"][:]
    trainer.train()
    assert len(logged(trainer, "loss")) == 3 and logged(trainer, "logratio/mean")[0] == 0
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    with pytest.raises(ValueError, match="`precompute_ref_log_probs=True` needs the whole dataset"):
        build(train_dataset=rows.to_iterable_dataset(), precompute_ref_log_probs=True)


def test_stream_of_single_completions(build):
    """They can't be grouped, and there would be nothing to train on."""
    rows = Dataset.from_dict({"prompt": ["a", "a"], "completion": [" x", " y"], "reward": [0.0, 1.0]})
    assert len(build(train_dataset=rows).train_dataset) == 1
    with pytest.raises(ValueError, match=r"one completion per row.*Pass a `Dataset`, or rows with `completions`"):
        build(train_dataset=rows.to_iterable_dataset())


def test_stream_without_a_group(build):
    """Training on it would end before its first step, without a word."""
    rows = text_rows(("a", [" x", " y"], [None, 1.0]), ("b", [" x"], [1.0]))
    with pytest.raises(ValueError, match=r"No row of the train stream is left.*fewer than 2 scored completions"):
        build(train_dataset=rows.to_iterable_dataset())


def test_reward_functions_score_the_groups(build, tmp_path, dialogues):
    def length(completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    def skip_long(completions, **kwargs):
        return [None if len(completion[0]["content"]) > 100 else 1.0 for completion in completions]

    rows = dialogues.take(10).select_columns(["prompt", "completions"])
    expected = [[float(len(c[0]["content"])) for c in completions] for completions in rows["completions"]]
    scored = build(train_dataset=rows, reward_funcs=length, output_dir=tmp_path / "a")
    assert scored.train_dataset["rewards"][:] == expected
    assert all(map(math.isfinite, run(scored)[0]))
    weighted = build(
        train_dataset=rows.add_column("rewards", [[9.0] * 4] * 10),  # is overridden
        reward_funcs=[length, length], reward_weights=[1.0, -0.5], output_dir=tmp_path / "b",
    )  # fmt: skip
    assert weighted.train_dataset["rewards"][:] == [[x / 2 for x in row] for row in expected]
    partly = build(train_dataset=rows, reward_funcs=skip_long, output_dir=tmp_path / "c")
    kept = [sum(x <= 100 for x in row) for row in expected]
    assert [len(row) for row in partly.train_dataset["rewards"]] == [k for k in kept if k > 1]
    assert any(k < 2 for k in kept) and any(2 <= k < 4 for k in kept)  # the lengths make a case of it


def test_evaluation(build, groups, scored_pairs):
    """Datasets of any format, several of them, and raw rows after training."""
    trainer = build(eval_dataset={"groups": groups.take(6), "pairs": scored_pairs.take(4)})
    assert [len(rows) for rows in trainer.eval_dataset.values()] == [6, 4]
    trainer.train()
    metrics = trainer.evaluate()
    of_groups, of_pairs = metrics["eval_groups_loss"], metrics["eval_pairs_loss"]
    assert of_groups == pytest.approx(loss_of(trainer, list(trainer.eval_dataset["groups"])), rel=1e-5)
    assert of_pairs == pytest.approx(loss_of(trainer, list(trainer.eval_dataset["pairs"])), rel=1e-5)
    assert trainer.evaluate(groups.take(6))["eval_loss"] == pytest.approx(of_groups, rel=1e-5)
    assert trainer.evaluate({"new": scored_pairs.take(4)})["eval_new_loss"] == pytest.approx(of_pairs, rel=1e-5)
    one = build(eval_dataset=groups.take(6), precompute_ref_log_probs=True)
    assert "ref_logps" in one.eval_dataset.column_names and math.isfinite(one.evaluate()["eval_loss"])


# ---- Metrics, files and references that move ----


def test_metrics(build, groups):
    """
    Within a group: the standard deviation of the rewards, with k − 1 below, and the share of the pairs of different
    rewards that the log-ratios order alike, where equal ones count as half. At the first step all log-ratios are 0.
    """
    trainer = build(eval_dataset=groups.take(8), learning_rate=1e-2, per_device_train_batch_size=8, max_steps=2)
    trainer.train()
    names = {
        "loss", "rewards/mean", "rewards/spread", "rewards/accuracies", "logps/mean", "logratio/mean", "entropy",
        "mean_token_accuracy", "num_tokens",
    }  # fmt: skip
    assert names <= trainer.state.log_history[0].keys()
    assert logged(trainer, "rewards/accuracies")[0] == 0.5 and logged(trainer, "logratio/mean")[0] == 0

    metrics = trainer.evaluate()  # of the 8 groups in one batch
    rows = list(trainer.eval_dataset)
    log_ratios = [(log_probs(trainer.model.eval(), row) - log_probs(trainer.ref_model, row)).tolist() for row in rows]
    right = []
    for h, row in zip(log_ratios, rows, strict=True):
        for i, j in combinations(range(len(h)), 2):
            if row["rewards"][i] != row["rewards"][j]:
                right.append((h[i] > h[j]) == (row["rewards"][i] > row["rewards"][j]))
    assert 0 < sum(right) < len(right) < sum(len(h) * (len(h) - 1) // 2 for h in log_ratios)  # the last: ties
    expected = {
        "rewards/accuracies": statistics.mean(right),
        "rewards/spread": statistics.mean(statistics.stdev(row["rewards"]) for row in rows),
        "rewards/mean": statistics.mean(reward for row in rows for reward in row["rewards"]),
        "logratio/mean": statistics.mean(x for h in log_ratios for x in h),
    }
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name


def test_model_card_and_tags(build, tmp_path):
    trainer = build(save_strategy="steps", save_steps=3)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "Contrastive Policy Gradient" in card and "2406.19185" in card and "fletberliac2024contrastive" in card
    assert {"trl", "trl-lol", "copg"} <= set(trainer.model.model_tags)


def test_reference_that_follows_the_policy(build, tmp_path):
    """As in DPO: every 2 steps half of the policy goes into the reference, here the copy in memory."""
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    fixed, moving = (
        build(output_dir=tmp_path / "a", max_steps=2),
        build(output_dir=tmp_path / "b", max_steps=2, **sync),
    )
    start = {name: p.detach().clone() for name, p in fixed.ref_model.named_parameters()}
    fixed.train()
    moving.train()
    policy, reference = dict(moving.model.named_parameters()), dict(moving.ref_model.named_parameters())
    for name, before in start.items():
        torch.testing.assert_close(reference[name], (before + policy[name]) / 2)
        assert torch.equal(dict(fixed.ref_model.named_parameters())[name], before)
    assert distance(start, {name: p.detach() for name, p in reference.items()}) > 1e-4


# ---- Errors ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, r"`beta=0\.0` must be positive"),
        ({"beta": -0.1}, r"`beta=-0\.1` must be positive"),
        ({"loss_type": ["sigmoid"]}, r"`loss_type=\['sigmoid'\]`.*accepts `\['copg'\]`"),
        ({"loss_type": ["copg", "sft"]}, r"accepts `\['copg'\]`"),
        ({"loss_weights": [0.5]}, r"`loss_weights=\[0\.5\]`.*remove both"),
    ],
)
def test_config_errors_say_what_to_change(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        cpu_args(CoPGConfig, tmp_path, **settings)
    assert cpu_args(CoPGConfig, tmp_path, loss_type="copg").loss_type == ["copg"]  # Control: a string will do


def test_reward_weights_need_reward_functions(build):
    with pytest.raises(ValueError, match="reward_weights"):
        build(reward_weights=[1.0])
