from dataclasses import dataclass, field

from .base_config import _ActorCriticConfig


@dataclass
class PPOConfig(_ActorCriticConfig):
    r"""
    Configuration class for the [`PPOTrainer`].

    This class includes the parameters that are specific to PPO training and those of an actor and critic; all other
    parameters are those of [`~trl.GRPOConfig`]. The ones that only mean something to GRPO (`loss_type`,
    `scale_rewards`, `importance_sampling_level`, `delta`, `epsilon_high`, `sync_ref_model`, …) raise an error when
    set.

    Parameters:
        beta (`float`, *optional*, defaults to `0.05`):
            KL coefficient β, in units of reward per nat. The penalty is in the reward, token by token, so that the
            optimum is π_ref e^{Q/β} with soft values Q. KL is summed over the tokens of a completion: the same β means
            more for long completions. TRL's PPO called it `kl_coef`.
        epsilon (`float`, *optional*, defaults to `0.2`):
            Range in which the ratio to the policy that generated is not clipped. TRL's PPO called it `cliprange`.
        num_iterations (`int`, *optional*, defaults to `4`):
            Passes over the completions of a generation batch. TRL's PPO called it `num_ppo_epochs`.
    """

    _loss_types = ("ppo",)

    loss_type: str = field(
        default="ppo", metadata={"help": "Type of loss to use. The only possible value is `'ppo'`."}
    )
    beta: float = field(
        default=0.05,
        metadata={"help": "KL coefficient, in units of reward per nat. The penalty is in the reward, token by token."},
    )
    epsilon: float = field(
        default=0.2,
        metadata={"help": "Range in which the ratio to the policy that generated is not clipped."},
    )
    num_iterations: int = field(default=4, metadata={"help": "Passes over the completions of a generation batch."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 0:
            raise ValueError(f"`beta={self.beta}` must not be negative: it is what a nat of KL costs in reward.")
        if not self.epsilon > 0:
            raise ValueError(f"`epsilon={self.epsilon}` must be positive: it is the range of the ratio.")
