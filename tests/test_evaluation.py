"""Evaluation by generating: what is generated, what is measured, and that training does not notice."""

import copy
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_lol import generation
from trl_lol.evaluation import GenerationEvalCallback, distinct_n, evaluate_policy
from trl_lol.generation import completion_logps, generate_completions
from trl_lol.rewards import ColumnReward


PAD, EOS, END_OF_TURN, LETTER_A = 0, 2, 3, 4
WORDS = [*"abcdefgh", "user", "assistant"]
PROMPTS = ["a b c d e f", "b", "c a", "d d d", "e f g"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", "<end>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, chat_template=CHAT_TEMPLATE, padding_side="right", model_max_length=64, **special
    )


def tiny_llama(seed: int = 0, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,  # peaked enough that greedy decoding has no near ties
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        **options,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    """Unlike Llama's, its position embeddings are absolute, so that left padding shows unless it is accounted for."""
    torch.manual_seed(0)
    size = {"vocab_size": 4 + len(WORDS), "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.5, pad_token_id=PAD, eos_token_id=EOS))


def logps_by_hand(model, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Tensor:
    """One sequence at a time, one token at a time, without padding."""
    model.eval()
    sums = []
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
        steps = enumerate(completion, start=len(prompt))
        sums.append(sum(logits[t - 1].log_softmax(-1)[token].item() for t, token in steps))
    return torch.tensor(sums)


# --- diversity ---


def test_distinct_n():
    """
    "a b a" and "a b": words a b a a b, 2 of 5 differ; bigrams ab ba ab, 2 of 3 (none across texts, which would make
    it 3 of 4); one trigram; no 4-gram.
    """
    texts = ["a b a", "a  b"]
    assert [distinct_n(texts, n) for n in (1, 2, 3, 4)] == [2 / 5, 2 / 3, 1.0, 0.0]
    assert distinct_n([], 1) == distinct_n([""], 1) == 0.0


# --- generating ---


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
def test_batches_do_not_change_completions(tokenizer, make_model):
    """Greedy completions of prompts of 1 to 6 tokens: in one padded batch, in two, and each alone, in order."""
    model = make_model()
    completions, prompt_ids, completion_ids = generate_completions(
        model, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0, batch_size=8
    )
    assert prompt_ids == [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert len({tuple(ids) for ids in completion_ids}) > 2
    for size in (3, 1):
        again = generate_completions(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0, batch_size=size)
        assert again == (completions, prompt_ids, completion_ids)


def test_text_completions_keep_the_space_that_parts_them_from_the_prompt(monkeypatch):
    """A tokenizer in SentencePiece's manner drops the space before the first word that it decodes: "a cat" completed
    by "▁sat" must give " sat", or the row that is made of both reads "a catsat". Completed by "s" it gives "s"."""
    vocabulary = {"<unk>": 0, "</s>": 1, "▁a": 2, "▁cat": 3, "▁sat": 4, "s": 5}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer.decode([4]) == "sat"
    model = tiny_llama()
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **kwargs: torch.cat([input_ids, torch.tensor([[4], [5]])], dim=1)
    )
    texts, prompt_ids, _ = generate_completions(model, tokenizer, ["a cat"] * 2, max_new_tokens=1)
    assert texts == [" sat", "s"]
    assert tokenizer("a cat" + texts[0])["input_ids"] == prompt_ids[0] + [4]


@pytest.mark.parametrize("declared", [None, END_OF_TURN, [EOS, END_OF_TURN]])
def test_completions_end_at_the_first_eos(tokenizer, monkeypatch, declared):
    """The tokenizer's EOS and all that the model declares end a completion; they are kept as tokens, not as text."""
    model = tiny_llama()
    model.generation_config.eos_token_id = declared
    generated = [[4, EOS, PAD, PAD], [5, 6, END_OF_TURN, 7], [4, 4, 4, 4]]

    def generate(input_ids, generation_config, **kwargs):
        assert EOS in generation_config.eos_token_id
        return torch.cat([input_ids, torch.tensor(generated)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    texts, _, ids = generate_completions(model, tokenizer, ["a", "b", "c"], max_new_tokens=4)
    assert ids[0] == [4, EOS] and ids[2] == [4] * 4 and texts[0] == " a" and texts[2] == " a a a a"
    if declared is None:  # a token like any other
        assert ids[1] == generated[1] and texts[1] == " b c <end> d"
    else:
        assert ids[1] == [5, 6, END_OF_TURN] and texts[1] == " b c"


def test_conversations(tokenizer):
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    completions, prompt_ids, completion_ids = generate_completions(
        tiny_llama(), tokenizer, prompts, max_new_tokens=4, temperature=0.0
    )
    assert tokenizer.decode(prompt_ids[1]) == "user b </s> assistant"
    for completion, ids in zip(completions, completion_ids, strict=True):
        assert completion == [{"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}]


def test_generating_leaves_no_trace(tokenizer):
    """Neither on the random state, nor on the modes of the modules, nor on the tokenizer; dropout is off meanwhile."""
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    during = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: during.append(module.training))
    state = torch.get_rng_state()
    first = generate_completions(model, tokenizer, PROMPTS, max_new_tokens=8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert during and not any(during)
    assert (tokenizer.padding_side, tokenizer.pad_token_id) == ("right", PAD)

    torch.rand(3)
    assert generate_completions(model, tokenizer, PROMPTS, max_new_tokens=8, seed=1) == first
    assert generate_completions(model, tokenizer, PROMPTS, max_new_tokens=8, seed=2) != first


def test_modes_come_back_after_an_error(tokenizer, monkeypatch):
    model = tiny_llama().train()
    monkeypatch.setattr(model, "generate", lambda **kwargs: 1 / 0)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        generate_completions(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_samples_come_from_the_policy_itself(tokenizer):
    """Not from what the model's generation config makes of it for chatting. 4000 samples of one token, ±4 σ."""
    model = tiny_llama()
    model.generation_config.update(top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=9.0)
    prompts = ["a b"] * 4000
    _, prompt_ids, ids = generate_completions(model, tokenizer, prompts, max_new_tokens=1, batch_size=4000)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(prompt_ids[:1])).logits[0, -1].softmax(-1)
    found = torch.tensor(ids).flatten().bincount(minlength=len(expected)) / 4000
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt() + 1e-3).all()
    greedy = generate_completions(model, tokenizer, prompts, max_new_tokens=1, batch_size=4000, top_k=1)[2]
    assert {tuple(token) for token in greedy} == {(expected.argmax().item(),)}


def test_a_prompt_without_tokens(tokenizer):
    with pytest.raises(ValueError, match="Prompt 1 has no tokens"):
        generate_completions(tiny_llama(), tokenizer, ["a", ""], max_new_tokens=1)


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
def test_completion_logps(make_model):
    prompt_ids = [[4], [5, 6, 7], [4, 5], [8, 9, 4, 5, 6]]
    completion_ids = [[5, 6, EOS], [EOS], [], [7, 7]]
    model = make_model().train()
    state = torch.get_rng_state()
    for batch_size in (1, 3, 8):
        logps = completion_logps(model, prompt_ids, completion_ids, batch_size)
        torch.testing.assert_close(
            logps.double(), logps_by_hand(model, prompt_ids, completion_ids).double(), rtol=1e-5, atol=1e-5
        )
        assert logps[2] == 0.0 and logps.shape == (4,) and not logps.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


# --- measuring ---


def count_a(prompts, completions, **kwargs):
    """Number of words "a"; not scored if there are no words."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text.split().count("a")) if text else None for text in texts]


def test_evaluate_policy(tokenizer):
    """Each number against its definition, from the samples and the log-probabilities by hand."""
    policy, reference = tiny_llama(), tiny_llama(seed=1)
    options = {"max_new_tokens": 6, "num_generations": 4, "batch_size": 7, "seed": 3}
    result = evaluate_policy(policy, tokenizer, PROMPTS, count_a, ref_model=reference, **options)
    samples = result["samples"]
    assert [sample["prompt"] for sample in samples] == [prompt for prompt in PROMPTS for _ in range(4)]

    repeated = [prompt for prompt in PROMPTS for _ in range(4)]
    completions, prompt_ids, ids = generate_completions(
        policy, tokenizer, repeated, max_new_tokens=6, batch_size=7, seed=3
    )
    assert [sample["completion"] for sample in samples] == completions
    logps = logps_by_hand(policy, prompt_ids, ids)
    kl = logps - logps_by_hand(reference, prompt_ids, ids)
    assert result["entropy"] == pytest.approx(-logps.sum().item() / sum(map(len, ids)), rel=1e-4)
    assert [sample["logp"] for sample in samples] == pytest.approx(logps.tolist(), abs=1e-4)
    assert result["kl"] == pytest.approx(kl.mean().item(), rel=1e-4) and abs(result["kl"]) > 0.1
    assert [sample["kl"] for sample in samples] == pytest.approx(kl.tolist(), abs=1e-4)
    assert result["length"] == sum(map(len, ids)) / 20
    rewards = [float(text.split().count("a")) for text in completions if text]
    assert len(rewards) < 20, "the seed should leave an empty completion, which is not scored"
    assert result["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert result["reward_std"] == pytest.approx(torch.tensor(rewards).std(correction=0).item())
    assert [result[f"distinct_{n}"] for n in (1, 2, 3)] == [distinct_n(completions, n) for n in (1, 2, 3)]


def test_reward_functions_get_their_columns(tokenizer):
    """The column holds 1 to 5, two completions each: 10 times its mean and half of 1 are 30.5."""
    seen = {}

    def spy(prompts, completions, completion_ids, tag, **kwargs):
        seen.update(prompts=prompts, completion_ids=completion_ids, tag=tag)
        return [1.0] * len(prompts)

    result = evaluate_policy(
        tiny_llama(),
        tokenizer,
        PROMPTS,
        [ColumnReward("tag"), spy],
        reward_weights=[10.0, 0.5],
        columns={"tag": [1, 2, 3, 4, 5]},
        num_generations=2,
        max_new_tokens=2,
    )
    assert result["reward"] == 30.5 and "kl" not in result
    assert seen["tag"] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and seen["prompts"] == [p for p in PROMPTS for _ in range(2)]
    assert [len(ids) for ids in seen["completion_ids"]] == [sample["length"] for sample in result["samples"]]


def test_kl_of_an_unchanged_policy_is_zero(tokenizer):
    options = {"max_new_tokens": 4, "batch_size": 2}
    result = evaluate_policy(tiny_llama(), tokenizer, PROMPTS, count_a, ref_model=tiny_llama(), **options)
    assert result["kl"] == 0.0


def test_nothing_scored(tokenizer):
    result = evaluate_policy(tiny_llama(), tokenizer, PROMPTS, lambda prompts, **kwargs: [None] * 5, max_new_tokens=2)
    assert result["reward"] != result["reward"] and result["length"] > 0
    with pytest.raises(ValueError, match="no prompts"):
        evaluate_policy(tiny_llama(), tokenizer, [], count_a)


def test_kl_of_an_adapter(tokenizer):
    """
    From the model without the adapter: 0 for a new adapter, whose B is 0, and no longer once B moves. An adapter "ref"
    takes the base model's place: with a copy of the moved weights the KL is 0 again.
    """
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    base = tiny_llama()
    model = get_peft_model(copy.deepcopy(base), lora)

    def evaluate() -> dict:
        return evaluate_policy(model, tokenizer, PROMPTS, count_a, max_new_tokens=4)

    assert evaluate()["kl"] == 0.0
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    moved = evaluate()
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    completions = generate_completions(model, tokenizer, PROMPTS, max_new_tokens=4)[2]
    by_hand = logps_by_hand(model, ids, completions) - logps_by_hand(base, ids, completions)
    assert moved["kl"] == pytest.approx(by_hand.mean().item(), rel=1e-4) and abs(moved["kl"]) > 0.1

    model.add_adapter("ref", lora)
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if ".ref." in name:
            weight.data.copy_(weights[name.replace(".ref.", ".default.")])
    trainable = [name for name, weight in weights.items() if weight.requires_grad]
    assert evaluate()["kl"] == 0.0
    assert model.active_adapter == "default"
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == trainable


# --- the callback ---


def sft_trainer(tmp_path, tokenizer, dropout: float = 0.0, **options) -> SFTTrainer:
    dataset = Dataset.from_dict({"text": ["a b c", "b c d e", "c d", "d e f g", "e f", "f a b"]})
    args = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        learning_rate=0.05,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        **{"save_strategy": "no", **options},
    )
    model = tiny_llama(attention_dropout=dropout, attn_implementation="eager")
    evaluation = {"one": dataset.select([0, 1]), "two": dataset.select([2])}
    return SFTTrainer(model, args, train_dataset=dataset, eval_dataset=evaluation, processing_class=tokenizer)


class Rising:
    """Rewards 1, 3, 2, … for the first, second, third, … evaluation, whatever was generated."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prompts, completions, **kwargs):
        self.calls += 1
        return [[1.0, 3.0, 2.0, 5.0, 7.0][self.calls - 1]] * len(prompts)


def test_the_callback_picks_the_best_checkpoint(tmp_path, tokenizer):
    """Rewards 1, 3, 2 at steps 2, 4, 6: step 4. The evaluation loss alone would pick the last step here."""
    reward = Rising()
    trainer = sft_trainer(
        tmp_path,
        tokenizer,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_generation/reward",
    )
    callback = GenerationEvalCallback(trainer, PROMPTS, reward, num_prompts=3, max_new_tokens=3)
    trainer.add_callback(callback)
    trainer.train()
    assert reward.calls == 3  # once per evaluation, not once per evaluation set
    assert trainer.state.best_metric == 3.0
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert all(torch.equal(weight, best[name]) for name, weight in trainer.model.state_dict().items())
    losses = [log["eval_one_loss"] for log in trainer.state.log_history if "eval_one_loss" in log]
    assert losses.index(min(losses)) != 1  # the control

    logs = [log for log in trainer.state.log_history if "eval_generation/reward" in log]
    assert [log["eval_generation/reward"] for log in logs] == [1.0, 3.0, 2.0]
    assert [log["step"] for log in logs] == [2, 4, 6]
    names = {"reward", "reward_std", "length", "distinct_1", "distinct_2", "distinct_3"}
    assert {f"eval_generation/{name}" for name in names} == {k for k in logs[0] if k.startswith("eval_generation/")}

    # The weights are others now, the step is not: the numbers must not be those of the last step's weights
    metrics = trainer.evaluate()
    assert metrics["eval_generation/reward"] == 5.0 and "eval_two_loss" in metrics
    assert len(callback.samples) == 3 and callback.samples[0]["reward"] == 5.0


def test_training_does_not_notice(tmp_path, tokenizer, monkeypatch):
    """Dropout and the order of the rows draw from the random state that sampling would move on."""

    def final_weights(callback: bool) -> Tensor:
        trainer = sft_trainer(tmp_path, tokenizer, dropout=0.5)
        if callback:
            trainer.add_callback(GenerationEvalCallback(trainer, PROMPTS, count_a, max_new_tokens=5))
        trainer.train()
        return torch.nn.utils.parameters_to_vector(trainer.model.parameters())

    without = final_weights(callback=False)
    assert torch.equal(final_weights(callback=True), without)
    with monkeypatch.context() as patch:  # the control
        patch.setattr(generation.torch.random, "fork_rng", lambda **kwargs: nullcontext())
        assert not torch.equal(final_weights(callback=True), without)


def test_the_callback_in_dpo_trainer(tmp_path, tokenizer):
    """
    Rows with an implicit prompt; the KL is from the trainer's reference, 0 before training; gradient checkpointing
    stays on; the model carries TRL's fused head.
    """
    user = [{"role": "user", "content": "a b"}]
    rows = [
        {
            "chosen": [*user, {"role": "assistant", "content": content}],
            "rejected": [*user, {"role": "assistant", "content": "h"}],
            "tag": tag,
        }
        for tag, content in enumerate(["c", "d e", "f"])
    ]
    seen = []

    def spy(prompts, completions, tag, **kwargs):
        assert not {"chosen", "rejected"} & kwargs.keys()
        seen.extend(zip(prompts, tag, strict=True))
        return [0.0] * len(prompts)

    model = tiny_llama()
    trainer = DPOTrainer(
        model,
        ref_model=tiny_llama(),
        args=DPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=3,
            learning_rate=0.1,
            max_steps=2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=True,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.add_callback(
        GenerationEvalCallback(trainer, Dataset.from_list(rows), spy, num_prompts=2, max_new_tokens=4, seed=5)
    )
    ids = torch.tensor([[4, 5, 6]])
    fused = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
    patched = completion_logps(trainer.model, [[4]], [[5, 6]])
    assert fused.log_probs.sum().item() == pytest.approx(patched.item(), rel=1e-5)

    before = trainer.evaluate()
    assert before["eval_generation/kl"] == pytest.approx(0.0, abs=1e-5)
    assert len(seen) == 2 and all(prompt == user for prompt, _ in seen)
    trainer.train()
    after = trainer.evaluate()
    assert trainer.model.is_gradient_checkpointing
    assert abs(after["eval_generation/kl"]) > 1e-2
    assert seen[2:] == seen[:2]  # the same prompts each time
    logged = [log["eval_generation/kl"] for log in trainer.state.log_history if "eval_generation/kl" in log]
    assert logged == [after["eval_generation/kl"]]  # `train` begins a new history


def test_the_callback_draws_its_prompts_once(tmp_path, tokenizer):
    trainer = sft_trainer(tmp_path, tokenizer)
    rows = Dataset.from_list([{"prompt": f"a {i}", "completion": "b", "tag": i} for i in range(50)])

    def draw(dataset, **options) -> GenerationEvalCallback:
        return GenerationEvalCallback(trainer, dataset, count_a, **options)

    first = draw(rows, num_prompts=5)
    assert len(set(first.prompts)) == 5 and first.prompts == [f"a {tag}" for tag in first.columns["tag"]]
    assert set(first.columns) == {"tag"}
    assert draw(rows, num_prompts=5).prompts == first.prompts
    assert draw(rows, num_prompts=5, seed=1).prompts != first.prompts
    assert draw(rows, num_prompts=99).prompts == rows["prompt"][:]
    assert draw(rows.to_iterable_dataset(), num_prompts=5).prompts == rows["prompt"][:5]
    with pytest.raises(ValueError, match="no rows"):
        draw([])
    with pytest.raises(TypeError, match="pass `RewardModel"):
        GenerationEvalCallback(trainer, rows, "some/model")


def test_virtual_tokens_are_passed_over():
    """Prompt tuning puts 3 virtual tokens before the real ones: logit t + 2 predicts the token at position t."""
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config).eval()
    prompt, completion = [4, 5, 6], [7, 8, EOS]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    assert logits.size(0) == 9
    expected = sum(logits[3 + t - 1].log_softmax(-1)[token] for t, token in enumerate(completion, start=3))
    torch.testing.assert_close(completion_logps(model, [prompt, prompt[:2]], [completion, [4]])[0], expected)
