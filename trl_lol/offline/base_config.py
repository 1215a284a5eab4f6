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
        shared_prompts (`bool`, *optional*, defaults to `False`):
            Whether completions of one prompt are computed in one sequence, with the prompt in it once. Losses and
            gradients are the same up to rounding; the more completions a prompt has, and the longer it is beside
            them, the faster it gets. Batches in which it would save less than 15 % of the work are computed as
            ever. Takes models whose attention is `sdpa`, `eager` or `flex_attention`, without recurrent layers or
            windows shorter than the sequences, which is checked.
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

    shared_prompts: bool = field(
        default=False,
        metadata={
            "help": "Whether completions of one prompt are computed in one sequence, with the prompt in it once. "
            "Losses and gradients are the same up to rounding."
        },
    )

    def __post_init__(self) -> None:
        for name, neutral in self._dpo_only.items():
            if (found := getattr(self, name)) != neutral:
                raise ValueError(
                    f"`{name}={found!r}` means something to DPO only, and {type(self).__name__} accepts no value but "
                    f"{neutral!r}. Remove it."
                )
        if self.shared_prompts and self.neftune_noise_alpha is not None:
            raise ValueError(
                f"`neftune_noise_alpha={self.neftune_noise_alpha}` scales its noise with the length of a sequence, "
                "which `shared_prompts=True` changes. Remove one of them."
            )
        super().__post_init__()
