"""Sampling groups of completions, and keeping them. What one completion is, is tested in `test_evaluation.py`."""

import copy

import pytest
import torch
from datasets import Dataset

from trl_lol import _cache, sample_completions, score_dataset, toy
from trl_lol.data import tokenize_row


K = 3


@pytest.fixture
def rows(dialogues) -> Dataset:
    return Dataset.from_dict({"prompt": dialogues["prompt"][:4], "answer": list("abcd")})


@pytest.fixture
def text_rows() -> Dataset:
    return Dataset.from_dict({"prompt": ["My phone", "The kettle is", "A"]})


def sample(rows, model, tokenizer, num_completions=K, **kwargs) -> Dataset:
    return sample_completions(rows, model, tokenizer, num_completions, **{"max_new_tokens": 6, **kwargs})


def count_calls(model, monkeypatch) -> list:
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: calls.append(kwargs) or generate(**kwargs))
    return calls


def test_conversations_get_groups_of_messages_and_keep_their_columns(rows, tiny_model, tokenizer):
    groups = sample(rows, tiny_model(), tokenizer)
    assert groups.column_names == ["prompt", "answer", "completions"]
    assert groups["prompt"][:] == rows["prompt"][:] and groups["answer"][:] == list("abcd")
    for completions in groups["completions"]:
        assert len(completions) == K and len({c[0]["content"] for c in completions}) == K
        assert all(len(c) == 1 and c[0].keys() == {"role", "content"} for c in completions)
    scored = score_dataset(groups, toy.oracle_reward)
    assert [len(rewards) for rewards in scored["rewards"]] == [K] * 4


def test_the_template_gets_what_it_gets_in_training(rows, tiny_model, tokenizer, monkeypatch):
    """A template that shows the tools: prompts are those that `tokenize_row` makes, and without tools others."""
    tokenizer, model = copy.deepcopy(tokenizer), tiny_model()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools[0].name }} {% endif %}{% if loud %}please {% endif %}" + tokenizer.chat_template
    )
    calls = count_calls(model, monkeypatch)
    extended = rows.add_column("tools", ['[{"name": "phone"}]'] * 4)
    extended = extended.add_column("chat_template_kwargs", [{"loud": i % 2 == 0} for i in range(4)])
    groups = sample(extended, model, tokenizer, 1)
    expected = [tokenize_row({**row, "rewards": [0.0]}, 0, tokenizer, "")["prompt_ids"] for row in groups]
    seen = {tuple(ids[ids != tokenizer.pad_token_id].tolist()) for ids in calls[0]["input_ids"]}
    assert seen == {*map(tuple, expected)}
    sample(rows, model, tokenizer, 1)
    assert not seen & {tuple(ids[ids != tokenizer.pad_token_id].tolist()) for ids in calls[1]["input_ids"]}


def test_text_gets_groups_of_text(text_rows, tiny_model, tokenizer):
    groups = sample(text_rows, tiny_model(), tokenizer)["completions"][:]
    assert [len(group) for group in groups] == [K] * 3
    assert all(isinstance(text, str) for group in groups for text in group)


def test_each_completion_continues_its_own_prompt(text_rows, tiny_model, tokenizer):
    """Greedy, a group is three times the completion that the prompt gets alone. The prompts are batched by length, so
    their order is not that of the rows."""
    model = tiny_model()
    groups = sample(text_rows, model, tokenizer, temperature=0.0, batch_size=4)["completions"][:]
    alone = [sample(text_rows.select([i]), model, tokenizer, 1, temperature=0.0)["completions"][0] for i in range(3)]
    assert groups == [completion * K for completion in alone]
    assert len({group[0] for group in groups}) == 3


def test_the_seed_decides(rows, tiny_model, tokenizer):
    model = tiny_model()
    first = sample(rows, model, tokenizer, seed=1)["completions"][:]
    torch.rand(3)
    assert sample(rows, model, tokenizer, seed=1)["completions"][:] == first
    assert sample(rows, model, tokenizer, seed=2)["completions"][:] != first


def test_earlier_completions_and_rewards_are_replaced(tiny_model, tokenizer):
    rows = Dataset.from_dict(
        {"prompt": ["a"], "completions": [["x", "y"]], "rewards": [[1.0, 0.0]], "answer": ["b"], "score_chosen": [1.0]}
    )
    assert sample(rows, tiny_model(), tokenizer).column_names == ["prompt", "answer", "completions"]
    pairs = Dataset.from_dict({"prompt": ["a"], "chosen": ["x"], "rejected": ["y"]})
    assert sample(pairs, tiny_model(), tokenizer).column_names == ["prompt", "completions"]


# ---- Cache ----


def test_the_second_call_reads_the_cache(rows, tiny_model, tokenizer, tmp_path, monkeypatch):
    first = sample(rows, tiny_model(), tokenizer, cache_dir=tmp_path)["completions"][:]
    model = tiny_model()  # another object with the same weights
    calls = count_calls(model, monkeypatch)
    again = sample(rows, model, tokenizer, cache_dir=tmp_path, batch_size=2)
    assert again["completions"][:] == first and again["answer"][:] == list("abcd") and not calls
    sample(rows, model, tokenizer, batch_size=2)  # control: without the cache the model is called
    assert len(calls) == 4 * K / 2


@pytest.mark.parametrize(
    "changed", ["seed", "model", "prompts", "num_completions", "max_new_tokens", "temperature", "top_p"]
)
def test_other_completions_do_not_hit_the_cache(changed, rows, tiny_model, tokenizer, tmp_path, monkeypatch):
    sample(rows, tiny_model(), tokenizer, cache_dir=tmp_path)
    model = tiny_model(seed=int(changed == "model"))
    rows = rows.select([1, 0, 2, 3]) if changed == "prompts" else rows
    settings = {"seed": 1, "num_completions": 2, "max_new_tokens": 5, "temperature": 0.9, "top_p": 0.9}
    calls = count_calls(model, monkeypatch)
    sample(rows, model, tokenizer, cache_dir=tmp_path, **{k: v for k, v in settings.items() if k == changed})
    assert calls and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("when", ["sampling", "writing"])
def test_a_killed_run_leaves_nothing_that_is_read(when, rows, tiny_model, tokenizer, tmp_path, monkeypatch):
    model = tiny_model()
    expected = sample(rows, model, tokenizer)["completions"][:]
    calls = count_calls(model, monkeypatch)
    generate = model.generate

    def killed_in_the_second_batch(**kwargs):
        if len(calls) == 1:
            raise KeyboardInterrupt
        return generate(**kwargs)

    def killed_while_writing(tensors, path):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "sampling":
            patch.setattr(model, "generate", killed_in_the_second_batch)
        else:
            patch.setattr(_cache, "save_file", killed_while_writing)
        with pytest.raises(KeyboardInterrupt):
            sample(rows, model, tokenizer, cache_dir=tmp_path, batch_size=2 if when == "sampling" else 16)
    assert not list(tmp_path.glob("*"))
    assert sample(rows, model, tokenizer, cache_dir=tmp_path)["completions"][:] == expected


# ---- Errors ----


def test_rows_that_cannot_be_sampled_for(rows, tiny_model, tokenizer):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"columns are question\. Sampling needs a `prompt`"):
        sample(rows.select_columns("prompt").rename_column("prompt", "question"), model, tokenizer)
    with pytest.raises(ValueError, match="`num_completions=0` must be at least 1"):
        sample(rows, model, tokenizer, 0)
    with pytest.raises(ValueError, match="Prompt 1 has no tokens"):
        sample(Dataset.from_dict({"prompt": ["a", ""]}), model, tokenizer)


@pytest.mark.parametrize("settings", [{"topp": 0.5}, {"num_return_sequences": 2}])
def test_settings_that_would_be_ignored_or_break_the_groups(text_rows, tiny_model, tokenizer, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: not among the fields"):
        sample(text_rows, tiny_model(), tokenizer, **settings)
    assert len(sample(text_rows, tiny_model(), tokenizer, top_p=0.5)) == 3


def test_empty_dataset(text_rows, tiny_model, tokenizer):
    with pytest.raises(ValueError, match="The dataset is empty"):
        sample(text_rows.select([]), tiny_model(), tokenizer)


def test_cache_tells_models_apart_that_have_the_same_weights(text_rows, tiny_model, tokenizer, tmp_path, monkeypatch):
    """The config is part of the policy."""
    sample(text_rows, tiny_model(), tokenizer, cache_dir=tmp_path)
    model = tiny_model()
    calls = count_calls(model, monkeypatch)
    sample(text_rows, model, tokenizer, cache_dir=tmp_path)
    assert not calls
    model.config.rms_norm_eps *= 10
    sample(text_rows, model, tokenizer, cache_dir=tmp_path)
    assert calls
