"""The methods: trainers of TRL and trl_lol, what each is trained on, and with which of its settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import trl
from datasets import Dataset

import trl_lol

from .task import GROUP, Task


Rows = Callable[[Task, Dataset, int], Dataset]  # of a task, its logged groups, and the seed


def everything(task: Task, groups: Dataset, seed: int) -> Dataset:
    """Every logged completion."""
    return Dataset.from_list([
        {**{name: value for name, value in row.items() if name not in GROUP}, "completion": completion}
        for row in groups
        for completion in row["completions"]
    ])  # fmt: skip


def best(task: Task, groups: Dataset, seed: int) -> Dataset:
    """The best logged completion of each prompt."""
    return groups.map(
        lambda row: {"completion": max(zip(row["rewards"], row["completions"], strict=True), key=lambda m: m[0])[1]},
        remove_columns=list(GROUP),
    )


def labelled(task: Task, groups: Dataset, seed: int) -> Dataset:
    """
    Every logged completion, desirable if its reward is above the mean. Shuffled, since KTOTrainer takes rows as they
    come and estimates a KL from the completions of their neighbours.
    """
    threshold = fmean(reward for row in groups for reward in row["rewards"])
    labels = [reward > threshold for row in groups for reward in row["rewards"]]
    return everything(task, groups, seed).add_column("label", labels).shuffle(seed=seed)


def with_rewards(task: Task, groups: Dataset, seed: int) -> Dataset:
    """Groups with their rewards."""
    return groups


def with_unit_rewards(task: Task, groups: Dataset, seed: int) -> Dataset:
    """Groups with their rewards brought between 0 and 1, for methods that take a reward as a weight."""
    rewards = [reward for row in groups for reward in row["rewards"]]
    low, high = min(rewards), max(rewards)
    if low == high:
        raise ValueError(f"All logged rewards are {low}: there is nothing to learn from.")
    return groups.map(lambda row: {"rewards": [(reward - low) / (high - low) for reward in row["rewards"]]})


def pairs(task: Task, groups: Dataset, seed: int) -> Dataset:
    """Preferences."""
    return task.pairs(groups, seed)


def prompts(task: Task, groups: Dataset, seed: int) -> Dataset:
    """The prompts alone."""
    return groups.remove_columns(list(GROUP))


@dataclass(frozen=True)
class Method:
    """
    A trainer with its settings.

    Args:
        trainer (`str`):
            Name of the trainer, before `Trainer` and `Config`, in `trl_lol`, or else in `trl`.
        rows (`Callable`):
            What it is trained on.
        completions_per_row (`int`, *optional*):
            Number of completions of such a row. If `None`, as many as a group has.
        settings (`dict[str, Any]`, *optional*):
            What is not the config's default.
        has_beta (`bool`, *optional*, defaults to `False`):
            Whether the config's `beta` matters. It is tuned then, and else the learning rate.
        is_online (`bool`, *optional*, defaults to `False`):
            Whether it generates.
    """

    trainer: str
    rows: Rows
    completions_per_row: int | None = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    has_beta: bool = False
    is_online: bool = False

    @property
    def package(self) -> Any:
        return trl_lol if f"{self.trainer}Trainer" in trl_lol.__all__ else trl

    @property
    def trainer_class(self) -> type:
        return getattr(self.package, f"{self.trainer}Trainer")

    @property
    def config_class(self) -> type:
        return getattr(self.package, f"{self.trainer}Config")


def _alol(loss_type: str, rows: Rows = with_rewards, **kwargs: Any) -> Method:
    return Method("ALoL", rows, settings={"loss_type": [loss_type]}, **kwargs)


def _online(trainer: str, rows: Rows = prompts, **settings: Any) -> Method:
    return Method(trainer, rows, settings=settings, has_beta=True, is_online=True)


# As many passes over what was generated as PPO makes by default, and values that learn faster than the policy
_CRITIC = {"num_iterations": 4, "value_learning_rate": 1e-3}
_GROUPS = {"num_generations": 4}
OLD_PPO = "TRL 1.12 PPO"

METHODS: dict[str, Method] = {
    "SFT on all": Method("SFT", everything, settings={"completion_only_loss": True}),
    "SFT on best": Method("SFT", best, settings={"completion_only_loss": True}),
    "wBC": _alol("wbc", with_unit_rewards),
    "R-GOLD": _alol("r_gold", with_unit_rewards),
    "R-LoL": _alol("r_lol", with_unit_rewards),
    "A-LoL": _alol("alol"),
    "A-LoL seq": _alol("alol_seq"),
    "A-LoL ref-free": _alol("alol_ref_free"),
    "A-LoL KL": _alol("alol_kl", has_beta=True),
    "CoPG": Method("CoPG", with_rewards, None, has_beta=True),
    "DPO": Method("DPO", pairs, 2, has_beta=True),
    "IPO": Method("DPO", pairs, 2, {"loss_type": ["ipo"]}, has_beta=True),
    "KTO": Method("KTO", labelled, has_beta=True),
    "RLOO": _online("RLOO", **_GROUPS),
    "GRPO": _online("GRPO", **_GROUPS),
    "PPO": _online("PPO", **_CRITIC),
    "APA": _online("APA", loss_type="apa", **_CRITIC),
    "AWR": _online("APA", loss_type="awr", **_CRITIC),
    "DR-PO": _online("DRPO", best, **_CRITIC),
    OLD_PPO: _online("PPO"),  # the trainer that TRL had until 1.12, see trl_ppo.py
}
