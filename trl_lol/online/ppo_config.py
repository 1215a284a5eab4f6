from dataclasses import dataclass, field
from typing import Any

from .base_config import _ActorCriticConfig


# What TRL's own PPO called its arguments, until 1.12
RENAMED_FIELDS = {
    "kl_coef": "`beta`",
    "cliprange": "`epsilon`",
    "cliprange_value": "`value_epsilon`",
    "num_ppo_epochs": "`num_iterations`",
    "num_mini_batches": "`steps_per_generation`",
    "response_length": "`max_completion_length`",
    "total_episodes": "`num_train_epochs` or `max_steps`",
    "stop_token": "the EOS tokens of the model's generation config",
    "stop_token_id": "the EOS tokens of the model's generation config",
    "num_sample_generations": "`log_completions`",
    "kl_estimator": 'always "k1"',
    "dataset_num_proc": "not needed (prompts are tokenised as they come)",
    "sft_model_path": "`model` of the trainer",
    "reward_model_path": "`reward_funcs` of the trainer",
    "local_rollout_forward_batch_size": "`per_device_train_batch_size`",
}
RENAMED_ARGUMENTS = {
    "reward_model": "`reward_funcs`",
    "value_model": "a head on the policy, which needs no argument",
    "ref_model": "the initial policy, which needs no argument",
}


def refuse_old_names(names: Any, renamed: dict[str, str]) -> None:
    """Say what an argument of TRL's PPO is called here, where Python would say that there is none of that name."""
    for name in names:
        if name in renamed:
            raise TypeError(
                f"`{name}`, of the PPO that TRL had until 1.12, is {renamed[name]} here. docs/from_trl_ppo.md has all "
                "old names and new."
            )


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

    def __new__(cls, *args: Any, **kwargs: Any) -> "PPOConfig":
        refuse_old_names(kwargs, RENAMED_FIELDS)
        return super().__new__(cls)

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
