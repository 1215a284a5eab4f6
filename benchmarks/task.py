"""What a benchmark needs to know of a piece of work, and what it makes once and keeps."""

import importlib
import importlib.util
import math
import os
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from datasets import Dataset
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_lol.evaluation import evaluate_policy


# Name: module and class. A task of your own is named by its file: `--tasks my_task.py`
TASKS = {
    "dialogues": "benchmarks.tasks.dialogues:Dialogues",
    "dialogues_long": "benchmarks.tasks.dialogues:LongDialogues",
    "bandit": "benchmarks.tasks.exact:Bandit",
    "two_steps": "benchmarks.tasks.exact:TwoSteps",
    "stories": "benchmarks.tasks.stories:Stories",
    "stories_k2": "benchmarks.tasks.stories:StoriesOf2",
    "stories_k4": "benchmarks.tasks.stories:StoriesOf4",
    "gsm8k": "benchmarks.tasks.smollm2:GSM8K",
    "hh": "benchmarks.tasks.smollm2:HH",
}


GROUP = ("completions", "rewards")  # columns of a logged group; all others belong to its prompt


class Task(ABC):
    """
    A reference policy, logged completions with rewards, prompts to judge by, and two rewards: `reward`, which is
    trained on, and `judge`, which no method sees. A subclass gives them and sets the budget, which is the same for all
    methods.

    Args:
        folder (`Path`):
            Where the reference policy and the logged completions are kept.

    Attributes:
        beta (`float`):
            What a nat of KL costs, in units of the judge's reward: settings are chosen, and methods compared, by
            `score`, reward − beta × KL.
        num_sequences (`int`):
            Completions that an offline method trains on, repetitions counted.
        batch_size (`int`):
            Completions of an optimizer step of an offline method.
        num_completions (`int`):
            Completions that an online method generates; 0 where there is no reward for new ones.
        generation_batch_size (`int`):
            Completions that an online method generates at a time.
        learning_rates (`tuple[float, ...]`):
            Grid of the offline methods without a β.
        betas, beta_learning_rates (`tuple[float, ...]`):
            Grid of the offline methods with a β, which have as many settings in all.
        online_betas, online_learning_rates (`tuple[float, ...]`):
            Grid of the online methods, which have both.
        num_generations (`int`):
            Completions of a held-out prompt that a policy is judged by.
        num_points (`int`):
            Points of a learning curve, the last one being the end.
        max_completion_length (`int`):
            Number of tokens that are generated at most.
        warm_up (`int`):
            Optimizer steps over which an offline method's learning rate rises.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train. If `None`, all weights are trained.
        without (`frozenset[str]`):
            Names of methods that are left out.
    """

    name: ClassVar[str]
    description: ClassVar[str]  # one sentence, which the tables begin with
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    beta: float = 0.05
    num_sequences: int = 3840
    batch_size: int = 32
    num_completions: int = 2048
    generation_batch_size: int = 64
    max_completion_length: int = 48
    num_generations: int = 8
    num_points: int = 4
    learning_rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    betas: tuple[float, ...] = (0.1, 0.5, 2.0)
    beta_learning_rates: tuple[float, ...] = (1e-4, 5e-4)
    online_betas: tuple[float, ...] = (0.05, 0.2, 1.0)
    online_learning_rates: tuple[float, ...] = (3e-5, 1e-4)
    warm_up: int = 10
    peft_config: PeftConfig | None = None
    without: frozenset[str] = frozenset()
    importable_reward: str | None = None  # "module:function" that gives `reward` without this package, for TRL 1.12

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def missing(self) -> str | None:
        """What has to be there for the task and is not, as a sentence."""
        return None

    # ---- What a subclass gives ----

    @abstractmethod
    def make_reference(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The policy that everything starts from. Made once."""

    @abstractmethod
    def make_rows(self, seed: int) -> Dataset:
        """
        Logged groups: `prompt`, `completions`, their training `rewards`, and columns for the rewards. Made once for
        each seed. Online methods get their prompts.
        """

    @abstractmethod
    def prompts(self, split: str) -> Dataset:
        """Held-out `prompt`, and columns for the rewards, of `"validation"` or `"test"`."""

    def reward(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """The reward that is trained on."""
        raise NotImplementedError(f"`{type(self).__name__}` has no reward for new completions.")

    def judge(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """The reward that policies are judged by. Best another one than `reward`."""
        return self.reward(prompts, completions, **columns)

    @property
    def has_reward(self) -> bool:
        """Whether new completions can be rewarded. Online methods need that."""
        return type(self).reward is not Task.reward

    def pairs(self, groups: Dataset, seed: int) -> Dataset:
        """
        `prompt`, `chosen` and `rejected` for the methods that learn from preferences: the best completion of each
        group and the worst. A group of equals has no preference.
        """
        rows = []
        for row in groups:
            order = sorted(range(len(row["rewards"])), key=row["rewards"].__getitem__)
            worst, best = order[0], order[-1]
            if row["rewards"][best] > row["rewards"][worst]:
                chosen, rejected = row["completions"][best], row["completions"][worst]
                others = {name: value for name, value in row.items() if name not in GROUP}
                rows.append({**others, "chosen": chosen, "rejected": rejected})
        return Dataset.from_list(rows)

    def evaluate(
        self, policy: PreTrainedModel, reference: PreTrainedModel, split: str, *, brief: bool = False
    ) -> dict[str, float]:
        """
        Judge a policy.

        Args:
            policy, reference ([`~transformers.PreTrainedModel`]):
                What was trained, and what it started from.
            split (`str`):
                `"validation"` or `"test"`.
            brief (`bool`, *optional*, defaults to `False`):
                Whether it is only a point of a learning curve.

        Returns:
            `dict[str, float]`: At least `reward` (the judge's) and `kl` (nats per completion).
        """
        prompts = self.prompts(split)
        num_generations = 2 if brief else self.num_generations
        columns = {name: list(prompts[name]) for name in prompts.column_names}
        result = evaluate_policy(
            policy,
            self.tokenizer,
            columns.pop("prompt"),
            self.judge,
            columns=columns,
            ref_model=reference,
            num_generations=num_generations,
            max_new_tokens=self.max_completion_length,
            batch_size=256,
        )
        samples = result.pop("samples")
        if not self.has_reward:
            return result
        columns = {name: [v for v in column for _ in range(num_generations)] for name, column in columns.items()}
        texts = ([sample[name] for sample in samples] for name in ("prompt", "completion"))
        rewards = [reward for reward in self.reward(*texts, **columns) if reward is not None]
        return result | {"train_reward": fmean(rewards or [math.nan])}

    def grid(self, has_beta: bool, is_online: bool) -> list[dict[str, float]]:
        """
        The settings that a method is tried with, each with every seed. The validation split chooses among them.

        Args:
            has_beta (`bool`):
                Whether the method has a β.
            is_online (`bool`):
                Whether the method generates.

        Returns:
            `list[dict[str, float]]`: Fields of the config.
        """
        if not (has_beta or is_online):
            return [{"learning_rate": learning_rate} for learning_rate in self.learning_rates]
        if is_online:
            learning_rates, betas = self.online_learning_rates, self.online_betas
        else:
            learning_rates, betas = self.beta_learning_rates, self.betas
        pairs = product(learning_rates, betas)
        return [{"learning_rate": learning_rate, "beta": beta} for learning_rate, beta in pairs]

    # ---- What is kept ----

    @property
    def reference_folder(self) -> Path:
        return self.folder / "reference"

    def prepare(self, seed: int) -> None:
        """Make what is not there yet: the reference policy, and the logged completions of a seed."""
        with made_whole(self.reference_folder) as folder:
            if folder is not None:
                model, tokenizer = self.make_reference()
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        with made_whole(self._rows_folder(seed)) as folder:
            if folder is not None:
                self.make_rows(seed).save_to_disk(folder)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.reference_folder)

    def reference(self) -> PreTrainedModel:
        """A copy of the reference policy."""
        return AutoModelForCausalLM.from_pretrained(self.reference_folder, dtype="auto")

    def rows(self, seed: int) -> Dataset:
        """The logged groups of a seed."""
        return Dataset.load_from_disk(self._rows_folder(seed))

    def _rows_folder(self, seed: int) -> Path:
        return self.folder / f"rows_{seed}"


@contextmanager
def made_whole(folder: Path) -> Iterator[Path | None]:
    """A folder to fill, which is put in its place once that is done; `None` if it is in its place."""
    if folder.exists():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as unfinished:
        yield Path(unfinished)
        with suppress(OSError):  # another process was faster
            os.rename(unfinished, folder)


def load_task(name: str, work_dir: Path) -> Task:
    """
    A task by its name, or the one of a Python file, which is the only subclass of [`Task`] that is written there.

    Args:
        name (`str`):
            Name of one of `TASKS`, or path of a file.
        work_dir (`Path`):
            Folder in which the task keeps what it makes, in a folder of its own.

    Returns:
        [`Task`]: The task.

    Raises:
        `ValueError`: If there is no such task.
    """
    if name in TASKS:
        module_name, _, class_name = TASKS[name].partition(":")
        task_class = getattr(importlib.import_module(module_name), class_name)
        return task_class(work_dir / name)
    path = Path(name)
    if path.suffix != ".py" or not path.exists():
        raise ValueError(f"There is no task {name!r}. Give one of {', '.join(TASKS)}, or the path of a Python file.")
    name = f"benchmark_task_{path.stem}"  # not that of a package
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == name
    ]
    if len(classes) != 1:
        raise ValueError(f"{path} has {len(classes)} subclasses of `Task`, and must have one.")
    return classes[0](work_dir / classes[0].name)
