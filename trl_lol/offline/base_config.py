"""What the configs of the offline trainers share."""

from dataclasses import dataclass, field

from trl import DPOConfig


@dataclass
class _OfflineRewardConfig(DPOConfig):
    """
    Base configuration of the offline trainers: [`~trl.DPOConfig`] without the fields that only mean something to DPO,
    which raise when they are set.

    Parameters:
        reward_weights (`list[float]`, *optional*):
            Weights of the reward functions. Must match the number of reward functions. If `None`, all rewards are
            weighted equally with weight `1.0`.
    """

    # DPO's own fields, and the only value that an offline reward trainer accepts
    _dpo_only = {  # noqa: RUF012
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
        "use_weighting": False,
        "ld_alpha": None,
        "discopop_tau": 0.05,
        "padding_free": False,
        "truncation_mode": "keep_start",
    }

    reward_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weights of the reward functions. Must match the number of reward functions. If `None`, all "
            "rewards are weighted equally with weight `1.0`."
        },
    )

    def __post_init__(self) -> None:
        for name, neutral in self._dpo_only.items():
            if (found := getattr(self, name)) != neutral:
                raise ValueError(
                    f"`{name}={found!r}` means something to DPO only, and {type(self).__name__} accepts no value but "
                    f"{neutral!r}. Remove it."
                )
        super().__post_init__()
