"""Shared prompts: the layout, the same numbers as with a prompt for each completion, and what cannot be shared."""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
from accelerate.utils import is_compiled_module
from conftest import LORA, SGD, cpu_args, distance, logged, run
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    RwkvConfig,
)

from trl_lol import ALoLConfig, ALoLTrainer, CoPGConfig, CoPGTrainer
from trl_lol._trl import add_fused_lm_head
from trl_lol.data import DataCollatorForGroups, batches_by_prompt
from trl_lol.offline.trainer import _precision
from trl_lol.shared_prompts import (
    BranchMask,
    attention_kwargs,
    check_architecture,
    check_log_probs,
    completion_tokens,
    dense_mask,
    is_worth_sharing,
    per_completion,
)


SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=64),
    "gemma": GemmaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, sliding_window=64, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=64, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(
        vocab_size=97, n_positions=128, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        initializer_range=0.2,
    ),
}  # fmt: skip
ATTENTION = [
    (name, attention)
    for name in CONFIGS
    for attention in ("sdpa", "eager")
    if (name, attention) != ("gemma2", "sdpa")  # caps its scores, which SDPA cannot
]


def make_model(name="llama", attention="sdpa", **changes):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name]) if isinstance(name, str) else name
    for field, value in changes.items():
        setattr(config, field, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    add_fused_lm_head(model)
    return model


def make_groups(shape, seed=0):
    """Groups of random tokens: for each the length of its prompt and those of its completions."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(3, 97, (length,), generator=generator).tolist()

    return [{"prompt_ids": tokens(p), "completion_ids": [tokens(c) for c in cs]} for p, cs in shape]


RAGGED = make_groups([(9, [3, 7, 1]), (4, [5, 2]), (1, [2, 4]), (12, [6]), (0, [3, 2])])


def read(model, batch, **replaced):
    """Log-probabilities of the completion tokens of a batch, one after the other."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    kwargs = {**attention_kwargs(batch, model), **replaced}
    log_probs = model(input_ids=batch["input_ids"], labels=labels, **kwargs, fused_lm_head=True).log_probs
    return per_completion(log_probs, batch)[completion_tokens(batch).bool()]


def gradients(model, log_probs):
    """Gradients of a loss in which every token counts differently."""
    model.zero_grad()
    (log_probs * torch.linspace(-1, 1, len(log_probs))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(a, b):
    """Largest difference of two models' gradients beside the largest of each."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-6)).item() for name in a)


# ---- The layout ----


def test_layout():
    """
    A prompt of three tokens with completions of two and one, and one of two with one of one:

        place      0 1 | 2 3 4 | 5 6        0 | 1 2
        token      5 6 | 7 8 9 | 7 1        4 | 3 2
        position   0 1 | 2 3 4 | 2 3        0 | 1 2
    """
    examples = [
        {
            "prompt_ids": [5, 6, 7],
            "completion_ids": [[8, 9], [1]],
            "rewards": [1, 0],
            "ref_logps": [[-1.0, -2.0], [-3.0]],
        },
        {"prompt_ids": [4, 3], "completion_ids": [[2]], "rewards": [2], "ref_logps": [[-4.0]]},
    ]
    batch = DataCollatorForGroups(pad_token_id=0).collate(examples, share=True)
    expected = {
        "group_ids": torch.tensor([0, 0, 1]),
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 7, 1], [4, 3, 2, 0, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 2, 3], [0, 1, 2, 0, 0, 0, 0]]),
        "completion_mask": torch.tensor([[0, 0, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0]]),
        "branch_ids": torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, -1, -1, -1, -1]]),
        "branch_index": torch.tensor([[2, 3, 4], [5, 6, -1], [1, 2, -1]]),
        "rewards": torch.tensor([1.0, 0.0, 2.0]),
        "ref_logps": torch.tensor([[-1.0, -2.0], [-3.0, 0.0], [-4.0, 0.0]]),
    }
    assert batch.keys() == expected.keys()
    assert next(iter(batch)) == "group_ids"  # whose length Trainer takes for the number of samples
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype and torch.equal(batch[name], tensor), name
    assert completion_tokens(batch).tolist() == [[1, 1], [1, 0], [1, 0]]
    assert per_completion(torch.arange(12.0).view(2, 6), batch).tolist() == [[2, 3], [5, 0], [7, 0]]
    attends = dense_mask(batch["branch_ids"])[:, 0].int().tolist()
    assert attends[0] == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1],
    ]
    assert attends[1][2] == [1, 1, 1, 0, 0, 0, 0]


def test_layout_is_cut_where_sequences_are():
    """At `max_length=4` the first completion loses its second token."""
    examples = [{"prompt_ids": [5, 6, 7], "completion_ids": [[8, 9], [1]]}]
    batch = DataCollatorForGroups(0, max_length=4, pad_to_multiple_of=4).collate(examples, share=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 7, 1, 0, 0]]
    assert batch["branch_index"].tolist() == [[2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("prompts", "completions", "saved"),
    [
        ([147], [[45, 45]], True),  # 238 tokens of 384
        ([4], [[32] * 4], False),  # 135 of 144
        ([40], [[10]], False),  # 50 of 50: nothing to share
        ([0], [[10, 10]], False),
        ([20, 400], [[10] * 4, [10]], True),  # 2 · 410 padded tokens of 5 · 410
        ([20, 20], [[10] * 8, [10]], False),  # 2 · 107 padded tokens of 9 · 30: 79 %, see below
    ],
)
def test_shares_what_is_worth_it(prompts, completions, saved):
    tokens = [max(p - 1, 0) + sum(min(p, 1) + c for c in cs) for p, cs in zip(prompts, completions, strict=True)]
    batches = {
        share: DataCollatorForGroups(0).collate(make_groups(zip(prompts, completions, strict=True)), share)
        for share in (True, False)
    }
    assert batches[True]["input_ids"].shape == (len(prompts), max(tokens))
    fraction = batches[True]["input_ids"].numel() / batches[False]["input_ids"].numel()
    assert is_worth_sharing(prompts, completions) == (fraction <= 0.85)
    if prompts != [20, 20]:
        assert is_worth_sharing(prompts, completions) == saved


def test_what_attention_costs_is_weighed():
    """
    Four completions of 200 tokens after 60: 863 tokens instead of 1040, 83 %. A branch computes 201 · 261 pairs, more
    than half of the 260² of a sequence, and a dense mask 863² instead of 4 · 260². To a wide model it is less.
    """
    groups = [60], [[200] * 4]
    assert is_worth_sharing(*groups)
    assert is_worth_sharing(*groups, pairs_per_token=6 * 4096)
    assert not is_worth_sharing(*groups, pairs_per_token=6 * 64)
    assert not is_worth_sharing(*groups, pairs_per_token=6 * 512, is_dense=True)
    for is_dense in (False, True):
        assert is_worth_sharing([147], [[45, 45]], 6 * 64, is_dense)
    # Every branch is as wide as the widest of the batch, and every prompt as long as the longest
    mixed = [1500, 40], [[40] * 12, [1500] * 2]
    assert is_worth_sharing(*mixed) and not is_worth_sharing(*mixed, pairs_per_token=6 * 64)


# ---- The same numbers ----


@pytest.mark.parametrize(("name", "attention"), ATTENTION)
def test_equal_to_a_prompt_for_each_completion(name, attention):
    """Log-probabilities and gradients on ragged groups, among them a prompt of one token and one of none."""
    model = make_model(name, attention)
    repeated, shared = (DataCollatorForGroups(0).collate(RAGGED, share) for share in (False, True))
    expected, found = read(model, repeated), read(model, shared)
    assert len(found) == 3 + 7 + 1 + 5 + 2 + 2 + 4 + 6 + 2 + 1  # without a prompt, nothing predicts the first token
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert relative(gradients(model, found), gradients(model, expected)) <= 1e-5
    for wrong in (
        {"attention_mask": shared["attention_mask"]},  # branches see each other
        {"position_ids": torch.arange(shared["input_ids"].size(1))[None]},
    ):
        assert (read(model, shared, **wrong) - expected).abs().max() > 1e-2  # Control


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_equal_with_lora_and_gradient_checkpointing(use_reentrant):
    model = get_peft_model(make_model(), LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    repeated, shared = (DataCollatorForGroups(0).collate(RAGGED, share) for share in (False, True))
    of_repeated, of_shared = (gradients(model, read(model, batch)) for batch in (repeated, shared))
    assert all("lora" in name for name in of_shared)
    assert relative(of_shared, of_repeated) <= 1e-5


lengths = st.tuples(st.integers(0, 9), st.lists(st.integers(1, 6), min_size=1, max_size=4))


@settings(deadline=None, max_examples=40)
@given(st.lists(lengths, min_size=1, max_size=4), st.integers(1, 3))
def test_two_parts_are_the_dense_mask(shape, multiple):
    """Attention of random vectors, groups of any shape: outputs and gradients, for every token but padding."""
    batch = DataCollatorForGroups(0, pad_to_multiple_of=multiple).collate(make_groups(shape), share=True)
    mask = attention_kwargs(batch, make_model())["attention_mask"]
    assert type(mask) is BranchMask
    rows, length = batch["input_ids"].shape
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(rows, 2, length, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    is_token = (batch["branch_ids"] >= 0)[:, None, :, None]
    results = []
    for attn_mask in (mask, dense_mask(batch["branch_ids"])):
        query, key, value = (x.clone().requires_grad_() for x in vectors[:3])
        output = scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=0.7) * is_token
        (output * vectors[3]).sum().backward()
        results.append((output.detach(), query.grad, key.grad, value.grad))
    assert "dense" not in vars(mask.branches)  # was not written out
    torch.testing.assert_close(*results)


def test_everything_else_sees_the_dense_mask():
    batch = DataCollatorForGroups(0).collate(RAGGED, share=True)
    mask = attention_kwargs(batch, make_model())["attention_mask"]
    dense = dense_mask(batch["branch_ids"])
    assert (mask.shape, mask.dtype, mask.ndim, mask.device) == (dense.shape, dense.dtype, 4, dense.device)
    assert isinstance(mask, torch.Tensor) and "dense" not in vars(mask.branches)
    for use in (
        lambda m: m[:, :, 2:, :5],
        lambda m: ~m,
        lambda m: torch.where(m, 1.0, 0.0),
        lambda m: m.to(torch.int),
    ):
        assert type(use(mask)) is torch.Tensor
        assert torch.equal(use(mask), use(dense))
    query = torch.randn(len(RAGGED), 2, 3, 4)  # not the whole of the rows, as with a cache
    key = torch.randn(len(RAGGED), 2, dense.size(3), 4)
    found, expected = (scaled_dot_product_attention(query, key, key, attn_mask=m[:, :, :3]) for m in (mask, dense))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_is_as_near(dtype, attention):
    """As near to single precision as with a prompt for each completion, up to half as much again."""
    repeated, shared = (DataCollatorForGroups(0).collate(RAGGED[:2], share) for share in (False, True))
    model = make_model(attention=attention)
    with torch.no_grad():
        exact = read(model, repeated)
        model.to(dtype)
        errors = [(read(model, batch).float() - exact).abs().mean() for batch in (repeated, shared)]
    assert errors[1] <= 1.5 * errors[0]


# ---- Through the trainers ----


@pytest.fixture
def build(build_trainer, short_groups):
    """Makes a CoPG trainer on 30 groups with prompts of 20 tokens and more, and completions of a few."""
    return partial(build_trainer, CoPGTrainer, train_dataset=short_groups, eval_dataset=short_groups.take(7), **SGD)


def layouts_of(trainer):
    """Whether each batch that the trainer makes from now on shares prompts."""
    seen, collate = [], type(trainer.data_collator).collate
    trainer.data_collator.collate = lambda examples, share: (
        seen.append(share) or collate(trainer.data_collator, examples, share)
    )
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precompute_ref_log_probs": True},
        {"peft_config": LORA},
        {"peft_config": LORA, "gradient_checkpointing": True, "precompute_ref_log_probs": True},
    ],
    ids=lambda settings: "-".join(settings) or "full",
)
def test_copg_trains_as_with_repeated_prompts(build, tmp_path, settings):
    """The same losses, weights, metrics and evaluation, at the first and at later steps."""
    repeated = build(output_dir=tmp_path / "repeated", **settings)
    shared = build(output_dir=tmp_path / "shared", shared_prompts=True, **settings)
    layouts = layouts_of(shared)
    (losses, weights), (expected, expected_weights) = run(shared), run(repeated)
    assert set(layouts) == {True}
    assert losses == pytest.approx(expected, abs=1e-6)
    assert distance(weights, expected_weights) <= 1e-6
    assert set(logged(shared, "shared_prompts")) == {1.0} and logged(repeated, "shared_prompts") == []
    for name in ("rewards/accuracies", "logratio/mean", "logps/mean", "entropy", "mean_token_accuracy"):
        # At the first step all log-ratios are ties, which rounding breaks
        assert logged(shared, name)[1:] == pytest.approx(logged(repeated, name)[1:], abs=1e-4), name
    assert logged(shared, "num_tokens")[-1] < logged(repeated, "num_tokens")[-1]
    del layouts[:]
    assert shared.evaluate()["eval_loss"] == pytest.approx(repeated.evaluate()["eval_loss"], abs=1e-6)
    assert layouts == [True]
    # Control: a run on other data is further away
    other = build(output_dir=tmp_path / "other", seed=1, shared_prompts=True, **settings)
    assert distance(run(other)[1], expected_weights) > 1e-4


def test_alol_reads_the_reference_once_per_prompt(build_trainer, dialogues, tmp_path):
    """Groups of four, of which the filter leaves some, come together again for the reference, and only for it."""
    scored = Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completions": [c[:1] for c in row["completions"]],
                "rewards": [3.0, 1.0, 2.0, 0.5],
            }
            for row in dialogues.take(12)
        ]
    )
    built = {
        shares: build_trainer(
            ALoLTrainer, output_dir=tmp_path / str(shares), train_dataset=scored, baseline="group_mean",
            precompute_ref_log_probs=True, shared_prompts=shares, precompute_ref_batch_size=8,
        )
        for shares in (False, True)
    }  # fmt: skip
    rows = {shares: trainer.train_dataset for shares, trainer in built.items()}
    assert len(rows[True]) == 2 * 12 and rows[True]["completion_ids"] == rows[False]["completion_ids"]
    for found, expected in zip(rows[True]["ref_logps"], rows[False]["ref_logps"], strict=True):
        assert found[0] == pytest.approx(expected[0], abs=1e-5)
    layouts = layouts_of(built[True])
    assert run(built[True])[0] == pytest.approx(run(built[False])[0], rel=1e-5)
    assert not any(layouts)


def test_rows_of_a_prompt_come_together():
    """Rows 0, 2 and 3 have the same prompt; a batch has room for two rows; the longest come first."""
    prompts, completions = [[5, 6], [7], [5, 6], [5, 6]], [[[1]], [[1] * 9], [[1] * 3], [[1] * 2]]
    assert batches_by_prompt(prompts, completions, 2, share=True) == [[[1]], [[2, 3]], [[0]]]
    assert batches_by_prompt(prompts, completions, 2) == [[[1], [2]], [[3], [0]]]
    assert batches_by_prompt(prompts, completions, 4, share=True) == [[[1], [2, 3, 0]]]


def test_what_is_longer_than_what_was_tried_is_repeated(build, short_groups):
    """Nothing is known of how the model reads longer sequences, and nothing has to be: evaluation is the same."""
    long = short_groups.take(4).map(
        lambda row: {"completions": [[{**c[0], "content": 12 * c[0]["content"]}] for c in row["completions"]]}
    )
    trainer, repeated = build(shared_prompts=True), build()
    layouts = layouts_of(trainer)
    found = trainer.evaluate(long)["eval_loss"]
    assert layouts == [False]
    assert found == pytest.approx(repeated.evaluate(long)["eval_loss"], rel=1e-6)


def test_the_longest_group_may_be_one_to_evaluate_on(build, short_groups):
    long = short_groups.take(4).map(
        lambda row: {"completions": [[{**c[0], "content": 9 * c[0]["content"]}] for c in row["completions"]]}
    )
    trainer = build(shared_prompts=True, eval_dataset={"short": short_groups.take(4), "long": long})
    rows = trainer.eval_dataset["long"]
    longest = max(len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) for row in rows)
    assert trainer.data_collator.max_shared_length == longest
    layouts = layouts_of(trainer)
    trainer.evaluate()
    assert layouts == [True, True]


def test_a_cached_reference_is_found_by_its_layout(build):
    """Log-probabilities differ in the last bits between layouts, and a run that goes on is to find its own."""
    build(precompute_ref_log_probs=True)
    trainer = build(precompute_ref_log_probs=True, shared_prompts=True)
    assert len(list(trainer.cache_dir.glob("ref_logps_train*"))) == 2


# ---- What cannot be shared ----


def by_place(model):
    """Makes a model look at how far into its row a token stands, as a local window or a recurrent layer would."""
    attention = model.model.layers[-1].self_attn
    forward = attention.forward

    def changed(hidden_states, *args, **kwargs):
        places = torch.arange(hidden_states.size(1)).to(hidden_states)[:, None]
        return forward(hidden_states + torch.sin(places), *args, **kwargs)

    attention.forward = changed
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trying_finds_a_model_that_goes_by_place(dtype):
    group = make_groups([(20, [8, 6, 5])])
    repeated, shared = (DataCollatorForGroups(0).collate(group, share) for share in (False, True))

    def check(model):
        def log_probs(batch, replaced):
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            kwargs = {**attention_kwargs(batch, model), **replaced}
            out = model(input_ids=batch["input_ids"], labels=labels, **kwargs, fused_lm_head=True)
            return per_completion(out.log_probs, batch)

        with torch.no_grad():
            check_log_probs(log_probs, repeated, shared, torch.finfo(dtype).eps)

    for name in CONFIGS:
        check(make_model(name, "eager").to(dtype))  # and does not find those that do not
    with pytest.raises(ValueError, match=r"differ by .* nats per token.*Set `shared_prompts=False`"):
        check(by_place(make_model("llama").to(dtype)))
    with pytest.raises(ValueError, match="differ by nan"):
        broken = make_model("llama").to(dtype)
        broken.model.norm.weight.data.fill_(math.nan)
        check(broken)


def test_the_trainer_tries_policy_and_reference(build, tiny_model):
    for kwargs in ({"model": by_place(tiny_model())}, {"ref_model": by_place(tiny_model())}):
        build(**kwargs)
        with pytest.raises(ValueError, match="by the place of a token"):
            build(shared_prompts=True, **kwargs)


@pytest.mark.parametrize(
    ("model", "longest", "message"),
    [
        (partial(make_model, "mistral", sliding_window=40), 41, "`sliding_window=40`.* 41:.*at most 40"),
        (partial(make_model, "gemma3", sliding_window=16), 17, "`sliding_window=16`"),
        (lambda: make_model(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2), "eager"), 9, "counts"),
        (lambda: make_model(RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2), "eager"), 9,
         "a state from token to token"),
        (lambda: make_model(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1), "eager"), 9,
         "layers of type linear_attention"),
        (lambda: make_model(Qwen3NextConfig(**SIZES, num_experts=2)), 9, "layers of type linear_attention"),
        (lambda: get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), 9,
         "PromptTuningConfig.* adds virtual tokens"),
        (lambda: get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5])), 9,
         "acts from some token"),
    ],
    ids=["window", "some windows", "no positions", "state", "recurrent", "some", "virtual tokens", "activated lora"],
)  # fmt: skip
def test_architectures_that_cannot(model, longest, message):
    with pytest.raises(ValueError, match=message):
        check_architecture(model(), longest)


@pytest.mark.parametrize(("name", "attention"), ATTENTION)
def test_architectures_that_can(name, attention):
    """Up to the window of those that have one, which is 64 tokens. The others read sequences of any length."""
    model = make_model(name, attention)
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    for candidate in (model, get_peft_model(model, lora)):
        check_architecture(candidate, longest=64)
        if name in ("mistral", "gemma2", "gemma3"):
            with pytest.raises(ValueError, match="`sliding_window=64`"):
                check_architecture(candidate, longest=65)
        else:
            check_architecture(candidate, longest=10**6)


def test_attention_that_cannot():
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2'.*sdpa, eager, flex_attention"):
        check_architecture(model, 9)


def test_what_the_trainers_refuse(build, build_trainer, groups, scored_pairs, tokenizer, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="IterableDataset"):
        build(shared_prompts=True, train_dataset=groups.to_iterable_dataset())
    with pytest.raises(ValueError, match="IterableDataset"):
        build(shared_prompts=True).evaluate(groups.to_iterable_dataset())
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        CoPGConfig(str(tmp_path), bf16=False, shared_prompts=True, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True"):
        ALoLConfig(str(tmp_path), bf16=False, shared_prompts=True)
    with pytest.raises(ValueError, match="a `data_collator` is passed"):
        CoPGTrainer(
            tiny_model(),
            args=cpu_args(CoPGConfig, tmp_path, shared_prompts=True),
            train_dataset=groups,
            data_collator=DataCollatorForGroups(0),
            processing_class=tokenizer,
        )


def test_a_mixture_of_experts_has_to_go_without_its_auxiliary_loss(build, tokenizer):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01, "sliding_window": None}
    sizes = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 512}

    def model():
        return make_model(MixtralConfig(**sizes, **experts))

    with pytest.raises(ValueError, match=r"`router_aux_loss_coef=0\.0`"):
        build(model=model(), shared_prompts=True)
    experts["router_aux_loss_coef"] = 0.0
    losses = [run(build(model=model(), shared_prompts=shares))[0] for shares in (False, True)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_dense_masks_are_weighed_where_they_are_used(build, tiny_model):
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    assert build(shared_prompts=True, model=eager).data_collator.is_dense
    collator = build(shared_prompts=True).data_collator
    assert not collator.is_dense and collator.pairs_per_token == 6 * 32
    assert dataclasses.asdict(build().data_collator)["max_shared_length"] == 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_equal_with_flex_attention(name, monkeypatch):
    """Block masks, forward alone, which is what FlexAttention can do on a CPU; and without the compiler."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda *args, training, **kwargs: flex_attention(*args, **kwargs),
    )
    repeated, shared = (DataCollatorForGroups(0).collate(RAGGED, share) for share in (False, True))
    eager, flex = (make_model(name, attention) for attention in ("eager", "flex_attention"))
    with torch.no_grad():
        expected = read(eager, repeated)
        torch.testing.assert_close(read(flex, shared), expected, atol=1e-5, rtol=0)
        unmasked = {**shared, "branch_ids": shared["branch_ids"].clamp(max=0)}
        assert (read(flex, unmasked) - expected).abs().max() > 1e-2  # Control


def test_windows_that_no_layer_has():
    """A flag is no window, and a window that only other layers than these would have is none."""
    config = Qwen2Config(**SIZES, sliding_window=8, use_sliding_window=True, max_window_layers=2)
    check_architecture(make_model(config), longest=100)
    config = Qwen2Config(**SIZES, sliding_window=8, use_sliding_window=True, max_window_layers=1)
    with pytest.raises(ValueError, match="`sliding_window=8`"):
        check_architecture(make_model(config), longest=100)


def test_engines_that_ask_leave_the_mask_unwritten():
    """FSDP2 asks of each input whether it is to be cast."""
    batch = DataCollatorForGroups(0).collate(RAGGED, share=True)
    mask = attention_kwargs(batch, make_model())["attention_mask"]
    assert not torch.is_floating_point(mask) and mask.numel() == mask.size(0) * mask.size(2) ** 2
    assert mask.layout == torch.strided and "dense" not in vars(mask.branches)


def test_models_that_are_compiled_get_a_plain_mask(build, tiny_model):
    trainer = build(shared_prompts=True, model=(compiled := tiny_model()))
    assert not trainer.data_collator.is_dense
    compiled.model.layers[0].compile(backend="eager")
    assert build(shared_prompts=True, model=compiled, max_steps=1).data_collator.is_dense


def test_compiled_models_are_trained_as_others(build, tmp_path):
    """Without the compiler itself, which takes long."""
    expected, weights = run(build(shared_prompts=True, max_steps=2, output_dir=tmp_path / "plain"))
    with torch.compiler.set_stance("force_eager"):
        trainer = build(shared_prompts=True, max_steps=2, torch_compile=True)
        losses, _ = run(trainer)
    assert is_compiled_module(trainer.model_wrapped) and trainer.data_collator.is_dense
    assert losses == pytest.approx(expected, abs=1e-6)
    assert set(logged(trainer, "shared_prompts")) == {1.0}
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    assert max((p - weights[name]).abs().max() for name, p in saved.named_parameters()) <= 1e-6


def test_tf32_is_no_single_precision(build, tiny_model):
    """And asking for it by the older name is an error once it was set by the newer one."""
    before = torch.backends.cuda.matmul.fp32_precision
    assert _precision(tiny_model()) == torch.finfo(torch.float32).eps
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert build(shared_prompts=True).data_collator.max_shared_length > 0
        assert _precision(tiny_model()) == torch.finfo(torch.float16).eps
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
