"""Reward functions in TRL's form: adapters, composition, and scoring a dataset with them."""

from .caching import cache_rewards
from .calling import RewardFunc, call_reward_funcs
from .functions import ColumnReward, clip, sigmoid, standardize, weighted_sum
from .metrics import MetricReward
from .models import ClassifierReward, RewardModel
from .scoring import score_dataset


__all__ = [
    "ClassifierReward",
    "ColumnReward",
    "MetricReward",
    "RewardFunc",
    "RewardModel",
    "cache_rewards",
    "call_reward_funcs",
    "clip",
    "score_dataset",
    "sigmoid",
    "standardize",
    "weighted_sum",
]
