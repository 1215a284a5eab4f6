"""The embedded world of help-desk dialogues: a model learned from scratch, and two rewards with no word in common."""

from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from trl_lol import score_dataset, toy

from ..methods import everything
from ..task import Task


class Dialogues(Task):
    """Answers of four qualities to help-desk questions; the reference learned from all of them."""

    name = "dialogues"
    description = (
        "Help-desk dialogues of the embedded world: four logged answers to each question, good, mediocre, "
        "rude or unsafe; trained on a reward that counts words, judged by one that looks up facts."
    )
    importable_reward = "trl_lol.toy:oracle_reward"
    beta = 0.02
    num_sequences, batch_size = 1600, 16
    num_completions = 1024
    learning_rates = (1e-4, 3e-4, 5e-4, 1e-3, 3e-3, 5e-3)
    betas = (0.3, 1.0)
    beta_learning_rates = (1e-4, 5e-4, 2e-3)
    online_betas = (0.1, 0.3, 1.0)
    online_learning_rates = (3e-4,)
    num_prompts = 600
    hidden_size = 128
    reference_steps = 400
    max_completion_length = 64
    num_generations = 2

    @cached_property
    def _dialogues(self) -> Dataset:
        return toy.make_dialogues(self.num_prompts + 120, seed=0)

    def make_reference(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        train = self._dialogues.take(self.num_prompts)
        tokenizer = toy.make_tokenizer(train)
        args = SFTConfig(
            str(self.folder / "sft"),
            completion_only_loss=True,
            per_device_train_batch_size=16,
            max_steps=self.reference_steps,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
        )
        model = toy.make_model(tokenizer, seed=0, hidden_size=self.hidden_size)
        rows = everything(self, train, 0)
        trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        return trainer.model, tokenizer

    def make_rows(self, seed: int) -> Dataset:
        held_out = [prompt for split in ("validation", "test") for prompt in self.prompts(split)["prompt"]]
        rows = toy.make_dialogues(self.num_prompts + 120, seed=1000 + seed).select_columns(["prompt", "completions"])
        rows = rows.filter(lambda row: row["prompt"] not in held_out).take(self.num_prompts)
        return score_dataset(rows, toy.oracle_reward)

    def prompts(self, split: str) -> Dataset:
        start = self.num_prompts + {"validation": 0, "test": 60}[split]
        return self._dialogues.select(range(start, start + 60)).select_columns(["prompt"])

    def reward(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        return toy.oracle_reward(prompts, completions)

    def judge(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        return toy.heldout_reward(prompts, completions)


class LongDialogues(Dialogues):
    """The same for three times as many completions, where the KL costs least: does a policy collapse?"""

    name = "dialogues_long"
    num_completions = 3 * Dialogues.num_completions
    num_points = 8
    online_betas = (0.1,)
