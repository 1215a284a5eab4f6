"""What the advantages say about a dataset: how much of it is worth training on, and why."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from .value import r_squared


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def quantiles(x: Tensor) -> list[float]:
    """Minimum, 5 %, 25 %, 50 %, 75 %, 95 % quantiles and maximum of `x`."""
    ordered = x.double().sort().values  # not `torch.quantile`, which takes at most 2^24 values
    return [ordered[round(q * (len(ordered) - 1))].item() for q in QUANTILES]


@dataclass
class AdvantageReport:
    """
    Summary of a dataset's rewards, values and advantages.

    Attributes:
        num_completions (`int`):
            Number of scored completions.
        num_kept (`int`):
            Number of those with a positive advantage.
        rewards, values, advantages (`list[float]`):
            Their quantiles at 0, 5, 25, 50, 75, 95 and 100 %. `values` is what was subtracted from the rewards.
        value_r2 (`float`):
            Part of the rewards' variance that the values explain.
        effective_sample_size (`float`):
            Number of equally likely completions that priority sampling amounts to: (Σ A⁺)² / Σ (A⁺)².
        subsets (`dict[str, tuple[int, int]]`):
            Kept and total completions of each value of the `subset` column, where there is one.
    """

    num_completions: int
    num_kept: int
    rewards: list[float]
    values: list[float]
    advantages: list[float]
    value_r2: float
    effective_sample_size: float
    subsets: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def from_tensors(
        cls, rewards: Tensor, values: Tensor, advantages: Tensor, subsets: Sequence[str] | None = None
    ) -> "AdvantageReport":
        """
        Summarise tensors of shape `(num_completions,)`.

        Args:
            rewards (`torch.Tensor`):
                Reward of each completion.
            values (`torch.Tensor`):
                What was subtracted from it.
            advantages (`torch.Tensor`):
                The difference.
            subsets (`Sequence[str]`, *optional*):
                Subset that each completion belongs to.

        Returns:
            [`AdvantageReport`]: The summary.
        """
        kept = advantages > 0
        positive = advantages.clamp(min=0).double()
        counts: dict[str, tuple[int, int]] = {}
        for name, is_kept in zip(subsets or [], kept.tolist() if subsets else [], strict=True):
            num_kept, total = counts.get(str(name), (0, 0))
            counts[str(name)] = (num_kept + is_kept, total + 1)
        return cls(
            num_completions=len(rewards),
            num_kept=int(kept.sum()),
            rewards=quantiles(rewards),
            values=quantiles(values),
            advantages=quantiles(advantages),
            value_r2=r_squared(values, rewards),
            effective_sample_size=(positive.sum().square() / positive.square().sum().clamp(min=1e-30)).item(),
            subsets=dict(sorted(counts.items())),
        )

    @property
    def kept_fraction(self) -> float:
        """Part of the completions that has a positive advantage."""
        return self.num_kept / self.num_completions

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def __str__(self) -> str:
        lines = [
            f"{self.num_kept} of {self.num_completions} completions ({self.kept_fraction:.1%}) have a positive "
            f"advantage; the effective sample size under priority sampling is {self.effective_sample_size:.0f}.",
            "            " + "".join(f"{f'{q:.0%}':>9}" for q in QUANTILES),
        ]
        for name in ("rewards", "values", "advantages"):
            lines.append(f"{name:<12}" + "".join(f"{x:9.3f}" for x in getattr(self, name)))
        lines.append(f"The values explain {self.value_r2:.1%} of the rewards' variance.")
        lines += [
            f"{name}: {kept} of {total} positive ({kept / total:.1%})" for name, (kept, total) in self.subsets.items()
        ]
        return "\n".join(lines)
