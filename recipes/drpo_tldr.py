# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-lol[bench]"]
# ///
"""
DR-PO, which restarts from prefixes of reference completions, beside its reference policy, SFT on the same completions
and PPO.

Offline, as it is: a small language world made in code, whose chosen answers are the references, about 6 minutes on 2
CPU cores. Everything lands in runs/drpo_tldr.

    accelerate launch recipes/drpo_tldr.py

TL;DR from the Hub with a reward model and LoRA, or data of yours, with any model and any sequence-classification
reward model; the judge is another one, which nothing is trained on. The references are in a column `completion`,
`chosen` or `reference` beside `prompt`, as text or as messages; preferences without `prompt` will do, too.

    accelerate launch recipes/drpo_tldr.py --config recipes/configs/drpo_tldr_lora.yaml
    accelerate launch recipes/drpo_tldr.py --config recipes/configs/drpo_tldr_lora.yaml \\
        --dataset_name path/to/data --model_name_or_path path/to/model --reward_model path/to/reward/model \\
        --judge_model path/to/another/reward/model
"""

from dataclasses import dataclass, field
from pathlib import Path

import alol_hh
from common import OnlineArguments, leave, run_online
from datasets import DatasetDict
from trl import extract_prompt

from trl_lol import DRPOConfig, DRPOTrainer


TOY_CONFIG = Path(__file__).parent / "configs" / "drpo_tldr_toy.yaml"


@dataclass
class RecipeArguments(OnlineArguments):
    """
    Arguments of the recipe, beside those of [`DRPOConfig`] and [`~trl.ModelConfig`].

    Args:
        compare (`list[str]`, *optional*, defaults to `["sft", "ppo"]`):
            Methods to train with the same number of completions, for comparison: `"sft"` on the references, `"ppo"`,
            which is the same without resets, and `"rloo"`, TRL's; or `"none"`.
    """

    compare: list[str] = field(
        default_factory=lambda: ["sft", "ppo"], metadata={"help": "Methods to compare with: 'sft', 'ppo', 'rloo'."}
    )


def load_rows(recipe: RecipeArguments) -> DatasetDict:
    """Rows from the Hub or a folder, with their prompts in a column of their own."""
    rows = alol_hh.load_rows(recipe)
    return rows if "prompt" in rows["train"].column_names else rows.map(extract_prompt)


def main() -> None:
    run_online(DRPOTrainer, DRPOConfig, "DR-PO", TOY_CONFIG, load_rows, RecipeArguments)


if __name__ == "__main__":
    main()
    leave()
