from dataclasses import dataclass, field

from ..advantages import BASELINES
from ..losses import ALOL_LOSS_TYPES
from .base_config import _OfflineRewardConfig


@dataclass
class ALoLConfig(_OfflineRewardConfig):
    r"""
    Configuration class for the [`ALoLTrainer`].

    This class includes the parameters that are specific to A-LoL training and those whose default differs. All other
    parameters are those of [`~trl.DPOConfig`]; the ones that only mean something to DPO (`f_divergence_type`,
    `label_smoothing`, `use_weighting`, `ld_alpha`, `discopop_tau`, `padding_free`, `truncation_mode="keep_end"`,
    `sync_ref_model`) raise an error when set.

    Parameters:
        > Parameters that control the loss

        loss_type (`list[str]`, *optional*, defaults to `["alol"]`):
            Type of loss to use. Possible values are `'alol'`, `'alol_seq'`, `'alol_ref_free'` and `'alol_kl'`, and the
            paper's baselines `'wbc'`, `'r_gold'`, `'r_lol'` and `'nll'`, which use every row, uniformly. Several types
            are combined with the weights of `loss_weights`; of the baselines only `'nll'` mixes with the A-LoL types.
        epsilon (`float`, *optional*, defaults to `0.9`):
            The importance ratio is clamped to [1 − ε, 1 + ε]. If `None`, it is not clamped.
        beta (`float`, *optional*, defaults to `0.1`):
            Coefficient of the KL term, used by `'alol_kl'` only, in units of reward per nat.

        > Parameters that control the advantages

        baseline (`str`, *optional*, defaults to `"value"`):
            What is subtracted from the reward: `"value"` (the reference policy's value of the prompt), `"group_mean"`
            or `"leave_one_out"` (rewards of the completions of the same prompt), `"batch_mean"` (mean reward of the
            dataset) or `"none"`.
        advantage_filter (`str`, *optional*, defaults to `"positive"`):
            `"positive"` drops the completions whose advantage is not positive. `"none"` is the paper's ablation: every
            row, signed advantages, uniform sampling.
        sampling (`str`, *optional*, defaults to `"priority"`):
            `"priority"` draws completions with replacement with probability proportional to their advantage; an epoch
            has as many draws as completions were kept. `"uniform"` visits each once. Streams and losses without an
            advantage are always sampled uniformly.
        advantage_weighting (`bool`, *optional*, defaults to `True`):
            Whether the loss is multiplied by the advantage. Together with priority sampling this weights a completion
            by the square of its advantage, as the paper does; `False` leaves the weighting to the sampling.

        > Parameters that control the value estimate

        value_source (`str`, *optional*, defaults to `"auto"`):
            Where the rewards come from that the value head is fitted on. `"dataset"`: the logged completions of the
            training prompts, which cost nothing, and whose mean is the reference policy's value if the policy could
            have written them. `"rollouts"`: the reference policy's own completions, sampled before training and scored
            with the `reward_funcs`, as in the paper; of the evaluation prompts where there are any, else of the
            training prompts. `"auto"` picks `"dataset"`.
        value_num_generations (`int`, *optional*, defaults to `1`):
            Number of completions per prompt that `"rollouts"` samples. With few prompts several are worth their price:
            one reward per prompt is mostly chance.
        value_max_completion_length (`int`, *optional*, defaults to `256`):
            Maximum length of these, in tokens.
        value_learning_rate (`float`, *optional*):
            Learning rate of the value head. If `None`, it is 0.02 / √hidden_size.
        value_num_train_epochs (`int`, *optional*, defaults to `10`):
            Number of passes over the prompts that the head is fitted on. The best one is kept.
        value_max_prompts (`int`, *optional*, defaults to `1024`):
            Number of prompts that the head is fitted on, and that `"rollouts"` completes, at most. Their hidden states
            are held in the host's memory: `value_max_prompts` × prompt tokens × hidden size numbers.
        value_range (`list[float]`, *optional*):
            Lowest and highest value of a bounded reward: the head ends in a sigmoid scaled to this range, as in the
            paper. If `None`, it is linear.

        > Parameters that control the rewards

        reward_weights (`list[float]`, *optional*):
            Weights of the reward functions. Must match the number of reward functions. If `None`, all rewards are
            weighted equally with weight `1.0`.

        > Parameters that control the layout

        shared_prompts (`bool`, *optional*, defaults to `False`):
            Whether `precompute_ref_log_probs` computes the completions of one prompt in one sequence, with the prompt
            in it once. The log-probabilities are the same up to rounding. Training has nothing to share: it draws
            completions one by one. Takes models whose attention is `sdpa`, `eager` or `flex_attention`, without
            recurrent layers or windows shorter than the sequences, which is checked.

    > [!NOTE]
    > `learning_rate` defaults to `1e-5` instead of the `1e-6` of [`~trl.DPOConfig`]: the loss is a weighted
    > log-likelihood, and takes the step sizes of supervised fine-tuning. The paper uses 2e-4 with LoRA.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})

    # Parameters that control the loss
    loss_type: list[str] = field(
        default_factory=lambda: ["alol"],
        metadata={
            "help": "Type of loss to use. Possible values are `'alol'`, `'alol_seq'`, `'alol_ref_free'` and "
            "`'alol_kl'`, and the paper's baselines `'wbc'`, `'r_gold'`, `'r_lol'` and `'nll'`, which use every row, "
            "uniformly. Several types are combined with the weights of `loss_weights`."
        },
    )
    epsilon: float | None = field(
        default=0.9,
        metadata={"help": "The importance ratio is clamped to [1 - ε, 1 + ε]. If `None`, it is not clamped."},
    )
    beta: float = field(
        default=0.1,
        metadata={"help": "Coefficient of the KL term, used by `'alol_kl'` only, in units of reward per nat."},
    )

    # Parameters that control the advantages
    baseline: str = field(
        default="value",
        metadata={
            "help": "What is subtracted from the reward: the reference policy's value of the prompt, the rewards of "
            "the completions of the same prompt, the mean reward of the dataset, or nothing.",
            "choices": list(BASELINES),
        },
    )
    advantage_filter: str = field(
        default="positive",
        metadata={
            "help": "`'positive'` drops the completions whose advantage is not positive. `'none'` is the paper's "
            "ablation: every row, signed advantages, uniform sampling.",
            "choices": ["positive", "none"],
        },
    )
    sampling: str = field(
        default="priority",
        metadata={
            "help": "`'priority'` draws completions with replacement with probability proportional to their "
            "advantage; `'uniform'` visits each once per epoch.",
            "choices": ["priority", "uniform"],
        },
    )
    advantage_weighting: bool = field(
        default=True,
        metadata={
            "help": "Whether the loss is multiplied by the advantage. Together with priority sampling this weights a "
            "completion by the square of its advantage; `False` leaves the weighting to the sampling."
        },
    )

    # Parameters that control the value estimate
    value_source: str = field(
        default="auto",
        metadata={
            "help": "Where the rewards come from that the value head is fitted on. `'dataset'`: the logged "
            "completions of the training prompts. `'rollouts'`: the reference policy's own completions, scored with "
            "the `reward_funcs`, of the evaluation prompts where there are any. `'auto'` picks `'dataset'`.",
            "choices": ["auto", "dataset", "rollouts"],
        },
    )
    value_num_generations: int = field(
        default=1, metadata={"help": "Number of completions per prompt that `'rollouts'` samples."}
    )
    value_max_completion_length: int = field(
        default=256, metadata={"help": "Maximum length, in tokens, of the completions that `'rollouts'` samples."}
    )
    value_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the value head. If `None`, it is 0.02 / sqrt(hidden_size)."},
    )
    value_num_train_epochs: int = field(
        default=10,
        metadata={"help": "Number of passes over the prompts that the value head is fitted on. The best one is kept."},
    )
    value_max_prompts: int = field(
        default=1024,
        metadata={
            "help": "Number of prompts that the value head is fitted on, and that `'rollouts'` completes, at most. "
            "Their hidden states are held in the host's memory."
        },
    )
    value_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "Lowest and highest value of a bounded reward: the value head ends in a sigmoid scaled to this "
            "range. If `None`, it is linear."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [t for t in self.loss_type if t not in ALOL_LOSS_TYPES]:
            raise ValueError(
                f"`loss_type` has {unknown}. ALoLConfig accepts {list(ALOL_LOSS_TYPES)}. A loss of DPOTrainer has no "
                "counterpart here: remove it to use 'alol'."
            )
        on_rewards = [t for t in self.loss_type if t in ("wbc", "r_gold", "r_lol")]
        if self.uses_advantages and on_rewards:
            raise ValueError(
                f"`loss_type` mixes {on_rewards}, which weight every row by its reward, with the A-LoL types, which "
                "weight the kept rows by their advantage. Use one kind; only 'nll' mixes with both."
            )
        for name in ("baseline", "advantage_filter", "sampling", "value_source"):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is unknown. Use one of {choices}.")
        if self.uses_rollouts and not (self.uses_advantages and self.baseline == "value"):
            raise ValueError(
                '`value_source="rollouts"` is for advantages over a value, and '
                f"{f'`baseline={self.baseline!r}`' if self.uses_advantages else f'`loss_type={self.loss_type}`'} has "
                "none. Remove one of them."
            )
        if self.uses_priority_sampling and self.train_sampling_strategy != "random":
            raise ValueError(
                f"`train_sampling_strategy={self.train_sampling_strategy!r}` has its own order, which priority "
                'sampling would ignore. Set `sampling="uniform"`, or leave the strategy at "random".'
            )
        if not self.advantage_weighting and not self.filters_advantages:
            raise ValueError(
                "`advantage_weighting=False` gives every kept completion the weight 1, which needs an A-LoL "
                '`loss_type` with `advantage_filter="positive"`. Remove one of them.'
            )
        if self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` moves the reference, but the advantages are those over the initial one. Remove "
                "it, and run a second round of A-LoL from the trained policy instead."
            )
        if self.shared_prompts and not self.precompute_ref_log_probs:
            raise ValueError(
                "`shared_prompts=True` is for `precompute_ref_log_probs=True`: A-LoL trains on completions one by "
                "one, which have no prompt to share. Set both, or neither."
            )
        if self.epsilon is not None and not self.epsilon > 0:
            raise ValueError(f"`epsilon={self.epsilon}` must be positive, or `None` for no clamping.")
        if self.value_range is not None and not (
            len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]
        ):
            raise ValueError(f"`value_range={self.value_range}` must hold the lowest and the highest value.")

    @property
    def uses_advantages(self) -> bool:
        """Whether any loss type weights by the advantage. If not, every row is used, uniformly."""
        return any(t.startswith("alol") for t in self.loss_type)

    @property
    def uses_rollouts(self) -> bool:
        """Whether the value head is fitted on the reference policy's own completions."""
        return self.value_source == "rollouts"

    @property
    def filters_advantages(self) -> bool:
        """Whether completions without a positive advantage are dropped."""
        return self.uses_advantages and self.advantage_filter == "positive"

    @property
    def uses_priority_sampling(self) -> bool:
        """Whether completions are drawn with probability proportional to their advantage."""
        return self.filters_advantages and self.sampling == "priority"
