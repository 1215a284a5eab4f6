import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from .._trl import get_dataset_column_names
from .drpo_config import DRPOConfig
from .ppo_trainer import PPOTrainer
from .roll_in import check_references, find_reference_column, tokenize_reference


class DRPOTrainer(PPOTrainer):
    """
    Trainer for Dataset Reset Policy Optimization (DR-PO), as introduced in [Dataset Reset Policy Optimization for
    RLHF](https://huggingface.co/papers/2404.08495): PPO whose rollouts restart from prefixes of reference completions,
    and so explore from where good completions lead.

    Such a prefix, the roll-in, counts towards `max_completion_length` and is part of what the reward functions see.
    The policy is trained on the tokens that it generates. The completions of one prompt in a batch share their
    roll-in. Evaluation begins at the prompt.

    Example:

    ```python
    from datasets import Dataset
    from trl_lol import DRPOConfig, DRPOTrainer


    def reward_len(completions, **kwargs):
        return [-abs(20 - len(completion)) / 20 for completion in completions]


    trainer = DRPOTrainer(
        "Qwen/Qwen3-0.6B",
        reward_funcs=reward_len,
        args=DRPOConfig("out", per_device_train_batch_size=2),
        train_dataset=Dataset.from_dict(
            {"prompt": ["The sky is", "The sun is"], "reference": [" blue on some days.", " a star, quite near."]}
        ),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as for [`PPOTrainer`].
        reward_funcs (`Callable`, [`~transformers.PreTrainedModel`], `str` or a list of these):
            Reward functions or reward models, as for [`PPOTrainer`]. They get whole completions with the roll-in, also
            as `completion_ids`, and the references, unless their column is `completion`, which TRL keeps back.
        args ([`DRPOConfig`], *optional*):
            Configuration of the trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with a column `"prompt"`, of strings or of message lists, and one of reference completions (see
            `reference_column` of [`DRPOConfig`]), of the same kind; for prompts of messages also of strings.
        eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers, quantization_config, \
peft_config:
            As for [`PPOTrainer`].
        tools, rollout_func, environment_factory:
            Not supported.

    Raises:
        `ValueError`: If there is no column of references, or if what it holds are no completions of the prompts.
    """

    _config_class = DRPOConfig
    _name = "DR-PO"
    _tag_names = ["trl", "trl-lol", "dr-po"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "Dataset Reset Policy Optimization for RLHF",
        "id": "2404.08495",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{chang2024dataset,
                title        = {{Dataset Reset Policy Optimization for RLHF}},
                author       = {Jonathan D. Chang and Wenhao Zhan and Owen Oertell and Kiant{\\'e} Brantley and Dipendra Misra and Jason D. Lee and Wen Sun},
                year         = 2024,
                eprint       = {arXiv:2404.08495},
            }"""),  # noqa: E501
    }

    _reference_column: str | None = None
    _rows: Sequence[dict[str, Any]] = ()  # of the generation batch
    _roll_ins: Sequence[list[int] | None] = ()  # of each completion, None where it is not reset
    _generation = (-1, 0)  # optimizer step, and the number of generation batches within it

    def _read_columns(self, dataset: Dataset | IterableDataset, args: DRPOConfig) -> None:
        if args.reset_prob > 0:
            columns = get_dataset_column_names(dataset)
            self._reference_column = find_reference_column(columns, args.reference_column)
            check_references(dataset, self._reference_column)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._reference_column not in (None, *self._signature_columns):
            self._signature_columns.append(self._reference_column)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._generation = (-1, 0)  # of an earlier call
        return super().train(*args, **kwargs)

    # ---- Rollouts ----

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        self._roll_ins = self._draw_roll_ins(prompt_ids)
        roll_ins = [roll_in or [] for roll_in in self._roll_ins]
        starts = [prompt + roll_in for prompt, roll_in in zip(prompt_ids, roll_ins, strict=True)]
        fields = {  # of each token, as `token_type_ids`; there are no images
            name: [row + [0] * len(roll_in) for row, roll_in in zip(rows, roll_ins, strict=True)]
            for name, rows in multimodal_fields.items()
        }
        completion_ids, logps = super()._generate_single_turn(starts, images, fields, *args, **kwargs)
        if self.args.log_completions:
            self._log_completion_extra("roll_in", self._tokenizer.batch_decode(roll_ins, skip_special_tokens=True))
        whole = [
            (roll_in + ids)[: self.max_completion_length]
            for roll_in, ids in zip(roll_ins, completion_ids, strict=True)
        ]
        if logps is not None:  # nobody has sampled the roll-in, which TRL knows as None
            logps = [
                ([None] * len(roll_in) + own)[: self.max_completion_length]
                for roll_in, own in zip(roll_ins, logps, strict=True)
            ]
        return whole, logps

    def _draw_roll_ins(self, prompt_ids: list[list[int]]) -> list[list[int] | None]:
        """What each completion restarts from. It is a function of the seed and of the group's place in the run."""
        if not self.model.training or self._reference_column is None:
            return [None] * len(prompt_ids)
        step, count = self._generation
        self._generation = (self.state.global_step, count + 1 if step == self.state.global_step else 0)
        drawn: dict[int, list[int] | None] = {}  # by group, of which parts may be on other processes
        roll_ins = []
        for i, (row, ids) in enumerate(zip(self._rows, prompt_ids, strict=True)):
            group = (self.accelerator.process_index * len(prompt_ids) + i) // self.num_generations
            if group not in drawn:
                drawn[group] = self._draw_roll_in(row, ids, group)
            roll_ins.append(drawn[group])
        return roll_ins

    def _draw_roll_in(self, row: dict[str, Any], prompt_ids: list[int], group: int) -> list[int] | None:
        args = self.args
        rng = np.random.default_rng((args.seed, *self._generation, group))
        if rng.random() >= args.reset_prob:
            return None
        reference = tokenize_reference(
            row["prompt"],
            row[self._reference_column],
            prompt_ids,
            self.processing_class,
            self.eos_token_ids,
            chat_template=self.chat_template,
            **self.chat_template_kwargs,
        )
        num_tokens = min(len(reference), self.max_completion_length)
        if num_tokens <= args.min_roll_in:
            return None
        return reference[: rng.integers(args.min_roll_in, num_tokens)]

    def _masks(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        mask = batch["completion_mask"]
        roll_in_lengths = torch.tensor([len(roll_in or []) for roll_in in self._roll_ins], device=mask.device)
        generated = mask * (torch.arange(mask.size(1), device=mask.device) >= roll_in_lengths.unsqueeze(1))
        return generated, mask if self.args.train_on_roll_in_values else generated

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training:
            self._log_resets([len(ids) for ids in completion_ids_list])
        return rewards_per_func

    def _log_resets(self, lengths: list[int]) -> None:
        """Means over the completions of all processes, those that begin at the prompt apart: the others flatter."""
        rows = [
            (roll_in is not None, len(roll_in or []), length)
            for roll_in, length in zip(self._roll_ins, lengths, strict=True)
        ]
        everyone = self._gather_rows(torch.tensor(rows, dtype=torch.float32, device=self.accelerator.device))
        is_reset, roll_in_length, length = everyone.unbind(dim=1)
        rewards = self._weighted_rewards()
        self._log("reset_fraction", is_reset.mean())
        starts_at_prompt = roll_in_length == 0
        for name, values, selected in (
            ("roll_in/mean_length", roll_in_length, is_reset.bool()),
            ("reward/no_reset", rewards, starts_at_prompt),
            ("reward/reset", rewards, ~starts_at_prompt),
            ("completions/mean_length/no_reset", length, starts_at_prompt),
            ("completions/mean_length/reset", length, ~starts_at_prompt),
        ):
            if len(found := values[selected & ~values.isnan()]):
                self._log(name, found.mean())
