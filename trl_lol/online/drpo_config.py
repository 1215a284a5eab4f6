from dataclasses import dataclass, field

from accelerate.logging import get_logger

from .ppo_config import PPOConfig


logger = get_logger(__name__)


@dataclass
class DRPOConfig(PPOConfig):
    r"""
    Configuration class for the [`DRPOTrainer`].

    This class includes the parameters that are specific to DR-PO training; all other parameters are those of
    [`PPOConfig`].

    Parameters:
        reset_prob (`float`, *optional*, defaults to `1.0`):
            Probability, the paper's β, with which the completions of a prompt restart from a prefix of its reference
            completion, the roll-in. 0 is PPO.
        min_roll_in (`int`, *optional*, defaults to `0`):
            Shortest roll-in, in tokens: its length is uniform on {`min_roll_in`, …, L − 1}, where L is the length of
            the reference up to its first EOS, or `max_completion_length` if that is less. There is no reset if L is
            not above `min_roll_in`. The paper's code takes 1, which together with `reset_prob=1.0` never trains the
            first token.
        train_on_roll_in_values (`bool`, *optional*, defaults to `False`):
            Whether the KL penalty, the value loss and whitening take in the roll-in, as in the paper's code, and not
            only the generated tokens. The policy loss and the logged KL never do.
        reference_column (`str`, *optional*):
            Column with the reference completions. If `None`, it is the first of `completion`, `chosen` and
            `reference` that there is. A prompt whose reference is null or empty is never reset.
    """

    _gae_only = (*PPOConfig._gae_only, "train_on_roll_in_values")

    reset_prob: float = field(
        default=1.0,
        metadata={
            "help": "Probability with which the completions of a prompt restart from a prefix of its reference "
            "completion. 0 is PPO."
        },
    )
    min_roll_in: int = field(
        default=0,
        metadata={"help": "Shortest roll-in, in tokens. The paper's code takes 1."},
    )
    train_on_roll_in_values: bool = field(
        default=False,
        metadata={
            "help": "Whether the KL penalty, the value loss and whitening take in the roll-in, as in the paper's code."
        },
    )
    reference_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the reference completions. If not set, the first of 'completion', 'chosen' and "
            "'reference' that there is."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.reset_prob <= 1:
            raise ValueError(f"`reset_prob={self.reset_prob}` must be between 0 and 1: it is a probability.")
        if not 0 <= self.min_roll_in < self.max_completion_length:
            raise ValueError(
                f"`min_roll_in={self.min_roll_in}` must be at least 0 and less than `max_completion_length="
                f"{self.max_completion_length}`, which roll-in and continuation share."
            )
        if self.reset_prob == 1 and self.min_roll_in > 0:
            logger.warning(
                f"With `reset_prob=1.0` and `min_roll_in={self.min_roll_in}` no completion of a prompt with a "
                "reference begins at the prompt: what comes first is never trained. Use `min_roll_in=0`, or a smaller "
                "`reset_prob`."
            )
