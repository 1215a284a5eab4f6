"""What must hold for every online trainer beside what the scorecard measures: resume within a generation, the
optimizer, what is saved, the reference's reset."""

import json
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from conftest import LORA, SGD, StopAt, distance, early_tokens, logged, run, weights
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging

from trl_lol import APATrainer, DRPOTrainer, PPOTrainer


FULL_AND_LORA = pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
HEAD = "value_head.layers.2.weight"
TRAINER = {"ppo": PPOTrainer, "apa": APATrainer, "drpo": DRPOTrainer}


@pytest.fixture(params=TRAINER)
def build(request, build_online_trainer):
    """Makes trainers of every kind: two steps of a run for each generation."""
    settings = {"learning_rate": 1e-3, "num_iterations": 2, "max_steps": 4}
    if request.param == "drpo":
        settings["reset_prob"] = 0.5
    return partial(build_online_trainer, TRAINER[request.param], **settings)


def head_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.value_head.state_dict().items()}


# ---- What it trains on ----


async def late_tokens(completion_ids, **kwargs):
    return [1 - share for share in early_tokens(completion_ids)]


CASES = {
    "gae": {},
    "gae, groups": {"num_generations": 4},
    "leave one out": {"num_generations": 4, "advantage_estimator": "leave_one_out"},
    "async reward": {"reward_funcs": [early_tokens, late_tokens], "reward_weights": [2.0, 1.0]},
    "everything": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "whiten_advantages": True},
}


@pytest.mark.parametrize(
    ("settings", "case"),
    [
        *(pytest.param(CASES[name], case, id=f"{name}, {case}") for name in CASES for case in ("full", "lora")),
        *(pytest.param(CASES[name], "standard prompts", id=f"{name}, standard") for name in list(CASES)[:2]),
    ],
)
def test_trains(build, references, settings, case):
    peft_config = LORA if case == "lora" else None
    rows = references
    if case == "standard prompts":
        rows = rows.map(lambda row: {name: row[name][-1]["content"] for name in row})
    trainer = build(train_dataset=rows, eval_dataset=rows.take(8), peft_config=peft_config, **settings)
    before = weights(trainer)
    losses, after = run(trainer)
    # Every trained tensor has moved, the head's among them. In the first step LoRA's A has no gradient yet
    assert len(losses) == 4 and all((before[name] != after[name]).any() for name in before)
    assert any(HEAD in name for name in before) == ("advantage_estimator" not in settings)
    names = {"reward", "kl", "kl/completion", "entropy", "policy_loss"}
    if "advantage_estimator" not in settings:
        names |= {"value_loss", "explained_variance"}
    for name in names:
        assert all(torch.tensor(logged(trainer, name)).isfinite()) and logged(trainer, name), name
    assert {f"eval_{name}" for name in names} | {"eval_loss"} <= trainer.evaluate().keys()
    if "reward_weights" in settings:  # 2 r + (1 − r) = 1 + r
        rewards = [1 + mean for mean in logged(trainer, "rewards/early_tokens/mean")]
        assert logged(trainer, "reward") == pytest.approx(rewards, rel=0, abs=1e-6)


def test_reward_model(build, tokenizer):
    """The reward of a module is its first logit for prompt and completion, as text through the chat template."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    reward_model = LlamaForSequenceClassification(config).eval()
    seen = []

    def same(prompts, completions, **kwargs):
        texts = [
            tokenizer.apply_chat_template(p + c, tokenize=False) for p, c in zip(prompts, completions, strict=True)
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        with torch.no_grad():
            seen.append(reward_model(**inputs).logits[:, 0].mean().item())
        return [0.0] * len(texts)

    trainer = build(
        reward_funcs=[reward_model, same], reward_processing_classes=[tokenizer, None], max_steps=2, num_iterations=1
    )
    trainer.train()
    assert len(set(seen)) == 2
    assert logged(trainer, "reward") == pytest.approx(seen, rel=0, abs=1e-5)


@pytest.mark.parametrize("precision", ["weights", "autocast"])
@FULL_AND_LORA
def test_bf16_leaves_the_head_in_float32(build, tiny_model, tmp_path, peft_config, precision):
    model = tiny_model().to(torch.bfloat16) if precision == "weights" else tiny_model()
    trainer = build(model, peft_config=peft_config, bf16=precision == "autocast")
    dtypes = set()
    trainer.value_head.register_forward_hook(
        lambda module, inputs, output: dtypes.add((inputs[0].dtype, output.dtype))
    )
    projected = set()
    projection = trainer._base_model.model.layers[0].mlp.down_proj
    projection = getattr(projection, "base_layer", projection)
    projection.register_forward_hook(lambda module, inputs, output: projected.add(output.dtype))
    before = head_of(trainer)
    losses, _ = run(trainer)
    assert torch.tensor(losses).isfinite().all()
    if precision == "weights":
        assert dtypes == {(torch.bfloat16, torch.float32)}
    else:  # Control: what is around the head does not compute in float32
        assert {output for _, output in dtypes} == {torch.float32} and torch.bfloat16 in projected
    assert all(p.dtype == torch.float32 for p in trainer.value_head.parameters())
    assert all((before[name] != after).any() for name, after in head_of(trainer).items())
    trainer.save_model()
    saved = load_file(tmp_path / "value_head.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("estimator", ["gae", "leave_one_out"])
def test_first_log_ratio_is_zero(build, tmp_path, tiny_model, estimator):
    changed = tiny_model()
    tiny_model(seed=9).save_pretrained(tmp_path / "elsewhere")
    changed.config._name_or_path = str(tmp_path / "elsewhere")  # what GRPOTrainer would load as the reference
    build = partial(build, advantage_estimator=estimator, num_generations=2)
    used = build(output_dir=tmp_path / "used")
    used.train()
    cases = {
        "built from a config": {},
        "changed in memory": {"model": changed},
        "lora": {"peft_config": LORA},
        "a PEFT model that was trained before": policy_of("PEFT instance", tiny_model),
        "a policy that another trainer has patched": {"model": used.model},
    }
    for case, kwargs in cases.items():
        trainer = build(output_dir=tmp_path / case.replace(" ", "-"), **kwargs)
        trainer.train()
        first, second, *_ = logged(trainer, "kl")
        assert first <= 1e-9 < 1e-6 < second, case
        first, second = logged(trainer, "kl/completion")
        assert abs(first) <= 1e-5 < abs(second), case  # a sum of 6 differences
    # Control: a reference that is not the initial policy is noticed
    trainer = build(output_dir=tmp_path / "control")
    trainer.ref_model.load_state_dict(tiny_model(seed=9).state_dict(), strict=False)
    trainer.train()
    assert logged(trainer, "kl")[0] > 1e-3


# ---- Equalities ----


@pytest.mark.parametrize("estimator", ["gae", "leave_one_out"])
def test_accumulation_equals_one_batch(build, tmp_path, estimator):
    """One generation batch of 8, whose losses are summed over micro-batches of 8, 2 or (the control) 4 with two
    optimizer steps. Lengths differ, so that a mean of the micro-batches' means is another number."""

    def run_ragged(**kwargs):  # a completion ends with the first token of the lower half that is generated
        trainer = build(advantage_estimator=estimator, num_generations=2, beta=1.0, **(SGD | kwargs))
        generate = trainer._generate_single_turn

        def cut(*args, **kwargs):
            ids, logprobs = generate(*args, **kwargs)
            starts = [len(roll_in or []) for roll_in in getattr(trainer, "_roll_ins", [None] * len(ids))]
            ends = [
                next((i for i in range(s, len(x)) if x[i] < 384), len(x)) for s, x in zip(starts, ids, strict=True)
            ]
            return [x[: end + 1] for end, x in zip(ends, ids, strict=True)], logprobs

        trainer._generate_single_turn = cut
        return run(trainer)

    one = run_ragged(output_dir=tmp_path / "a", per_device_train_batch_size=8)
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    two = run_ragged(output_dir=tmp_path / "b", **accumulated)
    half = run_ragged(output_dir=tmp_path / "c", per_device_train_batch_size=4)
    assert one[0] == pytest.approx(two[0], rel=0, abs=1e-6)
    assert distance(one[1], two[1]) <= 5e-6
    assert one[0] != pytest.approx(half[0], rel=0, abs=1e-4) and distance(one[1], half[1]) > 1e-4  # Control


@pytest.mark.parametrize(
    ("peft_config", "step", "steps_per_generation"),
    [(None, 3, 1), (LORA, 3, 1), (None, 5, 1), (LORA, 5, 1), (None, 7, 2)],
    ids=["full, between", "lora, between", "full, within", "lora, within", "full, within several steps"],
)
def test_resume_equals_uninterrupted(build, tmp_path, peft_config, step, steps_per_generation, caplog):
    """A generation serves 3 steps: after step 3 the next is due, after step 5 a third of the second is to come. Or it
    serves 6, in slices: after step 7 the second slice of the second generation is next."""
    settings = {"peft_config": peft_config, "num_iterations": 3, "max_steps": 8, "value_learning_rate": 1e-2}
    settings |= {"save_strategy": "steps", "save_steps": step, "steps_per_generation": steps_per_generation}
    build = partial(build, output_dir=tmp_path / "run", **settings)
    whole = build(output_dir=tmp_path / "whole", **{"save_strategy": "no"})
    whole.train()

    interrupted = build(callbacks=[StopAt(step)])
    interrupted.train()
    assert interrupted.state.global_step == step
    checkpoint = tmp_path / "run" / f"checkpoint-{step}"
    assert (checkpoint / "rollouts_0.pt").exists() == (step != 3)
    resumed = build()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 8
    for other, this in zip(whole.state.log_history[:8], resumed.state.log_history[:8], strict=True):
        assert "loss" in other and {**other, "step_time": None} == {**this, "step_time": None}
    assert distance(weights(resumed), weights(whole)) == 0

    # Controls: the head and the generation are part of the state
    assert "value head keeps its weights" not in caplog.text
    for name in ("rollouts_0.pt", "value_head.safetensors"):
        if (checkpoint / name).exists():
            (checkpoint / name).unlink()
            listed = json.loads((checkpoint / "trl_lol.json").read_text())
            del listed["files"][name]
            (checkpoint / "trl_lol.json").write_text(json.dumps(listed))
            without = build()
            without.train(resume_from_checkpoint=str(checkpoint))
            assert distance(weights(without), weights(whole)) > 1e-5, name
    assert "value head keeps its weights" in caplog.text


# ---- The optimizer ----


@FULL_AND_LORA
def test_learning_rate_of_the_head(build, tmp_path, peft_config):
    build = partial(build, peft_config=peft_config, max_steps=4, num_iterations=1)

    def groups(trainer):
        groups = [[id(p) for p in group["params"]] for group in trainer.optimizer.param_groups]
        trained = [id(p) for p in trainer.model.parameters() if p.requires_grad]
        assert sorted(p for group in groups for p in group) == sorted(trained)  # each in exactly one
        return groups

    plain = build(output_dir=tmp_path / "plain", max_steps=1)
    plain.train()
    two = len(groups(plain))
    trainer = build(output_dir=tmp_path / "head", value_learning_rate=1e-2)
    rates = []

    class Record(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            rates.append([group["lr"] for group in trainer.optimizer.param_groups])

    trainer.add_callback(Record())
    trainer.train()
    head = [id(p) for p in trainer.value_head.parameters()]
    assert len(groups(trainer)) == two + 1 and groups(trainer)[-1] == head
    # The schedule is linear, to 0 after 4 steps
    for step, (*others, last) in enumerate(rates):
        assert others == pytest.approx([1e-3 * (1 - step / 4)] * two) and last == pytest.approx(1e-2 * (1 - step / 4))
    # Adam's first step is as long as the learning rate, from a head of zeros
    first = build(output_dir=tmp_path / "first", value_learning_rate=1e-2, max_steps=1)
    first.train()
    assert head_of(first)["layers.2.bias"].abs().item() == pytest.approx(1e-2, rel=1e-3)
    assert head_of(plain)["layers.2.bias"].abs().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("value_learning_rate", [None, 0.2])
def test_head_is_trained_by_an_optimizer_of_the_user(build, tiny_model, value_learning_rate):
    """The head is made in the constructor, so that nobody can have put it into the optimizer."""
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = build(model, optimizers=(optimizer, None), learning_rate=0.3, value_learning_rate=value_learning_rate)
    trainer.train()
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert trainer.optimizer.optimizer is optimizer and groups[-1] == {id(p) for p in trainer.value_head.parameters()}
    assert sorted(map(id, trainer.model.parameters())) == sorted(p for group in groups for p in group)
    rates = [group["initial_lr"] for group in optimizer.param_groups]
    assert rates == [0.1, 0.3 if value_learning_rate is None else value_learning_rate]
    assert head_of(trainer)["layers.2.bias"].abs() > 1e-3


def test_scheduler_of_the_user_cannot_know_the_head(build, tiny_model):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match="scheduler"):
        build(model, optimizers=(optimizer, scheduler)).train()


# ---- Resetting the reference ----


@pytest.fixture
def build_apa(build_online_trainer, dialogues):
    """Makes an APATrainer that evaluates after every step, and resets when two evaluations in a row are no better."""
    settings = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 8, "num_iterations": 2}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "reset_ref_patience": 2}
    rows = dialogues.select_columns("prompt").take(8)
    return partial(build_online_trainer, APATrainer, eval_dataset=rows, **settings)


def constant(completions, **kwargs):
    return [0.5] * len(completions)


POLICIES = pytest.mark.parametrize("policy", ["full", "lora", "PEFT instance"])


def policy_of(kind, tiny_model):
    """Arguments of a trainer for a kind of policy, the same every time."""
    if kind == "full":
        return {"model": tiny_model()}
    if kind == "lora":
        return {"model": tiny_model(), "peft_config": deepcopy(LORA)}
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), deepcopy(LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return {"model": model}


def reference_of(trainer):
    """The reference's weights under the names of the policy's."""
    if trainer.ref_model is not None:
        return {name: p.clone() for name, p in trainer.ref_model.named_parameters()}
    adapter = {name: p.clone() for name, p in trainer.model.named_parameters() if ".ref." in name}
    return {name.replace(".ref.", ".default."): p for name, p in adapter.items()}


def policy_weights(trainer):
    return {name: p for name, p in weights(trainer).items() if "value_head" not in name}


@POLICIES
def test_reference_resets_when_the_reward_stalls(build_apa, tiny_model, policy):
    """A reward that cannot improve: evaluation 1 is the best so far, 2 and 3 are no better, so there is a reset after
    step 3. Evaluation 3 is what the new reference is worth; 4 and 5 are no better: a reset after step 5, and one after
    step 7."""
    trainer = build_apa(reward_funcs=constant, **policy_of(policy, tiny_model))
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    states = {}

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # before the evaluation
            states[state.global_step] = (policy_weights(trainer), head_of(trainer))

        def on_evaluate(self, args, state, control, **kwargs):  # after the reset, which has been added before
            if not trainer.is_in_train:
                return
            if state.global_step in (3, 5, 7):
                assert distance(reference_of(trainer), policy_weights(trainer)) == 0
                assert distance(policy_weights(trainer), states[state.global_step][0]) == 0  # a policy unchanged
            elif state.global_step > 3:  # Control: in between, the policy moves and the reference does not
                assert distance(reference_of(trainer), policy_weights(trainer)) > 1e-4
                assert distance(reference_of(trainer), states[state.global_step - 1][0]) == 0

    trainer.add_callback(Record())
    trainer.train()
    assert {e["step"]: e["ref_resets"] for e in trainer.state.log_history if "ref_resets" in e} == {3: 1, 5: 2, 7: 3}
    # Right after a reset the log-ratio is 0, within rounding. Each evaluation comes before the reset
    kl = {entry["step"]: entry["eval_kl/completion"] for entry in trainer.state.log_history if "eval_reward" in entry}
    assert min(abs(x) for x in kl.values()) > 1e-5
    assert abs(trainer.evaluate()["eval_kl/completion"]) > 1e-5
    trainer.reset_reference()
    assert abs(trainer.evaluate()["eval_kl/completion"]) <= 1e-6
    # The head goes on, and nothing else is trained or has changed
    assert all(p.requires_grad for p in trainer.value_head.parameters())
    assert distance(states[8][1], states[4][1]) > 1e-3
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    if policy != "full":
        assert not [
            n for n, p in trainer.model.named_parameters() if ".ref." in n and (p.requires_grad or id(p) in optimized)
        ]
        now = dict(trainer.model.named_parameters())
        unchanged = {name: p for name, p in base.items() if ".ref." not in name}
        assert len(unchanged) == 20 and distance(unchanged, {name: now[name] for name in unchanged}) == 0


def test_reference_stays_while_the_reward_improves(build_apa, tiny_model):
    calls = []

    def rising(completions, **kwargs):
        calls.append(None)
        return [float(len(calls))] * len(completions)

    trainer = build_apa(reward_funcs=rising)
    trainer.train()
    assert not logged(trainer, "ref_resets")
    assert distance(reference_of(trainer), dict(tiny_model().named_parameters())) == 0


@POLICIES
def test_resume_after_a_reset_equals_uninterrupted(build_apa, tiny_model, tmp_path, policy):
    """Resets after steps 3 and 5. The run stops after step 4: one reset is behind it, the next depends on the
    evaluations before the stop. And after step 3, with the reset just done."""

    def build(**kwargs):
        return build_apa(reward_funcs=constant, max_steps=6, **policy_of(policy, tiny_model), **kwargs)

    whole = build(output_dir=tmp_path / "whole")
    whole.train()
    for step in (3, 4) if policy == "lora" else (4,):
        settings = {"output_dir": tmp_path / f"run{step}", "save_strategy": "steps", "save_steps": step}
        build(callbacks=[StopAt(step)], **settings).train()
        resumed = build(**settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"run{step}" / f"checkpoint-{step}"))
        assert logged(resumed, "ref_resets") == logged(whole, "ref_resets") == [1, 2]
        assert logged(resumed, "loss") == logged(whole, "loss")
        assert distance(weights(resumed), weights(whole)) == 0
        assert distance(reference_of(resumed), reference_of(whole)) == 0
    # Control: the reset is a part of what the run depends on
    without = build(output_dir=tmp_path / "without")
    without.reset_reference = lambda: None
    without.train()
    assert distance(weights(without), weights(whole)) > 1e-4


def test_reset_with_an_adapter_on_the_embeddings(build_apa):
    peft_config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    trainer = build_apa(reward_funcs=constant, peft_config=peft_config, max_steps=2)
    trainer.train()
    trainer.reset_reference()
    assert trainer.evaluate()["eval_kl/completion"] == pytest.approx(0, rel=0, abs=1e-5)


def test_saved_adapter_after_a_reset_loads_without_this_package(
    build_apa, tiny_model, tmp_path, transformers_log, tokenizer
):
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = build_apa(model, reward_funcs=constant, peft_config=deepcopy(LORA), output_dir=tmp_path / "run")
    trainer.train()
    inputs = tokenizer("Hello, my printer", return_tensors="pt", return_token_type_ids=False)
    loaded = save_and_load(trainer, tmp_path / "out", transformers_log, by_hand=False)
    assert distance(reference_of(trainer), policy_weights(trainer)) > 1e-4  # the policy is what counts
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)


# ---- What is saved ----


@pytest.fixture
def transformers_log(caplog, monkeypatch):
    """Lets pytest see what transformers warns of."""
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    return caplog


def save_and_load(trainer, folder, log, by_hand):
    """Save, and load in the way of a user who has never heard of this package."""
    if by_hand:
        trainer.model.save_pretrained(folder)
    else:
        trainer.save_model(str(folder))
    auto_class = AutoPeftModelForCausalLM if (folder / "adapter_config.json").exists() else AutoModelForCausalLM
    log.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT's, with or without us
        if auto_class is AutoPeftModelForCausalLM:
            model = auto_class.from_pretrained(folder)
        else:
            model, info = auto_class.from_pretrained(folder, output_loading_info=True)
            assert not any(info.values()), info
    assert not [record for record in log.records if record.levelname in ("WARNING", "ERROR")]
    return model.eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@FULL_AND_LORA
def test_saved_model_loads_without_this_package(
    build, tmp_path, peft_config, tiny_model, tied, transformers_log, tokenizer
):
    torch.manual_seed(0)
    config = tiny_model().config
    config.tie_word_embeddings = tied
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = build(model, output_dir=tmp_path / "run", peft_config=deepcopy(peft_config), learning_rate=3e-2)
    trainer.train()
    inputs = tokenizer("Hello, my printer", return_tensors="pt", return_token_type_ids=False)
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    expected = trainer.model.eval().generate(**inputs, **greedy)
    with torch.no_grad():
        logits = trainer.model(**inputs).logits
    for by_hand in (False, True):
        folder = tmp_path / f"by hand {by_hand}"
        loaded = save_and_load(trainer, folder, transformers_log, by_hand)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits, logits)
        assert loaded.generate(**inputs, **greedy).tolist() == expected.tolist()
        files = sorted(folder.glob("*model*.safetensors"))
        assert len(files) == 1
        with safe_open(files[0], "pt") as file:
            names = list(file.keys())
            assert names and not [name for name in names if "value_head" in name]
        assert (folder / "value_head.safetensors").exists() != by_hand
    saved = load_file(tmp_path / "by hand False" / "value_head.safetensors")
    assert saved.keys() == head_of(trainer).keys() and distance(saved, head_of(trainer)) == 0
    assert distance(saved, {name: torch.zeros_like(x) for name, x in saved.items()}) > 1e-3  # which has been trained
    # Control: the initial model generates something else
    initial = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert initial.generate(**inputs, **greedy).tolist() != expected.tolist()


@FULL_AND_LORA
def test_best_model_is_loaded_with_its_head(build, tmp_path, peft_config, dialogues):
    """The reward falls from the first evaluation to the second, so the first is the best."""
    calls = []

    def falling(completion_ids, **kwargs):
        calls.append(None)
        return [share - len(calls) for share in early_tokens(completion_ids)]

    trainer = build(
        output_dir=tmp_path, reward_funcs=falling, peft_config=peft_config,
        eval_dataset=dialogues.select_columns("prompt").take(8),
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="reward", greater_is_better=True, max_steps=2,
    )  # fmt: skip
    seen = []

    class Record(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(weights(trainer))

    trainer.add_callback(Record())
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1") and len(seen) == 2
    assert distance(weights(trainer), seen[0]) == 0
    assert any(HEAD in name for name in seen[0]) and distance(seen[0], seen[-1]) > 1e-4  # Control


def test_config_card_and_generation(build, tmp_path, tokenizer):
    trainer = build(beta=0.3)
    args = trainer.args
    assert args.beta == 0.3 == trainer.beta and args.num_generations == 1 and type(args.num_generations) is int
    trainer.train()
    trainer.create_model_card("toy")
    card = (tmp_path / "README.md").read_text()
    assert trainer._paper["title"] in card and trainer._paper["id"] in card and trainer._tag_names[-1] in card
    # The head is on the model, and in the way of nothing that a model is used for
    inputs = tokenizer(["Hello, my printer"], return_tensors="pt", return_token_type_ids=False)
    for use in ({"do_sample": True}, {"num_beams": 2}):
        ids = trainer.model.generate(**inputs, max_new_tokens=3, pad_token_id=tokenizer.pad_token_id, **use)
        assert ids.shape[1] <= inputs["input_ids"].shape[1] + 3
    outputs = trainer.model(**inputs, labels=inputs["input_ids"])
    assert outputs.loss.isfinite() and "state_values" not in outputs
