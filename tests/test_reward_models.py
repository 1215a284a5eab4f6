"""Reward models as reward functions."""

import copy
import random
import shutil

import pytest
import torch
from conftest import cpu_args
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from trl import RewardConfig, RewardTrainer

from trl_lol import score_dataset, toy
from trl_lol.rewards import RewardModel
from trl_lol.rewards.hashing import hash_reward_funcs


OTHER_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
EXACT = {"rel": 0, "abs": 1e-5}


def make_reward_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, **config: object
) -> LlamaForSequenceClassification:
    """A Llama with 2 layers of width 32 and one label."""
    settings = toy.make_model(tokenizer, hidden_size=32).config
    settings.update({"num_labels": 1, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(settings).eval()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForSequenceClassification:
    return make_reward_model(tokenizer)


@pytest.fixture
def own(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer, to be changed."""
    return copy.deepcopy(tokenizer)


@torch.no_grad()
def score_of(model: PreTrainedModel, ids: list[int]) -> float:
    return model(input_ids=torch.tensor([ids])).logits.item()


def by_hand(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list, completions: list) -> list:
    """One sequence after the other, without padding."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if isinstance(prompt, str):
            ids = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt + completion, tokenize=True, return_dict=False)
        scores.append(score_of(model, ids))
    return scores


def apart(scores: list[float], others: list[float]) -> float:
    """The smallest difference: above 1e-3, no score can pass for another."""
    return min(abs(a - b) for a, b in zip(scores, others, strict=True))


@pytest.mark.parametrize("form", ["texts", "conversations"])
def test_scores_are_those_of_one_by_one(model, tokenizer, request, form):
    """Whatever the batch size and the order, and whatever else is in the batch."""
    prompts, completions = request.getfixturevalue(form)
    expected = by_hand(model, tokenizer, prompts, completions)
    for batch_size in (1, 3, 16):
        assert RewardModel(model, tokenizer, batch_size)(prompts, completions) == pytest.approx(expected, **EXACT)
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    shuffled = RewardModel(model, tokenizer, 4)([prompts[i] for i in order], [completions[i] for i in order])
    assert shuffled == pytest.approx([expected[i] for i in order], **EXACT)
    assert all(type(score) is float for score in shuffled)


def test_texts_end_with_one_eos(model, tokenizer, texts):
    """EOS is added where it is missing, as `RewardTrainer` does. Without it the scores are others."""
    prompts, completions = texts
    reward = RewardModel(model, tokenizer)
    scores = reward(prompts, completions)
    assert reward(prompts, [completion + "<|end|>" for completion in completions]) == scores
    without = [score_of(model, tokenizer(p + c)["input_ids"]) for p, c in zip(prompts, completions, strict=True)]
    assert apart(scores, without) > 1e-3


def test_special_tokens_are_those_of_the_tokenizer(model, own, texts):
    """A BOS token that the tokenizer adds is there once, and changes the scores."""
    before = RewardModel(model, own)(*texts)
    add_bos(own)
    scores = RewardModel(model, own)(*texts)
    assert scores == pytest.approx(by_hand(model, own, *texts), **EXACT)
    assert apart(scores, before) > 1e-3


def test_own_chat_template(model, tokenizer, own, conversations):
    own.chat_template = OTHER_TEMPLATE
    scores = RewardModel(model, own)(*conversations)
    assert scores == pytest.approx(by_hand(model, own, *conversations), **EXACT)
    assert apart(scores, RewardModel(model, tokenizer)(*conversations)) > 1e-3


def test_tools_and_template_arguments(model, own):
    """As in `RewardTrainer`, `tools` may be JSON, and `chat_template_kwargs` reach the template."""
    own.chat_template = "{% if loud %}{{ 'LOUD' }}{% endif %}" + own.chat_template
    reward = RewardModel(model, own)
    row = {"prompts": [[{"role": "user", "content": "Hi"}]], "completions": [[{"role": "assistant", "content": "Yo"}]]}
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    plain, as_json = reward(**row), reward(**row, tools=['[{"type": "function"}]'])
    assert as_json == reward(**row, tools=[[{"type": "function"}]]) != plain
    assert reward(**row, tools=[[tool]]) not in (plain, as_json)
    assert reward(**row, chat_template_kwargs=[{"loud": True}]) != plain == reward(**row, chat_template_kwargs=[None])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_matter(model, tokenizer, own, texts, side):
    own.padding_side = side
    assert RewardModel(model, own, 14)(*texts) == RewardModel(model, tokenizer, 14)(*texts)
    assert own.padding_side == side


def test_without_a_padding_token_eos_pads(tokenizer, own, texts):
    """
    `RewardTrainer` pads with EOS then, too. The model reads its score off the last token that is not padding: the one
    before EOS, which sees nothing of it.
    """
    own.pad_token = None
    model = make_reward_model(tokenizer, pad_token_id=None)
    expected = [
        score_of(model, tokenizer(p + c)["input_ids"]) for p, c in zip(*texts, strict=True)
    ]  # the model knows of no padding yet
    reward = RewardModel(model, own, 5)
    assert reward.pad_token_id == model.config.pad_token_id == own.eos_token_id
    assert reward(*texts) == pytest.approx(expected, **EXACT)
    own.eos_token = None
    with pytest.raises(ValueError, match="no padding token"):
        RewardModel(model, own)


def add_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.bos_token = "<|system|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.convert_tokens_to_ids("<|system|>"))]
    )


@pytest.mark.parametrize("first", ["", "bos", "cls"])
def test_prompts_lose_their_beginning(model, own, texts, caplog, first):
    """
    With a completion of c tokens and room for c + 4, the last 4 tokens of the prompt stay, or BOS (or CLS) and the
    last 3. Room for the completion (and BOS) alone is just enough; with one less it is not scored.
    """
    if first:
        add_bos(own)
    if first == "cls":
        own.cls_token, own.bos_token = own.bos_token, None
    bos = 1 if first else 0
    prompts, completions = ([column[0]] for column in texts)
    ids = own(prompts[0] + completions[0] + "<|end|>")["input_ids"]
    count = len(ids) - len(own(prompts[0])["input_ids"])
    assert len(ids) > count + 8 and own(prompts[0])["input_ids"] == ids[:-count]

    def score(max_length: int) -> float | None:
        return RewardModel(model, own, max_length=max_length)(prompts, completions)[0]

    whole = score_of(model, ids)
    assert score(len(ids)) == pytest.approx(whole, **EXACT)
    cut = score_of(model, ids[:bos] + ids[-(count + 4 - bos) :])
    assert score(count + 4) == pytest.approx(cut, **EXACT) and abs(cut - whole) > 1e-3
    assert score(count + bos) == pytest.approx(score_of(model, ids[:bos] + ids[-count:]), **EXACT)
    assert not caplog.records
    assert score(count + bos - 1) is None


def test_messages_lose_their_beginning(model, tokenizer, conversations):
    """Of messages, the marker that asks for the answer belongs to the prompt."""
    prompts, completions = ([column[0]] for column in conversations)
    ids = tokenizer.apply_chat_template(prompts[0] + completions[0], tokenize=True, return_dict=False)
    count = len(tokenizer(completions[0][0]["content"] + "<|end|>")["input_ids"])
    expected = pytest.approx([score_of(model, ids[-count:])], **EXACT)
    assert RewardModel(model, tokenizer, max_length=count)(prompts, completions) == expected
    assert RewardModel(model, tokenizer, max_length=count - 1)(prompts, completions) == [None]


def test_completions_that_do_not_fit_are_warned_of_once(model, tokenizer, caplog):
    reward = RewardModel(model, tokenizer, max_length=11)
    scores = reward(["Hello!"] * 4, [" yes", " yes" * 40, " yes" * 50, " no"])
    assert scores[1:3] == [None, None] and scores[0] != scores[3] and None not in (scores[0], scores[3])
    assert reward(["Hello!"], [" no" * 60]) == [None]
    assert [r.getMessage() for r in caplog.records if "max_length=11" in r.getMessage()] == [
        "A completion is longer than `max_length=11` of its reward function. Such completions are not scored."
    ]


def test_positions_are_the_default_length(model, tokenizer, own):
    """Unless the tokenizer states a smaller one. XLNet says -1 for no limit, tokenizers say 1e30."""
    assert RewardModel(model, tokenizer).max_length == 256
    assert RewardModel(model, tokenizer)(["Hello!"], [" yes" * 300]) == [None]
    for stated, length in ((100, 100), (300, 256)):
        own.model_max_length = stated
        assert RewardModel(model, own).max_length == length
    model.config.max_position_embeddings = -1
    assert RewardModel(model, own).max_length == 300
    own.model_max_length = int(1e30)
    assert RewardModel(model, own).max_length is None
    assert None not in RewardModel(model, own)(["Hello!"], [" yes" * 300])


def test_positions_behind_that_of_padding(own):
    """
    RoBERTa counts positions from `pad_token_id` + 1: of 20, 17 are left where padding is token 2, and 14 where it is
    token 5. BERT has all 20. The control: a model reads as many tokens and not one more.
    """
    settings = {"vocab_size": len(own), "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    settings |= {"num_hidden_layers": 1, "num_labels": 1, "max_position_embeddings": 20}
    for kind, config, padding, length in (
        (RobertaForSequenceClassification, RobertaConfig, 2, 17),
        (RobertaForSequenceClassification, RobertaConfig, 5, 14),
        (BertForSequenceClassification, BertConfig, 2, 20),
    ):
        own.pad_token = own.convert_ids_to_tokens(padding)
        model = kind(config(**settings, pad_token_id=padding)).eval()
        reward = RewardModel(model, own)
        assert reward.max_length == length
        fit, long = " a" * (length - 1), " a" * length  # and EOS
        assert len(own(fit)["input_ids"]) == length - 1
        scores = reward(["Hello!"] * 2, [fit, long])
        assert scores[0] == pytest.approx(score_of(model, own(fit + own.eos_token)["input_ids"]), **EXACT)
        assert scores[1] is None
        with pytest.raises((RuntimeError, IndexError)):
            score_of(model, own(long + own.eos_token)["input_ids"])


def test_empty_completions(model, tokenizer):
    (score,) = RewardModel(model, tokenizer)(["Hello!"], [""])
    assert score == pytest.approx(score_of(model, tokenizer("Hello!<|end|>")["input_ids"]), **EXACT)
    assert RewardModel(model, tokenizer)([], []) == []


@pytest.mark.parametrize("kind", ["two labels", "language model"])
def test_models_without_one_score(tokenizer, tiny_model, kind):
    model = make_reward_model(tokenizer, num_labels=2) if kind == "two labels" else tiny_model()
    with pytest.raises(ValueError, match=r"2 labels.*RewardTrainer.*ClassifierReward"):
        RewardModel(model, tokenizer)


def test_dropout_is_off(tokenizer, texts):
    """Also when the model is trained meanwhile. The control: with dropout, two forwards differ."""
    model = make_reward_model(tokenizer, attention_dropout=0.5)
    expected = by_hand(model, tokenizer, *texts)
    model.train()
    ids = tokenizer("What can I do?")["input_ids"]
    assert score_of(model, ids) != score_of(model, ids)
    reward = RewardModel(model, tokenizer)
    assert reward(*texts) == pytest.approx(expected, **EXACT)
    model.train()
    assert reward(*texts) == pytest.approx(expected, **EXACT)


def test_bfloat16(model, tokenizer, texts):
    """Floats with bfloat16's 8 bits: near the float32 scores and not equal to them."""
    exact = RewardModel(model, tokenizer)(*texts)
    scores = RewardModel(copy.deepcopy(model).bfloat16(), tokenizer)(*texts)
    assert all(type(score) is float for score in scores)
    assert scores == pytest.approx(exact, abs=0.1) and scores != exact


def test_folders(tmp_path, model, tokenizer, texts):
    """Model and tokenizer from a folder, in float32 on the CPU unless told otherwise."""
    model.save_pretrained(tmp_path / "my_reward")
    tokenizer.save_pretrained(tmp_path / "my_reward")
    expected = pytest.approx(RewardModel(model, tokenizer)(*texts), **EXACT)
    for folder in (tmp_path / "my_reward", str(tmp_path / "my_reward")):
        reward = RewardModel(folder)
        assert reward.__name__ == "my_reward" and reward.model.dtype == torch.float32
        assert reward(*texts) == expected
    assert RewardModel(tmp_path / "my_reward", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_lora_adapters(tmp_path, tokenizer, tiny_model, texts):
    """An adapter on a language model, whose scores come from the adapter's own head. Both parts count."""
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, dtype=torch.float32)
    alone = RewardModel(copy.deepcopy(base), tokenizer)(*texts)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(base, lora)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora" in name or "score" in name
            parameter.data += torch.randn_like(parameter) / 4
    expected = RewardModel(model, tokenizer)(*texts)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    reward = RewardModel(tmp_path / "adapter")
    assert reward(*texts) == pytest.approx(expected, **EXACT)
    assert reward(*texts) == pytest.approx(by_hand(model.eval(), tokenizer, *texts), **EXACT)
    assert apart(expected, alone) > 1e-3
    with model.disable_adapter():
        assert RewardModel(model, tokenizer)(*texts) == pytest.approx(alone, **EXACT)


def test_adapters_without_a_tokenizer(tmp_path, caplog, tokenizer, tiny_model, texts):
    """The base model's takes its place, and this is said."""
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    missing = "There is no tokenizer with the reward model .*adapter. Pass the one .* `tokenizer=`"
    with pytest.raises(ValueError, match=missing):
        RewardModel(tmp_path / "adapter")
    expected = pytest.approx(RewardModel(model, tokenizer)(*texts), **EXACT)
    assert RewardModel(tmp_path / "adapter", tokenizer)(*texts) == expected
    tokenizer.save_pretrained(tmp_path / "base")
    assert RewardModel(tmp_path / "adapter")(*texts) == expected
    (said,) = [record.getMessage() for record in caplog.records if "trl_lol" in record.name]
    assert said.startswith("There is no tokenizer with") and said.endswith(f"base model, {tmp_path / 'base'}.")


def test_models_without_a_tokenizer(tmp_path, model, texts):
    with pytest.raises(ValueError, match=r"reward model that was made in memory.*`tokenizer=`"):
        RewardModel(model)
    settings = BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=99, num_labels=1)
    BertForSequenceClassification(settings).save_pretrained(tmp_path / "bert")
    # The control: transformers makes a tokenizer there, and to it every word is unknown
    assert len(set(AutoTokenizer.from_pretrained(tmp_path / "bert")(texts[0][0])["input_ids"])) == 3
    model.save_pretrained(tmp_path / "llama")
    for folder in ("bert", "llama"):
        with pytest.raises(ValueError, match=f"no tokenizer with the reward model .*{folder}. Pass"):
            RewardModel(tmp_path / folder)


def test_a_model_in_parts_stays_where_it_is(tmp_path, model, tokenizer, texts):
    """
    Its second layer and its head on the disk, from where they come when they are needed. The control: such a model
    cannot be moved.
    """
    expected = pytest.approx(RewardModel(model, tokenizer)(*texts), **EXACT)
    model.save_pretrained(tmp_path / "model")
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    placed = {"device_map": {**parts, "model.rotary_emb": "cpu", "score": "disk"}, "offload_folder": tmp_path / "disk"}
    reward = RewardModel(tmp_path / "model", tokenizer, **placed)
    assert reward.model.score.weight.is_meta
    assert reward(*texts) == expected
    assert RewardModel(reward.model, tokenizer, device="cpu")(*texts) == expected
    with pytest.raises((RuntimeError, NotImplementedError)):
        reward.model.to("cpu")


def test_arguments_for_loading_what_is_loaded(model, tokenizer):
    with pytest.raises(TypeError, match="`dtype`, `device_map`: for loading"):
        RewardModel(model, tokenizer, dtype=torch.bfloat16, device_map="auto")


def test_cache_key_is_of_the_weights(tmp_path, model, tokenizer, texts):
    model.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, again = RewardModel(tmp_path / "a"), RewardModel(tmp_path / "b")
    key = first.cache_key
    first(*texts)
    assert key == first.cache_key == again.cache_key
    again.model.score.weight.data[0, 0] += 1e-3
    assert again.cache_key != key
    assert RewardModel(tmp_path / "a", max_length=99).cache_key != key
    first.tokenizer.chat_template = OTHER_TEMPLATE
    assert first.cache_key != key


def test_models_of_reward_trainer(tmp_path, model, own, pairs):
    """
    Trained for some steps and saved by TRL's RewardTrainer: the share of the 64 pairs that RewardModel ranks rightly,
    and its mean margin, are those of the trainer's own evaluation (of 8 batches of 8, so that means of means are
    means). The control: training has changed both.
    """
    pairs = pairs.take(64).select_columns(["prompt", "chosen", "rejected"])
    args = cpu_args(RewardConfig, tmp_path, max_steps=12, learning_rate=1e-2, max_length=None)
    trainer = RewardTrainer(model, args, train_dataset=pairs, eval_dataset=pairs, processing_class=own)
    untrained = trainer.evaluate()
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(tmp_path / "trained"))
    scored = score_dataset(pairs, RewardModel(tmp_path / "trained"))
    margins = [a - b for a, b in zip(scored["chosen_reward"], scored["rejected_reward"], strict=True)]
    assert sum(margin > 0 for margin in margins) / 64 == metrics["eval_accuracy"]
    assert sum(margins) / 64 == pytest.approx(metrics["eval_margin"], abs=1e-4)
    assert metrics["eval_accuracy"] > max(untrained["eval_accuracy"], 0.6)


# --- the cache ---


def test_scores_of_reward_models_are_found_again(tmp_path, monkeypatch, model, tokenizer, pairs):
    """By the same instance and by another of the same folder; not with other weights."""
    calls = []
    call = RewardModel.__call__

    def counted(self, prompts, completions, **columns):
        calls.append(len(completions))
        return call(self, prompts, completions, **columns)

    monkeypatch.setattr(RewardModel, "__call__", counted)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    reward, rows = RewardModel(tmp_path / "model"), pairs.take(8)
    scored = [score_dataset(rows, r, cache_dir=tmp_path / "cache")["chosen_reward"][:] for r in (reward, reward)]
    assert calls == [16] and scored[0] == scored[1]
    score_dataset(rows, RewardModel(tmp_path / "model", batch_size=16), cache_dir=tmp_path / "cache")
    assert calls == [16]
    reward.model.score.weight.data += 1
    assert score_dataset(rows, reward, cache_dir=tmp_path / "cache")["chosen_reward"][:] != scored[0]
    assert calls == [16, 16]


def test_the_hash_of_a_reward_model_is_of_what_scores_depend_on(tmp_path, model, tokenizer):
    """Neither the batch size nor where the model lies is part of it."""
    model.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    hashes = {
        hash_reward_funcs(RewardModel(folder, batch_size=batch_size))
        for folder, batch_size in ((tmp_path / "a", 16), (tmp_path / "b", 16), (tmp_path / "a", 4))
    }
    assert len(hashes) == 1 and None not in hashes
