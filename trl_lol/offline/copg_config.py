from dataclasses import dataclass, field

from .base_config import _OfflineRewardConfig


@dataclass
class CoPGConfig(_OfflineRewardConfig):
    r"""
    Configuration class for the [`CoPGTrainer`].

    This class includes the parameters that are specific to CoPG training. All other parameters are those of
    [`~trl.DPOConfig`]; the ones that only mean something to DPO (`loss_type`, `loss_weights`, `f_divergence_type`,
    `label_smoothing`, `use_weighting`, `ld_alpha`, `discopop_tau`, `padding_free`, `truncation_mode="keep_end"`) raise
    an error when set.

    Parameters:
        beta (`float`, *optional*, defaults to `0.1`):
            KL coefficient β, in units of reward per nat: the policy is drawn to π ∝ π_ref e^{R/β}. It has no meaning
            apart from the scale of the rewards: a completion that is better than another by one β is to become e times
            as likely beside it. The best value of the paper's summarisation run is 0.06, and values from 0.03 to 0.1
            do about as well. Too small a value makes the policy collapse, which the loss does not show: evaluate by
            generating ([`GenerationEvalCallback`]).

        > Parameters that control the rewards

        reward_weights (`list[float]`, *optional*):
            Weights of the reward functions. Must match the number of reward functions. If `None`, all rewards are
            weighted equally with weight `1.0`.

        > Parameters that control the layout

        shared_prompts (`bool`, *optional*, defaults to `False`):
            Whether the completions of a group are computed in one sequence, with the prompt in it once. Losses and
            gradients are the same up to rounding; the more completions a prompt has, and the longer it is beside
            them, the faster it gets. Batches in which it would save less than 15 % of the work are computed as
            ever. Takes models whose attention is `sdpa`, `eager` or `flex_attention`, without recurrent layers or
            windows shorter than the sequences, which is checked.

    > [!NOTE]
    > A row is a group of completions, which is never split: `per_device_train_batch_size` counts groups.
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["copg"],
        metadata={"help": "Type of loss to use. The only possible value is `'copg'`."},
    )
    beta: float = field(
        default=0.1,
        metadata={
            "help": "KL coefficient, in units of reward per nat: the policy is drawn to the reference times "
            "exp(reward / beta)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type != ["copg"] or self.loss_weights is not None:
            raise ValueError(
                f"`loss_type={self.loss_type}` and `loss_weights={self.loss_weights}`: CoPGConfig accepts `['copg']` "
                "without weights. A loss of DPOTrainer has no counterpart here: remove both."
            )
        if not self.beta > 0:
            raise ValueError(
                f"`beta={self.beta}` must be positive: it is what the policy pays in reward for a nat of KL."
            )
