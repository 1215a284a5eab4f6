from dataclasses import dataclass, field

from accelerate.logging import get_logger

from .base_config import _ActorCriticConfig


logger = get_logger(__name__)


@dataclass
class APAConfig(_ActorCriticConfig):
    r"""
    Configuration class for the [`APATrainer`].

    This class includes the parameters that are specific to APA training and those of an actor and critic; all other
    parameters are those of [`~trl.GRPOConfig`]. The ones that only mean something to GRPO (`epsilon`, `scale_rewards`,
    `importance_sampling_level`, `delta`, `sync_ref_model`, …) raise an error when set.

    Parameters:
        beta (`float`, *optional*, defaults to `0.1`):
            The paper's λ, in units of advantage per nat: a token whose advantage is one λ is to become e times as
            likely as under the initial policy. The paper's run uses 0.1, Stream of Search 2. With
            `loss_type="awr"`, use 1: the weight e^{A/λ} explodes at 0.1.
        loss_type (`str`, *optional*, defaults to `"apa"`):
            `"apa"`: squared regression of ln π on ln π_init + A/λ. `"awr"`: advantage-weighted regression, the
            paper's baseline.
        whiten_advantages (`bool`, *optional*, defaults to `False`):
            Whether to scale the advantages to zero mean and unit variance over the completion tokens of the whole
            generation batch, which makes λ a multiple of their standard deviation.
        vf_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the value loss.
        value_epsilon (`float`, *optional*):
            Range around the values at generation that the value loss clips to. The paper does not clip.
        reset_ref_patience (`int`, *optional*):
            When the reward on the eval dataset has not improved for this many evaluations, the current policy becomes
            the reference, as [Stream of Search](https://huggingface.co/papers/2404.03683) needed. If `None`, the
            reference stays the initial policy.
    """

    _loss_types = ("apa", "awr")
    _grpo_only = (*_ActorCriticConfig._grpo_only, "epsilon")

    loss_type: str = field(
        default="apa",
        metadata={
            "help": "'apa': squared regression of the log-probability on its initial value plus advantage / beta. "
            "'awr': advantage-weighted regression.",
            "choices": ["apa", "awr"],
        },
    )
    beta: float = field(
        default=0.1,
        metadata={"help": "The paper's lambda, in units of advantage per nat. With `loss_type='awr'`, use 1."},
    )
    whiten_advantages: bool = field(
        default=False,
        metadata={
            "help": "Whether to scale the advantages to zero mean and unit variance over the completion tokens of the "
            "whole generation batch."
        },
    )
    vf_coef: float = field(default=1.0, metadata={"help": "Weight of the value loss."})
    value_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Range around the values at generation that the value loss clips to. If not set, it does not clip."
        },
    )
    reset_ref_patience: int | None = field(
        default=None,
        metadata={
            "help": "When the reward on the eval dataset has not improved for this many evaluations, the current "
            "policy becomes the reference."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"`beta={self.beta}` must be positive: advantages are divided by it.")
        if self.loss_type == "awr" and self.beta < 1 and not self.whiten_advantages:
            logger.warning(
                f"AWR weighs a token by e^(advantage / {self.beta}), which explodes where advantages are of the order "
                "of 1. The paper uses `beta=1.0`."
            )
        if self.reset_ref_patience is not None:
            if self.reset_ref_patience < 1:
                raise ValueError(f"`reset_ref_patience={self.reset_ref_patience}` must be at least 1 evaluation.")
            if self.loss_type == "awr":
                raise ValueError("`reset_ref_patience` moves the reference, and AWR has none. Use `loss_type='apa'`.")
            if self.eval_strategy == "no":
                raise ValueError(
                    "`reset_ref_patience` counts evaluations, and `eval_strategy='no'` means that there are none. Set "
                    "`eval_strategy` and `eval_steps`."
                )
