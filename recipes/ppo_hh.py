# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-lol[bench]"]
# ///
"""
PPO with a reward model on helpful-and-harmless dialogues, beside its reference, more SFT and TRL's RLOO.

Offline, as it is: a small language world made in code, about 5 minutes on 2 CPU cores. Everything lands in
runs/ppo_hh.

    accelerate launch recipes/ppo_hh.py

Your own prompts, from the Hub or a folder, with any model and any sequence-classification reward model; the judge is
another one, which nothing is trained on. Preferences will do: their prompts are used (here HH's from the Hub).

    accelerate launch recipes/ppo_hh.py --config recipes/configs/ppo_hh_lora.yaml \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct
"""

from pathlib import Path

from alol_hh import load_rows
from common import leave, run_online

from trl_lol import PPOConfig, PPOTrainer


TOY_CONFIG = Path(__file__).parent / "configs" / "ppo_hh_toy.yaml"


def main() -> None:
    run_online(PPOTrainer, PPOConfig, "PPO", TOY_CONFIG, load_rows)


if __name__ == "__main__":
    main()
    leave()
