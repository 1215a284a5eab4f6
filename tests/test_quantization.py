"""
Quantised models: as reward models, and as the base that a LoRA is trained on (QLoRA).

What a model computes with 4-bit weights is what it computes with the numbers that they stand for: those are put into a
model without quantisation, and everything is compared with that.
"""

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SGD, StopAt, cpu_args, distance, logged, run, weights
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from trl_lol import ALoLTrainer, CoPGTrainer, estimate_advantages, toy
from trl_lol.rewards import RewardModel


bnb = pytest.importorskip("bitsandbytes")

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
INT8 = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")
EXACT = {"rel": 0, "abs": 1e-5}


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    With AVX512-BF16, bitsandbytes packs weights anew at the first forward in evaluation mode, for a kernel that
    reckons in bfloat16 and has no gradient. Elsewhere, GPUs included, it does not.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    toy.make_model(tokenizer, hidden_size=64, num_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    config = toy.make_model(tokenizer, hidden_size=64, num_layers=2).config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conversations(dialogues: Dataset) -> tuple[list, list]:
    """60 prompts of one and of three turns, with an answer each."""
    return dialogues["prompt"][:], [completions[0] for completions in dialogues["completions"]]


@torch.no_grad()
def dequantised(quantised: PreTrainedModel, plain: PreTrainedModel) -> PreTrainedModel:
    """The plain model with the numbers that the 4-bit weights of the other stand for."""
    count = 0
    for name, module in quantised.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            numbers = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name.removesuffix(".base_layer")).weight.copy_(numbers)
            count += 1
    assert count == 2 * 7  # all but the embeddings and the head
    return plain


# --- reward models ---


def spread(scores: list[float], others: list[float]) -> float:
    """Root mean square of the differences, in standard deviations of the scores. √2 for scores that have nothing to do
    with each other."""
    differences = [a - b for a, b in zip(scores, others, strict=True)]
    return statistics.fmean(d * d for d in differences) ** 0.5 / statistics.pstdev(others)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_scores_are_those_of_the_numbers_that_4_bits_stand_for(reward_folder, conversations, batch_size):
    reward = RewardModel(reward_folder, batch_size=batch_size, quantization_config=NF4)
    plain = LlamaForSequenceClassification.from_pretrained(reward_folder)
    unquantised = RewardModel(copy.deepcopy(plain))(*conversations)
    expected = RewardModel(dequantised(reward.model, plain))(*conversations)
    assert reward(*conversations) == pytest.approx(expected, **EXACT)
    assert min(abs(a - b) for a, b in zip(unquantised, expected, strict=True)) > 1e-5


@pytest.mark.parametrize(("config", "bound"), [(NF4, 0.5), (INT8, 0.06)], ids=["4 bits", "8 bits"])
def test_quantised_scores_are_near_the_others(reward_folder, conversations, config, bound):
    """
    NF4 rounds normal weights by 0.092 standard deviations. If the errors of the 14 matrices added up like independent
    ones, the scores would be off by 0.092 · √14 = 0.34 of theirs; attention adds to it, 0.34 to 0.47 on four seeds. 8
    bits round weights, and activations as well, by 0.006: 0.006 · √28 = 0.03, and 0.041 to 0.049 on four seeds.
    """
    unquantised = RewardModel(reward_folder)(*conversations)
    reward = RewardModel(reward_folder, quantization_config=config)
    scores = reward(*conversations)
    assert 1e-3 < spread(scores, unquantised) < bound
    assert spread(scores, unquantised[1:] + unquantised[:1]) > 1
    one_by_one = RewardModel(reward.model, batch_size=1)(*conversations)
    order = [*range(1, len(scores), 2), *range(0, len(scores), 2)]
    prompts, completions = ([column[i] for i in order] for column in conversations)
    assert scores == pytest.approx(one_by_one, **EXACT)
    assert reward(prompts, completions) == pytest.approx([scores[i] for i in order], **EXACT)


def test_adapters_on_a_quantised_base(tmp_path, policy_folder, tokenizer, conversations):
    """As trained on it, and loaded from a folder. The adapter, which has a head of its own, makes a difference."""
    base = LlamaForSequenceClassification.from_pretrained(policy_folder, num_labels=1, quantization_config=NF4)
    plain = LlamaForSequenceClassification.from_pretrained(policy_folder, num_labels=1)
    plain.score.weight.data.copy_(base.score.weight.data)
    alone = RewardModel(dequantised(base, plain), tokenizer)(*conversations)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(base, lora)
    torch.manual_seed(1)
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in adapter.values():
        parameter.data += torch.randn_like(parameter) / 8
    other = get_peft_model(plain, lora)
    for name, parameter in adapter.items():
        other.get_parameter(name).data.copy_(parameter.data)
    expected = RewardModel(other, tokenizer)(*conversations)
    assert spread(expected, alone) > 0.1
    assert RewardModel(model, tokenizer)(*conversations) == pytest.approx(expected, **EXACT)
    model.save_pretrained(tmp_path)
    reward = RewardModel(tmp_path, quantization_config=NF4)  # with the tokenizer of its base model
    assert reward(*conversations) == pytest.approx(expected, **EXACT)


def test_cache_key_of_quantised_models(reward_folder, conversations):
    """The same whoever loads it and whenever it is asked for; another one for other bits."""
    reward, again = (RewardModel(reward_folder, quantization_config=NF4) for _ in range(2))
    key = reward.cache_key
    reward(*conversations)
    assert key == reward.cache_key == again.cache_key
    for kwargs in ({}, {"quantization_config": INT8}):
        assert RewardModel(reward_folder, **kwargs).cache_key != key


# --- QLoRA ---


@pytest.fixture
def build_qlora(
    tmp_path: Path, policy_folder: Path, scored_pairs: Dataset, short_groups: Dataset
) -> Callable[..., Any]:
    """Makes a trainer of a LoRA on the 4-bit policy from its folder; without quantisation, if a model is given."""

    def build(
        trainer_class: type, model: PreTrainedModel | None = None, output_dir: str = "out", **kwargs: Any
    ) -> Any:
        rows = {ALoLTrainer: scored_pairs.take(40), CoPGTrainer: short_groups}[trainer_class]
        if trainer_class is ALoLTrainer:
            kwargs = {"value_num_train_epochs": 3, "value_learning_rate": 1e-2, **kwargs}
        args = cpu_args(trainer_class._config_class, tmp_path / output_dir, **kwargs)
        trainer = trainer_class(
            str(policy_folder) if model is None else model,
            args=args,
            train_dataset=rows,
            eval_dataset=rows.take(12),
            processing_class=AutoTokenizer.from_pretrained(policy_folder),
            quantization_config=NF4 if model is None else None,
            peft_config=LORA,
        )
        assert any(isinstance(m, bnb.nn.Linear4bit) for m in trainer.model.modules()) == (model is None)
        return trainer

    return build


def keep_in_float32(trainer: Any) -> Any:
    """TRL puts the adapter of a quantised model into bfloat16."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.bfloat16
            parameter.data = parameter.data.float()
    return trainer


def frozen(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}


BOTH = pytest.mark.parametrize("trainer_class", [ALoLTrainer, CoPGTrainer])


@BOTH
def test_qlora_trains_the_adapter_alone(build_qlora, tmp_path, trainer_class):
    """
    The adapter starts as nothing, so that the first log-ratio is 0 exactly. Then it goes the right way: of A-LoL, the
    completions that are kept get more likely; of CoPG, the loss on rows that it is trained on goes down. Saved, loaded
    and put on the 4-bit base again, the adapter gives the same logits; on the base of 32 bits, others.
    """
    settings = {"max_steps": 8, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    trainer = build_qlora(trainer_class, per_device_train_batch_size=8, **settings)
    before, adapter, loss = frozen(trainer), weights(trainer), trainer.evaluate()["eval_loss"]
    trainer.train()
    log_ratios = logged(trainer, "logratio/mean")
    assert log_ratios[0] == 0.0
    if trainer_class is ALoLTrainer:
        assert log_ratios[-1] > 0.1
    else:
        assert trainer.evaluate()["eval_loss"] < 0.5 * loss
    assert all(torch.equal(x, before[name]) for name, x in frozen(trainer).items()) and len(before) > 14
    assert distance(adapter, weights(trainer)) > 1e-3 and all("lora" in name for name in adapter)

    trainer.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("model*.safetensors"))
    again, other = (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", **kwargs).eval()
        for kwargs in ({"quantization_config": NF4}, {})
    )
    keep_in_float32(trainer)
    ids = torch.tensor([[300, 400, 500, 600]])
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=ids).logits
        assert (again(input_ids=ids).logits - logits).abs().max() <= 1e-5
        assert (other(input_ids=ids).logits - logits).abs().max() > 1e-2


@BOTH
def test_qlora_is_lora_on_the_numbers_that_4_bits_stand_for(build_qlora, policy_folder, trainer_class):
    """
    The same advantages, from a value head fitted on the same hidden states, and the same losses and log-ratios. The
    control: the 32-bit model has others.
    """
    settings = {**SGD}
    quantised = keep_in_float32(build_qlora(trainer_class, **settings))
    plain = AutoModelForCausalLM.from_pretrained(policy_folder)
    unquantised = build_qlora(trainer_class, copy.deepcopy(plain), "plain", **settings)
    twin = build_qlora(trainer_class, dequantised(quantised.model.get_base_model(), plain), "twin", **settings)
    for name, parameter in weights(quantised).items():
        twin.model.get_parameter(name).data.copy_(parameter)
    if trainer_class is ALoLTrainer:
        expected = flat(twin.train_dataset["advantages"])
        assert flat(quantised.train_dataset["advantages"]) == pytest.approx(expected, **EXACT)
        assert quantised.train_dataset["prompt_ids"][:] == twin.train_dataset["prompt_ids"][:]
        assert flat(unquantised.train_dataset["advantages"]) != pytest.approx(expected, **EXACT)
    (losses, adapter), (expected, other_adapter), (others, _) = map(run, (quantised, twin, unquantised))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses != pytest.approx(others, rel=1e-3)
    assert distance(adapter, other_adapter) <= 1e-5


def flat(rows: Any) -> list[float]:
    return [x for row in rows for x in row]


@BOTH
def test_qlora_with_a_cached_reference_equals_a_live_one(build_qlora, trainer_class):
    settings = {**SGD, "per_device_train_batch_size": 8}
    live = build_qlora(trainer_class, output_dir="live", **settings)
    cached = build_qlora(trainer_class, output_dir="cached", precompute_ref_log_probs=True, **settings)
    assert "ref_logps" in cached.train_dataset.column_names and live.ref_model is cached.ref_model is None
    (live_losses, live_weights), (cached_losses, cached_weights) = (run(keep_in_float32(x)) for x in (live, cached))
    assert live_losses == pytest.approx(cached_losses, rel=1e-5)
    assert distance(live_weights, cached_weights) <= 1e-6
    # Control: with another reference for the first completion of each row the losses differ
    cached.train_dataset = cached.train_dataset.map(
        lambda row: {"ref_logps": [[x - 0.05 for x in row["ref_logps"][0]], *row["ref_logps"][1:]]}
    )
    assert run(cached)[0] != pytest.approx(live_losses, rel=1e-3)


@BOTH
def test_resumed_qlora_equals_an_uninterrupted_one(build_qlora, trainer_class):
    settings = {"max_steps": 6, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    losses, expected = run(build_qlora(trainer_class, output_dir="whole", **settings))
    stopped = build_qlora(trainer_class, **settings)
    stopped.add_callback(StopAt(3))
    halfway = run(stopped)[1]
    resumed, final = run(build_qlora(trainer_class, **settings), resume_from_checkpoint=True)
    assert resumed == losses and distance(final, expected) == 0
    assert distance(halfway, expected) > 1e-3


def test_estimates_of_a_quantised_policy(policy_folder, scored_pairs):
    """`estimate_advantages` takes the model as it is: values and advantages of the numbers that 4 bits stand for."""
    quantised = AutoModelForCausalLM.from_pretrained(policy_folder, quantization_config=NF4)
    plain = AutoModelForCausalLM.from_pretrained(policy_folder)
    rows, settings = scored_pairs.take(40), {"num_train_epochs": 3, "learning_rate": 1e-2}
    others = estimate_advantages(rows, plain, **settings)["value"][:]
    expected = estimate_advantages(rows, dequantised(quantised, plain), **settings)["value"][:]
    values = estimate_advantages(rows, quantised, **settings)["value"][:]
    assert values == pytest.approx(expected, **EXACT) and values != pytest.approx(others, **EXACT)
