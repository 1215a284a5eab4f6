"""Real data: SmolLM2-135M-Instruct learns from logged solutions and dialogues, and ranks those that were held out."""

import os
from pathlib import Path

from datasets import DatasetDict
from peft import LoraConfig

from ..methods import METHODS
from .logged import LoggedTask


COMPARED = {"SFT on best", "A-LoL", "CoPG", "DPO"}  # a run takes minutes


class _SmolLM2(LoggedTask):
    """
    A folder of data below `BENCHMARK_DATA`, and the model in `BENCHMARK_MODEL`. A run is short enough for one core:
    LoRA on the upper half of the layers, short sequences, and few of them.
    """

    folder_of_data: str
    seeds = (0, 1, 2)
    beta = 0.01
    dtype = "bfloat16"
    peft_config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(15, 30)),
        task_type="CAUSAL_LM",
    )
    learning_rates = beta_learning_rates = (3e-4,)  # a run takes minutes
    betas = (0.1,)
    warm_up = 2
    num_points = 1
    batch_size = 4
    max_completion_length = 32
    num_generated = 8
    judging_batch_size = 8
    held_out = 0.25
    without = frozenset(METHODS) - COMPARED

    @property
    def missing(self) -> str | None:
        """The folders, where they are not given."""
        paths = {name: os.environ.get(name, "") for name in ("BENCHMARK_DATA", "BENCHMARK_MODEL")}
        absent = [name for name, path in paths.items() if not path or not Path(path).exists()]
        if not absent:
            return None
        return (
            f"`{self.name}` needs {' and '.join(absent)}: the folder that holds {self.folder_of_data}, and that of "
            "SmolLM2-135M-Instruct."
        )

    @property
    def dataset(self) -> str:
        return str(Path(os.environ["BENCHMARK_DATA"]) / self.folder_of_data)

    @property
    def model(self) -> str:
        return os.environ["BENCHMARK_MODEL"]


class GSM8K(_SmolLM2):
    """Four solutions to each question, right or wrong."""

    name = "gsm8k"
    description = (
        "SmolLM2-135M-Instruct with LoRA, 20 grade-school questions with four solutions by other models, rewarded if "
        "right; judged by the share of held-out questions where the solution that its log-ratio ranks first is "
        "right, and by how it orders right and wrong ones."
    )
    folder_of_data = "gsm8k_groups"
    max_length = 160
    num_groups = 20
    num_sequences = 80
    num_judged = 16

    def load(self) -> DatasetDict:
        return super().load().map(lambda row: {"prompt": row["prompt"] + "\n"})


class HH(_SmolLM2):
    """Pairs of answers, scored by a reward model."""

    name = "hh"
    description = (
        "SmolLM2-135M-Instruct with LoRA, 64 dialogues of Anthropic's HH with two answers each and a reward model's "
        "scores of them; judged by the score of the answer that its log-ratio ranks first in held-out dialogues, and "
        "by how it orders the two."
    )
    folder_of_data = "hh_scored"
    max_length = 112
    num_groups = 64
    num_sequences = 128
    num_judged = 40
