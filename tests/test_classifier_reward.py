"""Text classifiers as reward functions."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Pipeline,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    pipeline,
)

from trl_lol import score_dataset
from trl_lol.rewards import ClassifierReward


EXACT = {"rel": 0, "abs": 1e-5}
LABELS = ("polite", "neutral", "rude")


@pytest.fixture
def make_classifier(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Pipeline]:
    """Makes a tiny BERT with three labels, in a pipeline. Only its tokenizer can know how long texts may be."""

    def make(**config: object) -> Pipeline:
        settings = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
            id2label=dict(enumerate(LABELS)),
            label2id={label: i for i, label in enumerate(LABELS)},
            pad_token_id=tokenizer.pad_token_id,
            **{"max_position_embeddings": 64, **config},
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = BertForSequenceClassification(settings).eval()
        return pipeline("text-classification", model=model, tokenizer=copy.deepcopy(tokenizer), device="cpu")

    return make


@torch.no_grad()
def probabilities(classifier: Pipeline, text: str) -> list[float]:
    return of_tokens(classifier, classifier.tokenizer(text)["input_ids"])


@torch.no_grad()
def of_tokens(classifier: Pipeline, ids: list[int]) -> list[float]:
    return classifier.model(input_ids=torch.tensor([ids])).logits[0].softmax(-1).tolist()


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("form", ["texts", "conversations"])
def test_probability_of_a_label(make_classifier, request, form, batch_size):
    prompts, completions = request.getfixturevalue(form)
    classifier = make_classifier()
    plain = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    expected = [probabilities(classifier, text) for text in plain]
    for i, label in enumerate(LABELS):
        reward = ClassifierReward(classifier, label, batch_size=batch_size)
        assert reward.__name__ == label
        assert reward(prompts, completions) == pytest.approx([p[i] for p in expected], **EXACT)
    assert min(abs(p[0] - p[1]) for p in expected) > 1e-4
    assert len(reward(prompts[:1], completions[:1])) == 1


def test_classifiers_have_no_dropout(make_classifier, texts):
    """A pipeline leaves a model that it is given in training."""
    classifier = make_classifier()
    expected = [probabilities(classifier, text)[0] for text in texts[1]]
    reward = ClassifierReward(classifier, "polite")
    classifier.model.train()
    assert probabilities(classifier, texts[1][0])[0] != expected[0]
    assert reward(*texts) == pytest.approx(expected, **EXACT)


def test_unknown_labels(make_classifier):
    with pytest.raises(ValueError, match="'polite', 'neutral', 'rude', and not 'Polite'"):
        ClassifierReward(make_classifier(), "Polite")


def test_with_prompt(make_classifier, texts, conversations):
    """Texts are put one behind the other, messages one per line."""
    classifier = make_classifier(max_position_embeddings=256)
    reward = ClassifierReward(classifier, "rude", with_prompt=True)
    for prompts, completions in (texts, conversations):
        whole = [
            p + c if isinstance(p, str) else "\n".join(m["content"] for m in p + c)
            for p, c in zip(prompts, completions, strict=True)
        ]
        scores = reward(prompts, completions)
        assert scores == pytest.approx([probabilities(classifier, text)[2] for text in whole], **EXACT)
        assert scores != pytest.approx(ClassifierReward(classifier, "rude")(prompts, completions), **EXACT)


@pytest.mark.parametrize("specials", [False, True], ids=["plain", "with CLS and SEP"])
@pytest.mark.parametrize("form", ["text", "messages"])
def test_prompts_lose_their_beginning(make_classifier, caplog, form, specials):
    """
    81 tokens of prompt before an answer of 3 tokens, CLS before it and SEP behind it: of 20 tokens, the prompt has
    the last 15, or 17 without CLS and SEP. The answer stays when there is room for nothing else; with one less, it is
    not scored. The control: cut on the right, as pipelines do, all answers get the same score.
    """
    classifier = make_classifier(max_position_embeddings=128)
    tokenizer, side = classifier.tokenizer, classifier.tokenizer.truncation_side
    cls, sep = ([768 - 1], [768 - 2]) if specials else ([], [])
    if specials:
        tokenizer.cls_token, tokenizer.sep_token = (tokenizer.convert_ids_to_tokens(*ids) for ids in (cls, sep))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.cls_token} $A {tokenizer.sep_token}",
            special_tokens=[(tokenizer.cls_token, *cls), (tokenizer.sep_token, *sep)],
        )
    answer, other, prompt = " yes no yes", " no no no", "a" + " a" * 80
    if form == "messages":
        prompt, answer, other = ([{"role": "user", "content": text}] for text in (prompt, answer, other))
        joint = tokenizer("\n yes no yes", add_special_tokens=False)["input_ids"]
    else:
        joint = tokenizer(answer, add_special_tokens=False)["input_ids"]
    before = tokenizer("a" + " a" * 80, add_special_tokens=False)["input_ids"]
    alone, num_specials = tokenizer(" yes no yes", add_special_tokens=False)["input_ids"], len(cls + sep)
    assert len(before) == 81 and joint[-len(alone) :] == alone

    def score(max_length: int, completion: Any = answer) -> float | None:
        return ClassifierReward(classifier, "polite", with_prompt=True, max_length=max_length)([prompt], [completion])[
            0
        ]

    room = 20 - num_specials - len(joint)
    expected = of_tokens(classifier, [*cls, *before[-room:], *joint, *sep])[0]
    assert score(20) == pytest.approx(expected, **EXACT)
    assert abs(score(20) - of_tokens(classifier, [*cls, *before, *joint, *sep])[0]) > 1e-4
    least = len(alone) + num_specials
    assert score(least) == pytest.approx(of_tokens(classifier, [*cls, *alone, *sep])[0], **EXACT)
    assert abs(score(20) - score(20, other)) > 1e-4
    assert not caplog.records
    assert score(least - 1) is None
    assert tokenizer.truncation_side == side == "right"
    as_text = [p if isinstance(p, str) else p[0]["content"] for p in (prompt, answer, other)]
    right = classifier([as_text[0] + as_text[1], as_text[0] + as_text[2]], truncation=True, max_length=20)
    assert right[0]["score"] == pytest.approx(right[1]["score"], **EXACT)


@pytest.mark.parametrize("stated", [64, 32, int(1e30)])
def test_long_completions_are_not_scored(make_classifier, stated):
    """Longer than what the tokenizer states, or else than what the model has positions for."""
    classifier = make_classifier()
    classifier.tokenizer.model_max_length = stated
    length = min(stated, 64)
    fit, long = "a" + " a" * (length - 1), "a" + " a" * length
    assert len(classifier.tokenizer(fit)["input_ids"]) == length
    scores = ClassifierReward(classifier, "polite")(["p"] * 3, [long, fit, long])
    assert scores == [None, pytest.approx(probabilities(classifier, fit)[0], **EXACT), None]
    assert ClassifierReward(classifier, "polite")(["p"] * 2, [long, long]) == [None, None]


def test_positions_behind_that_of_padding(tokenizer):
    """RoBERTa's: 18 of 20, where padding is token 1. The control: it cannot read 19."""
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    settings |= {"num_hidden_layers": 1, "max_position_embeddings": 20, "pad_token_id": 1, "num_labels": 2}
    model = RobertaForSequenceClassification(RobertaConfig(**settings)).eval()
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.convert_ids_to_tokens(1)
    classifier = pipeline("text-classification", model=model, tokenizer=own, device="cpu")
    reward = ClassifierReward(classifier, "LABEL_1", with_prompt=True)
    ids = own("a" + " a" * 40)["input_ids"]
    assert reward(["a" + " a" * 30], [" a" * 10]) == [pytest.approx(of_tokens(classifier, ids[-18:])[1], **EXACT)]
    with pytest.raises((RuntimeError, IndexError)):
        of_tokens(classifier, ids[-19:])


def test_folders(tmp_path, make_classifier, texts):
    classifier = make_classifier()
    expected = pytest.approx(ClassifierReward(classifier, "polite")(*texts), **EXACT)
    classifier.save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        assert ClassifierReward(folder, "polite")(*texts) == expected
    classifier.model.save_pretrained(tmp_path / "without")
    assert len(pipeline("text-classification", model=str(tmp_path / "without")).tokenizer) == 5  # and all are special
    with pytest.raises(ValueError, match=r"no tokenizer with the classifier .*without\. Pass a pipeline"):
        ClassifierReward(tmp_path / "without", "polite")


def test_logits(make_classifier):
    """What is passed on reaches the pipeline: softmax of the logits is the probability."""
    classifier = make_classifier()
    logits = [ClassifierReward(classifier, n, function_to_apply="none")(["p"], ["Hello!"])[0] for n in LABELS]
    total = sum(math.exp(logit) for logit in logits)
    assert [math.exp(logit) / total for logit in logits] == pytest.approx(probabilities(classifier, "Hello!"))


def test_scores_of_classifiers_are_found_again(tmp_path, monkeypatch, make_classifier, pairs):
    calls = []
    call = ClassifierReward.__call__

    def counted(self, prompts, completions, **columns):
        calls.append(len(completions))
        return call(self, prompts, completions, **columns)

    monkeypatch.setattr(ClassifierReward, "__call__", counted)
    reward, rows = ClassifierReward(make_classifier(), "polite"), pairs.take(8)
    for same in (reward, reward, ClassifierReward(make_classifier(), "polite")):
        score_dataset(rows, same, cache_dir=tmp_path)
    assert calls == [16]
    score_dataset(rows, ClassifierReward(make_classifier(), "rude"), cache_dir=tmp_path)
    assert calls == [16, 16]
