"""A-LoL through the real trainer: losses, advantages, values, metrics, files and errors. What holds for all is tested
in `test_offline_trainers.py`."""

import json
from functools import partial

import pytest
import torch
from conftest import LORA, cpu_args, logged
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_lol import ALoLConfig, ALoLTrainer, toy
from trl_lol.advantages import sequence_advantages
from trl_lol.losses import ALOL_LOSS_TYPES, alol_loss
from trl_lol.offline.sampling import EpochSampler


@pytest.fixture
def build(build_trainer, scored_pairs):
    """Makes a trainer on 120 scored preferences, 240 completions."""
    settings = {"learning_rate": 1e-3, "value_num_train_epochs": 2, "lr_scheduler_type": "constant"}
    return partial(build_trainer, ALoLTrainer, train_dataset=scored_pairs, **settings)


# ---- The loss that is trained on ----


@pytest.mark.parametrize("loss_type", ALOL_LOSS_TYPES)
def test_loss_is_the_papers(build, loss_type):
    """The trainer's loss is `alol_loss` on log-probabilities computed here by a plain forward, at the first and at a
    later step."""
    trainer = build(loss_type=[loss_type], beta=0.05, sampling="uniform")
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    trainer.model.train()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)

        def logps(model):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            return logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)

        expected = alol_loss(
            logps(trainer.model),
            logps(trainer.ref_model),
            batch["completion_mask"][:, 1:],
            batch["advantages"],
            loss_type=loss_type,
            beta=0.05,
        ).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_losses_combine_with_weights(build):
    single = [build(loss_type=[t], seed=1) for t in ("alol", "nll")]
    mixed = build(loss_type=["alol", "nll"], loss_weights=[0.5, 0.25], seed=1)
    batch = mixed.data_collator([mixed.train_dataset[i] for i in range(4)])
    alol, nll, both = (t.compute_loss(t.model, dict(batch)) for t in (*single, mixed))
    torch.testing.assert_close(both, 0.5 * alol + 0.25 * nll)


def test_advantage_weighting_off_leaves_the_weight_to_the_sampling(build):
    on, off = build(), build(advantage_weighting=False)
    batch = on.data_collator([on.train_dataset[0]])
    advantage = batch["advantages"].item()
    assert advantage > 0
    for trainer in (on, off):
        trainer.model.train()
    torch.testing.assert_close(
        on.compute_loss(on.model, dict(batch)), advantage * off.compute_loss(off.model, dict(batch))
    )


# ---- Equalities ----


def test_loss_does_not_depend_on_padding_order_or_split(build, short_pairs):
    trainer = build(train_dataset=short_pairs, precompute_ref_log_probs=True)
    rows = [trainer.train_dataset[i] for i in range(8)]
    trainer.model.train()

    def loss(rows):
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()

    whole = loss(rows)
    assert loss(rows[::-1]) == pytest.approx(whole, rel=0, abs=1e-6)
    assert sum(loss(rows[i : i + 2]) for i in (0, 2, 4, 6)) / 4 == pytest.approx(whole, rel=0, abs=1e-6)
    trainer.data_collator.pad_to_multiple_of = 128
    assert loss(rows) == pytest.approx(whole, rel=0, abs=1e-6)
    assert abs(loss(rows[:7]) - whole) > 1e-4  # Control


# ---- The reference ----


def test_reference_is_frozen_and_not_shared(build, tiny_model):
    trainer = build()
    before = {name: p.clone() for name, p in trainer.ref_model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.ref_model.named_parameters())
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    assert build(precompute_ref_log_probs=True).ref_model is None  # nothing but the policy in memory


# ---- Advantages and what is kept ----


def test_advantages_are_rewards_minus_the_prompts_value_and_negative_ones_are_dropped(build, scored_pairs):
    trainer = build()
    everything = build(advantage_filter="none")
    rewards = torch.tensor([r for row in scored_pairs for r in (row["chosen_reward"], row["rejected_reward"])])
    assert len(everything.train_dataset) == 240
    torch.testing.assert_close(torch.tensor(everything.train_dataset["rewards"]).view(-1), rewards)
    advantages = torch.tensor(everything.train_dataset["advantages"]).view(-1)
    values = rewards - advantages
    for i in range(0, 240, 4):  # two rows of two completions each have one prompt, hence one value
        assert (values[i : i + 4] - values[i]).abs().max() < 1e-5
    kept = torch.tensor(trainer.train_dataset["advantages"]).view(-1)
    torch.testing.assert_close(kept, advantages[advantages > 0])
    report = trainer.advantage_report
    assert (report.num_kept, report.num_completions) == (len(kept), 240) and 0 < len(kept) < 240
    assert sum(total for _, total in report.subsets.values()) == 240


def test_advantages_stay_alive_with_one_completion_per_prompt(build, dialogues):
    """However long the head is fitted: it has not seen the reward of the prompt that it values. Rewards that say
    nothing about their prompts keep most of their spread as advantages."""
    rewards = torch.randn(len(dialogues), generator=torch.Generator().manual_seed(0))
    rows = {
        "prompt": dialogues["prompt"][:],
        "completion": [completions[0] for completions in dialogues["completions"]],
        "reward": rewards.tolist(),
    }
    trainer = build(train_dataset=Dataset.from_dict(rows), value_num_train_epochs=100, value_learning_rate=3e-3)
    report = trainer.advantage_report
    assert report.num_completions == len(dialogues) and 0.2 < report.kept_fraction < 0.8
    advantages = torch.tensor(trainer.train_dataset["advantages"]).view(-1)
    assert advantages.mean() > 0.5 * rewards[rewards > 0].mean()


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out", "batch_mean", "none"])
def test_other_baselines(build, scored_pairs, baseline):
    """The four completions of a prompt are one group, although they stand in two rows."""
    trainer = build(baseline=baseline, advantage_filter="none")
    rewards = torch.tensor([r for row in scored_pairs for r in (row["chosen_reward"], row["rejected_reward"])])
    expected = sequence_advantages(rewards, group_ids=torch.arange(240) // 4, baseline=baseline)
    torch.testing.assert_close(torch.tensor(trainer.train_dataset["advantages"]).view(-1), expected)


def test_baseline_losses_use_every_row_with_its_reward(build):
    for loss_type in ("wbc", "r_gold", "r_lol", "nll"):
        trainer = build(loss_type=[loss_type])
        assert len(trainer.train_dataset) == 240
        rewards, advantages = (torch.tensor(trainer.train_dataset[name][:]) for name in ("rewards", "advantages"))
        torch.testing.assert_close(advantages, rewards)
        assert trainer._get_train_sampler().cumulative is None
        assert trainer.advantage_report is None


def test_signed_advantages_are_sampled_uniformly_and_keep_their_sign(build):
    trainer = build(advantage_filter="none")
    assert trainer._get_train_sampler().cumulative is None
    advantages = torch.tensor(trainer.train_dataset["advantages"]).view(-1)
    batch = trainer.data_collator([trainer.train_dataset[int(advantages.argmin())]])
    assert batch["advantages"].item() < 0
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, batch).item() < 0


def test_priority_sampler_draws_by_advantage(build):
    sampler = build()._get_train_sampler()
    assert isinstance(sampler, EpochSampler) and sampler.cumulative is not None
    trainer = build()
    advantages = torch.tensor(trainer.train_dataset["advantages"], dtype=torch.double).view(-1)
    torch.testing.assert_close(sampler.cumulative, advantages.cumsum(0))
    assert len(sampler) == len(trainer.train_dataset)


def test_evaluation_uses_every_row(build, scored_pairs):
    trainer = build(eval_dataset={"small": scored_pairs.select(range(10)), "large": scored_pairs})
    assert [len(d) for d in trainer.eval_dataset.values()] == [20, 240]
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_large_loss"] < float("inf")
    # TRL logs what the loss collects as `eval_…` whatever the set is called; the larger one came last
    rewards = [r for row in scored_pairs for r in (row["chosen_reward"], row["rejected_reward"])]
    assert logged(trainer, "eval_rewards/mean")[-1] == pytest.approx(sum(rewards) / 240, rel=1e-5)
    kept = trainer.advantage_report.kept_fraction
    assert logged(trainer, "eval_advantages/kept_fraction")[-1] == pytest.approx(kept, abs=0.1)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_evaluate_takes_new_rows_after_training(build, scored_pairs, peft_config):
    """Values of prompts that come later are those of the reference, not of the trained policy."""
    trainer = build(peft_config=peft_config)
    before = trainer._prepare_dataset(scored_pairs.select(range(20)), trainer.processing_class, trainer.args, "eval")
    trainer.train()
    trainer.cache_dir = trainer.value_estimator.cache_dir = None
    after = trainer._prepare_dataset(scored_pairs.select(range(20)), trainer.processing_class, trainer.args, "eval")
    torch.testing.assert_close(torch.tensor(after["advantages"][:]), torch.tensor(before["advantages"][:]))
    metrics = trainer.evaluate(scored_pairs.select(range(20)))
    assert torch.isfinite(torch.tensor(metrics["eval_loss"]))


def test_everything_slow_is_cached(build, tmp_path, monkeypatch):
    log = tmp_path / "calls"

    def reward(completions, **kwargs):
        with log.open("a") as file:  # a list that it fills would change the function's hash
            file.write("." * len(completions))
        return [float(len(c[0]["content"])) for c in completions]

    first = build(reward_funcs=reward, precompute_ref_log_probs=True)
    files = sorted(path.name.split("-")[0] for path in (first.cache_dir).iterdir())
    assert files == ["ref_logps_train", "rewards", "value_head"] and log.read_text() == "." * 240
    monkeypatch.setattr("trl_lol.value.prompt_hidden_states", None)  # what is not called need not be there
    monkeypatch.setattr(ALoLTrainer, "compute_ref_log_probs", None)
    second = build(reward_funcs=reward, precompute_ref_log_probs=True)
    assert log.read_text() == "." * 240
    assert second.train_dataset[:] == first.train_dataset[:]


# ---- Files and metrics ----


def test_metrics_report_and_model_card(build, tmp_path):
    trainer = build(loss_type=["alol"], save_strategy="steps", save_steps=3)
    trainer.train()
    names = {
        "loss", "rewards/mean", "logps/mean", "logratio/mean", "entropy", "mean_token_accuracy", "num_tokens",
        "advantages/mean", "advantages/kept_fraction", "importance_ratio/mean", "importance_ratio/clipped",
    }  # fmt: skip
    assert names <= trainer.state.log_history[0].keys()
    assert logged(trainer, "importance_ratio/mean")[0] == 1 and logged(trainer, "importance_ratio/clipped")[0] == 0
    assert logged(trainer, "advantages/kept_fraction")[0] == pytest.approx(trainer.advantage_report.kept_fraction)
    report = json.loads((tmp_path / "advantage_report.json").read_text())
    assert report["num_kept"] == trainer.advantage_report.num_kept
    card = (tmp_path / "README.md").read_text()
    assert "Leftover Lunch" in card and "2305.14718" in card and "baheti2024leftover" in card


# ---- Errors ----


def test_all_advantages_negative(build):
    rows = {"prompt": ["a", "b"], "completions": [["x", "y"], ["z", "w"]], "rewards": [[1.0, 1.0], [2.0, 2.0]]}
    with pytest.raises(ValueError, match=r"(?s)nothing to train on.*rewards.*baseline"):
        build(train_dataset=Dataset.from_dict(rows), baseline="group_mean")


def test_value_range_must_hold_the_rewards(build):
    with pytest.raises(ValueError, match=r"value_range.*does not hold the rewards"):
        build(value_range=[0.0, 0.1])


def test_warnings_about_unbounded_losses(build, caplog):
    build(loss_type=["alol_kl"], beta=0.5)
    assert "below `beta=0.5`" in caplog.text
    caplog.clear()
    build(loss_type=["wbc"])
    assert "negative reward" in caplog.text
    caplog.clear()
    build(loss_type=["nll"])
    build(loss_type=["alol_kl"], beta=0.0)
    assert "without bound" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": ["sigmoid"]}, r"accepts .*'alol'"),
        ({"loss_type": ["alol", "wbc"]}, "mixes"),
        ({"baseline": "mean"}, "Use one of"),
        ({"advantage_filter": "all"}, "Use one of"),
        ({"sampling": "weighted"}, "Use one of"),
        ({"value_source": "oracle"}, "Use one of"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"value_range": [1.0, 0.0]}, "value_range"),
        ({"advantage_weighting": False, "advantage_filter": "none"}, "advantage_weighting"),
        ({"train_sampling_strategy": "group_by_length"}, 'sampling="uniform"'),
    ],
)
def test_config_errors_say_what_to_change(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        cpu_args(ALoLConfig, tmp_path, **settings)


def test_reward_function_errors_name_it_and_leave_nothing_behind(build, tmp_path):
    def broken(completions, **kwargs):
        raise KeyError("missing")

    with pytest.raises(RuntimeError, match="broken"):
        build(reward_funcs=broken)
    assert not list(tmp_path.glob("_cache/*"))


def test_learning_raises_the_reward(tmp_path, tokenizer, tiny_model, dialogues):
    """Completions are one of two words; the reward of the first is 1, of the second 0. After training the policy
    prefers the first, and with the rewards swapped, the control, the second."""
    good, bad = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
    prompts = dialogues["prompt"][:]
    for rewards, sign in (([1.0, 0.0], 1), ([0.0, 1.0], -1)):
        for seed in range(3):
            rows = Dataset.from_dict(
                {"prompt": prompts, "completions": [[good, bad]] * len(prompts), "rewards": [rewards] * len(prompts)}
            )
            trainer = ALoLTrainer(
                tiny_model(seed),
                args=cpu_args(ALoLConfig, tmp_path, learning_rate=1e-2, max_steps=15, seed=seed),
                train_dataset=rows,
                eval_dataset=rows.select(range(8)),
                processing_class=tokenizer,
            )
            trainer.train()
            batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(8)])
            with torch.no_grad():
                outputs = trainer.model(
                    input_ids=batch["input_ids"],
                    labels=batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
                    fused_lm_head=True,
                )
            gap = outputs.log_probs.sum(1)[0::2] - outputs.log_probs.sum(1)[1::2]
            assert (sign * gap).min() > 2


# ---- Corners ----


def test_cache_tells_models_apart_that_have_the_same_weights(build, tiny_model):
    """The scale of a LoRA adapter is in its config alone. Log-probabilities cached with one must not serve another."""
    for alpha in (4, 64):
        model = get_peft_model(tiny_model(), LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear"))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        trainer = build(model, precompute_ref_log_probs=True, max_steps=1)
        trainer.train()
        assert abs(logged(trainer, "logratio/mean")[0]) < 1e-4


def test_live_reference_has_no_dropout(build, tokenizer):
    """Dropout in the attention is no module, so that `disable_dropout` does not reach it."""
    model = toy.make_model(tokenizer, hidden_size=32, num_layers=2)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    trainer = build(model, peft_config=LORA)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.train()
    first, second = (trainer.compute_ref_log_probs(trainer.model, batch) for _ in range(2))
    assert torch.equal(first, second) and trainer.model.training
    policy = [trainer.compute_loss(trainer.model, dict(batch)).item() for _ in range(2)]
    assert policy[0] != policy[1]  # Control: the policy has


def test_metrics_are_named_for_what_they_are(build):
    for settings, kept in (({"loss_type": ["nll"]}, None), ({"advantage_filter": "none"}, 1.0), ({}, "report")):
        trainer = build(max_steps=1, **settings)
        trainer.train()
        fractions = logged(trainer, "advantages/kept_fraction")
        if kept is None:
            assert not fractions and not logged(trainer, "advantages/mean")
        elif kept == "report":
            assert fractions == [pytest.approx(trainer.advantage_report.kept_fraction)]
        else:
            assert fractions == [kept]


@pytest.mark.parametrize("column", [["a", None] * 60, [["a"], ["b"]] * 60], ids=["null", "list"])
def test_subsets_of_any_kind(build, scored_pairs, column):
    report = build(train_dataset=scored_pairs.remove_columns("subset").add_column("subset", column)).advantage_report
    assert len(report.subsets) == 2 and sum(total for _, total in report.subsets.values()) == 240


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_dataset_in_a_tensor_format(build, tmp_path, kind):
    rows = Dataset.from_dict(
        {"prompt": ["a", "b"] * 4, "completion": list("cdefghij"), "reward": [0.0, 1.0, 2.0, 3.0] * 2}
    )
    plain, formatted = (build(train_dataset=d, output_dir=tmp_path / "x") for d in (rows, rows.with_format(kind)))
    assert plain.train_dataset[:] == formatted.train_dataset[:]


def test_equal_rewards_say_so(build):
    rows = Dataset.from_dict({"prompt": list("abcd"), "completion": list("efgh"), "reward": [0.1] * 4})
    with pytest.raises(ValueError, match=r"All 4 rewards are 0\.1"):
        build(train_dataset=rows)
    assert len(build(train_dataset=rows, baseline="none").train_dataset) == 4


def test_stream_uses_cross_fitted_values_and_reports(build, scored_pairs):
    """A prompt that the heads were fitted on has the same advantage, streamed or not."""
    whole = build(advantage_filter="none")
    stream = build(train_dataset=scored_pairs.to_iterable_dataset(), advantage_filter="none")
    advantages = torch.tensor([row["advantages"][0] for row in stream.train_dataset])
    expected = torch.tensor(whole.train_dataset["advantages"]).view(-1)
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=1e-5)
    assert stream.advantage_report.num_completions == 240
    tied = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "reward": [1.0]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="nothing to train on"):
        build(train_dataset=tied, baseline="group_mean")


def test_reward_weights_need_reward_functions(build):
    with pytest.raises(ValueError, match="reward_weights"):
        build(reward_weights=[1.0])
