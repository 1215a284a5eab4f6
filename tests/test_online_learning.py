"""
Do the online trainers learn, and do they end where the maths says? Half of a small vocabulary is rewarded, and the
exact probability that the policy gives it is read off the model.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cpu_args
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_lol import APAConfig, APATrainer, PPOConfig, PPOTrainer


VOCAB_SIZE, COMPLETION_LEN = 64, 4
REWARDED = VOCAB_SIZE // 2  # the first rewarded token


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<eos>": 0, "<pad>": 1, **{f"t{i}": i for i in range(2, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


PROMPTS = [f"t{i} t{j}" for i, j in itertools.product(range(2, VOCAB_SIZE, 4), range(2, VOCAB_SIZE, 4))]


def rewarded_share(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Probability of a rewarded token after a prompt, mean over the prompts."""
    with torch.no_grad():
        logits = model(**tokenizer(PROMPTS, return_tensors="pt")).logits[:, -1]
    return logits.softmax(-1)[:, REWARDED:].sum(-1).mean().item()


@pytest.fixture
def learn(tmp_path: Path) -> Callable[..., tuple[float, float]]:
    """Trains, and returns the share of rewarded tokens before and after."""

    def train(trainer_class: type, seed: int, sign: float = 1.0, **kwargs: Any) -> tuple[float, float]:
        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            return [sign * sum(i >= REWARDED for i in ids) / COMPLETION_LEN for ids in completion_ids]

        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
        model, tokenizer = LlamaForCausalLM(config), make_tokenizer()
        start = rewarded_share(model, tokenizer)
        settings = {
            "seed": seed,
            "max_steps": 80,
            "per_device_train_batch_size": 64,
            "max_completion_length": COMPLETION_LEN,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
        }
        args = cpu_args(trainer_class._config_class, tmp_path, **(settings | kwargs))
        trainer = trainer_class(
            model, reward, args=args, train_dataset=Dataset.from_dict({"prompt": PROMPTS}), processing_class=tokenizer
        )
        trainer.train()
        return start, rewarded_share(model, tokenizer)

    return train


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo(learn: Callable[..., tuple[float, float]], seed: int):
    """A reward is followed, its opposite is followed the other way, and no reward moves nothing."""
    settings = {"beta": 0.01, "learning_rate": 1e-2}
    start, end = learn(PPOTrainer, seed, **settings)
    assert abs(start - 0.5) < 0.1
    assert end >= 0.9
    assert learn(PPOTrainer, seed, sign=-1.0, **settings)[1] <= 0.1
    assert abs(learn(PPOTrainer, seed, sign=0.0, **settings)[1] - start) <= 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta", [0.25, 0.125])
def test_apa(learn: Callable[..., tuple[float, float]], beta: float, seed: int):
    """
    The reward is a mean over T = 4 tokens, so a rewarded token is worth 1/T and its odds are to grow by e^{1/(λT)}:
    e at λ = 1/4 and e² at λ = 1/8, from 1/2 to .731 and .881.
    """
    start, end = learn(APATrainer, seed, beta=beta, num_iterations=2)
    assert abs(end - tilted(start, beta)) < 0.05
    assert abs(end - tilted(start, 2 * beta)) > 0.05  # half the tilt would be another place


def test_ppo_ends_at_the_kl_regularised_optimum(learn: Callable[..., tuple[float, float]]):
    """The rewards of the tokens add up, so that soft and hard values differ by a constant, and the tilt is APA's."""
    start, end = learn(PPOTrainer, 0, beta=0.25, lam=1.0, max_steps=160, whiten_advantages=False)
    assert abs(end - tilted(start, 0.25)) < 0.05


@pytest.mark.parametrize("config", [PPOConfig, APAConfig])
def test_leave_one_out_learns_without_a_critic(learn: Callable[..., tuple[float, float]], config: type):
    trainer_class = {PPOConfig: PPOTrainer, APAConfig: APATrainer}[config]
    settings = {"advantage_estimator": "leave_one_out", "num_generations": 4, "beta": 0.05, "num_iterations": 2}
    start, end = learn(trainer_class, 0, **settings)
    assert abs(start - 0.5) < 0.1
    assert end > 0.8


def tilted(share: float, beta: float) -> float:
    odds = share / (1 - share) * math.exp(1 / (beta * COMPLETION_LEN))
    return odds / (1 + odds)
