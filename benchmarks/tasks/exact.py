"""
Two problems whose optimum is known, for the real trainers: the policy is a small Phi that completes one prompt by one
or two tokens, so that all completions there are can be counted instead of sampled.
"""

from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from scipy.special import expit
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trl_lol.data import Messages, tokenize_prompt
from trl_lol.generation import completion_logps

from ..task import Task
from .stories import TEMPLATE


PAD, BOS, EOS, QUESTION = "<pad>", "<s>", "</s>", "?"
PROMPT = [{"role": "user", "content": QUESTION}]
# Bias of the tokens that no arm is made of. Contrasts between arms do not keep these down: in a model without biases,
# where the hidden state can raise them, CoPG has ended with nearly all the probability there
UNLIKELY = -40.0


class ExactTask(Task):
    """
    A table of rewards. Every arm is a completion of `max_completion_length` letters, one token each; any other
    completion has reward 0. The reference is uniform over the arms.

    The β of the objective, J(π) = E[R] − β KL(π ‖ π_ref), is part of the problem: methods that have a β get this one,
    and what is tuned is the learning rate, over the same values for all.

    Attributes:
        rewards (`dict[str, float]`):
            Reward of each arm.
        behaviours (`tuple[tuple[float, ...], tuple[float, ...]]`):
            Probabilities of the arms from which the first and the second completion of a logged group are drawn.
        num_rows (`int`):
            Number of logged groups.
    """

    rewards: ClassVar[dict[str, float]]
    behaviours: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]
    num_rows = 2048
    num_sequences = 9600
    batch_size = 64
    num_completions = 3200
    generation_batch_size = 64
    learning_rates = beta_learning_rates = online_learning_rates = (1e-3, 3e-3)

    def make_reference(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tokenizer = _make_tokenizer("".join(self.rewards))
        config = PhiConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=16,
            initializer_range=32**-0.5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            model = PhiForCausalLM(config)
            model.lm_head.weight.zero_()
            letters = tokenizer.encode("".join(self.rewards))
            model.lm_head.bias.fill_(UNLIKELY)[letters] = 0.0
        return model, tokenizer

    def make_rows(self, seed: int) -> Dataset:
        """Groups of two arms, each drawn from a behaviour of its own."""
        rng, arms = np.random.default_rng(seed), list(self.rewards)
        drawn = [rng.choice(len(arms), size=self.num_rows, p=behaviour) for behaviour in self.behaviours]
        groups = [[arms[arm] for arm in group] for group in zip(*drawn, strict=True)]
        return Dataset.from_dict(
            {
                "prompt": [PROMPT] * self.num_rows,
                "completions": [[_answer(arm) for arm in group] for group in groups],
                "rewards": [[self.rewards[arm] for arm in group] for group in groups],
            }
        )

    def prompts(self, split: str) -> Dataset:
        """The one prompt."""
        return Dataset.from_dict({"prompt": [PROMPT]})

    def reward(self, prompts: list, completions: list[str | Messages], **columns: Any) -> list[float]:
        """Reward of each completion, text or messages."""
        texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
        return [self.rewards.get(text, 0.0) for text in texts]

    def pairs(self, groups: Dataset, seed: int) -> Dataset:
        """
        Preferences drawn from the Bradley-Terry model of the rewards: y over y' with probability σ(R − R'), as the
        paper gives them to IPO. A group of twice the same arm has no preference.
        """
        rng = np.random.default_rng([seed, 1])  # not the numbers that the groups were drawn with
        rows = []
        for row in groups:
            (first, second), (reward, other) = row["completions"], row["rewards"]
            if first != second:
                chosen, rejected = (first, second) if rng.random() < expit(reward - other) else (second, first)
                rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
        return Dataset.from_list(rows)

    def evaluate(
        self, policy: PreTrainedModel, reference: PreTrainedModel, split: str, *, brief: bool = False
    ) -> dict[str, float | list[float]]:
        """
        Judge a policy by all completions there are.

        Returns:
            `dict[str, float | list[float]]`: Exact expectations `reward` and `train_reward` (the same), `kl` (nats per
            completion), `length` (tokens, EOS included) and `entropy` (nats per token); `regret`, β ln Σ π_ref e^{R/β}
            − (reward − β `kl`); and `policy`, the probability of each arm in the order of `rewards`.
        """
        completions = self.completions()
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        rewards = torch.tensor(self.reward([], texts), dtype=torch.float64)
        lengths = torch.tensor([len(ids) for ids in completions], dtype=torch.float64)
        logps, ref_logps = self._logps(policy, completions), self._logps(reference, completions)
        probs = logps.exp()
        reward, kl, length = probs @ rewards, probs @ (logps - ref_logps), probs @ lengths
        best = self.beta * (ref_logps + rewards / self.beta).logsumexp(0)
        return {
            "reward": reward.item(),
            "train_reward": reward.item(),
            "kl": kl.item(),
            "regret": (best - (reward - self.beta * kl)).item(),
            "entropy": (-probs @ logps / length).item(),
            "length": length.item(),
            "policy": [probs[completions.index(self.tokenizer.encode(arm))].item() for arm in self.rewards],
        }

    def completions(self) -> list[list[int]]:
        """Token IDs of every completion of `max_completion_length` tokens or up to and with an earlier EOS."""
        vocabulary, eos = range(len(self.tokenizer)), self.tokenizer.eos_token_id
        cut = (
            ids[: ids.index(eos) + 1] if eos in ids else ids
            for ids in product(vocabulary, repeat=self.max_completion_length)
        )
        return [list(ids) for ids in dict.fromkeys(cut)]

    def _logps(self, model: PreTrainedModel, completions: list[list[int]]) -> Tensor:
        prompt_ids = [tokenize_prompt(PROMPT, {}, self.tokenizer)] * len(completions)
        return completion_logps(model, prompt_ids, completions, batch_size=len(completions)).double()


class Bandit(ExactTask):
    """The bandit of the CoPG paper's section 5."""

    name = "bandit"
    description = (
        "The bandit of the CoPG paper: three arms with rewards 2.5, 2 and 1, logged by two behaviours that mostly "
        "draw the worst one."
    )
    rewards: ClassVar = {"a": 2.5, "b": 2.0, "c": 1.0}
    behaviours = (0.1, 0.2, 0.7), (0.05, 0.05, 0.9)
    beta = 0.5
    betas = online_betas = (beta,)
    max_completion_length = 1
    without = frozenset({"DR-PO"})  # a reference of one token has no prefix to reset to: it would be PPO


class TwoSteps(ExactTask):
    """Two choices of two, of which the second matters only after the first has been the risky one."""

    name = "two_steps"
    description = (
        "Two choices of two: the first one risks reward 0 for 1, or takes .6 for sure. The logged completions seldom "
        "hold the best one."
    )
    rewards: ClassVar = {"aa": 1.0, "ab": 0.0, "ba": 0.6, "bb": 0.6}
    behaviours = ((0.1, 0.3, 0.3, 0.3),) * 2
    beta = 0.25
    betas = online_betas = (beta,)
    max_completion_length = 2


def _make_tokenizer(letters: str) -> PreTrainedTokenizerFast:
    """A token for each letter, the question, and the special tokens."""
    tokens = [PAD, BOS, EOS, QUESTION, *sorted(set(letters))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, chat_template=TEMPLATE
    )


def _answer(arm: str) -> Messages:
    return [{"role": "assistant", "content": arm}]
