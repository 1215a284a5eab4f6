"""Orders that are a function of the seed and the epoch, so that a run resumes."""

from typing import Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class HasEpoch(Protocol):
    """A sampler whose order depends on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""


class SetEpochCallback(TrainerCallback):
    """
    Tells the sampler the epoch when an epoch begins.

    The training loop does so as well, but after a resume in the middle of an epoch the data loader is wrapped once
    more to skip batches, and on several ranks accelerate then no longer reaches the sampler.
    """

    def __init__(self, sampler: HasEpoch) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.sampler.set_epoch(int(state.epoch))
