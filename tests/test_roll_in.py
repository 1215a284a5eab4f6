"""Tokens of reference completions behind those of their prompts: chat templates and tokenizers of several kinds."""

from copy import deepcopy

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from trl_lol import DRPOTrainer
from trl_lol.online.roll_in import tokenize_reference


CHAT = [{"role": "user", "content": "Hello!"}]
# As Qwen3's and DeepSeek-R1's: thoughts have a place of their own in an answer, or are taken out of it
THINKING = """{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""  # noqa: E501
DROPPING = """{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"""  # noqa: E501


@pytest.fixture
def characters():
    """A tokenizer that writes a space as "▁" and puts one before a text, as SentencePiece does; a token for each
    character, and tokens for some pairs and for tags."""
    merged = ["lu", "▁b"]
    letters = [chr(c) for c in range(33, 123)] + ["▁", "\n"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *letters, *merged])}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in merged], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def roll_in(tokenizer, prompt, reference):
    """Prompt and reference as they stand behind each other, as text."""
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
    else:
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    ids = tokenize_reference(prompt, reference, prompt_ids, tokenizer, [tokenizer.eos_token_id])
    return tokenizer.decode(prompt_ids + ids).removeprefix(" ")


@pytest.mark.parametrize("prompt", ["The sky is", "The sky is ", "The sky is b", "The sky is bl"])
def test_text_is_what_stands_in_the_dataset(characters, prompt):
    """Also where the prompt ends in a space or within a token, and the tokenizer begins a text by a space."""
    whole = "The sky is blue and hot"
    assert roll_in(characters, prompt, whole.removeprefix(prompt)) == whole
    assert characters.decode(characters("blue", add_special_tokens=False)["input_ids"]) == " blue"  # Control


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("Hi there", "<think></think>Hi there"),
        ([{"role": "assistant", "content": "Hi there"}], "<think></think>Hi there"),
        (
            [{"role": "assistant", "content": "Hi there", "reasoning_content": "A greeting."}],
            "<think>A greeting.</think>Hi there",
        ),
        ([{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}], "<think></think>Hi"),
    ],
)
def test_the_message_goes_through_the_template(characters, reference, expected):
    characters.chat_template = THINKING
    assert roll_in(characters, CHAT, reference) == f"<user>Hello!</s><assistant>{expected}"


def test_a_template_that_does_not_render_the_answer_as_it_is(characters, caplog):
    """A template that takes thoughts out of an answer cannot continue it, and one that opens them cannot begin it: the
    answer's own tokens follow the prompt, and a warning says so."""
    characters.chat_template = DROPPING
    prompt = "<user>Hello!</s><assistant><think>"
    assert roll_in(characters, CHAT, "A greeting.</think>Hi there") == f"{prompt}A greeting.</think>Hi there"
    assert "the prompt, which ends with" in caplog.text


def test_tokens_that_run_into_each_other_are_no_fault_of_the_template(characters, caplog):
    """ "l" and "uck" are the tokens "lu", "c", "k" when they stand together."""
    characters.chat_template = THINKING.replace("<think>", "l").replace("<assistant>{% e", "<assistant>l{% e")
    characters.chat_template = characters.chat_template.replace("{{ m.reasoning_content or '' }}</think>", "")
    assert roll_in(characters, CHAT, "uck") == "<user>Hello!</s><assistant>luck"
    assert "chat template" not in caplog.text


def test_nothing_behind_the_first_eos(characters):
    characters.chat_template = THINKING
    for prompt, begin in ((CHAT, "<user>Hello!</s><assistant><think></think>"), ("The sky is", "The sky is")):
        assert roll_in(characters, prompt, " red</s> and blue") == f"{begin} red"


def test_fields_of_tokens_grow_with_the_prompt(build_online_trainer, tokenizer, monkeypatch):
    """`token_type_ids` and the like of chat prompts go to `generate` as they come from the tokenizer."""
    typed = deepcopy(tokenizer)
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = Dataset.from_list([{"prompt": CHAT, "reference": "It is on the table, and so is the kettle."}] * 8)
    size = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, eos_token_id=tokenizer.eos_token_id, bos_token_id=None))
    trainer = build_online_trainer(DRPOTrainer, model, train_dataset=rows, num_iterations=1)
    trainer.processing_class = typed
    shapes = []
    generate = model.generate

    def record(**kwargs):
        shapes.append({name: tuple(kwargs[name].shape) for name in ("input_ids", "token_type_ids", "attention_mask")})
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", record)
    trainer.train()
    assert len(shapes) == 3 and all(len(set(shape.values())) == 1 for shape in shapes)
