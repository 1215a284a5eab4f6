"""What must hold for every offline trainer beside what the scorecard measures: the reference and what is saved."""

import warnings
from functools import partial

import pytest
import torch
from accelerate.utils import is_compiled_module
from conftest import LORA, logged
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_lol import ALoLTrainer, CoPGTrainer


@pytest.fixture(params=["alol", "copg"])
def build(request, build_trainer, scored_pairs, groups):
    """Makes trainers of both kinds."""
    settings = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    if request.param == "copg":
        return partial(build_trainer, CoPGTrainer, train_dataset=groups, **settings)
    return partial(build_trainer, ALoLTrainer, train_dataset=scored_pairs, value_num_train_epochs=2, **settings)


def test_first_log_ratio_is_zero(build, tmp_path, tiny_model):
    changed = tiny_model()
    tiny_model(seed=9).save_pretrained(tmp_path / "elsewhere")
    changed.config._name_or_path = str(tmp_path / "elsewhere")  # what DPOTrainer would load as the reference
    adapted = get_peft_model(tiny_model(), LORA)
    torch.nn.init.normal_(next(p for n, p in adapted.named_parameters() if "lora_B" in n), std=0.1)
    used = build(max_steps=2)
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
        trainer = build(output_dir=tmp_path / case.replace(" ", "-"), max_steps=2, **kwargs)
        trainer.train()
        first, second = logged(trainer, "logratio/mean")
        assert abs(first) <= 1e-6, case
        assert abs(second) > 1e-6, case
    # Control: a reference that is not the initial policy is noticed
    trainer = build(output_dir=tmp_path / "control", max_steps=1, ref_model=tiny_model(seed=9))
    trainer.train()
    assert abs(logged(trainer, "logratio/mean")[0]) > 1e-3


def test_compiled_with_a_reference_of_its_own(build, tmp_path):
    """Both models are wrapped, and train as plain ones do. The compiler itself, which takes long, is left out."""
    plain = build(output_dir=tmp_path / "plain", max_steps=2)
    plain.train()
    with torch.compiler.set_stance("force_eager"):
        compiled = build(torch_compile=True, max_steps=2)  # accelerate's state is shared: `plain` has to be done
        compiled.train()
    assert is_compiled_module(compiled.ref_model) and is_compiled_module(compiled.model_wrapped)
    assert not is_compiled_module(plain.ref_model)
    assert logged(compiled, "loss") == logged(plain, "loss")
    assert logged(compiled, "logratio/mean")[1] != 0


def test_tokens_are_counted_as_trainer_counts_them(build, tmp_path):
    """What is logged is up to the step that has ended, whoever counts. The control counts padding, too."""
    runs = {}
    for counts in ("no", "non_padding", "all"):
        trainer = build(output_dir=tmp_path / counts, include_num_input_tokens_seen=counts, max_steps=3)
        trainer.train()
        runs[counts] = logged(trainer, "num_tokens")
    assert runs["no"] == runs["non_padding"] and 0 < runs["no"][0] < runs["no"][1]
    assert all(a > b for a, b in zip(runs["all"], runs["no"], strict=True))


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_saved_model_loads_without_this_package(build, tmp_path, peft_config, tiny_model):
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = build(model, output_dir=tmp_path / "out", peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    auto_class = AutoPeftModelForCausalLM if peft_config else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = auto_class.from_pretrained(tmp_path / "out").eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")("Hello, my printer", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)
