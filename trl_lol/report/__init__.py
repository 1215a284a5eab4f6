"""What the advantages say about a dataset: how much of it is worth training on, and why."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from torch import Tensor

from .._cache import written_beside
from ..data import Messages, as_group, prompt_key
from ..rewards.models import as_text
from ..rewards.scoring import completion_rewards, reward_columns
from ..value import r_squared
from .numbers import QUANTILES, Bin, Example, Histogram, calibrate, histogram, quantiles


if TYPE_CHECKING:
    from rich.console import Group

MAX_SUBSETS = 20  # printed


@dataclass
class AdvantageReport:
    """
    Summary of a dataset's rewards, values and advantages. Printed it is a table, and `plot` draws it.

    A completion is *kept* if its advantage is positive, as A-LoL keeps it, and else *dropped*. The *value* is what was
    subtracted from the reward, whatever the baseline: advantage = reward − value.

    Attributes:
        num_completions (`int`):
            Number of scored completions. All that follows is about these, except for `num_missing`.
        num_kept (`int`):
            Number of those with a positive advantage.
        rewards, values, advantages (`list[float]`):
            Their quantiles at 0, 5, 25, 50, 75, 95 and 100 %, each one of the numbers (that of the nearest rank).
        value_r2 (`float` or `None`):
            Part of the rewards' variance that the values explain, 1 − Σ(R − V)² / Σ(R − mean R)²: 1 if they are the
            rewards, 0 if they do no better than the mean reward, negative if worse. It says how well a value foresees
            a reward only where it does not know it: a `"group_mean"` contains the reward. `None` if all rewards are
            equal.
        effective_sample_size (`float`):
            Number of equally likely completions that priority sampling amounts to: (Σ A⁺)² / Σ (A⁺)², with A⁺ =
            max(A, 0). It is `num_kept` if the kept advantages are all equal, and 1 if one outweighs all others.
        subsets (`dict[str, tuple[int, int]]`):
            Kept and total completions of each value of the subset column, where there is one.
        num_prompts (`int` or `None`):
            Number of distinct prompts of these completions. `None` if it is not known.
        num_missing (`int`):
            Number of further completions that are not scored.
        num_duplicates (`int` or `None`):
            Number of completions that are, to the letter, an earlier completion of the same prompt. `None` if it is
            not known.
        calibration (`list[Bin]`):
            Completions in the order of their values, cut into up to 10 parts of about equal size: mean value, mean
            reward and number of each. Completions of the same value stay in one part.
        histograms (`dict[str, Histogram]`):
            Histograms of the `"rewards"`, `"values"` and `"advantages"`.
        best, worst (`list[Example]`):
            The completions with the highest and with the lowest advantages, most extreme first; of equal ones the
            earlier first. Empty if no texts were given.
    """

    num_completions: int
    num_kept: int
    rewards: list[float]
    values: list[float]
    advantages: list[float]
    value_r2: float | None
    effective_sample_size: float
    subsets: dict[str, tuple[int, int]] = field(default_factory=dict)
    num_prompts: int | None = None
    num_missing: int = 0
    num_duplicates: int | None = None
    calibration: list[Bin] = field(default_factory=list)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    best: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)

    @classmethod
    def from_tensors(
        cls,
        rewards: Tensor,
        values: Tensor,
        advantages: Tensor,
        subsets: Sequence[str] | None = None,
        *,
        group_ids: Tensor | None = None,
        num_missing: int = 0,
        num_duplicates: int | None = None,
        examples: Callable[[list[int]], list[tuple[str, str]]] | None = None,
        num_examples: int = 3,
    ) -> "AdvantageReport":
        """
        Summarise tensors of shape `(num_completions,)`, of scored completions only.

        Args:
            rewards (`torch.Tensor`):
                Reward of each completion.
            values (`torch.Tensor`):
                What was subtracted from it.
            advantages (`torch.Tensor`):
                The difference.
            subsets (`Sequence[str]`, *optional*):
                Subset that each completion belongs to.
            group_ids (`torch.Tensor`, *optional*):
                Integer that is equal for the completions of one prompt.
            num_missing (`int`, *optional*, defaults to `0`):
                Number of completions that are not among these, for want of a reward.
            num_duplicates (`int`, *optional*):
                Number of completions that repeat an earlier one of the same prompt. If `None`, it is not known.
            examples (`Callable`, *optional*):
                Returns the texts of the prompts and completions at given positions. If `None`, no examples are shown.
            num_examples (`int`, *optional*, defaults to `3`):
                Number of best and of worst completions to show.

        Returns:
            [`AdvantageReport`]: The summary.

        Raises:
            `ValueError`: If there are no completions.
        """
        if len(rewards) == 0:
            raise ValueError(
                f"There is no scored completion to report on ({num_missing} are not scored). Check the rewards: null "
                "means that a completion is not scored."
            )
        rewards, values, advantages = (x.detach().double().cpu() for x in (rewards, values, advantages))
        kept = advantages > 0
        positive = advantages.clamp(min=0)
        counts: dict[str, tuple[int, int]] = {}
        for name, is_kept in zip(subsets or [], kept.tolist() if subsets else [], strict=True):
            num_kept, total = counts.get(str(name), (0, 0))
            counts[str(name)] = (num_kept + is_kept, total + 1)

        def pick(descending: bool) -> list[Example]:
            if examples is None:
                return []
            positions = advantages.argsort(descending=descending, stable=True)[:num_examples].tolist()
            return [
                Example(
                    prompt=prompt,
                    completion=completion,
                    reward=rewards[i].item(),
                    value=values[i].item(),
                    advantage=advantages[i].item(),
                )
                for i, (prompt, completion) in zip(positions, examples(positions), strict=True)
            ]

        return cls(
            num_completions=len(rewards),
            num_kept=int(kept.sum()),
            rewards=quantiles(rewards),
            values=quantiles(values),
            advantages=quantiles(advantages),
            value_r2=None if rewards.min() == rewards.max() else r_squared(values, rewards),
            effective_sample_size=(positive.sum().square() / positive.square().sum()).item() if kept.any() else 0.0,
            subsets=dict(sorted(counts.items())),
            num_prompts=None if group_ids is None else len(group_ids.unique()),
            num_missing=num_missing,
            num_duplicates=num_duplicates,
            calibration=calibrate(values, rewards),
            histograms={
                name: histogram(x, kept, rewards)
                for name, x in (("rewards", rewards), ("values", values), ("advantages", advantages))
            },
            best=pick(descending=True),
            worst=pick(descending=False),
        )

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, subset_column: str = "subset", *, num_examples: int = 3
    ) -> "AdvantageReport":
        """
        Summarise what [`estimate_advantages`] returns.

        Args:
            dataset ([`~datasets.Dataset`]):
                Rows of any accepted format, with rewards and advantages. Null is "not scored".
            subset_column (`str`, *optional*, defaults to `"subset"`):
                Column that says which part of the dataset a row belongs to. It may be missing.
            num_examples (`int`, *optional*, defaults to `3`):
                Number of best and of worst completions to show.

        Returns:
            [`AdvantageReport`]: The summary.

        Raises:
            `ValueError`: If the dataset has no advantages, or they are all null.
        """
        columns = {name: name.replace("reward", "advantage") for name in reward_columns(dataset, [])}
        if missing := [name for pair in columns.items() for name in pair if name not in dataset.column_names]:
            raise ValueError(
                f"The dataset has no column {' and no '.join(map(repr, missing))}: its columns are "
                f"{', '.join(dataset.column_names)}. `estimate_advantages(dataset, ...)` returns it with them."
            )
        dataset = dataset.with_format(None)
        swapped = dataset.remove_columns([*columns]).rename_columns({a: r for r, a in columns.items()})
        prompts: dict[str, int] = {}
        earlier: set[tuple[int, str]] = set()
        scored: list[tuple[int, int]] = []  # position of the row, and in the row
        rewards, advantages, group_ids, subsets = [], [], [], []
        num_completions = 0
        for i, (row, row_advantages) in enumerate(zip(dataset, completion_rewards(swapped), strict=True)):
            group = as_group(row)
            num_completions += len(group.completions)
            asked = prompt_key(group.prompt, row)
            for j, (reward, advantage) in enumerate(zip(group.rewards, row_advantages, strict=True)):
                if reward is None or advantage is None:
                    continue
                scored.append((i, j))
                rewards.append(reward)
                advantages.append(advantage)
                group_ids.append(prompts.setdefault(asked, len(prompts)))
                subsets.append(row.get(subset_column))
                earlier.add((group_ids[-1], json.dumps(group.completions[j], sort_keys=True, default=str)))

        def examples(positions: list[int]) -> list[tuple[str, str]]:
            places = [(as_group(dataset[scored[p][0]]), scored[p][1]) for p in positions]
            return [(_dialogue(group.prompt), as_text(group.completions[j])) for group, j in places]

        rewards, advantages = (torch.tensor(x, dtype=torch.float64) for x in (rewards, advantages))
        return cls.from_tensors(
            rewards,
            rewards - advantages,  # also where there is no `value`, which another baseline leaves out
            advantages,
            subsets if subset_column in dataset.column_names else None,
            group_ids=torch.tensor(group_ids),
            num_missing=num_completions - len(scored),
            num_duplicates=len(scored) - len(earlier),
            examples=examples,
            num_examples=num_examples,
        )

    @property
    def kept_fraction(self) -> float:
        """Part of the completions that has a positive advantage."""
        return self.num_kept / self.num_completions

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        with written_beside(Path(path)) as beside:
            beside.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "AdvantageReport":
        """Read a report that was saved."""
        fields = json.loads(Path(path).read_text())
        return cls(**{**fields, "subsets": {name: tuple(counts) for name, counts in fields["subsets"].items()}})

    def plot(self, folder: str | Path) -> list[Path]:
        """
        Draw the report. The pictures are made from its fields alone, so those of a loaded report are the same.

        Args:
            folder (`str` or `Path`):
                Folder to write to.

        Returns:
            `list[Path]`: `distributions.png`, the histograms; `calibration.png`, the mean rewards over the mean
            values, where these differ; and `subsets.png`, what is kept of each subset, where there are any.

        Raises:
            `ImportError`: If matplotlib is not installed.
        """
        from . import plots

        folder = Path(folder)
        title = f"{self.num_kept} of {self.num_completions} completions kept ({self.kept_fraction:.1%})"
        figures = {"distributions.png": plots.plot_distributions(self.histograms, title)}
        if len(self.calibration) > 1:
            figures["calibration.png"] = plots.plot_calibration(self.calibration, self.value_r2)
        if self.subsets:
            figures["subsets.png"] = plots.plot_subsets(self.subsets)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=150)
        return [folder / name for name in figures]

    def __rich__(self) -> "Group":
        from rich.console import Group

        from .tables import examples_table, number_format, sentence, table

        number = number_format(self.rewards + self.values)
        counts = {
            "Prompts": self.num_prompts,
            "Completions that repeat an earlier one of the same prompt": self.num_duplicates,
            "Completions that are not scored": self.num_missing,
        }
        head = [
            f"{self.num_kept} of {self.num_completions} completions ({self.kept_fraction:.1%}) have a positive "
            f"advantage; the effective sample size under priority sampling is {self.effective_sample_size:.0f}.",
            " ".join(f"{what}: {count}." for what, count in counts.items() if count is not None),
        ]
        rows = [[name, *map(number, getattr(self, name))] for name in ("rewards", "values", "advantages")]
        parts = [*map(sentence, head), "", table("quantiles", [f"{q:.0%}" for q in QUANTILES], rows), ""]
        if self.value_r2 is None:
            parts.append(sentence("The rewards are all equal: there is nothing for the values to explain."))
        else:
            parts.append(sentence(f"The values explain {self.value_r2:z.1%} of the rewards' variance."))
        if len(self.calibration) > 1:
            rows = [[number(x["value"]), number(x["reward"]), str(x["count"])] for x in self.calibration]
            parts += ["", table("mean value", ["mean reward", "completions"], rows)]
        if self.subsets:
            largest = sorted(self.subsets.items(), key=lambda item: -item[1][1])[:MAX_SUBSETS]
            rows = [[name, str(kept), str(n - kept), f"{kept / n:.1%}"] for name, (kept, n) in largest]
            parts += ["", table("subset", ["kept", "dropped", "share kept"], rows)]
            if others := len(self.subsets) - len(largest):
                parts.append(sentence(f"... and {others} smaller ones."))
        for title, examples in (("highest advantages", self.best), ("lowest advantages", self.worst)):
            if examples:
                parts += ["", examples_table(title, examples, number)]
        return Group(*parts)

    def __str__(self) -> str:
        from .tables import plain

        return plain(self)


def _dialogue(prompt: str | Messages) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {as_text([message])}" for message in prompt)
