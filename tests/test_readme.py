"""The README's Python runs as it is shown, on a tiny model."""

import re
from pathlib import Path

import pytest
from conftest import cpu_args
from transformers import LlamaConfig, LlamaForSequenceClassification

import trl_lol
from trl_lol import toy
from trl_lol.offline.base_config import _OfflineRewardConfig
from trl_lol.offline.trainer import _OfflineRewardTrainer


README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_blocks_run(index, tmp_path, monkeypatch, tiny_model, tokenizer, pairs):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    # What a reader has on a GPU machine and this test has not: bfloat16, and a model of their own
    monkeypatch.setattr(_OfflineRewardConfig, "__post_init__", _on_cpu(_OfflineRewardConfig.__post_init__))
    monkeypatch.chdir(tmp_path)
    reward_model = LlamaForSequenceClassification(LlamaConfig(**tiny_model().config.to_dict() | {"num_labels": 1}))
    reward_model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    block = BLOCKS[index].replace("path/or/id/of/a/model", str(tmp_path / "model"))
    block = block.replace("path/or/id/of/a/reward/model", str(tmp_path / "reward"))
    namespace = {
        "ALoLTrainer": trl_lol.ALoLTrainer,
        "model": str(tmp_path / "model"),
        "args": cpu_args(trl_lol.ALoLConfig, tmp_path),
        "dataset": pairs,
        "eval_dataset": pairs.select(range(8)),
        "judge": toy.heldout_reward,
    }
    exec(compile(block, f"README block {index}", "exec"), namespace)
    assert isinstance(namespace["trainer"], _OfflineRewardTrainer)
    assert len(namespace["trainer"].train_dataset) > 0


def _on_cpu(original):
    def __post_init__(self):
        self.use_cpu, self.bf16, self.report_to = True, False, "none"
        original(self)

    return __post_init__


def test_there_is_something_to_run():
    assert len(BLOCKS) >= 4  # an edit that renames the fences would otherwise leave nothing to run
