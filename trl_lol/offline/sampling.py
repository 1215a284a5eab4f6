"""The order in which an offline trainer visits its rows: a function of the seed and the epoch, so that it resumes."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """
    Draws the rows of an epoch in an order that depends on nothing but the seed and the epoch.

    Unlike [`~torch.utils.data.WeightedRandomSampler`], whose order depends on how often it was iterated, a resumed run
    sees the rows that the interrupted one would have seen, and every rank agrees on the order.

    Args:
        num_rows (`int`):
            Number of rows of the dataset.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.
        weights (`torch.Tensor`, *optional*):
            Unnormalised sampling weights, of shape `(num_rows,)`. When given, an epoch is `num_rows` draws with
            replacement, row `i` having probability `weights[i] / weights.sum()`. Otherwise an epoch is a permutation.
    """

    def __init__(self, num_rows: int, seed: int = 0, weights: Tensor | None = None) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.cumulative = None if weights is None else weights.double().cumsum(0)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        # Hashing the pair keeps (seed 0, epoch 1) apart from (seed 1, epoch 0)
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)))
        if self.cumulative is None:
            order = torch.randperm(self.num_rows, generator=generator)
        else:  # inverse transform: unlike `torch.multinomial`, no limit of 2^24 rows
            draws = torch.rand(self.num_rows, generator=generator, dtype=torch.double) * self.cumulative[-1]
            order = torch.searchsorted(self.cumulative, draws, right=True).clamp(max=self.num_rows - 1)
        yield from order.tolist()
