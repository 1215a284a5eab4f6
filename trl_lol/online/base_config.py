"""What the configs of the online trainers share."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from trl import GRPOConfig


ADVANTAGE_ESTIMATORS = ("gae", "leave_one_out")


class _PassesAsTwo(int):
    """GRPOConfig refuses `num_generations < 2`, for its advantages. A critic needs no group."""

    def __lt__(self, other: Any) -> bool:
        return other != 2 and int(self) < other


@dataclass
class _ActorCriticConfig(GRPOConfig):
    """
    Base configuration of the online trainers: [`~trl.GRPOConfig`] without the fields that only mean something to GRPO,
    which raise when they are set.

    Parameters:
        > Parameters that control the generation

        num_generations (`int`, *optional*, defaults to `1`):
            Number of completions per prompt. `advantage_estimator="leave_one_out"` needs at least 2.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the policy and the reference, so that they do not differ by noise.

        > Parameters that control the advantages

        advantage_estimator (`str`, *optional*, defaults to `"gae"`):
            `"gae"`: generalised advantage estimation per token, with a value head on the policy. `"leave_one_out"`:
            the completion's reward minus the mean reward of the prompt's other completions, for all its tokens,
            without a value head.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per token.
        lam (`float`, *optional*, defaults to `0.95`):
            GAE's trace decay λ. 1 trusts the rewards alone, 0 the value head.
        whiten_rewards (`bool`, *optional*, defaults to `False`):
            Whether to scale the per-token rewards to unit variance, keeping their mean.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Whether to scale the advantages to zero mean and unit variance. Both are taken over the completion tokens
            of the whole generation batch, across processes.
        missing_eos_penalty (`float`, *optional*):
            Subtracted from the reward of a completion that does not end with an EOS token. Must be positive.

        > Parameters that control the value head

        vf_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the value loss.
        value_epsilon (`float`, *optional*, defaults to `0.2`):
            Range around the values at generation that the value loss clips to, in units of reward. `None`: no
            clipping.
        value_learning_rate (`float`, *optional*):
            Learning rate of the value head. If `None`, it is `learning_rate`, at which a new head learns slowly.
    """

    # GRPO's own fields, which accept their default only
    _grpo_only = (
        "delta",
        "epsilon_high",
        "entropy_coef_delta",
        "entropy_coef_max",
        "entropy_coef_min",
        "entropy_target",
        "importance_sampling_level",
        "max_tool_calling_iterations",
        "multi_objective_aggregation",
        "off_policy_mask_threshold",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
        "sapo_temperature_neg",
        "sapo_temperature_pos",
        "scale_rewards",
        "sync_ref_model",
        "top_entropy_quantile",
        "use_adaptive_entropy",
        "use_bias_correction_kl",
        "vespo_k_neg",
        "vespo_k_pos",
        "vespo_lambda_neg",
        "vespo_lambda_pos",
    )
    # What does nothing without a critic
    _gae_only = (
        "gamma",
        "lam",
        "whiten_rewards",
        "vf_coef",
        "value_epsilon",
        "value_learning_rate",
    )
    _loss_types = ()

    num_generations: int | None = field(
        default=1,
        metadata={"help": "Number of completions per prompt. `advantage_estimator='leave_one_out'` needs at least 2."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Whether to disable dropout in the policy and the reference, so that they do not differ by noise."
        },
    )
    advantage_estimator: str = field(
        default="gae",
        metadata={
            "help": "'gae': generalised advantage estimation per token, with a value head on the policy. "
            "'leave_one_out': the completion's reward minus the mean reward of the prompt's other completions, for "
            "all its tokens, without a value head.",
            "choices": list(ADVANTAGE_ESTIMATORS),
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(
        default=0.95,
        metadata={"help": "GAE's trace decay. 1 trusts the rewards alone, 0 the value head."},
    )
    whiten_rewards: bool = field(
        default=False,
        metadata={"help": "Whether to scale the per-token rewards to unit variance, keeping their mean."},
    )
    whiten_advantages: bool = field(
        default=True,
        metadata={
            "help": "Whether to scale the advantages to zero mean and unit variance over the completion tokens of the "
            "whole generation batch, across processes."
        },
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={
            "help": "Subtracted from the reward of a completion that does not end with an EOS token. Must be positive."
        },
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    value_epsilon: float | None = field(
        default=0.2,
        metadata={
            "help": "Range around the values at generation that the value loss clips to, in units of reward. If not "
            "set, it is not clipped."
        },
    )
    value_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the value head. If not set, it is `learning_rate`."},
    )

    def __post_init__(self) -> None:
        for name in ("num_generations", "num_iterations", "max_completion_length", "steps_per_generation"):
            found = getattr(self, name)
            if not (found is None and name == "steps_per_generation") and not (found or 0) >= 1:
                raise ValueError(f"`{name}={found}` must be at least 1.")
        if not self.temperature > 0:
            raise ValueError(
                f"`temperature={self.temperature}` must be positive: log-probabilities are divided by it."
            )
        num_generations = self.num_generations
        self.num_generations = _PassesAsTwo(num_generations) if num_generations == 1 else num_generations
        super().__post_init__()
        self.num_generations = num_generations

        defaults = {f.name: f.default for f in fields(GRPOConfig) if f.default is not MISSING}
        for name in self._grpo_only:
            if (found := getattr(self, name)) != defaults[name]:
                raise ValueError(
                    f"`{name}={found!r}` is an argument of GRPO that has no meaning here: {type(self).__name__} "
                    f"accepts no value but {defaults[name]!r}. Remove it."
                )
        if self.loss_type not in self._loss_types:
            raise ValueError(
                f"`loss_type={self.loss_type!r}`: {type(self).__name__} accepts {_either(self._loss_types)}."
            )
        if self.advantage_estimator not in ADVANTAGE_ESTIMATORS:
            raise ValueError(
                f"`advantage_estimator={self.advantage_estimator!r}` is unknown. Use {_either(ADVANTAGE_ESTIMATORS)}."
            )
        if self.advantage_estimator == "leave_one_out":
            if self.num_generations < 2:
                raise ValueError(
                    f"`advantage_estimator='leave_one_out'` compares the completions of a prompt, and there is "
                    f"`num_generations={self.num_generations}`. Set it to 2 or more."
                )
            own = {f.name: f.default for f in fields(self)}
            for name in self._gae_only:
                if (found := getattr(self, name)) != own[name]:
                    raise ValueError(
                        f"`{name}={found!r}` does nothing with `advantage_estimator='leave_one_out'`, which works on "
                        "whole completions without a value head. Remove it, or use `'gae'`."
                    )
        for name in ("gamma", "lam"):
            if not 0 <= (found := getattr(self, name)) <= 1:
                raise ValueError(f"`{name}={found}` must be between 0 and 1.")
        for name in ("missing_eos_penalty", "value_epsilon", "value_learning_rate"):
            if (found := getattr(self, name)) is not None and not found > 0:
                raise ValueError(f"`{name}={found}` must be positive. Leave it out (`None`) to switch it off.")
        if not self.vf_coef >= 0:
            raise ValueError(f"`vf_coef={self.vf_coef}` must not be negative.")


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))
