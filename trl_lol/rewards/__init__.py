"""Reward functions in TRL's form: adapters, composition, and scoring a dataset with them."""

from .calling import RewardFunc, call_reward_funcs
from .functions import ColumnReward, sigmoid, weighted_sum
from .scoring import score_dataset


__all__ = ["ColumnReward", "RewardFunc", "call_reward_funcs", "score_dataset", "sigmoid", "weighted_sum"]
