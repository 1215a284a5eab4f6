"""What makes two reward functions, models or tokenizers the same to a cache, in this process and in another."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.normalizers import Replace
from transformers import LlamaForSequenceClassification

from trl_lol import RewardModel, cache_rewards, sigmoid
from trl_lol._cache import model_key, tokenizer_key
from trl_lol.rewards.hashing import hash_reward_funcs


SCRIPT = """
    import helper
    from functools import partial
    from trl_lol.rewards.hashing import hash_reward_funcs

    WORDS = frozenset({"yes", "no", "maybe", "never"})

    def literal(prompts, completions, **columns):
        return [float(completion in {"yes", "no", "maybe", "never"}) for completion in completions]

    def nested(prompts, completions, **columns):
        return [float(completion in WORDS) + helper.grade(completion) for completion in completions]

    class Judge:
        def __init__(self):
            self.words = {"yes", "no", "maybe", frozenset({"a", "b", "c"})}

        def __call__(self, prompts, completions, **columns):
            return [float(completion in self.words) for completion in completions]

    for func in (literal, nested, Judge(), partial(literal, extra=WORDS)):
        print(hash_reward_funcs(func))
"""


def test_hashes_agree_between_processes_until_a_helper_is_edited(tmp_path):
    """Sets and frozensets, which `x in {"a", "b"}` makes, have another order in every process."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))

    def run(hash_seed, grade):
        (tmp_path / "helper.py").write_text(f"def grade(completion):\n    return {grade}\n")
        env = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(tmp_path / "script.py")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    first, again, edited = run(1, 1.0), run(2, 1.0), run(1, 5.0)
    assert len(set(first)) == 4 and again == first
    assert [a == b for a, b in zip(first, edited, strict=True)] == [True, False, True, True]


def test_the_adapter_in_use_is_part_of_a_model(tiny_model):
    """Two adapters are there all the time. Switching between them, or off, makes another model."""
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(), config, "a")
    model.add_adapter("b", config)
    keys, below = [], []
    for name in "ab":
        model.set_adapter(name)
        keys.append(str(model_key(model)))
        below.append(str(model_key(model.get_base_model())))
    with model.disable_adapter():
        keys.append(str(model_key(model)))
        below.append(str(model_key(model.get_base_model())))
    assert len(set(keys)) == len(set(below)) == 3
    model.set_adapter("a")
    assert str(model_key(model)) == keys[0]


def test_how_a_text_is_cut_is_part_of_a_tokenizer(tokenizer):
    """Not only the vocabulary. What the last call padded or truncated is not."""
    key = tokenizer_key(tokenizer)
    used, other = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    used("a phone", truncation=True, max_length=1, padding="max_length")
    assert tokenizer_key(used) == key
    other.backend_tokenizer.normalizer = Replace("e", "a")
    assert tokenizer_key(other) != key and other.get_vocab() == tokenizer.get_vocab()


def test_what_is_cached_is_hashed_by_its_parts(tiny_model, tokenizer, tmp_path):
    """A model within, by its weights, however its tokenizer was last used."""
    torch.manual_seed(0)
    config = tiny_model().config
    config.num_labels = 1
    model = RewardModel(LlamaForSequenceClassification(config), copy.deepcopy(tokenizer))
    cached = cache_rewards(sigmoid(model), tmp_path)
    before = hash_reward_funcs(cached)
    model.tokenizer("a phone", truncation=True, max_length=1, padding="max_length")
    assert hash_reward_funcs(cached) == before != hash_reward_funcs(cache_rewards(model, tmp_path))
    with torch.no_grad():
        model.model.score.weight.mul_(-1)
    assert hash_reward_funcs(cached) != before


def test_a_set_that_cannot_be_sorted(tmp_path):
    class Judge:
        words = frozenset({1, "a", None, ("b", 2)})

        def __call__(self, prompts, completions, **columns):
            return [float(completion in self.words) for completion in completions]

    assert hash_reward_funcs(Judge()) is not None
    assert hash_reward_funcs(lambda prompts, completions: [frozenset({1, "a"})]) is not None


@pytest.mark.parametrize("columns", ["id", ["id"]])
def test_columns_are_a_list_of_names(tmp_path, columns):
    def judge(prompts, completions, **columns):
        return [1.0] * len(completions)

    if isinstance(columns, str):
        with pytest.raises(TypeError, match=r"`columns=\['id'\]`"):
            cache_rewards(judge, tmp_path, columns)
    else:
        assert cache_rewards(judge, tmp_path, columns)(["p"], ["c"], id=["1"]) == [1.0]
