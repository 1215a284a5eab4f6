"""What went wrong once with online trainers: adapters whose start changes the base, reused folders and trainers."""

import copy
from functools import partial

import pytest
import torch
from conftest import LORA, StopAt, distance, early_tokens, logged, weights
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification, OPTConfig, OPTForCausalLM

from trl_lol import APATrainer, DRPOTrainer, PPOTrainer
from trl_lol.value import add_value_head


PISSA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa")
IDS = torch.arange(20, 40).view(2, 10)


@pytest.fixture
def build(build_online_trainer):
    return partial(build_online_trainer, PPOTrainer, learning_rate=1e-3)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


# ---- The reference ----


def perturbed(model):
    """The adapter as if it had been trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


ADAPTERS = {
    "pissa": PISSA,
    "lora on embeddings": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_reference_of_a_trained_adapter_is_a_copy_of_it(build, tiny_model, name):
    model = perturbed(get_peft_model(tiny_model(), ADAPTERS[name]))
    with torch.no_grad(), model.disable_adapter():
        base = model.eval()(IDS).logits
    before = logits(model)
    assert (before - base).abs().max() > 0.1  # Control: the base model is another one
    config = copy.deepcopy(model.peft_config["default"])
    trainer = build(model, max_steps=2, num_iterations=2)
    assert torch.equal(logits(model), before)
    assert model.peft_config["default"] == config
    trainer.train()
    assert logged(trainer, "kl")[0] == logged(trainer, "kl/completion")[0] == 0 < logged(trainer, "kl")[1]


def test_an_adapter_under_another_name(build, tiny_model):
    model = get_peft_model(tiny_model(), LORA, adapter_name="mine")
    trainer = build(perturbed(model), max_steps=2, num_iterations=2)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0 < logged(trainer, "kl")[1]
    assert model.active_adapters == ["mine"]


def test_an_adapter_that_was_trained_here_before(build, tiny_model):
    """Its former reference is there still, and gives way to a copy of what it has become."""
    model = get_peft_model(tiny_model(), LORA)
    build(model, max_steps=2).train()
    trainer = build(model, max_steps=2, num_iterations=2)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0 < logged(trainer, "kl")[1]


@pytest.mark.parametrize("init", ["pissa", False])
def test_a_new_adapter_that_changes_the_model_at_once(build, tiny_model, init):
    """The model without it is not the initial policy, which is therefore kept as an adapter."""
    trainer = build(peft_config=LoraConfig(**LORA.to_dict() | {"init_lora_weights": init}), max_steps=2)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0
    assert "ref" in trainer.model.peft_config
    assert "ref" not in build(peft_config=LORA).model.peft_config  # Control: usually it takes no memory


def test_nothing_to_train(build, tiny_model, tmp_path):
    get_peft_model(tiny_model(), LORA).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        build(PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter"))
    build(PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", is_trainable=True))


# ---- Used again ----


def test_a_folder_that_is_used_again(build_online_trainer, tmp_path, dialogues):
    """Rollouts and a reference that an earlier run has left in a checkpoint are not those of the next one."""

    def constant(completions, **kwargs):
        return [0.0] * len(completions)

    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"eval_dataset": dialogues.select_columns("prompt").take(8), "learning_rate": 1e-3}
    build = partial(build_online_trainer, APATrainer, **settings)
    build(
        output_dir=tmp_path / "a", reward_funcs=constant, reset_ref_patience=1, num_iterations=2, max_steps=3
    ).train()
    left = {path.name for path in (tmp_path / "a" / "checkpoint-3").iterdir()}
    assert {"rollouts_0.pt", "reference.safetensors"} <= left
    build(output_dir=tmp_path / "a", callbacks=[StopAt(3)]).train()
    whole = build(output_dir=tmp_path / "b")
    whole.train()
    resumed = build(output_dir=tmp_path / "a")
    resumed.train(resume_from_checkpoint=True)
    assert distance(weights(whole), weights(resumed)) == 0
    assert logged(whole, "kl")[-1] == logged(resumed, "kl")[-1]


def test_a_trainer_that_is_used_again(build, tmp_path):
    """Interrupted within a generation batch, and resumed without being made anew."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "num_iterations": 3}
    whole = build(output_dir=tmp_path / "a", **settings)
    whole.train()
    resumed, stop = build(output_dir=tmp_path / "b", **settings), StopAt(4)
    resumed.add_callback(stop)
    resumed.train()
    resumed.remove_callback(stop)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert resumed._step == 5
    assert distance(weights(whole), weights(resumed)) == 0


@pytest.mark.parametrize(
    "changed", [{"steps_per_generation": 4}, {"per_device_train_batch_size": 2}, {"num_iterations": 2}]
)
def test_rollouts_of_another_size_are_made_anew(build, tmp_path, caplog, changed):
    settings = {"save_strategy": "steps", "save_steps": 3, "steps_per_generation": 2, "num_iterations": 4}
    build(output_dir=tmp_path, max_steps=3, **settings).train()
    trainer = build(output_dir=tmp_path, max_steps=5, **(settings | changed))
    trainer.train(resume_from_checkpoint=True)
    assert "rollouts are of a run with other batches" in caplog.text
    assert trainer.state.global_step == 5


# ---- Models and rewards ----


def test_a_model_that_projects_its_hidden_states(build_online_trainer, tokenizer):
    """Values are read where the LM head reads, which for OPT may be another width than the blocks'."""
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, dropout=0.0,
        do_layer_norm_before=True,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = build_online_trainer(PPOTrainer, OPTForCausalLM(config), max_steps=2)
    trainer.train()
    assert trainer.value_head.layers[0].in_features == 16
    assert logged(trainer, "kl")[0] == 0


def test_a_module_where_the_head_goes(tiny_model):
    model = tiny_model()
    model.value_head = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="has a `value_head` of its own, a Linear"):
        add_value_head(model)


def test_evaluation_that_casts_the_model(build, dialogues):
    trainer = build(eval_dataset=dialogues.select_columns("prompt").take(8), bf16_full_eval=True)
    assert trainer.evaluate()["eval_reward"] is not None


def test_a_reward_model_that_overflows(build, tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    model.config._name_or_path = "path/to/judge"
    torch.nn.init.constant_(model.score.weight, float("inf"))  # infinities of either sign add up to NaN
    trainer = build(reward_funcs=[early_tokens, model], reward_processing_classes=[None, tokenizer])
    with pytest.raises(ValueError, match=r"reward model 'judge' returned (nan|inf)"):
        trainer.train()


def test_columns_that_are_named_as_arguments(build, dialogues):
    rows = dialogues.select_columns("prompt").take(8)
    trainer = build(train_dataset=rows.add_column("reward_func", list(range(8))), max_steps=1)
    trainer.train()
    for name in ("completions", "log_extra"):
        with pytest.raises(ValueError, match=f"a column `{name}`"):
            build(train_dataset=rows.add_column(name, list(range(8))))


@pytest.mark.parametrize(
    "bad",
    [
        {"num_generations": 0},
        {"num_generations": None},
        {"num_iterations": 0},
        {"max_completion_length": 0},
        {"steps_per_generation": 0},
        {"temperature": 0.0},
    ],
)
def test_values_that_would_train_on_nothing(build, bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}=.* must be"):
        build(**bad)


# ---- vLLM and roll-ins ----


class EchoVLLM:
    """Stands in for TRL's client of vLLM: goes on with the first tokens of each prompt, each of probability 1/e."""

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler):
        self.prompts = prompts
        ids = [prompt[:6] for prompt in prompts]
        return None, ids, [[[-1.0]] * 6 for _ in ids], None


def test_vllm_goes_on_from_the_roll_in(build_online_trainer):
    """vLLM knows the probabilities of its own tokens alone: the ratio of the sequence is over these."""
    trainer = build_online_trainer(
        DRPOTrainer,
        num_generations=2,
        per_device_train_batch_size=8,
        vllm_importance_sampling_mode="sequence_truncate",
        vllm_importance_sampling_clip_max=1e9,
    )
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = EchoVLLM()
    trainer.model.train()
    rows = [row for row in trainer.train_dataset.take(4) for _ in range(2)]
    batch = trainer._generate_and_score_completions(rows)
    lengths = [len(roll_in) for roll_in in trainer._roll_ins]
    assert len(set(lengths)) > 1 and trainer.vllm_generation.prompts[::2] == trainer.vllm_generation.prompts[1::2]
    for i, (prompt, length) in enumerate(zip(trainer.vllm_generation.prompts, lengths, strict=True)):
        completion = batch["completion_ids"][i].tolist()
        assert completion == (prompt[len(prompt) - length :] + prompt[:6])[:6]
        assert batch["loss_mask"][i].tolist() == [0] * length + [1] * (6 - length)
        log_ratio = (batch["old_per_token_logps"][i, length:] + 1).sum()
        torch.testing.assert_close(batch["importance_sampling_ratio"][i, 0].log(), log_ratio, rtol=1e-5, atol=1e-5)


def test_prompts_that_are_made_when_they_are_read(build_online_trainer, references):
    rows = references.remove_columns("prompt").add_column("prompt", range(len(references)))

    def read(batch):
        return {**batch, "prompt": [f"Number {number}" for number in batch["prompt"]]}

    trainer = build_online_trainer(PPOTrainer, train_dataset=rows.with_transform(read), max_steps=1)
    trainer.train()
    assert len(logged(trainer, "loss")) == 1


def test_the_message_that_is_none_is_named(build_online_trainer, references):
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Hi"}]}] * 8 + [{"prompt": prompt}])
    with pytest.raises(ValueError, match=r"Row 8 of the train dataset has the message \{.*None.*assistant"):
        build_online_trainer(PPOTrainer, train_dataset=rows)


@pytest.mark.parametrize("other", [True, False])
def test_rollouts_are_gone_on_with_by_all_processes_or_none(build_online_trainer, tmp_path, monkeypatch, other):
    settings = {"num_iterations": 3, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    build_online_trainer(PPOTrainer, **settings).train()
    trainer = build_online_trainer(PPOTrainer, **settings)
    trainer._step, trainer._buffered_inputs = 0, None
    monkeypatch.setattr("trl_lol.online.trainer.gather_object", lambda own: [*own, other])
    trainer._load_rollouts(str(tmp_path / "checkpoint-2"))
    assert (trainer._step, trainer._buffered_inputs is not None) == ((2, True) if other else (0, False))
