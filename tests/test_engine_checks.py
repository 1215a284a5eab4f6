"""What is said of engines that will not do. That the others train is in tests/distributed."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trl_lol import engines
from trl_lol._reference import copy_as_reference


def trainer(model: nn.Module, fsdp_version: int | None) -> SimpleNamespace:
    plugin = None if fsdp_version is None else SimpleNamespace(fsdp_version=fsdp_version)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    return SimpleNamespace(model=model, accelerator=accelerator, is_fsdp_enabled=plugin is not None)


def test_weights_that_one_process_has():
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: false"):
        engines.check_engine(trainer(empty, 2))
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        engines.check_engine(trainer(nn.Linear(2, 2), 1))
    engines.check_engine(trainer(nn.Linear(2, 2), 2))
    engines.check_engine(trainer(empty, None))


def test_a_sharded_policy_is_not_copied(tiny_model):
    model = tiny_model()
    assert not engines.is_sharded(model)
    model.lm_head.weight.ds_id = 0  # as DeepSpeed marks what it has sharded
    assert engines.is_sharded(model)
    with pytest.raises(ValueError, match="name or path"):
        copy_as_reference(model, "train a LoRA")


def test_fsdp_is_known_before_the_trainer_is_made(monkeypatch):
    args = SimpleNamespace(fsdp=None)
    assert not engines.uses_fsdp(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert engines.uses_fsdp(args)


def test_models_beside_the_trained_one_are_loaded_whole():
    """Even if that is an error, ZeRO-3 comes back: the trainer's own models are loaded in shards again."""
    integration = engines.deepspeed_integration
    config = type("Config", (), {"is_zero3": lambda self: True})()
    integration.set_hf_deepspeed_config(config)
    try:
        assert integration.is_deepspeed_zero3_enabled()
        with pytest.raises(KeyError), engines.loading_whole():
            assert not integration.is_deepspeed_zero3_enabled()
            raise KeyError
        assert integration.is_deepspeed_zero3_enabled()
    finally:
        integration.unset_hf_deepspeed_config()
    with engines.loading_whole():
        assert not integration.is_deepspeed_zero3_enabled()
    assert not integration.is_deepspeed_zero3_enabled()
