"""
What the online trainers make of a table of completions, against float64 arithmetic on raw quantities: rewards per
token, advantages, losses and their gradients, normalisation, metrics.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LORA, SGD, cpu_args, distance, logged, run, weights
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from trl_lol import APATrainer, PPOTrainer


# Length of each completion of the table, and whether it ends with EOS
LENGTHS = [6, 3, 1, 5, 6, 2, 4, 6]
ENDS = [False, True, True, True, True, True, True, False]
SCORES = [0.7, -1.2, 2.0, 0.1, -0.4, 1.5, 0.0, 3.0]
PARTLY = [0.7, None, 2.0, 0.1, None, 1.5, 0.0, 3.0]
NUM_TOKENS = sum(LENGTHS)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 against float64


def table(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The completions: random ordinary tokens, and EOS where it is due."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(300, 700, (n,), generator=generator).tolist() for n in LENGTHS]
    return [[*row[:-1], tokenizer.eos_token_id] if end else row for row, end in zip(rows, ENDS, strict=True)]


def replay(trainer: Any, completions: list[list[int]]) -> None:
    """Take completions from a table instead of generating them."""
    trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (completions[: len(prompt_ids)], None)


def returning(values: list[float | None]) -> Callable:
    def scores(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return values[: len(completion_ids)]

    return scores


def shake(module: nn.Module, scale: float = 0.15, seed: int = 1) -> None:
    """Add the same noise to the weights that are trained, so that the policy leaves its reference and the value head
    leaves zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def build(build_online_trainer: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """Makes an online trainer that replays the table, with a policy that has left its reference."""

    def build(
        trainer_class: type = PPOTrainer, scores: list[float | None] = SCORES, shaken: bool = True, **kwargs: Any
    ) -> Any:
        kwargs = {"per_device_train_batch_size": 8, "reward_funcs": returning(scores)} | kwargs
        if "peft_config" in kwargs:  # PEFT writes the model's name into it
            kwargs["peft_config"] = copy.deepcopy(kwargs["peft_config"])
        trainer = build_online_trainer(trainer_class, **kwargs)
        replay(trainer, table(tokenizer))
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer.model.train()
        if shaken:
            shake(trainer.model)
        return trainer

    return build


def roll_out(trainer: Any) -> dict[str, Tensor]:
    """The batch for the eight completions of the table."""
    k = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    prompts = trainer.train_dataset[: len(LENGTHS)]["prompt"]
    return trainer._generate_and_score_completions([{"prompt": prompts[i // k]} for i in range(len(LENGTHS))])


def off_policy(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch as a policy and a critic find it that have moved far since."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, *batch["loss_mask"].shape, generator=generator)
    moved = {"old_per_token_logps": batch["old_per_token_logps"] + 0.4 * noise[0]}
    if "old_values" in batch:
        moved["old_values"] = batch["old_values"] + 0.4 * noise[1]
    return batch | moved


def loss_and_gradient(trainer: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradient = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradient


def assert_same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]], rtol: float = 5e-6) -> None:
    """
    The same loss and gradient. A gradient is held against the largest entry of its tensor: a small entry is a sum of
    large terms, and how much of their rounding is left in it depends on the processor.
    """
    torch.testing.assert_close(a[0], b[0], check_dtype=False, rtol=rtol, atol=0)
    assert a[1].keys() == b[1].keys()
    for name, expected in b[1].items():
        atol = rtol * expected.abs().max().item()
        torch.testing.assert_close(a[1][name], expected, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# --- By hand


def whiten(rows: list[list[float]], shift_mean: bool = True) -> list[list[float]]:
    """Over all tokens, with Bessel's correction and the 1e-8 under the root."""
    tokens = [x for row in rows for x in row]
    mean = math.fsum(tokens) / len(tokens)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in tokens) / (len(tokens) - 1) + 1e-8)
    return [[(x - mean) / std + (0.0 if shift_mean else mean) for x in row] for row in rows]


def advantages_by_hand(
    batch: dict[str, Tensor],
    scores: list[float | None],
    beta: float,
    gamma: float = 1.0,
    lam: float = 0.95,
    penalty: float = 0.0,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
) -> tuple[list[list[float]], list[list[float]]]:
    """
    Advantages and returns of the tokens of every completion, those of an unscored one empty: r_t = −β (ln π_old −
    ln π_ref), at the last token + R − penalty without EOS; A_t = Σ_j (γλ)^(j−t) (r_j + γ V_{j+1} − V_j).
    """

    def rows(name: str) -> list[list[float]]:
        lists = batch[name].double().tolist() if name in batch else [[0.0] * 6] * 8
        return [x[:n] if score is not None else [] for x, n, score in zip(lists, LENGTHS, scores, strict=True)]

    old, ref, values = rows("old_per_token_logps"), rows("ref_per_token_logps"), rows("old_values")
    rewards = [[-beta * (o - r) for o, r in zip(*row, strict=True)] for row in zip(old, ref, strict=True)]
    for row, score, end in zip(rewards, scores, ENDS, strict=True):
        if row:
            row[-1] += score - (0.0 if end else penalty)
    if whiten_rewards:
        rewards = whiten(rewards, shift_mean=False)
    advantages = []
    for r, v in zip(rewards, values, strict=True):
        delta = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))]
        advantages.append([sum((gamma * lam) ** (j - t) * delta[j] for j in range(t, len(r))) for t in range(len(r))])
    returns = [[x + y for x, y in zip(*row, strict=True)] for row in zip(advantages, values, strict=True)]
    return whiten(advantages) if whiten_advantages else advantages, returns


def padded(rows: list[list[float]], length: int = 6) -> Tensor:
    return torch.tensor([[*row, *[0.0] * (length - len(row))] for row in rows], dtype=torch.float64)


def forward_by_hand(trainer: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities, entropies and values of the completion's tokens, from the backbone's hidden states."""
    base = trainer._base_model
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    hidden = base.model(input_ids=ids, attention_mask=attention_mask).last_hidden_state
    hidden = hidden[:, inputs["prompt_ids"].size(1) - 1 : -1]  # of the state in which the token is chosen
    logps = (base.lm_head(hidden).double() / trainer.args.temperature).log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1)
    values = None
    if trainer.value_head is not None:
        first, _, last = trainer.value_head.layers
        inner = hidden.double() @ first.weight.double().T + first.bias.double()
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2  # GELU
        values = (inner @ last.weight.double().T + last.bias.double()).squeeze(-1)
    return logps.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1), entropies, values


def losses_by_hand(trainer: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per-token losses and metrics."""
    logps, entropies, values = forward_by_hand(trainer, inputs)
    args, advantages = trainer.args, inputs["advantages"].double()
    kept = inputs["loss_mask"].bool()
    out = {"entropy": entropies}
    if isinstance(trainer, PPOTrainer):
        ratio = (logps - inputs["old_per_token_logps"].double()).exp()
        low, high = 1 - args.epsilon, 1 + args.epsilon
        out["policy_loss"] = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        out["clip_ratio/low_mean"] = ((ratio < low) & (advantages < 0)).double()
        out["clip_ratio/high_mean"] = ((ratio > high) & (advantages > 0)).double()
        out["clip_ratio/region_mean"] = out["clip_ratio/low_mean"] + out["clip_ratio/high_mean"]
    elif args.loss_type == "apa":
        out["policy_loss"] = (logps - inputs["ref_per_token_logps"].double() - advantages / args.beta).square()
    else:
        out["policy_loss"] = -(advantages / args.beta).exp() * logps
    if values is not None:
        old, returns = inputs["old_values"].double(), inputs["returns"].double()
        error = (values - returns).square()
        if args.value_epsilon is not None:
            near = torch.minimum(torch.maximum(values, old - args.value_epsilon), old + args.value_epsilon)
            error = torch.maximum(error, (near - returns).square())
        out["value_loss"] = error / 2
    if "ref_per_token_logps" in inputs:
        difference = inputs["ref_per_token_logps"].double() - logps.detach()
        out["kl"] = difference.exp() - difference - 1
    return {name: x[kept] for name, x in out.items()}


def loss_by_hand(trainer: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.model.zero_grad()
    tokens = losses_by_hand(trainer, inputs)
    total = tokens["policy_loss"] - trainer.args.entropy_coef * tokens["entropy"]
    if "value_loss" in tokens:
        total = total + trainer.args.vf_coef * tokens["value_loss"]
    loss = total.sum() / inputs["loss_mask"].sum()
    loss.backward()
    gradient = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradient


# --- Rollouts


@pytest.mark.parametrize(
    ("trainer_class", "kwargs", "settings"),
    [
        (PPOTrainer, {}, {"beta": 0.05}),
        (PPOTrainer, {"beta": 0.3, "whiten_advantages": False}, {"beta": 0.3, "whiten_advantages": False}),
        (PPOTrainer, {"beta": 0.0, "gamma": 0.9, "lam": 0.6}, {"beta": 0.0, "gamma": 0.9, "lam": 0.6}),
        (PPOTrainer, {"whiten_rewards": True}, {"beta": 0.05, "whiten_rewards": True}),
        (PPOTrainer, {"missing_eos_penalty": 1.5}, {"beta": 0.05, "penalty": 1.5}),
        (PPOTrainer, {"scores": PARTLY, "whiten_rewards": True}, {"beta": 0.05, "whiten_rewards": True}),
        (APATrainer, {"beta": 0.3}, {"beta": 0.0, "whiten_advantages": False}),  # no KL in the reward
        (APATrainer, {"beta": 0.3, "whiten_advantages": True}, {"beta": 0.0}),
    ],
)
def test_advantages_by_hand(
    build: Callable[..., Any], trainer_class: type, kwargs: dict[str, Any], settings: dict[str, Any]
) -> None:
    trainer = build(trainer_class, per_device_train_batch_size=2, gradient_accumulation_steps=4, **kwargs)
    batch = roll_out(trainer)
    scores = kwargs.get("scores", SCORES)
    advantages, returns = advantages_by_hand(batch, scores, **settings)
    torch.testing.assert_close(batch["advantages"].double(), padded(advantages), **CLOSE)
    torch.testing.assert_close(batch["returns"].double(), padded(returns), **CLOSE)
    assert batch["loss_mask"].sum(dim=1).tolist() == [len(row) for row in advantages]
    assert batch["num_items_in_batch"] == sum(map(len, advantages))
    # Controls: the critic is not at zero, and the policy is not at its reference
    assert batch["old_values"].std() > 0.1
    if trainer.beta != 0.0:
        assert (batch["old_per_token_logps"] - batch["ref_per_token_logps"]).abs().mean() > 0.1
    # Each of the settings matters
    defaults = {"beta": 0.05, "gamma": 1.0, "lam": 0.95, "penalty": 0.0}
    defaults |= {"whiten_rewards": False, "whiten_advantages": True}
    for name, value in settings.items():
        if value != defaults[name] and not (name == "beta" and "ref_per_token_logps" not in batch):
            others, _ = advantages_by_hand(batch, scores, **(settings | {name: defaults[name]}))
            assert (padded(others) - padded(advantages)).abs().max() > 1e-2, name


def test_what_rollouts_are_made_of(build: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """Old log-probabilities and values are the policy's, reference log-probabilities those of the model it was."""
    trainer = build(temperature=0.7)
    batch = roll_out(trainer)
    kept = batch["completion_mask"].bool()
    with torch.no_grad():
        logps, _, values = forward_by_hand(trainer, batch)
        torch.testing.assert_close(batch["old_per_token_logps"].double()[kept], logps[kept], **CLOSE)
        torch.testing.assert_close(batch["old_values"].double()[kept], values[kept], **CLOSE)
        policy = trainer.model
        trainer.model, trainer.value_head = trainer.ref_model, None
        logps, _, _ = forward_by_hand(trainer, batch)
        trainer.model = policy
    torch.testing.assert_close(batch["ref_per_token_logps"].double()[kept], logps[kept], **CLOSE)
    assert [ids[:n] for ids, n in zip(batch["completion_ids"].tolist(), LENGTHS, strict=True)] == table(tokenizer)


def test_whitening_is_of_the_whole_generation_batch(build: Callable[..., Any]) -> None:
    """
    Four micro-batches of two. Over all of their tokens the advantages have mean 0 and variance 1; within one they do
    not, as they would if each was whitened alone.
    """
    trainer = build(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    prompts = [{"prompt": prompt} for prompt in trainer.train_dataset[:8]["prompt"]]
    batches = []
    for trainer._step in range(4):
        batches.append(trainer._prepare_inputs(prompts))
    tokens = [batch["advantages"][batch["loss_mask"].bool()] for batch in batches]
    together = torch.cat(tokens).double()
    assert len(tokens) == 4 and len(together) == NUM_TOKENS
    torch.testing.assert_close(together.mean(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(together.std(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-6)
    assert max(x.mean().abs() for x in tokens) > 0.1 and max((x.std() - 1).abs() for x in tokens) > 0.1
    assert all(batch["num_items_in_batch"] == NUM_TOKENS for batch in batches)


def test_weighted_rewards(build: Callable[..., Any]) -> None:
    """0.5 R_1 + 2 R_2, where a None drops out of the sum, and a row with nothing but None is not scored."""
    first, second = [1.0, None, 2.0, None, 1.0, 1.0, 1.0, 1.0], [3.0, 1.0, None, None, 0.0, 0.0, 0.0, -1.0]
    trainer = build(reward_funcs=[returning(first), returning(second)], reward_weights=[0.5, 2.0])
    batch = roll_out(trainer)
    advantages, _ = advantages_by_hand(batch, [6.5, 2.0, 1.0, None, 0.5, 0.5, 0.5, -1.5], beta=0.05)
    torch.testing.assert_close(batch["advantages"].double(), padded(advantages), **CLOSE)


def test_missing_eos_when_padding_is_eos(
    build: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Rows 0 and 7 lack EOS. An eighth column of padding, which is EOS itself, must not pass for one; nor must an EOS in
    the middle of what is padding.
    """
    trainer = build(missing_eos_penalty=1.5, whiten_advantages=False, pad_to_multiple_of=8)
    trainer._tokenizer = copy.deepcopy(trainer._tokenizer)
    trainer._tokenizer.pad_token = trainer._tokenizer.eos_token
    batch = roll_out(trainer)
    assert (batch["completion_ids"][:, 6:] == tokenizer.eos_token_id).all()
    expected, without = (
        advantages_by_hand(batch, SCORES, beta=0.05, whiten_advantages=False, penalty=p)[0] for p in (1.5, 0.0)
    )
    torch.testing.assert_close(batch["advantages"].double(), padded(expected, 8), **CLOSE)
    differing = [i for i in range(8) if expected[i] != without[i]]
    assert differing == [0, 7]


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize(("trainer_class", "beta"), [(PPOTrainer, 0.3), (APATrainer, 0.3), (PPOTrainer, 0.0)])
def test_leave_one_out_by_hand(build: Callable[..., Any], trainer_class: type, beta: float, whitened: bool) -> None:
    """Groups of four. PPO's reward of a completion is R − β Σ_t (ln π_old − ln π_ref); APA's is R. A group's unscored
    member leaves the others' baseline."""
    scores = [*SCORES[:5], None, *SCORES[6:]]
    trainer = build(
        trainer_class,
        scores,
        advantage_estimator="leave_one_out",
        num_generations=4,
        beta=beta,
        whiten_advantages=whitened,
        missing_eos_penalty=0.5,
    )
    assert trainer.value_head is None and not any("value_head" in name for name, _ in trainer.model.named_parameters())
    batch = roll_out(trainer)
    assert not {"old_values", "returns"} & batch.keys()
    old = batch["old_per_token_logps"].double()
    log_ratio = old - batch["ref_per_token_logps"].double() if beta else torch.zeros_like(old)
    rewards = []
    for i, score in enumerate(scores):
        if score is not None:
            kl = log_ratio[i, : LENGTHS[i]].sum().item() if trainer_class is PPOTrainer else 0.0
            score = score - beta * kl - (0.0 if ENDS[i] else 0.5)
        rewards.append(score)
    rows = []
    for i in range(8):
        others = [rewards[j] for j in range(8) if j // 4 == i // 4 and j != i and rewards[j] is not None]
        rows.append([] if rewards[i] is None else [rewards[i] - math.fsum(others) / len(others)] * LENGTHS[i])
    expected = whiten(rows) if whitened else rows
    torch.testing.assert_close(batch["advantages"].double(), padded(expected), **CLOSE)
    inputs = off_policy(batch)
    assert_same(loss_and_gradient(trainer, inputs), loss_by_hand(trainer, inputs))
    assert "value_loss" not in trainer._metrics["train"] and "explained_variance" not in trainer._metrics["train"]


# --- Losses


@pytest.mark.parametrize(
    ("trainer_class", "kwargs"),
    [
        (PPOTrainer, {}),
        (PPOTrainer, {"vf_coef": 0.7, "value_epsilon": None, "entropy_coef": 0.3, "temperature": 0.7}),
        (PPOTrainer, {"beta": 0.0, "vf_coef": 0.7, "scores": PARTLY}),
        (PPOTrainer, {"peft_config": LORA, "gradient_checkpointing": True}),
        (APATrainer, {}),
        (APATrainer, {"value_epsilon": 0.1, "entropy_coef": 0.3, "scores": PARTLY}),
        (APATrainer, {"loss_type": "awr", "beta": 1.0}),
    ],
)
def test_losses_and_metrics_by_hand(build: Callable[..., Any], trainer_class: type, kwargs: dict[str, Any]) -> None:
    """Loss = Σ (policy + vf_coef · value − entropy_coef · H) / number of scored tokens, and the metrics are means over
    them."""
    trainer = build(trainer_class, **kwargs)
    batch = roll_out(trainer)
    inputs = off_policy(batch)
    assert_same(loss_and_gradient(trainer, inputs), loss_by_hand(trainer, inputs))

    metrics = trainer._metrics["train"]
    for name, tokens in losses_by_hand(trainer, inputs).items():
        assert metrics[name] == [pytest.approx(tokens.mean().item(), rel=1e-4, abs=1e-6)], name
    if trainer_class is PPOTrainer:
        assert 0 < metrics["clip_ratio/low_mean"][0] < 1 and 0 < metrics["clip_ratio/high_mean"][0] < 1
    kept = inputs["loss_mask"].bool()
    values, returns = batch["old_values"].double()[kept], batch["returns"].double()[kept]
    explained = 1 - (returns - values).var() / returns.var()
    assert metrics["explained_variance"] == [pytest.approx(explained.item(), rel=1e-4)]
    if "ref_per_token_logps" in batch:
        log_ratio = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]).double()
        sums = [log_ratio[i][kept[i]].sum().item() for i in range(8) if kept[i].any()]
        assert metrics["kl/completion"] == [pytest.approx(math.fsum(sums) / len(sums), rel=1e-4)]
    assert "frac_reward_zero_std" not in metrics
    # The log of completions shows the mean of our advantages
    shown = [
        (a.double()[m].mean() if m.any() else torch.zeros(())).item()
        for a, m in zip(batch["advantages"], kept, strict=True)
    ]
    assert list(trainer._logs["advantages"]) == pytest.approx(shown, rel=1e-4, abs=1e-6)
    assert max(map(abs, shown)) > 0.1


def test_value_clipping_and_coefficients(build: Callable[..., Any]) -> None:
    trainer = build(vf_coef=0.7, value_epsilon=0.2)
    inputs = off_policy(roll_out(trainer))

    def loss(**changed: Any) -> float:
        old = {name: getattr(trainer.args, name) for name in changed}
        for name, value in changed.items():
            setattr(trainer.args, name, value)
        trainer.entropy_coef = trainer.args.entropy_coef
        try:
            return trainer._compute_loss(trainer.model, inputs).item()
        finally:
            for name, value in old.items():
                setattr(trainer.args, name, value)

    tokens = losses_by_hand(trainer, inputs)
    value_loss, entropy = tokens["value_loss"].mean().item(), tokens["entropy"].mean().item()
    policy = loss(vf_coef=0.0)
    assert loss() - policy == pytest.approx(0.7 * value_loss, rel=1e-5)
    assert loss(vf_coef=1.4) - policy == pytest.approx(1.4 * value_loss, rel=1e-5)
    assert loss(vf_coef=0.0, entropy_coef=0.5) - policy == pytest.approx(-0.5 * entropy, rel=1e-5)
    # Clipping raises the loss where it is active, and a range that nothing leaves is none
    trainer.args.value_epsilon = None
    unclipped = losses_by_hand(trainer, inputs)["value_loss"].mean().item()
    trainer.args.value_epsilon = 0.2
    assert value_loss > unclipped + 0.01
    assert loss(value_epsilon=None) - policy == pytest.approx(0.7 * unclipped, rel=1e-5)
    assert loss(value_epsilon=1e3) == loss(value_epsilon=None)


def test_ppo_is_trls_clip(
    build: Callable[..., Any],
    tiny_model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    dialogues: Dataset,
    tmp_path: Path,
) -> None:
    """GRPO's loss "dapo" without KL on the same advantages per token, with ratios clipped on both sides."""
    models = [tiny_model(), tiny_model()]
    for model in models:
        shake(model)
    ours = build(model=models[0], shaken=False, vf_coef=0.0)
    shake(ours.value_head)
    trls = GRPOTrainer(
        models[1],
        reward_funcs=returning(SCORES),
        args=cpu_args(
            GRPOConfig,
            tmp_path,
            loss_type="dapo",
            beta=0.0,
            epsilon=0.2,
            num_generations=2,
            per_device_train_batch_size=8,
            max_completion_length=6,
        ),
        train_dataset=dialogues.select_columns("prompt"),
        processing_class=tokenizer,
    )
    trls.current_gradient_accumulation_steps = 1
    trls.model.train()
    inputs = off_policy(roll_out(ours))
    assert inputs["advantages"].shape == inputs["old_per_token_logps"].shape
    loss, gradient = loss_and_gradient(ours, inputs)
    of_value_head = {name: gradient.pop(name) for name in list(gradient) if "value_head" in name}
    assert of_value_head and all((g == 0).all() for g in of_value_head.values())
    expected = loss_and_gradient(trls, inputs)
    assert_same((loss, gradient), expected, rtol=2e-6)
    assert max(g.abs().max() for g in gradient.values()) > 1e-2
    for name in ("low_mean", "high_mean", "region_mean"):
        fraction = ours._metrics["train"][f"clip_ratio/{name}"]
        assert fraction == trls._metrics["train"][f"clip_ratio/{name}"] and 0 < fraction[0] < 1
    # Control: another range clips others
    ours.args.epsilon = 0.5
    assert abs(loss_and_gradient(ours, inputs)[0] - loss) > 1e-3


@pytest.mark.parametrize("trainer_class", [PPOTrainer, APATrainer])
def test_one_advantage_per_completion_is_that_of_all_its_tokens(
    build: Callable[..., Any], trainer_class: type
) -> None:
    trainer = build(trainer_class)
    batch = off_policy(roll_out(trainer))
    column = batch["advantages"][:, :1]
    one, all_ = (
        loss_and_gradient(trainer, batch | {"advantages": a})
        for a in (column, column.expand(batch["loss_mask"].shape))
    )
    assert_same(one, all_, rtol=0)
    assert abs(one[0] - loss_and_gradient(trainer, batch)[0]) > 1e-3  # control


# --- Rows that are not trained on


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("trainer_class", [PPOTrainer, APATrainer])
def test_rows_left_out_reach_neither_loss_nor_gradient(
    build: Callable[..., Any], trainer_class: type, truncated: bool
) -> None:
    """Unscored rows 1 and 4 (9 tokens), or the truncated ones, 0 and 7 (12 tokens), whatever their tokens, advantages
    and log-probabilities are."""
    kwargs = {"mask_truncated_completions": True} if truncated else {"scores": PARTLY}
    left_out = [0, 7] if truncated else [1, 4]
    trainer = build(trainer_class, entropy_coef=0.1, **kwargs)
    batch = roll_out(trainer)
    expected = [0 if i in left_out else n for i, n in enumerate(LENGTHS)]
    assert batch["loss_mask"].sum(dim=1).tolist() == expected
    assert batch["num_items_in_batch"] == sum(expected) == NUM_TOKENS - (12 if truncated else 9)

    reference = loss_and_gradient(trainer, off_policy(batch))

    def replaced(rows: list[int], garbage: float) -> dict[str, Tensor]:
        other = {name: x.clone() for name, x in off_policy(batch).items()}
        for name, x in other.items():
            if name == "completion_ids":
                x[rows] = torch.randint(300, 700, (2, 6), generator=torch.Generator().manual_seed(9))
            elif x.dim() == 2 and x.is_floating_point():
                x[rows] = garbage
        return other

    for garbage in (math.nan, math.inf, 1e4):
        assert_same(loss_and_gradient(trainer, replaced(left_out, garbage)), reference, rtol=0)
    # Control: of rows that are trained on it is felt
    assert abs(loss_and_gradient(trainer, replaced([3, 5], 0.5))[0] - reference[0]) > 1e-3


def test_truncated_rows_leave_the_statistics_as_well(build: Callable[..., Any]) -> None:
    trainer = build(mask_truncated_completions=True)
    batch = roll_out(trainer)
    scores = [score if end else None for score, end in zip(SCORES, ENDS, strict=True)]
    advantages, returns = advantages_by_hand(batch, scores, beta=0.05)
    torch.testing.assert_close(batch["advantages"].double(), padded(advantages), **CLOSE)
    torch.testing.assert_close(batch["returns"].double(), padded(returns), **CLOSE)


@pytest.mark.parametrize(
    ("trainer_class", "kwargs"),
    [
        (PPOTrainer, {"whiten_rewards": True, "entropy_coef": 0.1, "missing_eos_penalty": 1.0}),
        (PPOTrainer, {"advantage_estimator": "leave_one_out", "num_generations": 4}),
        (APATrainer, {"whiten_advantages": True}),
    ],
)
def test_nothing_scored_is_no_step(build: Callable[..., Any], trainer_class: type, kwargs: dict[str, Any]) -> None:
    trainer = build(trainer_class, [None] * 8, **SGD, **kwargs, max_steps=1)
    loss, gradient = loss_and_gradient(trainer, roll_out(trainer))
    assert loss == 0 and gradient and all((g == 0).all() for g in gradient.values())
    before = weights(trainer)
    losses, after = run(trainer)
    assert losses == [0.0] and distance(before, after) == 0
    trainer.reward_funcs = [returning(SCORES)]  # control
    assert max(g.abs().max() for g in loss_and_gradient(trainer, roll_out(trainer))[1].values()) > 1e-3


# --- Batches


def test_gradient_accumulation_is_one_batch(build: Callable[..., Any]) -> None:
    """
    Two optimizer steps on eight completions of 1 to 6 tokens, in one batch or in four of two. Control: the mean of the
    micro-batches' means is another loss.
    """

    def train(batch_size: int, mean_of_means: bool = False) -> tuple[list[float], dict[str, Tensor]]:
        trainer = build(
            **SGD,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            max_steps=2,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
        )
        if mean_of_means:
            compute_loss, steps = trainer._compute_loss, trainer.args.steps_per_generation
            trainer._compute_loss = lambda model, inputs: compute_loss(
                model, inputs | {"num_items_in_batch": inputs["loss_mask"].sum() * steps}
            )
        return run(trainer)

    losses, expected = train(8)
    accumulated_losses, accumulated = train(2)
    assert distance(accumulated, expected) < 1e-6
    assert accumulated_losses == pytest.approx(losses, abs=1e-6)
    assert distance(train(2, mean_of_means=True)[1], expected) > 1e-4


def test_several_steps_on_a_generation_batch_are_normalised_each(build: Callable[..., Any]) -> None:
    """With four optimizer steps on a generation batch, each divides by a quarter of its tokens: by 33/4."""
    trainer = build(per_device_train_batch_size=2, steps_per_generation=4)
    batch = roll_out(trainer)
    inputs = {name: x[2:4] if x.dim() else x for name, x in off_policy(batch).items()}
    loss, _ = loss_and_gradient(trainer, inputs)
    tokens = losses_by_hand(trainer, inputs)
    total = (tokens["policy_loss"] + 0.1 * tokens["value_loss"]).sum().item()
    assert NUM_TOKENS == 33
    assert loss.item() == pytest.approx(total / (33 / 4), rel=1e-5)


@pytest.mark.parametrize("trainer_class", [PPOTrainer, APATrainer])
def test_padding_changes_nothing(
    build: Callable[..., Any], trainer_class: type, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Rollouts with longer prompts and completions, and a loss with longer completions."""
    trainer = build(trainer_class, beta=1.0, entropy_coef=0.1)
    batch = roll_out(trainer)
    trainer.pad_to_multiple_of = 16
    longer_batch = roll_out(trainer)
    trainer.pad_to_multiple_of = None
    assert longer_batch["advantages"].shape == (8, 16) and longer_batch["prompt_ids"].size(1) % 16 == 0
    for name in ("advantages", "returns", "old_values", "old_per_token_logps", "ref_per_token_logps"):
        kept = batch["loss_mask"].bool()
        torch.testing.assert_close(longer_batch[name][:, :6][kept], batch[name][kept], rtol=1e-5, atol=1e-5)
    assert (longer_batch["advantages"][:, 6:] == 0).all()

    inputs = off_policy(batch)
    longer = {}
    for name, x in inputs.items():
        fill = tokenizer.pad_token_id if name.endswith("ids") else 0 if name.endswith("mask") else 7.7
        longer[name] = x if not x.dim() or name.startswith("prompt") else pad(x, (0, 3), value=fill)
    assert longer["loss_mask"].shape == (8, 9)
    reference = loss_and_gradient(trainer, inputs)
    assert_same(loss_and_gradient(trainer, longer), reference, rtol=2e-6)
    for name in ("loss_mask", "value_mask"):  # control: as tokens they would count
        longer[name] = longer[name].clone()
        longer[name][:, -1] = 1
    assert abs(loss_and_gradient(trainer, longer)[0] - reference[0]) > 1e-3


# --- Forwards


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Batch sizes of a module's forwards."""
    sizes: list[int] = []
    hook = module.register_forward_hook(lambda m, args, kwargs, out: sizes.append(len(out[0])), with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_iterations": 1},  # TRL computes no old log-probabilities
        {"num_iterations": 4},  # it does
        {"num_iterations": 1, "peft_config": LORA},
        {"num_iterations": 4, "peft_config": LORA},
        {"num_iterations": 1, "beta": 0.0},
    ],
)
@pytest.mark.parametrize("chunk", [8, 4])
def test_forwards_are_shared(build: Callable[..., Any], kwargs: dict[str, Any], chunk: int) -> None:
    """One pass of the policy and one of the reference for a generation batch, and one forward for a loss."""
    trainer = build(per_device_train_batch_size=chunk, gradient_accumulation_steps=8 // chunk, **kwargs)
    is_lora = "peft_config" in kwargs
    with counted(trainer._base_model.model) as of_policy:
        batch = roll_out(trainer)
    one_pass = [chunk] * (8 // chunk)
    assert of_policy == one_pass * (2 if is_lora else 1)
    if not is_lora and trainer.beta != 0.0:
        with counted(trainer.ref_model.model) as of_reference:
            roll_out(trainer)
        assert of_reference == one_pass
    assert ("ref_per_token_logps" in batch) == (trainer.beta != 0.0)
    # The values are of the pass with the adapter on
    with torch.no_grad():
        logps, _, values = forward_by_hand(trainer, batch)
    kept = batch["loss_mask"].bool()
    torch.testing.assert_close(batch["old_values"].double()[kept], values[kept], **CLOSE)
    torch.testing.assert_close(batch["old_per_token_logps"].double()[kept], logps[kept], **CLOSE)
    if is_lora:
        with trainer.model.disable_adapter(), torch.no_grad():
            base_logps, _, base_values = forward_by_hand(trainer, batch)
        torch.testing.assert_close(batch["ref_per_token_logps"].double()[kept], base_logps[kept], **CLOSE)
        assert (base_values - values)[kept].abs().max() > 0.1

    with counted(trainer._base_model.model) as of_policy:
        loss = trainer._compute_loss(trainer.model, batch)
    assert of_policy == [8]
    gradient = torch.autograd.grad(loss, trainer.value_head.layers[-1].weight)[0]
    assert gradient.abs().max() > 0
    assert trainer._passes == []


@pytest.mark.parametrize("kind", ["full", "lora", "trained adapter"])
def test_a_model_changed_in_memory_is_its_own_reference(
    build: Callable[..., Any], tiny_model: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    """Control: what the folder still holds, from where TRL would load the reference, is another model."""
    tiny_model().save_pretrained(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    shake(model)
    if kind == "trained adapter":
        model = get_peft_model(model, copy.deepcopy(LORA))
        shake(model)
    trainer = build(model=model, shaken=False, **({"peft_config": LORA} if kind == "lora" else {}))
    batch = roll_out(trainer)
    assert torch.equal(batch["ref_per_token_logps"], batch["old_per_token_logps"])
    trainer._compute_loss(trainer.model, batch)
    metrics = trainer._metrics["train"]
    assert metrics["kl/completion"] == [0.0] and metrics["kl"] == [0.0]

    if kind == "full":
        trainer.ref_model.load_state_dict(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict())
    else:
        shake(trainer.model, seed=2)
    trainer._compute_loss(trainer.model, roll_out(trainer))
    assert abs(metrics["kl/completion"][1]) > 0.1 and metrics["kl"][1] > 0.01


def test_a_second_trainer_takes_over_the_model(build: Callable[..., Any]) -> None:
    """With a value head and a reference of its own, which is the model as it is then and does not follow it."""
    first = build(PPOTrainer)
    second = build(APATrainer, model=first.model, shaken=False)
    assert (second.value_head.layers[-1].weight == 0).all() and second._base_model.value_head is second.value_head
    batch = roll_out(second)
    assert torch.equal(batch["ref_per_token_logps"], batch["old_per_token_logps"])
    shake(second.model, seed=2)
    moved = roll_out(second)
    assert torch.equal(moved["ref_per_token_logps"], batch["ref_per_token_logps"])
    assert (moved["old_per_token_logps"] - batch["old_per_token_logps"]).abs().max() > 0.1
    inputs = off_policy(moved)
    assert_same(loss_and_gradient(second, inputs), loss_by_hand(second, inputs))


# --- vLLM


class _VLLM:
    """Stands in for TRL's client of vLLM: notes which weights a sync would send, and generates from the table."""

    def __init__(self, trainer: Any, completions: list[list[int]], logps: list[list[float]] | None = None) -> None:
        self.trainer, self.completions, self.logps = trainer, completions, logps
        self.synced: list[str] = []
        self.error: Exception | None = None

    def sync_weights(self) -> None:
        if self.error is not None:
            raise self.error
        self.synced = [name for name, _ in self.trainer.model.named_parameters()]

    def generate(self, prompts: list, images: Any, num_generations: int, profiler: Any) -> tuple:
        with profiler:
            logps = self.logps or [[-1.0] * len(ids) for ids in self.completions]
            return None, self.completions, [[[x] for x in row] for row in logps], None


@pytest.fixture
def with_vllm(build: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    def make(trainer_class: type = PPOTrainer, **kwargs: Any) -> Any:
        trainer = build(trainer_class, **kwargs)
        del trainer._generate_single_turn  # the real one
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        trainer.vllm_generation = _VLLM(trainer, table(tokenizer))
        return trainer

    return make


@pytest.mark.parametrize("kwargs", [{}, {"peft_config": LORA}], ids=["full", "lora"])
def test_vllm_never_sees_the_value_head(with_vllm: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    trainer = with_vllm(**kwargs)
    names = [name for name, _ in trainer.model.named_parameters()]
    head = [name for name in names if "value_head" in name]
    assert len(head) == 4
    batch = roll_out(trainer)
    assert sorted(trainer.vllm_generation.synced) == sorted(set(names) - set(head))
    assert sorted(name for name, _ in trainer.model.named_parameters()) == sorted(names)
    assert trainer._base_model.value_head is trainer.value_head and batch["old_values"].abs().max() > 0
    # Also when it fails
    trainer.vllm_generation.error, trainer._last_loaded_step = RuntimeError("no connection"), -1
    with pytest.raises(RuntimeError, match="no connection"):
        roll_out(trainer)
    assert trainer._base_model.value_head is trainer.value_head


@pytest.mark.parametrize("trainer_class", [PPOTrainer, APATrainer])
def test_vllm_ratio_corrects_the_policy_loss_alone(with_vllm: Callable[..., Any], trainer_class: type) -> None:
    """
    Loss = Σ (ratio · policy + vf_coef · value) / tokens. The ratio is exp(ln π_old − ln π_vLLM) of each token, up to
    the bounds.
    """
    trainer = with_vllm(
        trainer_class,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_min=0.8,
        vllm_importance_sampling_clip_max=1.25,
    )
    old = roll_out(trainer)["old_per_token_logps"]
    offsets = 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(5))
    trainer.vllm_generation.logps = [row[:n] for row, n in zip((old - offsets).tolist(), LENGTHS, strict=True)]
    batch = roll_out(trainer)
    kept = batch["loss_mask"].bool()
    ratio = offsets.double().exp().clamp(0.8, 1.25)[kept]
    assert 0.8 < ratio.median() < 1.25 and ratio.min() == 0.8 and ratio.max() == 1.25
    torch.testing.assert_close(batch["importance_sampling_ratio"].double()[kept], ratio, **CLOSE)

    inputs = off_policy(batch)
    loss, _ = loss_and_gradient(trainer, inputs)
    tokens = losses_by_hand(trainer, inputs)
    policy, value = tokens["policy_loss"], trainer.args.vf_coef * tokens["value_loss"]
    assert loss.item() == pytest.approx((ratio * policy + value).mean().item(), rel=1e-5)
    assert trainer._metrics["train"]["value_loss"] == [pytest.approx(tokens["value_loss"].mean().item(), rel=1e-4)]
    # Controls: without it, or with it on all of the loss
    for other in (policy + value, ratio * (policy + value)):
        assert abs(loss.item() - other.mean().item()) > 1e-4


# --- Evaluation


@pytest.mark.parametrize(
    ("trainer_class", "kwargs"),
    [
        (PPOTrainer, {}),
        (PPOTrainer, {"advantage_estimator": "leave_one_out", "num_generations": 4}),
        (APATrainer, {"peft_config": LORA}),
    ],
)
def test_evaluation(
    build_online_trainer: Callable[..., Any], dialogues: Dataset, trainer_class: type, kwargs: dict[str, Any]
) -> None:
    """Twelve prompts in batches of 8, twice the generation batch of training."""
    trainer = build_online_trainer(
        trainer_class, eval_dataset=dialogues.select_columns("prompt").take(12), per_device_eval_batch_size=8, **kwargs
    )
    metrics = trainer.evaluate()
    names = {"reward", "reward_std", "loss", "kl", "kl/completion", "policy_loss", "entropy"}
    names |= {"value_loss"} if trainer.value_head is not None else set()
    for name in names:
        assert math.isfinite(logged(trainer, f"eval_{name}")[0]), name
    assert metrics["eval_loss"] == logged(trainer, "eval_loss")[0]
    assert 0 < logged(trainer, "eval_reward")[0] < 1
    assert bool(logged(trainer, "eval_frac_reward_zero_std")) == (trainer.num_generations_eval > 1)
    assert not trainer._metrics["train"]


def test_evaluation_by_hand(build: Callable[..., Any]) -> None:
    """A batch of eight where training generates four in two micro-batches: the loss is over its own tokens, and the
    log, which is as long as the generation batch, shows the last four advantages."""
    trainer = build(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.model.eval()
    batch = roll_out(trainer)
    advantages, _ = advantages_by_hand(batch, SCORES, beta=0.05)
    torch.testing.assert_close(batch["advantages"].double(), padded(advantages), **CLOSE)
    assert list(trainer._logs["advantages"]) == pytest.approx(
        [sum(row) / len(row) for row in advantages[-4:]], rel=1e-4
    )
    inputs = off_policy(batch)
    assert_same(loss_and_gradient(trainer, inputs), loss_by_hand(trainer, inputs))
    assert trainer._metrics["eval"]["policy_loss"] and not trainer._metrics["train"]
