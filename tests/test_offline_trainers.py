"""What must hold for every offline trainer: equalities, resume, the reference and what is saved."""

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import LORA, SGD, StopAt, distance, logged, run, weights
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_lol import ALoLTrainer, CoPGTrainer


@pytest.fixture(params=["alol", "alol uniform", "copg"])
def offline(request, build_trainer, scored_pairs, short_pairs, groups, short_groups):
    """A trainer's `build`, rows of short completions and small rewards, and a batch size that makes a few steps of an
    epoch."""
    settings = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    if request.param == "copg":
        build = partial(build_trainer, CoPGTrainer, train_dataset=groups, **settings)
        return SimpleNamespace(build=build, short_rows=short_groups, batch_size=8)
    settings |= {"value_num_train_epochs": 2, "sampling": "uniform" if "uniform" in request.param else "priority"}
    build = partial(build_trainer, ALoLTrainer, train_dataset=scored_pairs, **settings)
    return SimpleNamespace(build=build, short_rows=short_pairs, batch_size=16)


BOTH = pytest.mark.parametrize("offline", ["alol", "copg"], indirect=True)  # where sampling plays no part


@BOTH
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_cached_reference_equals_live_reference(offline, tmp_path, peft_config):
    kwargs = {"train_dataset": offline.short_rows, "peft_config": peft_config, "per_device_train_batch_size": 8, **SGD}
    live = offline.build(output_dir=tmp_path / "live", **kwargs)
    cached = offline.build(output_dir=tmp_path / "cached", precompute_ref_log_probs=True, **kwargs)
    assert cached.ref_model is None and "ref_logps" in cached.train_dataset.column_names
    (live_losses, live_weights), (cached_losses, cached_weights) = run(live), run(cached)
    assert live_losses == pytest.approx(cached_losses, rel=0, abs=1e-6)
    assert distance(live_weights, cached_weights) <= 1e-6
    # Control: with another reference for the first completion of each row the losses differ
    cached.train_dataset = cached.train_dataset.map(
        lambda row: {"ref_logps": [[x - 0.05 for x in row["ref_logps"][0]], *row["ref_logps"][1:]]}
    )
    assert run(cached)[0] != pytest.approx(live_losses, rel=0, abs=1e-4)


@BOTH
def test_accumulation_equals_one_batch(offline, tmp_path):
    build = partial(offline.build, train_dataset=offline.short_rows, **SGD)
    one = build(output_dir=tmp_path / "a", per_device_train_batch_size=8)
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    two = build(output_dir=tmp_path / "b", **accumulated)
    half = build(output_dir=tmp_path / "c", per_device_train_batch_size=4)
    one, two, half = run(one), run(two), run(half)
    assert one[0] == pytest.approx(two[0], rel=0, abs=1e-6)
    assert distance(one[1], two[1]) <= 5e-6
    assert one[0] != pytest.approx(half[0], rel=0, abs=1e-4) and distance(one[1], half[1]) > 1e-4  # Control


@BOTH
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_same_seed_gives_the_same_run_and_checkpointing_changes_nothing(offline, tmp_path, peft_config):
    build = partial(offline.build, peft_config=peft_config)
    first = run(build(output_dir=tmp_path / "a"))
    again = run(build(output_dir=tmp_path / "b"))
    checkpointed = run(build(output_dir=tmp_path / "c", gradient_checkpointing=True))
    other_seed = run(build(output_dir=tmp_path / "d", seed=1))
    assert first[0] == again[0] == checkpointed[0] and first[0] != other_seed[0]
    assert distance(first[1], again[1]) == 0 and distance(first[1], checkpointed[1]) == 0


@pytest.mark.parametrize("stop", ["middle of epoch 1", "end of epoch 1", "middle of epoch 2"])
def test_resume_equals_uninterrupted(offline, tmp_path, stop):
    kwargs = {
        "num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": offline.batch_size,
        "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear", "precompute_ref_log_probs": True,
        "learning_rate": 1e-2,
    }  # fmt: skip
    whole = offline.build(output_dir=tmp_path / "whole", **{**kwargs, "save_strategy": "no"})
    whole.train()
    steps = whole.state.global_step // 2
    step = {"middle of epoch 1": steps // 2, "end of epoch 1": steps, "middle of epoch 2": steps + steps // 2}[stop]
    assert steps >= 4

    interrupted = offline.build(output_dir=tmp_path / "run", **{**kwargs, "save_steps": step})
    interrupted.add_callback(StopAt(step))
    interrupted.train()
    assert interrupted.state.global_step == step
    checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
    resumed = offline.build(output_dir=tmp_path / "run", **{**kwargs, "save_steps": step})
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == whole.state.global_step
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert distance(weights(resumed), weights(whole)) == 0
    if stop != "end of epoch 1":  # Control: where the sampler stood is part of the state
        ignoring = offline.build(output_dir=tmp_path / "run", ignore_data_skip=True, **{**kwargs, "save_steps": step})
        ignoring.train(resume_from_checkpoint=checkpoint)
        assert distance(weights(ignoring), weights(whole)) > 1e-3


@BOTH
def test_first_log_ratio_is_zero(offline, tmp_path, tiny_model):
    changed = tiny_model()
    tiny_model(seed=9).save_pretrained(tmp_path / "elsewhere")
    changed.config._name_or_path = str(tmp_path / "elsewhere")  # what DPOTrainer would load as the reference
    adapted = get_peft_model(tiny_model(), LORA)
    torch.nn.init.normal_(next(p for n, p in adapted.named_parameters() if "lora_B" in n), std=0.1)
    used = offline.build(max_steps=2)
    used.train()
    cases = {
        "built from a config": {},
        "cached": {"precompute_ref_log_probs": True},
        "changed in memory": {"model": changed},
        "lora": {"peft_config": LORA},
        "lora, cached": {"peft_config": LORA, "precompute_ref_log_probs": True},
        "a PEFT model that was trained before": {"model": adapted},
        "a policy that another trainer has patched": {"model": used.model},
    }
    for case, kwargs in cases.items():
        trainer = offline.build(output_dir=tmp_path / case.replace(" ", "-"), max_steps=2, **kwargs)
        trainer.train()
        first, second = logged(trainer, "logratio/mean")
        assert abs(first) <= 1e-6, case
        assert abs(second) > 1e-6, case
    # Control: a reference that is not the initial policy is noticed
    trainer = offline.build(output_dir=tmp_path / "control", max_steps=1, ref_model=tiny_model(seed=9))
    trainer.train()
    assert abs(logged(trainer, "logratio/mean")[0]) > 1e-3


@BOTH
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_saved_model_loads_without_this_package(offline, tmp_path, peft_config, tiny_model):
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = offline.build(model, output_dir=tmp_path / "out", peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    auto_class = AutoPeftModelForCausalLM if peft_config else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = auto_class.from_pretrained(tmp_path / "out").eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")("Hello, my printer", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)
