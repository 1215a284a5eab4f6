"""What sharing prompts saves: what is compared, and that it is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import shared_prompts
from benchmarks.shared_prompts import CASES, LENGTHS, NAMES, Case, Setting, compare, make_groups, make_trainer, run


SMALL = Setting(batch_size=8, steps=1, rounds=2)


def test_groups_have_the_lengths_that_are_said():
    for case in (Case("HH", 4), Case("HH", 4, is_ragged=True)):
        groups = make_groups(case, num_completions=16)
        prompts = [group["prompt"].count(" a") for group in groups]
        completions = [text.count(" b") + 1 for group in groups for text in group["completions"]]
        assert (len(prompts), len(completions)) == (4, 16)
        low, high = (73, 220) if case.is_ragged else (147, 147)
        assert low <= min(prompts) <= max(prompts) <= high
        assert (len(set(prompts)) > 1) == case.is_ragged
        assert 22 <= min(completions) <= max(completions) <= 67


@pytest.mark.parametrize("k", [1, 2, 4])
def test_all_train_on_the_same_tokens(k, tmp_path, monkeypatch):
    """Batches of one step, of prompts of 12 and completions of 6 tokens. With a shared prompt there are fewer."""
    monkeypatch.setitem(LENGTHS, "HH", (12, 6))
    tokens = {}
    for name in NAMES if k > 1 else NAMES[:2]:
        trainer = make_trainer(name, Case("HH", k), SMALL, tmp_path / name)
        (batch,) = trainer.get_train_dataloader()
        tokens[name] = int(batch["attention_mask"].sum())
        assert ("branch_index" in batch) == (name == "shared" and k > 1)
    assert tokens["repeated"] == tokens.get("DPO", 8 * 18) == 8 * 18
    assert tokens["shared"] == (8 // k * (11 + 7 * k) if k > 1 else 8 * 18)


def test_speed_up_by_hand():
    """Ratios of 2, 3 and 4, and of 3, 4 and 8 beside DPO; 300 tokens of 100."""
    seconds = {"repeated": [2.0, 6.0, 4.0], "shared": [1.0, 2.0, 1.0], "DPO": [3.0, 8.0, 8.0]}
    tokens = {"repeated": 300, "shared": 100, "DPO": 300}
    result = compare({"seconds": seconds, "tokens": tokens})
    assert result == {"ideal": 3.0, "speed_up": 3.0, "range": (2.0, 4.0), "beside_dpo": 4.0}
    with pytest.raises(RuntimeError, match="Not the same completions"):
        compare({"seconds": seconds, "tokens": {**tokens, "DPO": 299}})


def test_run_writes_a_table_and_a_plot(tmp_path, monkeypatch):
    """With a clock that counts the tokens that the model has computed, which makes every speed-up the ideal one."""
    computed = [0.0]
    make = shared_prompts.make_trainer

    def counted(*args):
        trainer = make(*args)
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: computed.__setitem__(0, computed[0] + kwargs["input_ids"].numel()),
            with_kwargs=True,
        )
        return trainer

    monkeypatch.setattr(shared_prompts, "make_trainer", counted)
    monkeypatch.setattr(shared_prompts, "clock", lambda: computed[0])
    monkeypatch.setattr(shared_prompts, "apart", lambda function, *args: function(*args))
    monkeypatch.setattr(shared_prompts, "CASES", [case for case in CASES if case.k > 1 and not case.is_ragged])
    monkeypatch.setitem(LENGTHS, "even", (8, 5))
    path = run(tmp_path, ["even"], batch_size=8, steps=1, rounds=2)
    cases = json.loads(path.read_text())["cases"]
    assert [case["k"] for case in cases] == [2, 4, 8]
    assert [case["ideal"] for case in cases] == [case["speed_up"] for case in cases]
    assert cases[2]["ideal"] == pytest.approx(8 * 13 / (7 + 8 * 6))
    table = (tmp_path / "README.md").read_text()
    assert "| even | 8 + 5 | 8 | 1.89 | 1.89 | 1.89 to 1.89 | 100% | 1.89 |" in table
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_settings_that_are_wrong():
    with pytest.raises(ValueError, match=r"`batch_size=4` must be a multiple of 8"):
        replace(SMALL, batch_size=4)
    with pytest.raises(ValueError, match="exclude each other"):
        Setting(model="a", shape="Qwen2.5-1.5B")
    assert Path(Setting(model="folder/SmolLM2", lora=True).name).name.startswith("smollm2_lora_")
