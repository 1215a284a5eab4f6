"""The Python of README, docs and docstrings runs as it is shown, on a tiny model."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from conftest import cpu_args
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import trl_lol
from trl_lol import toy
from trl_lol.offline.base_config import _OfflineRewardConfig
from trl_lol.offline.trainer import _OfflineRewardTrainer
from trl_lol.online.base_config import _ActorCriticConfig


ROOT = Path(__file__).parent.parent
BLOCKS = {
    f"{page} {index}": block
    for page in ("README.md", "docs/from_trl_ppo.md")
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL))
    if "# pip install trl==" not in block  # shows what a script was with another version
}
for name in filter(lambda name: name.endswith("Trainer"), trl_lol.__all__):
    for block in re.findall(r"```python\n(.*?)```", inspect.getdoc(getattr(trl_lol, name)), flags=re.DOTALL):
        BLOCKS[name] = block.replace("Qwen/Qwen3-0.6B", "path/or/id/of/a/model")


@pytest.mark.parametrize("name", BLOCKS)
def test_python_blocks_run(name, tmp_path, monkeypatch, tiny_model, tokenizer, pairs):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    # What a reader has on a GPU machine and this test has not: bfloat16, and a model of their own
    for config in (_OfflineRewardConfig, _ActorCriticConfig, GRPOConfig, SFTConfig):
        monkeypatch.setattr(config, "__post_init__", _on_cpu(config.__post_init__))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    reward_model = LlamaForSequenceClassification(LlamaConfig(**tiny_model().config.to_dict() | {"num_labels": 1}))
    reward_model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    block = BLOCKS[name].replace("path/or/id/of/a/model", str(tmp_path / "model"))
    block = block.replace("path/or/id/of/a/reward/model", str(tmp_path / "reward"))
    namespace = {
        "ALoLTrainer": trl_lol.ALoLTrainer,
        "model": str(tmp_path / "model"),
        "args": cpu_args(trl_lol.ALoLConfig, tmp_path),
        "dataset": pairs,
        "eval_dataset": pairs.select(range(8)),
        "judge": toy.heldout_reward,
    }
    exec(compile(block, name, "exec"), namespace)
    trainer = namespace["trainer"]
    assert isinstance(trainer, _OfflineRewardTrainer | GRPOTrainer | SFTTrainer)
    assert len(trainer.train_dataset) > 0
    if isinstance(trainer, GRPOTrainer | SFTTrainer):
        assert trainer.state.global_step == trainer.state.max_steps > 0


def _on_cpu(original):
    def __post_init__(self):
        self.use_cpu, self.bf16, self.report_to = True, False, "none"
        original(self)

    return __post_init__


def test_there_is_something_to_run():
    # An edit that renames the fences would otherwise leave nothing to run
    assert sum(name.startswith("README.md") for name in BLOCKS) >= 5 and "docs/from_trl_ppo.md 1" in BLOCKS
    assert {"PPOTrainer", "APATrainer", "DRPOTrainer"} <= BLOCKS.keys()
