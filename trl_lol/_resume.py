"""What it takes for a resumed run to equal one that was not interrupted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@contextmanager
def same_dtypes(model: nn.Module) -> Iterator[None]:
    """
    Leave the parameters in the types that they had: TRL trains the adapter of a quantised model in bfloat16, and PEFT
    reads it from a checkpoint into float32.

    Args:
        model (`torch.nn.Module`):
            The model, whose parameters are loaded within the context.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))  # an adapter may be new


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
