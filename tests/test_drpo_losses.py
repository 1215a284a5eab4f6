"""
DR-PO's losses and metrics on the real trainer, with fixed roll-ins: against float64 arithmetic and numbers by hand.
"""

from copy import deepcopy

import pytest
import torch
from conftest import LORA, SGD, distance, run
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

from trl_lol import DRPOTrainer


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
    assert_same(found, (loss.detach(), gradient))
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
        assert_same(loss_and_gradient(trainer, replaced(names, is_roll_in, garbage)), reference, rtol=0)
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
