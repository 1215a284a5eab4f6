"""Train language models on arbitrary scalar rewards: published methods as Hugging Face TRL trainers."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any


try:
    __version__ = version("trl-lol")
except PackageNotFoundError:  # run from a checkout
    __version__ = "unknown"

_MODULES = {
    "ALoLConfig": ".offline.alol_config",
    "ALoLTrainer": ".offline.alol_trainer",
    "APAConfig": ".online.apa_config",
    "APATrainer": ".online.apa_trainer",
    "AdvantageReport": ".report",
    "ClassifierReward": ".rewards",
    "CoPGConfig": ".offline.copg_config",
    "CoPGTrainer": ".offline.copg_trainer",
    "ColumnReward": ".rewards",
    "DRPOConfig": ".online.drpo_config",
    "DRPOTrainer": ".online.drpo_trainer",
    "GenerationEvalCallback": ".evaluation",
    "MetricReward": ".rewards",
    "PPOConfig": ".online.ppo_config",
    "PPOTrainer": ".online.ppo_trainer",
    "RewardModel": ".rewards",
    "cache_rewards": ".rewards",
    "clip": ".rewards",
    "estimate_advantages": ".estimation",
    "sample_completions": ".generation",
    "score_dataset": ".rewards",
    "sequence_advantages": ".advantages",
    "sigmoid": ".rewards",
    "standardize": ".rewards",
    "weighted_sum": ".rewards",
}
__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:
    from .advantages import sequence_advantages
    from .estimation import estimate_advantages
    from .evaluation import GenerationEvalCallback
    from .generation import sample_completions
    from .offline.alol_config import ALoLConfig
    from .offline.alol_trainer import ALoLTrainer
    from .offline.copg_config import CoPGConfig
    from .offline.copg_trainer import CoPGTrainer
    from .online.apa_config import APAConfig
    from .online.apa_trainer import APATrainer
    from .online.drpo_config import DRPOConfig
    from .online.drpo_trainer import DRPOTrainer
    from .online.ppo_config import PPOConfig
    from .online.ppo_trainer import PPOTrainer
    from .report import AdvantageReport
    from .rewards import (
        ClassifierReward,
        ColumnReward,
        MetricReward,
        RewardModel,
        cache_rewards,
        clip,
        score_dataset,
        sigmoid,
        standardize,
        weighted_sum,
    )


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import trl_lol` costs nothing
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
