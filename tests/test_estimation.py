"""Advantages without a trainer: the same that A-LoL trains on, for every row format."""

import copy
import math

import pytest
import torch
from conftest import LORA
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model

from trl_lol import ALoLTrainer, estimate_advantages, score_dataset, toy


SETTINGS = {"num_train_epochs": 2, "max_prompts": 20}
REWARDS = [[1.0, 0.0], [0.5, None], [None, None], [2.0, 1.0]]


@pytest.fixture
def groups(dialogues):
    """4 prompts with two completions each, of which some are not scored."""
    rows = dialogues.select(range(4)).select_columns(["prompt", "completions"])
    rows = rows.map(lambda row: {"completions": row["completions"][:2]})
    return rows.add_column("rewards", REWARDS)


def as_singles(groups):
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": completion, "reward": reward}
            for row in groups
            for completion, reward in zip(row["completions"], row["rewards"], strict=True)
        ]
    )


def test_they_are_what_alol_trains_on(build_trainer, tiny_model, tokenizer, scored_pairs):
    """40 prompts, of which the value heads see 20. A-LoL keeps the completions whose advantage is positive."""
    pairs = scored_pairs.take(40)
    settings = {"value_num_train_epochs": 2, "value_max_prompts": 20, "per_device_eval_batch_size": 8, "seed": 0}
    trainer = build_trainer(ALoLTrainer, train_dataset=pairs, **settings)
    estimated = estimate_advantages(pairs, tiny_model(), processing_class=tokenizer, **SETTINGS)
    found = [a for row in estimated for a in (row["chosen_advantage"], row["rejected_advantage"])]
    kept = [advantages[0] for advantages in trainer.train_dataset["advantages"]]
    assert 0 < len(kept) < 80 and kept == pytest.approx([a for a in found if a > 0], rel=0, abs=1e-6)
    for row in estimated:  # A = R − V
        assert row["chosen_advantage"] == pytest.approx(row["chosen_reward"] - row["value"], rel=0, abs=1e-6)
    others = estimate_advantages(pairs, tiny_model(seed=1), processing_class=tokenizer, **SETTINGS)
    assert others["value"][:] != estimated["value"][:]  # Control: they are of the policy


def test_formats_agree_and_what_is_not_scored_has_no_advantage(groups, tiny_model, tokenizer):
    of_groups = estimate_advantages(groups, tiny_model(), processing_class=tokenizer, **SETTINGS)
    assert of_groups["rewards"][:] == REWARDS
    assert [[a is None for a in row] for row in of_groups["advantages"]] == [
        [r is None for r in row] for row in REWARDS
    ]
    assert all(math.isfinite(value) for value in of_groups["value"])  # also of a prompt without a reward
    of_singles = estimate_advantages(as_singles(groups), tiny_model(), processing_class=tokenizer, **SETTINGS)
    assert {"reward", "value", "advantage"} <= set(of_singles.column_names)
    assert of_singles["advantage"][:] == [a for row in of_groups["advantages"] for a in row]
    assert of_singles["value"][::2] == of_singles["value"][1::2] == of_groups["value"][:]


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("group_mean", [[0.5, -0.5], [0.0, None], [None, None], [0.5, -0.5]]),
        ("leave_one_out", [[1.0, -1.0], [0.0, None], [None, None], [1.0, -1.0]]),
        ("batch_mean", [[0.1, -0.9], [-0.4, None], [None, None], [1.1, 0.1]]),  # mean .9
        ("none", REWARDS),
    ],
)
def test_other_baselines_read_nothing(groups, tiny_model, tokenizer, monkeypatch, baseline, expected):
    model = tiny_model()
    monkeypatch.setattr(model, "forward", None)
    monkeypatch.setattr(model.model, "forward", None)
    found = estimate_advantages(groups, model, processing_class=tokenizer, baseline=baseline)
    assert "value" not in found.column_names
    for row, numbers in zip(found["advantages"], expected, strict=True):
        row, numbers = ([math.nan if x is None else x for x in values] for values in (row, numbers))
        assert row == pytest.approx(numbers, rel=0, abs=1e-9, nan_ok=True)


def test_every_prompt_is_read_once(groups, tiny_model, tokenizer):
    model, read = tiny_model(), []
    model.train()
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.extend(kwargs["attention_mask"].sum(1).tolist()), with_kwargs=True
    )
    doubled = Dataset.from_list([*as_singles(groups), *as_singles(groups)])
    estimate_advantages(doubled, model, processing_class=tokenizer, **SETTINGS)
    assert len(read) == 4 and model.training


def test_reward_functions_take_precedence_and_all_is_cached(groups, tiny_model, tokenizer, tmp_path):
    kwargs = {"processing_class": tokenizer, "cache_dir": tmp_path, **SETTINGS}
    model = tiny_model()
    found = estimate_advantages(groups, model, toy.oracle_reward, **kwargs)
    assert found["rewards"][:] == score_dataset(groups, toy.oracle_reward)["rewards"][:] != REWARDS
    model.model.register_forward_pre_hook(lambda *args: pytest.fail("a prompt is read again"))
    again = estimate_advantages(groups, model, toy.oracle_reward, **kwargs)
    assert again["advantages"][:] == found["advantages"][:]


def test_every_module_keeps_its_mode(groups, tiny_model, tokenizer):
    model = tiny_model().train()
    model.model.layers[0].eval()
    estimate_advantages(groups, model, processing_class=tokenizer, **SETTINGS)
    assert model.training and model.model.layers[1].training and not model.model.layers[0].mlp.training


def test_what_cannot_be_estimated(groups, tiny_model, tokenizer):
    model, kwargs = tiny_model(), {"processing_class": tokenizer}
    with pytest.raises(TypeError, match="needs a `Dataset`"):
        estimate_advantages(groups.to_iterable_dataset(), model, **kwargs)
    unscored = groups.select([2])
    with pytest.raises(ValueError, match="There are 0 prompts with a scored completion"):
        estimate_advantages(unscored, model, **kwargs)
    assert estimate_advantages(unscored, baseline="group_mean")["advantages"][:] == [[None, None]]
    with pytest.raises(ValueError, match='`baseline="value"` needs a `model`'):
        estimate_advantages(groups)
    prompt_tuning = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter, whose virtual tokens"):
        estimate_advantages(groups, prompt_tuning, **kwargs)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    text = Dataset.from_list([{"prompt": "a", "completion": "b", "reward": 1.0}])
    with pytest.raises(ValueError, match="The tokenizer has no EOS token"):
        estimate_advantages(text, model, processing_class=endless)
    with pytest.raises(TypeError, match="reward_weight"):
        estimate_advantages(groups, baseline="none", reward_weight=[1.0])
    with pytest.raises(ValueError, match="Row 0 has 3, of type int, for a prompt"):
        estimate_advantages(Dataset.from_list([{"prompt": 3, "completion": "a", "reward": 1.0}]), baseline="none")


def test_an_adapter_is_part_of_the_policy(groups, tiny_model, tokenizer):
    base = estimate_advantages(groups, tiny_model(), processing_class=tokenizer, **SETTINGS)
    model = get_peft_model(tiny_model(), LORA)
    same = estimate_advantages(groups, model, processing_class=tokenizer, **SETTINGS)
    assert same["value"][:] == pytest.approx(base["value"][:], rel=0, abs=1e-6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    changed = estimate_advantages(groups, model, processing_class=tokenizer, **SETTINGS)
    assert changed["value"][:] != pytest.approx(base["value"][:], rel=0, abs=1e-6)


def test_rows_without_rewards(groups, tiny_model, tokenizer):
    with pytest.raises(ValueError, match="Row 0 has no reward"):
        estimate_advantages(groups.remove_columns("rewards"), tiny_model(), processing_class=tokenizer)
