"""The value head: invariances, what it learns, what it must not learn, and the estimator around it."""

import dataclasses
import inspect
import logging
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import LORA
from peft import get_peft_model
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from trl_lol._trl import add_fused_lm_head
from trl_lol.value import (
    PromptValueHead,
    StateValueHead,
    ValueCausalLMOutput,
    ValueEstimator,
    add_value_head,
    cross_fit_values,
    fit_value_head,
    predict_values,
    prompt_hidden_states,
    r_squared,
)


@pytest.fixture(scope="module")
def model():
    """A random Llama whose small initial weights leave the tokens readable in its hidden states, as training does."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def random_prompts(num_prompts, vocab_size, seed=0):
    """Random tokens from 20 on, and at a random place one of the tokens 5 to 12."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size=()):
        return torch.randint(low, high, size, generator=generator)

    prompts = []
    for _ in range(num_prompts):
        prompt = draw(20, vocab_size, (int(draw(4, 24)),))
        prompt[draw(0, len(prompt))] = draw(5, 13)
        prompts.append(prompt.tolist())
    return prompts


def token_rewards(prompts):
    """A reward that the prompt determines: which of the tokens 5 to 12 it holds."""
    return torch.tensor([next(t for t in prompt if t < 20) / 8 for prompt in prompts])


def states_of(model, prompts, batch_size=16):
    states = [None] * len(prompts)
    for batch, hidden in prompt_hidden_states(model, prompts, batch_size):
        for i, h in zip(batch, hidden, strict=True):
            states[i] = h
    return states


@pytest.fixture(scope="module")
def states(model):
    return states_of(model, random_prompts(400, model.config.vocab_size))


@pytest.fixture(scope="module")
def fitted(states):
    rewards = torch.stack([h.mean() for h in states])
    return fit_value_head(states, rewards, learning_rate=1e-2)


def test_prediction_does_not_depend_on_batch_order_or_padding(model, fitted):
    prompts = random_prompts(40, model.config.vocab_size, seed=1)
    one_by_one = predict_values([fitted], states_of(model, prompts, batch_size=1), batch_size=1)
    batched = predict_values([fitted], states_of(model, prompts, batch_size=40), batch_size=40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = predict_values([fitted], states_of(model, [prompts[i] for i in order], batch_size=7), batch_size=11)
    assert one_by_one.std() > 1e-3
    torch.testing.assert_close(batched, one_by_one, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shuffled, one_by_one[order], atol=1e-6, rtol=1e-5)


def test_what_padding_holds_is_ignored_on_either_side(fitted, states):
    h, width = states[0], len(states[0]) + 5
    expected = predict_values([fitted], [h])
    for side in ("left", "right"):
        mask = pad_sequence([torch.ones(len(h)), torch.ones(width)], batch_first=True, padding_side=side)[:1]
        hidden = torch.full((1, width, h.size(1)), torch.nan)
        hidden[mask.bool()] = h
        torch.testing.assert_close(fitted(hidden, mask), expected)
        # Control: without the mask the padding takes part
        assert not torch.allclose(fitted(hidden.nan_to_num(0.0), torch.ones(1, width)), expected)


def test_prediction_has_no_dropout_and_fitting_leaves_the_random_state_alone(states):
    rewards = torch.stack([h.mean() for h in states])
    before = torch.get_rng_state()
    head = fit_value_head(states[:64], rewards[:64], num_train_epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(predict_values([head.train()], states[:8]), predict_values([head.train()], states[:8]))
    mask = torch.ones(1, len(states[0]))
    head.train()  # Control: dropout is there while fitting
    assert not torch.equal(head(states[0][None], mask), head(states[0][None], mask))
    again = fit_value_head(states[:64], rewards[:64], num_train_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True))


def test_unfitted_head_predicts_the_mean_reward(states):
    """No epoch is better than epoch 0, so the head stays at its start: the mean of the rewards, 1.25, or with a range
    [0, 5] the sigmoid of its logit."""
    rewards = torch.tensor([0.5, 1.0, 1.5, 2.0] * 4)
    for value_range in (None, (0.0, 5.0)):
        head = fit_value_head(
            states[:16], rewards, num_train_epochs=0, validation_fraction=0.0, value_range=value_range
        )
        torch.testing.assert_close(predict_values([head], states[:16]), torch.full((16,), 1.25))


def test_bounded_head_stays_in_its_range(states):
    rewards = (torch.stack([h.mean() for h in states[:64]]) > 0).float() * 5
    head = fit_value_head(states[:64], rewards, value_range=(0.0, 5.0), learning_rate=1e-2)
    values = predict_values([head], states)
    assert values.min() >= 0 and values.max() <= 5 and values.std() > 0.5


def test_learns_what_the_prompt_determines_and_nothing_from_shuffled_rewards(model):
    prompts = random_prompts(800, model.config.vocab_size, seed=2)
    hidden = states_of(model, prompts, batch_size=64)
    rewards = token_rewards(prompts)
    _, values = cross_fit_values(hidden, rewards)
    assert r_squared(values, rewards) >= 0.8
    for seed in range(3):
        shuffled = rewards[torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))]
        _, values = cross_fit_values(hidden, shuffled)
        assert -0.1 <= r_squared(values, shuffled) <= 0.05


def test_cross_fitting_keeps_advantages_alive_with_one_completion_per_prompt(states):
    """Rewards that the prompts say nothing about have a standard deviation of 1, and so have their advantages over the
    mean. A head that has seen the rewards memorises them, and advantages over its values are near 0: the control."""
    rewards = torch.randn(len(states[:96]), generator=torch.Generator().manual_seed(0))
    settings = {"num_train_epochs": 120, "validation_fraction": 0.0, "learning_rate": 3e-3}
    _, held_out = cross_fit_values(states[:96], rewards, num_folds=2, **settings)
    _, in_sample = cross_fit_values(states[:96], rewards, num_folds=1, **settings)
    assert (rewards - held_out).abs().mean() > 0.5
    assert (rewards - in_sample).abs().mean() < 0.1


def test_every_prompt_is_predicted_by_a_head_that_has_not_seen_it(states):
    """Changing one prompt's reward changes the head of the other fold only, never that prompt's own value."""
    rewards = torch.randn(20, generator=torch.Generator().manual_seed(0))
    settings = {"num_train_epochs": 2, "validation_fraction": 0.0}
    _, before = cross_fit_values(states[:20], rewards, **settings)
    _, in_sample_before = cross_fit_values(states[:20], rewards, num_folds=1, **settings)
    for i in (0, 7, 19):
        changed = rewards.clone()
        changed[i] += 10
        _, after = cross_fit_values(states[:20], changed, **settings)
        _, in_sample_after = cross_fit_values(states[:20], changed, num_folds=1, **settings)
        assert after[i] == before[i] and not torch.equal(after, before)
        assert in_sample_after[i] != in_sample_before[i]


def test_weights_count_completions(states):
    """Mean reward 0 of one completion and 1 of three: the weighted mean is 0.75."""
    head = fit_value_head(
        states[:2], torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]), num_train_epochs=0, validation_fraction=0.0
    )
    assert head.reward_mean.item() == 0.75


def test_r_squared():
    """Residuals (0, 0, 1), deviations from the mean 2 (−1, 0, 1): 1 − 1/2."""
    assert r_squared(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])) == 0.5


@pytest.fixture
def estimator(model, tmp_path):
    """Makes estimators on one cache folder, over a reference policy that counts the prompts it reads."""

    def backbone(input_ids, **kwargs):
        policy.num_read += len(input_ids)
        return model.base_model(input_ids=input_ids, **kwargs)

    @contextmanager
    def reference():
        yield policy

    policy = SimpleNamespace(base_model=backbone, config=model.config, device=model.device, num_read=0)
    make = partial(ValueEstimator, reference, cache_dir=tmp_path, batch_size=16, max_prompts=60)
    return make, policy


def test_estimator_reads_each_prompt_once_and_then_from_the_cache(estimator, model):
    make, policy = estimator
    prompts = random_prompts(100, model.config.vocab_size, seed=3)
    rewards = token_rewards(prompts)
    first = make()
    first.fit(prompts, rewards)
    values = first.predict_sharded(prompts, "train")
    assert policy.num_read == 100  # 60 to fit the heads, 40 to predict
    again = make()
    again.fit(prompts, rewards)
    assert torch.equal(again.predict_sharded(prompts, "train"), values) and policy.num_read == 100
    for changed, seen in ((make(seed=1), rewards), (make(cache_key="other weights"), rewards), (make(), rewards + 1)):
        changed.fit(prompts, seen)
        changed.predict_sharded(prompts, "train")
    assert policy.num_read == 400  # anything that matters changes the key


def test_estimator_predicts_prompts_beyond_the_fitted_ones(estimator, model):
    prompts = random_prompts(500, model.config.vocab_size, seed=4)
    rewards = token_rewards(prompts)
    estimator = estimator[0](max_prompts=400)
    estimator.fit(prompts, rewards)
    values = estimator.predict_sharded(prompts, "train")
    assert r_squared(values[:400], rewards[:400]) > 0.5 and r_squared(values[400:], rewards[400:]) > 0.5
    held_out = random_prompts(100, model.config.vocab_size, seed=5)
    predicted = estimator.predict_sharded(held_out, "eval")
    assert r_squared(predicted, token_rewards(held_out)) > 0.5
    torch.testing.assert_close(estimator.predict(held_out[:3]), predicted[:3], atol=1e-5, rtol=1e-5)


def test_heads_fit_narrow_models():
    """Eight heads do not divide a width of 6; two do."""
    head = PromptValueHead(6)
    assert head.attention.num_heads == 2
    assert head(torch.randn(3, 4, 6), torch.ones(3, 4)).shape == (3,)


# --- Values of states, online


@pytest.fixture
def with_head(tiny_model):
    """A model with TRL's fused head and a value head that has left zero, and its ids and labels."""
    model = tiny_model().eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    head = add_value_head(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.layers[-1].weight.normal_(generator=generator)
        head.layers[-1].bias.fill_(0.25)
    ids = torch.randint(6, 700, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [0, 0] + [1] * 5, [1] * 4 + [0] * 3])
    return model, {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_state_values_are_computed_in_float32():
    """0 until trained. Then, with an inner layer that adds up and passes on, and an outer one of w = 1, b = ½, where
    GELU is the identity to float32: (100 + 20 + 3) · 3 + ½."""
    head = StateValueHead(3)
    hidden = torch.tensor([[[100.0, 20.0, 3.0], [0.0, -1.0, 1.0]]])
    assert torch.equal(head(hidden), torch.zeros(1, 2))
    inner, _, outer = head.layers
    for parameter, value in ((inner.weight, 1.0), (inner.bias, 0.0), (outer.weight, 1.0), (outer.bias, 0.5)):
        torch.nn.init.constant_(parameter, value)
    assert head(hidden).tolist() == [[369.5, 0.5]]
    # bfloat16 has 8 bits: 256 + 1 is 256 there
    hidden = torch.tensor([[[256.0, 1.0, 0.0]]], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(hidden).dtype == torch.float32 and head(hidden).item() == 3 * 257 + 0.5
        assert torch.nn.functional.linear(hidden, outer.weight).item() == 256.0  # control


def test_state_value_heads_begin_equal():
    """On every rank, whatever the random state there, which is left alone."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = StateValueHead(4).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(first[name], x) for name, x in StateValueHead(4).state_dict().items())
    assert first["layers.0.weight"].abs().max() > 0


def test_values_and_log_probabilities_come_from_one_forward(with_head):
    model, inputs = with_head
    with torch.no_grad():
        hidden = model.model(**{n: inputs[n] for n in ("input_ids", "attention_mask")}).last_hidden_state
        plain = model(**inputs, fused_lm_head=True)
    forwards = []
    model.model.register_forward_hook(lambda *args: forwards.append(args))
    outputs = model(**inputs, fused_lm_head=True, return_values=True)
    assert len(forwards) == 1
    assert isinstance(outputs, ValueCausalLMOutput) and type(plain) is not ValueCausalLMOutput
    torch.testing.assert_close(outputs.state_values, model.value_head(hidden))
    assert outputs.state_values.std() > 0.1
    for name in plain:
        assert torch.equal(outputs[name], plain[name]), name
    # Both reach the trunk
    for output in (outputs.log_probs, outputs.state_values):
        (gradient,) = torch.autograd.grad(output.sum(), model.model.embed_tokens.weight, retain_graph=True)
        assert gradient.abs().max() > 0


def test_the_values_field_is_one_that_ddp_finds(with_head):
    """DDP walks over what the output holds, which for a model output are its declared fields."""
    model, inputs = with_head
    outputs = model(**inputs, fused_lm_head=True, return_values=True)
    assert "state_values" in {field.name for field in dataclasses.fields(outputs)}
    assert any(value is outputs.state_values for value in outputs.values())  # which is a method, hence the name


def test_without_return_values_nothing_has_changed(with_head, tiny_model):
    model, inputs = with_head
    bare = tiny_model().eval()
    with torch.no_grad():
        ours, expected = model(**inputs), bare(**inputs)
        assert torch.equal(ours.logits, expected.logits) and torch.equal(ours.loss, expected.loss)
        generate = {"max_new_tokens": 4, "do_sample": False}
        prompt = {"input_ids": inputs["input_ids"][:1]}
        assert torch.equal(model.generate(**prompt, **generate), bare.generate(**prompt, **generate))
    assert "return_values" not in inspect.signature(model.forward).parameters
    with pytest.raises(ValueError, match="not used by the model"):  # `generate` still validates
        model.generate(**prompt, **generate, no_such_argument=1)


def test_the_hook_goes_also_after_an_error(with_head):
    model, inputs = with_head
    for _ in range(2):
        with pytest.raises(ValueError, match="exactly one"):
            model(**inputs, fused_lm_head=True, return_values=True, inputs_embeds=0)
        model(**inputs, fused_lm_head=True, return_values=True)
    assert not model.base_model._forward_hooks


def test_the_head_is_not_saved_with_the_model(with_head, tmp_path, caplog):
    model, inputs = with_head
    assert {n for n, _ in model.named_parameters() if "value_head" in n} == {
        f"value_head.layers.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    model.save_pretrained(tmp_path)
    assert not any("value_head" in name for name in load_file(tmp_path / "model.safetensors"))
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_values_through_an_adapter(with_head):
    """The wrapper passes the argument on, and the values are those of the adapted trunk."""
    model, inputs = with_head
    inputs |= {"fused_lm_head": True, "return_values": True}
    with torch.no_grad():
        base = model(**inputs).state_values
        adapted = get_peft_model(model, LORA)
        assert torch.equal(adapted(**inputs).state_values, base)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        assert not torch.allclose(adapted(**inputs).state_values, base, atol=1e-2)
        with adapted.disable_adapter():
            assert torch.equal(adapted(**inputs).state_values, base)
