"""
What this package relies on in TRL beyond its documented behaviour. A new TRL that moves one of these seams fails here,
with a sentence that names the seam and who stands on it, and not deep in a run.
"""

import ast
import asyncio
import dataclasses
import functools
import inspect
import textwrap
import threading
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import requires
from typing import Any

import pytest
import torch
import trl
from conftest import cpu_args
from datasets import Dataset
from packaging.requirements import Requirement
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import sort_checkpoints
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, extract_prompt, is_conversational
from trl.trainer.utils import FusedCausalLMOutput

from trl_lol import ALoLConfig, APAConfig, DRPOConfig, DRPOTrainer, PPOConfig, _trl, score_dataset
from trl_lol.offline.base_config import _OfflineRewardConfig
from trl_lol.offline.trainer import _OfflineRewardTrainer
from trl_lol.online.base_config import _ActorCriticConfig
from trl_lol.online.trainer import _ActorCriticTrainer


def signature(function: Callable) -> str:
    """Parameters with their order and defaults, without annotations."""
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    return str(inspect.Signature(parameters))


def test_version():
    (pin,) = [r for r in map(Requirement, requires("trl-lol")) if r.name == "trl"]
    message = (
        f"TRL {trl.__version__} is not the minor version that the seams were read in, 1.16. Read trl_lol/_trl.py and "
        "this file beside the new TRL, then move the pin in pyproject.toml and here."
    )
    assert Version("1.16") <= Version(trl.__version__) < Version("1.17"), message
    assert Version(trl.__version__) in pin.specifier and Version("1.17") not in pin.specifier, message


# ---- Borrowed functions ----

BORROWED = {
    "FusedCausalLMOutput": "(loss=None, log_probs=None, entropy=None, log_sum_sq_probs=None, mean_logits=None, "
    "is_top1=None, label_mask=None, aux_loss=None)",
    "add_fused_lm_head": "(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=('log_probs',))",
    "chunked_logprob": ["_addmm_fp32", "_backward_tile", "_forward_tile"],
    "common_prefix_length": "(ids, other_ids)",
    "compute_flops_per_token": "(config, seq_len)",
    "compute_mfu": "(flops_per_token, tokens_per_second, world_size, peak_flops_per_device)",
    "disable_gradient_checkpointing": "(model, gradient_checkpointing_kwargs=None)",
    "get_callable_name": "(func)",
    "get_config_model_id": "(config)",
    "get_dataset_column_names": "(dataset)",
    "get_peak_flops": "(device_name, dtype)",
    "global_then_local_main_first": "()",
    "hash_module": "(module)",
    "is_async_callable": "(func)",
    "pad": "(tensors, padding_value=0, padding_side='right', pad_to_multiple_of=None)",
    "prepare_deepspeed": "(model, accelerator)",
    "prepare_fsdp": "(model, accelerator)",
    "start_event_loop_in_daemon": "(name=None)",
    "tokenize": "(processing_class, input, **apply_chat_template_kwargs)",
    "unwrap_model_for_generation": "(model, accelerator, gather_deepspeed3_params=True, generation_kwargs=None, "
    "gradient_checkpointing_kwargs=None)",
    "use_adapter": "(model, adapter_name)",
}


@pytest.mark.parametrize("name", _trl.__all__)
def test_borrowed_functions_have_the_signature_they_are_called_with(name):
    assert name in BORROWED, f"trl_lol/_trl.py borrows `{name}` and nothing pins it: add its signature to `BORROWED`"
    borrowed = getattr(_trl, name)
    found = BORROWED[name] if inspect.ismodule(borrowed) else signature(borrowed)
    assert found == BORROWED[name], f"TRL's `{name}` is borrowed in trl_lol/_trl.py and now takes {found}"
    if inspect.ismodule(borrowed):
        missing = [part for part in BORROWED[name] if not hasattr(borrowed, part)]
        assert not missing, f"`{name}` is borrowed in trl_lol/_trl.py and is without {missing}"


def test_nothing_is_pinned_that_is_not_borrowed():
    assert BORROWED.keys() == set(_trl.__all__)


def test_tokenize(tokenizer):
    """Text goes through the tokenizer, messages through the chat template, and both give one flat list."""
    message = "`tokenize_row` relies on TRL's `_tokenize`: {'input_ids': flat list} for one text or one message list"
    ids = _trl.tokenize(tokenizer, "How?")["input_ids"]
    assert ids == tokenizer("How?")["input_ids"] and all(isinstance(i, int) for i in ids), message
    chat = [{"role": "user", "content": "How?"}]
    end, user, assistant = tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>", "<|assistant|>"])
    rendered = _trl.tokenize(tokenizer, chat, add_generation_prompt=True, tools=None)["input_ids"]
    assert list(rendered) == [user, *ids, end, assistant], message


def test_borrowed_functions_do_what_they_are_relied_on_for(tiny_model, scored_pairs):
    assert _trl.common_prefix_length([1, 2, 3], [1, 2, 4, 3]) == 2, "`common_prefix_length`: the shared beginning"
    padded = _trl.pad([torch.tensor([1, 2, 3]), torch.tensor([4])], 9, padding_side="right", pad_to_multiple_of=2)
    assert padded.tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]], "`pad` fills up on the right to a multiple: the collator"

    def reward(**kwargs):
        return []

    class AsyncReward:
        async def __call__(self, **kwargs):
            return []

    names = [_trl.get_callable_name(f) for f in (reward, functools.partial(reward, x=1), AsyncReward())]
    assert names == ["reward", "reward", "AsyncReward"], "`get_callable_name` names reward functions in errors"
    kinds = [_trl.is_async_callable(f) for f in (reward, AsyncReward(), functools.partial(AsyncReward()))]
    assert kinds == [False, True, True], "`is_async_callable` knows partials and callable classes"

    columns = scored_pairs.column_names
    stream = scored_pairs.to_iterable_dataset().map(lambda row: row)  # its features are unknown
    for dataset in (scored_pairs, stream):
        assert _trl.get_dataset_column_names(dataset) == columns, "`get_dataset_column_names` reads streams as well"

    model, same = tiny_model(), tiny_model()
    message = (
        "`hash_module` hashes what the weights are, which keys the caches of reference log-probabilities and values"
    )
    assert _trl.hash_module(model) == _trl.hash_module(same) != _trl.hash_module(tiny_model(seed=1)), message
    assert _trl.get_config_model_id(model.config) == "", "`get_config_model_id` is `_name_or_path`: args=None's folder"

    model.gradient_checkpointing_enable()
    with _trl.disable_gradient_checkpointing(model, None):
        assert not model.is_gradient_checkpointing, "`disable_gradient_checkpointing` serves the reference forwards"
    assert model.is_gradient_checkpointing, "`disable_gradient_checkpointing` puts back what it found"

    with _trl.global_then_local_main_first():
        pass  # a context manager without arguments, also outside a distributed run


def test_mfu(tiny_model):
    """
    300 tokens/s of 2e9 operations each are 6e11 of 3e12 operations/s, 20 %. A token takes 6 operations per weight of a
    linear layer, the tied head being one, beside those of attention, which grow with the sequence.
    """
    assert _trl.compute_mfu(2_000_000_000, 300.0, 1, 3e12) == pytest.approx(20), "`compute_mfu` is in percent"
    model = tiny_model()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    flops = [_trl.compute_flops_per_token(model.config, n) for n in (0, 8, 16)]
    assert flops[0] == 6 * weights and flops[2] - flops[1] == flops[1] - flops[0] > 0, "`compute_flops_per_token`"
    known = _trl.get_peak_flops("NVIDIA H200", "bfloat16")
    assert known == 989e12 and _trl.get_peak_flops("an unknown one", "bfloat16") is None, "`get_peak_flops`"


def test_start_event_loop():
    thread, loop, ready = _trl.start_event_loop_in_daemon(name="seam")
    message = "`start_event_loop_in_daemon` gives (thread, loop, event): rewards/calling.py waits for the event"
    assert isinstance(thread, threading.Thread) and thread.daemon and thread.name == "seam", message
    assert ready.wait(5) and isinstance(loop, asyncio.AbstractEventLoop), message
    assert asyncio.run_coroutine_threadsafe(asyncio.sleep(0, "done"), loop).result(5) == "done", message
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)


def test_use_adapter(tiny_model):
    """`None` switches the adapters off, a name chooses one; afterwards the former is active again."""
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config).eval()
    model.add_adapter("ref", config)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        policy = model(ids).logits
        with _trl.use_adapter(model, None):
            without = model(ids).logits
        with _trl.use_adapter(model, "ref"):
            reference = model(ids).logits
        after = model(ids).logits
        base = tiny_model().eval()(ids).logits
    message = "`use_adapter` makes the reference policy out of a PEFT model in `_reference_policy`"
    assert torch.equal(after, policy) and model.active_adapter == "default", message
    assert torch.allclose(without, base, atol=1e-6), message
    assert not torch.allclose(without, policy) and not torch.allclose(reference, without), message
    assert not torch.allclose(reference, policy), message


def test_public_functions_with_private_details():
    """`as_group` reads implicit prompts as TRL does, and takes a row as conversational where TRL does."""
    row = {"chosen": "a b", "rejected": "a c"}
    assert extract_prompt(row) == {"prompt": "a", "chosen": " b", "rejected": " c"}, "`extract_prompt`, see `as_group`"
    messages = [{"role": "user", "content": "a"}]
    assert is_conversational({"prompt": messages, "completion": messages}), "`is_conversational`, see `Group`"
    assert not is_conversational({"prompt": "a", "completion": "b"}), "`is_conversational`, see `Group`"


# ---- DPOTrainer: what is overridden, and what is called ----

DPO_INIT = (
    "(self, model, ref_model=None, args=None, data_collator=None, train_dataset=None, eval_dataset=None, "
    "processing_class=None, compute_metrics=None, callbacks=None, optimizers=(None, None), quantization_config=None, "
    "peft_config=None)"
)


def test_constructor():
    """Positional arguments of a DPO script reach the same parameter as well: the order is kept, and ours come last."""
    found = signature(DPOTrainer.__init__)
    assert found == DPO_INIT, (
        f"`DPOTrainer.__init__` now takes {found}: `_OfflineRewardTrainer` repeats its parameters"
    )
    assert signature(_OfflineRewardTrainer.__init__) == f"{DPO_INIT[:-1]}, reward_funcs=None)"


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "_prepare_dataset": "(self, dataset, processing_class, args, dataset_name)",
        "_set_signature_columns_if_needed": "(self)",
        "compute_ref_log_probs": "(self, model, inputs)",
        "_precompute_ref_logps": "(self, dataset, name, batch_size)",
        "_compute_loss": "(self, model, inputs, return_outputs)",
        "_get_train_sampler": "(self, train_dataset=None)",
        "log": "(self, logs, start_time=None)",
    }.items(),
)
def test_overridden_methods(name, expected):
    found = signature(getattr(DPOTrainer, name))
    assert found == expected, f"`_OfflineRewardTrainer` overrides `DPOTrainer.{name}`, which now takes {found}"
    assert name in vars(_OfflineRewardTrainer), f"`{name}` is no longer overridden: remove the pin"
    assert signature(getattr(_OfflineRewardTrainer, name)) == expected, f"our `{name}` differs from DPOTrainer's"


def test_no_other_method_is_overridden():
    """A subclass stays shallow, and a new name of ours must not replace one of TRL's by accident."""
    own = {name for name in vars(_OfflineRewardTrainer) if not name.startswith("__")}
    overridden = {name for name in own if hasattr(DPOTrainer, name)} - {"_abc_impl"}
    assert overridden == {
        "_prepare_dataset",
        "_set_signature_columns_if_needed",
        "compute_ref_log_probs",
        "_precompute_ref_logps",
        "_compute_loss",
        "_get_train_sampler",
        "log",
    }


def statements(function: Callable) -> list[ast.stmt]:
    """The statements of a function's body."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    return definition.body


def calls(node: ast.AST) -> list[str]:
    """Everything that is called in a piece of source, in its order."""
    return [ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]


def test_constructor_precomputes_last():
    """
    `_finish_dataset` computes advantages before reference log-probabilities, after DPOTrainer's constructor, in which
    `_precompute_ref_logps` returns at once. Nothing may come after it that would need what it did not do.
    """
    *before, last = statements(DPOTrainer.__init__)
    message = "DPOTrainer's constructor no longer ends with `_precompute_ref_logps`, on which `_constructed` relies"
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "args.precompute_ref_log_probs", message
    assert calls(last).count("self._precompute_ref_logps") == 3, message  # train, eval, each of several eval datasets
    assert not any("self._precompute_ref_logps" in calls(statement) for statement in before), message
    written = {ast.unparse(t) for n in ast.walk(last) if isinstance(n, ast.Assign) for t in n.targets}
    assert written == {"self.train_dataset", "self.eval_dataset", "self.ref_model"}, message


def test_constructor_prepares_datasets_before_an_accelerator_exists():
    order = [name for statement in statements(DPOTrainer.__init__) for name in calls(statement)]
    assert order.count("super().__init__") == 1
    before, after = order[: order.index("super().__init__")], order[order.index("super().__init__") :]
    message = "`_prepare_dataset` no longer runs before Trainer's constructor, which is why it asks PartialState"
    assert "self._prepare_dataset" in before and "self._prepare_dataset" not in after, message
    message = "DPOTrainer no longer loads a missing reference after Trainer's constructor: see `copy_as_reference`"
    assert "create_model_from_path" in after, message


def test_loss_is_not_scaled():
    message = (
        "`loss_is_scaled_for_ga` must be False: `_loss` returns the mean of a micro-batch, and Trainer divides it"
    )
    assert DPOTrainer.loss_is_scaled_for_ga is False, message
    assert _OfflineRewardTrainer.loss_is_scaled_for_ga is False, message


@pytest.fixture(scope="module")
def dpo(tmp_path_factory, tiny_model, tokenizer, pairs) -> DPOTrainer:
    args = cpu_args(DPOConfig, tmp_path_factory.mktemp("dpo"))
    return DPOTrainer(tiny_model(), tiny_model(seed=1), args, train_dataset=pairs.take(8), processing_class=tokenizer)


def test_attributes_after_construction(dpo, tokenizer):
    expected = {
        "_tokenizer": lambda x: x is tokenizer and x.pad_token_id is not None,
        "precompute_ref_logps": lambda x: x is False,
        "loss_types": lambda x: x == ["sigmoid"],
        "loss_weights": lambda x: x == [1.0],
        "aux_loss_enabled": lambda x: x is False,
        "router_aux_loss_coef": lambda x: x == 0.0,
        "_metrics": lambda x: x.keys() == {"train", "eval"} and all(type(m) is defaultdict for m in x.values()),
        "_total_train_tokens": lambda x: x == 0,
        "_tp_size": lambda x: x == 1,
        "ref_model": lambda x: isinstance(x, PreTrainedModel),
        "_signature_columns": lambda x: x is None,
        "_is_vision_dataset": lambda x: x is False,
        "maybe_activation_offload_context": lambda x: hasattr(x, "__enter__"),
    }
    for name, holds in expected.items():
        assert hasattr(dpo, name), f"DPOTrainer no longer has `{name}`, which the offline trainers read"
        assert holds(getattr(dpo, name)), f"`DPOTrainer.{name}` is {getattr(dpo, name)!r}: not what is relied on"


def test_log_means_over_what_was_recorded(dpo):
    dpo.model.train()
    dpo._metrics["train"]["some/metric"] += [1.0, 3.0]
    dpo.log(logs := {"loss": 0.5})
    message = "`DPOTrainer.log` averages `_metrics[mode]` and empties it: `_log_means` appends to it"
    assert logs["some/metric"] == 2.0 and not dpo._metrics["train"], message
    dpo.model.eval()
    dpo._metrics["eval"]["some/metric"] += [4.0]
    dpo.log(logs := {"eval_loss": 0.5})
    assert logs["eval_some/metric"] == 4.0 and not dpo._metrics["eval"], message


def test_compute_loss_hands_over(dpo, monkeypatch):
    """Trainer calls `compute_loss`, and DPOTrainer hands its first three arguments over to `_compute_loss`."""
    seen: list[Any] = []
    monkeypatch.setattr(dpo, "_compute_loss", lambda model, inputs, return_outputs: seen.append(return_outputs) or 7)
    message = "`DPOTrainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)` calls `_compute_loss`"
    assert dpo.compute_loss(dpo.model, {}, return_outputs=True, num_items_in_batch=3) == 7 and seen == [True], message


def test_evaluate_prepares_what_it_is_given(dpo, pairs, monkeypatch):
    """Rows that are given to `evaluate` come to `_prepare_dataset`, with the name of their dataset."""
    seen: list[tuple] = []
    prepare = dpo._prepare_dataset

    def record(dataset, processing_class, args, name):
        seen.append((dataset.column_names, processing_class is dpo.processing_class, args is dpo.args, name))
        return prepare(dataset, processing_class, args, name)

    monkeypatch.setattr(dpo, "_prepare_dataset", record)
    dpo.evaluate({"few": pairs.take(2)})
    message = "`DPOTrainer.evaluate` prepares datasets with `_prepare_dataset(dataset, processing_class, args, name)`"
    assert seen == [(["prompt", "chosen", "rejected", "subset"], True, True, "few")], message


def test_fused_head(dpo):
    """
    The log-probabilities are those of the model's own logits: log softmax at position t, read off at token t + 1, and
    0 where that token's label is −100.
    """
    message = "the fused LM head that DPOTrainer adds gives the log-probabilities that every offline loss is made of: "
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    labels = ids.masked_fill(torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]) == 1, -100)
    model = dpo.model.eval()
    with torch.no_grad():
        outputs = model(
            input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids), use_cache=False, fused_lm_head=True
        )
        logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    assert isinstance(outputs, FusedCausalLMOutput), message + "its output is a `FusedCausalLMOutput`"
    fields = {"loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss"}
    assert {f.name for f in dataclasses.fields(outputs)} == fields, message + "these are its fields"
    mask = labels[:, 1:] != -100
    expected = {
        "log_probs": logps.gather(2, ids[:, 1:, None])[..., 0],
        "entropy": -(logps.exp() * logps).sum(-1),
        "is_top1": (logps.argmax(-1) == ids[:, 1:]).float(),
    }
    for name, values in expected.items():
        found = getattr(outputs, name)
        assert found.shape == (2, 4), message + f"`{name}` has shape (batch, seq_len - 1)"
        assert torch.allclose(found.float(), values * mask, atol=1e-5), (
            message + f"`{name}` is 0 where the label is -100"
        )
    assert outputs.log_probs[mask].abs().min() > 0, "the test itself would not notice masked-out completions"
    assert outputs.aux_loss is None, message + "without experts there is no auxiliary loss"
    with torch.no_grad():
        reference = dpo.ref_model(input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True)
    assert reference.log_probs.shape == (2, 4), message + "the reference model gets one as well"


# ---- Configs ----

# DPOConfig's own fields, and what the offline configs do with them
DPO_FIELDS = {
    "model_init_kwargs": None,
    "trust_remote_code": False,
    "router_aux_loss_coef": None,
    "disable_dropout": True,
    "dataset_num_proc": None,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "padding_free": False,
    "pad_to_multiple_of": "auto",
    "precompute_ref_log_probs": False,
    "precompute_ref_batch_size": None,
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "label_smoothing": 0.0,
    "beta": 0.1,
    "use_weighting": False,
    "discopop_tau": 0.05,
    "activation_offloading": False,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "pad_token": None,
}


def defaults(config_class: type) -> dict[str, Any]:
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(config_class)
    }


def test_dpo_config():
    theirs = {k: v for k, v in defaults(DPOConfig).items() if k not in defaults(TrainingArguments)}
    assert theirs == DPO_FIELDS, (
        "the fields of DPOConfig or their defaults have changed: decide for each new one whether an offline reward "
        "trainer takes it, or lists it in `_OfflineRewardConfig._dpo_only`"
    )
    for name, neutral in _OfflineRewardConfig._dpo_only.items():
        message = f"`_dpo_only` refuses `{name}` unless it is {neutral!r}, but DPOConfig's default is {theirs[name]!r}"
        assert theirs[name] == neutral, message


def test_alol_config_has_the_defaults_of_dpo_config():
    """Beside the loss, only the learning rate differs, as the docstring says."""
    ours = defaults(ALoLConfig)
    changed = {name for name, value in defaults(DPOConfig).items() if ours[name] != value}
    assert changed == {"loss_type", "learning_rate"}


# ---- GRPOTrainer: what reward functions are given ----


def test_reward_functions_get_what_grpo_trainer_passes(tmp_path, tiny_model, tokenizer):
    """One step of GRPOTrainer and `score_dataset` on the same columns. Only `completion_index` is ours."""
    calls: list[dict[str, Any]] = []

    def record(**kwargs):
        calls.append(kwargs)
        kwargs["log_extra"]("a column", [0.0] * len(kwargs["completions"]))
        kwargs["log_metric"]("a metric", 0.0)
        return [0.0] * len(kwargs["completions"])

    rows = [{"prompt": "How?", "answer": "So.", "level": level} for level in range(4)]
    args = cpu_args(
        GRPOConfig, tmp_path, max_steps=1, num_generations=2, max_completion_length=2, per_device_train_batch_size=2
    )
    trainer = GRPOTrainer(tiny_model(), record, args, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    scored = Dataset.from_list([{**row, "completions": [" a", " b"]} for row in rows])
    score_dataset(scored, record, processing_class=tokenizer, batch_size=8)
    online, offline = calls

    message = (
        "GRPOTrainer passes other arguments to reward functions than `call_reward_funcs` does, so that a function "
        "written for it may fail here"
    )
    assert online.keys() == offline.keys() - {"completion_index"}, message
    assert online.keys() == {
        "prompts",
        "completions",
        "completion_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
        "answer",
        "level",
    }, message
    for kwargs, count in ((online, 2), (offline, 8)):
        assert all(len(kwargs[name]) == count for name in ("prompts", "completions", "completion_ids", "level")), (
            message
        )
        assert all(isinstance(ids, list) and isinstance(ids[0], int) for ids in kwargs["completion_ids"]), message
        assert isinstance(kwargs["trainer_state"], TrainerState), message


# ---- Trainer: what is overridden, and what is called around checkpoints ----


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (Trainer._save_checkpoint, "(self, model, trial)"),
        (Trainer._push_from_checkpoint, "(self, checkpoint_folder)"),
        (Trainer._get_output_dir, "(self, trial)"),
        (Trainer._load_from_checkpoint, "(self, resume_from_checkpoint, model=None)"),
        (Trainer._load_best_model, "(self)"),
        (
            sort_checkpoints,
            "(output_dir, checkpoint_prefix='checkpoint', use_mtime=False, best_model_checkpoint=None)",
        ),
        (
            Trainer._run_epoch,
            "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
            "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, "
            "steps_trained_in_current_epoch)",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_checkpoints_of_trainer(function, expected):
    found = signature(function)
    assert found == expected, f"`WholeCheckpointsMixin` relies on transformers' `{function.__name__}`: {found}"


def test_a_checkpoint_is_pushed_and_others_deleted_where_the_mixin_waits_for():
    source = inspect.getsource(Trainer._save_checkpoint)
    message = "`WholeCheckpointsMixin` does at the end what `Trainer._save_checkpoint` does with `{}`"
    assert "if self.args.push_to_hub:\n            self._push_from_checkpoint(output_dir)" in source, message.format(
        "push_to_hub"
    )
    assert "save_total_limit=self.args.save_total_limit" in source, message.format("save_total_limit")


# ---- GRPOTrainer: what is overridden, and what is called ----

GRPO_INIT = (
    "(self, model, reward_funcs=None, args=None, train_dataset=None, eval_dataset=None, processing_class=None, "
    "reward_processing_classes=None, callbacks=None, optimizers=(None, None), quantization_config=None, "
    "peft_config=None, tools=None, rollout_func=None, environment_factory=None)"
)

GRPO_OVERRIDDEN = {
    "_calculate_rewards": "(self, inputs, prompts, completions, completion_ids_list)",
    "_compute_loss": "(self, model, inputs)",
    "_generate_and_score_completions": "(self, inputs)",
    "_tokenize_prompts": "(self, prompts)",
    "_generate_single_turn": "(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False)",
    "_get_train_sampler": "(self, dataset=None)",
    "_get_per_token_logps_and_entropies": "(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, "
    "compute_entropy=False, compute_aux_loss=False, pixel_values=None, image_grid_thw=None, num_images=None, "
    "pixel_attention_mask=None, spatial_shapes=None, num_tiles=None, image_sizes=None, token_type_ids=None, "
    "mm_token_type_ids=None, image_position_ids=None)",
    "_load_best_model": "(self)",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "_save": "(self, output_dir=None, state_dict=None)",
    "_save_rng_state": "(self, output_dir)",
    "create_optimizer": "(self, model=None)",
    "train": "(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)",
}


def test_grpo_constructor():
    found = signature(GRPOTrainer.__init__)
    assert found == GRPO_INIT, (
        f"`GRPOTrainer.__init__` now takes {found}: `_ActorCriticTrainer` repeats its parameters"
    )
    assert signature(_ActorCriticTrainer.__init__) == GRPO_INIT


@pytest.mark.parametrize(("name", "expected"), GRPO_OVERRIDDEN.items())
def test_overridden_methods_of_grpo(name, expected):
    found = signature(getattr(GRPOTrainer, name))
    assert found == expected, f"`_ActorCriticTrainer` overrides `GRPOTrainer.{name}`, which now takes {found}"


def test_no_other_method_of_grpo_is_overridden():
    own = {name for name in vars(_ActorCriticTrainer) if not name.startswith("__")}
    assert {name for name in own if hasattr(GRPOTrainer, name)} - {"_abc_impl"} == GRPO_OVERRIDDEN.keys()


def test_grpo_methods_of_drpo():
    """Beside those of the base, one is overridden, and one is what reward functions get as `log_extra`."""
    own = {name for name in vars(DRPOTrainer) if not name.startswith("__") and hasattr(GRPOTrainer, name)}
    assert own - {"_abc_impl"} - GRPO_OVERRIDDEN.keys() == {
        "_name", "_paper", "_set_signature_columns_if_needed", "_tag_names",
    }  # fmt: skip
    for name, expected in {
        "_log_completion_extra": "(self, column, values)",
        "_set_signature_columns_if_needed": "(self)",
    }.items():
        found = signature(getattr(GRPOTrainer, name))
        assert found == expected, f"`DRPOTrainer` relies on `GRPOTrainer.{name}`, which now takes {found}"


def test_grpo_loss_is_scaled():
    message = "`loss_is_scaled_for_ga` must be True: `_compute_loss` divides by the accumulated steps itself"
    assert GRPOTrainer.loss_is_scaled_for_ga is True, message


@pytest.fixture(scope="module")
def grpo(tmp_path_factory, tiny_model, tokenizer) -> GRPOTrainer:
    def reward(completions, **kwargs):
        return [float(i) for i in range(len(completions))]

    settings = {"beta": 0.1, "num_generations": 2, "max_completion_length": 4, "num_iterations": 2}
    args = cpu_args(GRPOConfig, tmp_path_factory.mktemp("grpo"), **settings)
    folder = str(tmp_path_factory.mktemp("policy"))
    tiny_model().save_pretrained(folder)
    rows = Dataset.from_dict({"prompt": ["How?", "Why?", "Who?", "When?"]})
    trainer = GRPOTrainer(folder, reward, args, train_dataset=rows, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1  # as inside `train`
    return trainer


def test_attributes_of_grpo_after_construction(grpo):
    expected = {
        "aux_loss_enabled": lambda x: x is False,
        "chat_template": lambda x: x is None,
        "chat_template_kwargs": lambda x: x == {},
        "entropy_coef": lambda x: x == 0.0,
        "eos_token_ids": lambda x: isinstance(x, list) and all(isinstance(i, int) for i in x),
        "max_completion_length": lambda x: x == 4,
        "num_generations": lambda x: x == 2,
        "num_generations_eval": lambda x: x == 2,
        "num_iterations": lambda x: x == 2,
        "reward_funcs": lambda x: len(x) == 1,
        "reward_weights": lambda x: torch.equal(x, torch.ones(1)),
        "router_aux_loss_coef": lambda x: x == 0.0,
        "ref_model": lambda x: isinstance(x, PreTrainedModel),
        "_buffered_inputs": lambda x: x is None,
        "_logs": lambda x: x["advantages"].maxlen == 4,
        "_metrics": lambda x: x.keys() == {"train", "eval"},
        "_step": lambda x: x == 0,
        "_tokenizer": lambda x: x is grpo.processing_class,
    }
    for name, holds in expected.items():
        assert hasattr(grpo, name), f"GRPOTrainer no longer has `{name}`, which the online trainers read"
        assert holds(getattr(grpo, name)), f"`GRPOTrainer.{name}` is {getattr(grpo, name)!r}: not what is relied on"


def test_what_grpo_makes_of_a_generation_batch(grpo, monkeypatch):
    """The old policy's pass comes before the reference's, and rewards and logs are where they are looked for."""
    passes: list[Any] = []
    rewards: list[torch.Tensor] = []
    log_probs, calculate = grpo._get_per_token_logps_and_entropies, grpo._calculate_rewards

    def record_pass(model, *args, **kwargs):
        passes.append((model is grpo.model, model is grpo.ref_model, len(args), torch.is_grad_enabled()))
        return log_probs(model, *args, **kwargs)

    def record_rewards(*args):
        rewards.append(calculate(*args))
        return rewards[0]

    monkeypatch.setattr(grpo, "_get_per_token_logps_and_entropies", record_pass)
    monkeypatch.setattr(grpo, "_calculate_rewards", record_rewards)
    grpo.model.train()
    batch = grpo._generate_and_score_completions([{"prompt": p} for p in ("How?", "How?", "Why?", "Why?")])
    message = "GRPOTrainer's scoring of a generation batch has changed, on which the online trainers build: "
    assert passes == [(True, False, 3, False), (False, True, 3, False)], message + "the order of its forward passes"
    assert rewards[0].tolist() == [[0.0], [1.0], [2.0], [3.0]], (
        message + "`_calculate_rewards` returns (rows, functions)"
    )
    width = batch["completion_ids"].size(1)
    shapes = {
        "prompt_ids": (4, batch["prompt_ids"].size(1)),
        "prompt_mask": (4, batch["prompt_ids"].size(1)),
        "completion_ids": (4, width),
        "completion_mask": (4, width),
        "old_per_token_logps": (4, width),
        "ref_per_token_logps": (4, width),
        "advantages": (4,),
        "num_items_in_batch": (),
    }
    assert {name: tuple(x.shape) for name, x in batch.items()} == shapes, message + "names and shapes"
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum(), message + "`num_items_in_batch`"
    assert len(grpo._logs["advantages"]) == 4, message + "the log of completions"
    assert "frac_reward_zero_std" in grpo._metrics["train"], message + "a metric that is taken out"


def test_grpo_counts_steps_and_keeps_rollouts(grpo, monkeypatch):
    """What a checkpoint in the middle of a generation batch holds: the step, and the batches that are left."""
    made: list[int] = []
    rows = torch.arange(4.0)
    monkeypatch.setattr(
        grpo,
        "_generate_and_score_completions",
        lambda batch: made.append(1) or {"x": rows, "num_items_in_batch": rows[0]},
    )
    grpo.model.train()
    message = (
        "`GRPOTrainer._prepare_inputs` no longer generates when `_step` is a multiple of the steps per generation"
    )
    grpo._step, grpo._buffered_inputs = 0, None
    assert grpo._prepare_inputs([]).keys() == {"x", "num_items_in_batch"} and len(made) == 1, message
    assert isinstance(grpo._buffered_inputs, list) and len(grpo._buffered_inputs) == 1, message
    grpo._step = 1
    grpo._prepare_inputs([])
    assert len(made) == 1, message
    grpo._step = 2
    grpo._prepare_inputs([])
    assert len(made) == 2, message
    grpo._step, grpo._buffered_inputs = 0, None


# GRPOConfig's own fields that an online trainer takes. The rest is refused by `_ActorCriticConfig._grpo_only`
GRPO_TAKEN = """
    beta cache_implementation cast_lm_head_to_fp32 chat_template_kwargs disable_dropout ds3_gather_for_generation
    entropy_coef epsilon generation_batch_size generation_kwargs log_completions log_completions_hub_repo
    log_multimodal log_unique_prompts loss_type mask_truncated_completions max_completion_length min_p
    model_init_kwargs num_completions_to_print num_generations num_generations_eval num_iterations pad_to_multiple_of
    repetition_penalty reward_weights router_aux_loss_coef shuffle_dataset steps_per_generation temperature top_k top_p
    transformers_continuous_batching_config trust_remote_code use_transformers_continuous_batching
    use_transformers_paged use_vllm vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port
    vllm_importance_sampling_cap vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_max_model_length vllm_mode vllm_model_impl
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_structured_outputs_regex
    vllm_tensor_parallel_size
"""


def test_grpo_config():
    theirs = defaults(GRPOConfig).keys() - defaults(TrainingArguments).keys()
    refused = set(_ActorCriticConfig._grpo_only)
    assert theirs == refused | set(GRPO_TAKEN.split()), (
        "the fields of GRPOConfig have changed: decide for each new one whether an online trainer takes it, or lists "
        "it in `_ActorCriticConfig._grpo_only`"
    )
    assert not refused & set(GRPO_TAKEN.split())


def test_online_configs_have_the_defaults_of_grpo_config():
    """Beside the loss, only what the docstrings say differs."""
    shared = {"loss_type", "beta", "num_generations", "disable_dropout"}
    ppo = shared | {"num_iterations"}
    for config_class, changed in ((PPOConfig, ppo), (APAConfig, shared), (DRPOConfig, ppo)):
        ours = defaults(config_class)
        assert {name for name, value in defaults(GRPOConfig).items() if ours[name] != value} == changed
