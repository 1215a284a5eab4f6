"""The offline language world: what its bytes, texts, rewards, tokenizer and model promise."""

import hashlib
import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trl_lol import toy


RANK = {quality: -index for index, quality in enumerate(toy.QUALITIES)}  # higher is better


@pytest.fixture(scope="module")
def dialogues() -> Dataset:
    return toy.make_dialogues()


@pytest.fixture(scope="module")
def tokenizer(dialogues: Dataset) -> PreTrainedTokenizerFast:
    return toy.make_tokenizer(dialogues)


def flatten(dialogues: Dataset) -> tuple[list, list, list[str]]:
    rows = [(r["prompt"], c, q) for r in dialogues for c, q in zip(r["completions"], r["qualities"], strict=True)]
    return tuple(map(list, zip(*rows, strict=True)))


def pairwise_accuracy(dialogues: Dataset, reward: Callable[..., list[float]]) -> float:
    """Share of the pairs of answers to one prompt, of different quality, that the reward orders right; ties: half."""
    hits = []
    for row in dialogues:
        scores = reward([row["prompt"]] * len(row["completions"]), row["completions"])
        graded = [(RANK[quality], score) for quality, score in zip(row["qualities"], scores, strict=True)]
        for (rank_a, a), (rank_b, b) in itertools.combinations(graded, 2):
            if rank_a != rank_b:
                hits.append(0.5 if a == b else float((a > b) == (rank_a > rank_b)))
    return float(np.mean(hits))


def fingerprint() -> str:
    """Hash of all that is made from seed 3: dialogues, pairs, tokenizer and model."""
    dialogues = toy.make_dialogues(60, seed=3)
    tokenizer = toy.make_tokenizer(dialogues, vocab_size=400)
    model = toy.make_model(tokenizer, seed=3, hidden_size=32)
    digest = hashlib.sha256()
    for part in (dialogues.to_list(), toy.preference_pairs(dialogues, seed=3).to_list()):
        digest.update(repr(part).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()


# Determinism


def test_same_bytes_in_another_process() -> None:
    """Sets and dicts of strings iterate in another order under another hash seed; nothing may depend on that."""
    code = "import test_toy; print(test_toy.fingerprint())"
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here)])
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == fingerprint()


def test_seed_decides() -> None:
    dialogues = toy.make_dialogues(40, seed=0)
    assert toy.make_dialogues(40, seed=0).to_list() == dialogues.to_list()
    assert toy.make_dialogues(40, seed=1).to_list() != dialogues.to_list()
    assert toy.preference_pairs(dialogues, seed=0).to_list() == toy.preference_pairs(dialogues, seed=0).to_list()
    assert toy.preference_pairs(dialogues, seed=1).to_list() != toy.preference_pairs(dialogues, seed=0).to_list()


def test_global_random_state_is_left_alone() -> None:
    def states() -> tuple:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    fingerprint()
    assert states() == before
    torch.rand(1)  # control: the comparison does see one draw
    assert states() != before


# Dialogues and pairs


def test_dialogues(dialogues: Dataset) -> None:
    """
    1200 prompts x 4 answers. Three standard errors are 3 √(.25 · .75 / 1200) = .0375 for the harmless quarter,
    3 √(.33 · .67 / 1200) = .041 for the third with an earlier turn and 3 √(.35 · .65 / 4800) = .021 for a quality.
    """
    assert dialogues.column_names == ["prompt", "completions", "qualities", "subset"]
    assert len({str(prompt) for prompt in dialogues["prompt"]}) == len(dialogues) == 1200
    for row in dialogues:
        roles = [message["role"] for message in row["prompt"]]
        assert roles in (["user"], ["user", "assistant", "user"])
        assert [[message["role"] for message in completion] for completion in row["completions"]] == [
            ["assistant"]
        ] * 4
    assert np.mean([subset == "harmless" for subset in dialogues["subset"]]) == pytest.approx(0.25, abs=0.0375)
    assert np.mean([len(prompt) == 3 for prompt in dialogues["prompt"]]) == pytest.approx(1 / 3, abs=0.041)
    prompts, completions, qualities = flatten(dialogues)
    for quality, weight in zip(toy.QUALITIES, toy.QUALITY_WEIGHTS, strict=True):
        assert np.mean([q == quality for q in qualities]) == pytest.approx(weight, abs=0.021)
    texts = [message["content"] for messages in prompts + completions for message in messages]
    assert not any(re.search(r"[][{}|]|  | [.,?!]", text) for text in texts)  # no grammar left over
    assert all(text[0].isupper() and text[-1] in ".?!" for text in texts)


def test_answers_per_prompt() -> None:
    dialogues = toy.make_dialogues(7, answers_per_prompt=3)
    assert [len(completions) for completions in dialogues["completions"]] == [3] * 7
    assert len(toy.preference_pairs(dialogues)) == 7  # 3 // 2 = 1 pair each, the third answer left out


def test_each_question_is_about_one_case(dialogues: Dataset) -> None:
    for row in dialogues:
        last = row["prompt"][-1]["content"]
        found = [case for cases in toy.CASES.values() for case in cases if toy._occurs(case.ask, last)]
        assert len(found) == 1 and found[0] in toy.CASES[row["subset"]]


def test_preference_pairs(dialogues: Dataset) -> None:
    """
    Two pairs for each prompt with 4 answers. Where the two differ in quality, the worse one is chosen as often as the
    annotator errs: .2, and three standard errors are 3 √(.2 · .8 / 1700) = .03.
    """
    pairs = toy.preference_pairs(dialogues)
    assert pairs.column_names == ["prompt", "chosen", "rejected", "subset"]
    assert len(pairs) == 2 * len(dialogues)

    def share_of_errors(pairs: Dataset) -> float:
        errors = []
        for row, first, second in zip(dialogues, pairs.to_list()[::2], pairs.to_list()[1::2], strict=True):
            answers = [pair[side] for pair in (first, second) for side in ("chosen", "rejected")]
            assert sorted(map(str, answers)) == sorted(map(str, row["completions"]))  # each answer once
            assert first["prompt"] == second["prompt"] == row["prompt"]
            quality = {str(c): q for c, q in zip(row["completions"], row["qualities"], strict=True)}
            for pair in (first, second):
                chosen, rejected = (RANK[quality[str(pair[side])]] for side in ("chosen", "rejected"))
                if chosen != rejected:
                    errors.append(chosen < rejected)
        assert len(errors) > 1500
        return float(np.mean(errors))

    assert share_of_errors(pairs) == pytest.approx(0.2, abs=0.03)
    assert share_of_errors(toy.preference_pairs(dialogues, label_noise=0.0)) == 0
    assert share_of_errors(toy.preference_pairs(dialogues, label_noise=1.0)) == 1


# Rewards


def test_rewards_order_the_qualities(dialogues: Dataset) -> None:
    """A shallow reward errs on 8 to 20 % of the pairs, the evaluator on less than 5 %, a coin on half of them."""
    assert 0.80 < pairwise_accuracy(dialogues, toy.oracle_reward) < 0.92
    assert pairwise_accuracy(dialogues, toy.heldout_reward) > 0.95
    rng = random.Random(0)
    coin = pairwise_accuracy(dialogues, lambda prompts, completions: [rng.random() for _ in completions])
    assert coin == pytest.approx(0.5, abs=0.03)


def test_rewards_depend_on_the_prompt(dialogues: Dataset) -> None:
    """The good answer to another question has the form (0.3) and seldom the rest; the oracle minds less."""
    prompts, completions, qualities = flatten(dialogues.filter(lambda row: row["subset"] == "helpful"))
    good = [index for index, quality in enumerate(qualities) if quality == "good"]
    other = random.Random(0).sample(good, len(good))
    for reward, least in ((toy.heldout_reward, 0.5), (toy.oracle_reward, 0.4)):
        own = reward([prompts[i] for i in good], [completions[i] for i in good])
        swapped = reward([prompts[i] for i in good], [completions[i] for i in other])
        assert np.mean(own) - np.mean(swapped) > least


def test_rewards_are_different_functions(dialogues: Dataset) -> None:
    """They agree on the whole, not in the detail; and no word of the oracle's lists is in the evaluator's."""
    prompts, completions, _ = flatten(dialogues)
    oracle, heldout = toy.oracle_reward(prompts, completions), toy.heldout_reward(prompts, completions)
    assert 0.5 < np.corrcoef(oracle, heldout)[0, 1] < 0.9
    assert min(oracle) >= -3 and max(oracle) <= 3 and len(set(oracle)) > 100
    assert min(heldout) >= 0 and max(heldout) <= 1
    patterns = (toy.UNCIVIL, toy.DANGEROUS, toy.REFUSAL)
    evaluator = {word for pattern in patterns for word in re.findall("[a-z]+", pattern.pattern)}
    assert not evaluator & (toy.POLITE | toy.ACTIONS | toy.RUDE | toy.UNSAFE)
    assert evaluator & {"knife"}  # control: the words are found


def test_rewards_of_hand_written_answers() -> None:
    """
    The right remedy is worth 0.5, the device 0.2 and the form 0.3. Naming all remedies of a two-remedy answer halves
    the first: 0.25 + 0.2 + 0.3 = 0.75.
    """
    prompt = [
        {"role": "user", "content": "My kettle leaks. Any ideas?"},
        {"role": "assistant", "content": "Please replace the rubber seal under the lid."},
        {"role": "user", "content": "Thanks. Our phone has no sound. Any ideas?"},
    ]
    remedy = "turn up the volume and check the mute switch"
    expected = {
        f"Please {remedy}. That helps your phone.": 1.0,
        f"Please {remedy}. That helps your kettle.": 0.8,
        "Please replace the rubber seal under the lid. That helps your kettle.": 0.3,
        f"Please {remedy} or replace the rubber seal under the lid. That helps your phone.": 0.75,
        f"Please {remedy}. That helps your phone. Go away.": 0.3,
        f"Please {remedy}. That helps your phone. Push a knife into it.": 0.0,
        f"Please {remedy}. That helps your phone. " * 2: 0.7,
        f"Please {remedy}. That helps your": 0.5,
        "": 0.0,
    }
    scores = toy.heldout_reward([prompt] * len(expected), list(expected))
    assert scores == pytest.approx(list(expected.values()))

    request = [{"role": "user", "content": "How can I copy the badge of my boss?"}]
    assert toy.heldout_reward([request] * 3, ["I cannot.", "Ask the office for your own.", "Yes."]) == pytest.approx(
        [0.5, 0.8, 0.3]
    )

    best, silent, rude, unsafe, rambling = toy.oracle_reward(
        [prompt] * 5,
        [
            f"Sorry to hear that. Please {remedy}. Then try your phone again. I am happy to help.",
            "",
            f"Sorry to hear that. Please {remedy}, stupid. Then try your silly phone again. I am happy to help.",
            f"Sorry to hear that. Please {remedy} or poke it. Then push your phone again. I am happy to help.",
            "Please try your phone. " * 20,
        ],
    )
    assert best > 1.5 and silent == -3
    assert max(rude, unsafe, rambling) < best - 1


def test_rewards_read_text_and_messages_alike(dialogues: Dataset, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts, completions, _ = flatten(dialogues.select(range(50)))
    rendered = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    texts = [completion[0]["content"] for completion in completions]
    for reward in (toy.oracle_reward, toy.heldout_reward):
        assert reward(prompts=rendered, completions=texts, subset=None) == reward(prompts, completions)


# Tokenizer and model


def test_tokenizer(dialogues: Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    assert len(tokenizer) == 768
    again = toy.make_tokenizer(dialogues)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.chat_template == tokenizer.chat_template
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for text in ("Please hold the power button.", "Unseen: zürich, 你好\n\t42"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    prompt = dialogues[0]["prompt"]
    assert reloaded.apply_chat_template(prompt) == tokenizer.apply_chat_template(prompt)


def test_template_is_prefix_preserving(dialogues: Dataset, tokenizer: PreTrainedTokenizerFast) -> None:
    """Also with a system message, tools, a tool's turn and message fields that the template does not know."""
    odd = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi!", "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]},
        {"role": "tool", "content": "nothing", "name": "look"},
        {"role": "user", "content": "And now?"},
    ]
    answer = [{"role": "assistant", "content": "Please wait.", "thinking": "hm"}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    cases = [(odd, answer, tools), (odd, answer, None)]
    cases += [(row["prompt"], row["completions"][0], None) for row in dialogues.select(range(300))]
    assert any(len(prompt) == 3 for prompt, _, _ in cases)
    lengths = []
    for prompt, completion, tools in cases:
        start = tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(prompt + completion, tools=tools)["input_ids"]
        assert whole[: len(start)] == start
        assert whole[-1] == tokenizer.eos_token_id and len(whole) > len(start) + 1
        assert tokenizer.decode(whole[len(start) : -1]) == completion[0]["content"]
        lengths.append(len(whole))
    assert np.quantile(lengths, 0.99) < 128
    rendered = tokenizer.apply_chat_template(odd, tools=cases[0][2], tokenize=False)
    assert rendered.count(toy.END_TOKEN) == len(odd) + 1  # the tools have a turn of their own
    assert rendered.count('"look"') == 2  # in the tools and in the call


def test_model(dialogues: Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    model = toy.make_model(tokenizer)
    assert 1e6 < model.num_parameters() < 3e6
    assert model.dtype == torch.float32
    tiny = toy.make_model(tokenizer, seed=1, hidden_size=32)
    assert tiny.num_parameters() < 5e4
    assert not torch.equal(toy.make_model(tokenizer, seed=2, hidden_size=32).lm_head.weight, tiny.lm_head.weight)
    generation = tiny.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    tiny.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, tiny.lm_head.weight)


def test_generation_with_left_padding(dialogues: Dataset, tokenizer: PreTrainedTokenizerFast) -> None:
    """Left-padded, a batch continues greedily as each of its prompts does alone; right-padded, it does not."""
    model = toy.make_model(tokenizer, hidden_size=32)
    prompts = sorted(dialogues["prompt"][:40], key=lambda prompt: len(str(prompt)))[::13]

    def generate(prompts: list, padding_side: str = "left") -> list[list[int]]:
        texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side=padding_side)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        return output[:, inputs["input_ids"].size(1) :].tolist()

    alone = [continuation for prompt in prompts for continuation in generate([prompt])]
    assert generate(prompts) == alone
    assert generate(prompts, padding_side="right") != alone
