"""A script written for DPOTrainer runs, and with nothing but the class names changed it runs A-LoL or CoPG."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import pytest
import torch
from conftest import cpu_args
from datasets import Dataset, DatasetDict
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser

from trl_lol import ALoLConfig, ALoLTrainer, CoPGConfig, CoPGTrainer
from trl_lol.losses import ALOL_LOSS_TYPES


# What users have: the arguments and the order of work of TRL's own DPO script
DPO_SCRIPT = """\
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl import DPOConfig, DPOTrainer

parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
training_args.model_init_kwargs = {
    "revision": model_args.model_revision,
    "trust_remote_code": training_args.trust_remote_code,
    "attn_implementation": model_args.attn_implementation,
    "dtype": model_args.dtype,
}
dataset = load_dataset(
    script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
)
trainer = DPOTrainer(
    model=model_args.model_name_or_path,
    args=training_args,
    train_dataset=dataset[script_args.dataset_train_split],
    eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
    quantization_config=get_quantization_config(model_args),
    peft_config=get_peft_config(model_args),
)
trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
trainer.accelerator.print("Training completed.")
trainer.save_model(training_args.output_dir)
trainer.end()
"""


def swapped(name: str) -> str:
    """The script with another method's class names."""
    script = DPO_SCRIPT.replace("from trl import DPOConfig, DPOTrainer", "from trl_lol import DPOConfig, DPOTrainer")
    return script.replace("DPOConfig", f"{name}Config").replace("DPOTrainer", f"{name}Trainer")


SCRIPTS = {"DPO": DPO_SCRIPT, "ALoL": swapped("ALoL"), "CoPG": swapped("CoPG")}

FLAGS = [
    "--learning_rate", "5.0e-4", "--num_train_epochs", "1", "--per_device_train_batch_size", "2", "--max_steps", "2",
    "--gradient_accumulation_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1", "--logging_steps", "1",
    "--no_remove_unused_columns", "--dtype", "float32", "--use_cpu", "--bf16", "false", "--report_to", "none",
    "--disable_tqdm", "true",
]  # fmt: skip
LORA_FLAGS = ["--use_peft", "--lora_r", "32", "--lora_alpha", "16", "--gradient_checkpointing", "false"]

CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"city": "Rome"}}}
TOOLS = [
    {"type": "function", "function": {"name": "lookup", "parameters": {"properties": {"city": {"type": "string"}}}}}
]


def text(messages: list[dict[str, Any]]) -> str:
    return " ".join(message["content"] for message in messages)


def as_text(row: dict[str, Any]) -> dict[str, Any]:
    return {name: f" {text(row[name])}" for name in ("prompt", "chosen", "rejected")}


def with_implicit_prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}


def with_tools(row: dict[str, Any]) -> dict[str, Any]:
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    answer = {"role": "tool", "name": "lookup", "content": "sunny"}
    return {**row, "prompt": [*row["prompt"], called, answer], "tools": json.dumps(TOOLS)}


DATA: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "standard": as_text,
    "conversational": lambda row: row,
    "implicit prompt": with_implicit_prompt,
    "tools": with_tools,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tiny_model, tokenizer) -> str:
    """A folder with the tiny model and its tokenizer, as `model_name_or_path` names one."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def data_dirs(tmp_path_factory, pairs) -> dict[str, str]:
    """One folder per kind of data, with a training and a test split."""
    paths = {}
    for kind, convert in DATA.items():
        paths[kind] = str(path := tmp_path_factory.mktemp("data"))
        rows = [convert({k: row[k] for k in ("prompt", "chosen", "rejected")}) for row in pairs.take(16)]
        for split, part in (("train", rows[:12]), ("test", rows[12:])):
            (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return paths


@pytest.fixture
def run_script(tmp_path, monkeypatch, model_dir) -> Callable[..., Any]:
    """Runs a script with arguments as from a command line, and returns its trainer."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))

    def run(script: str, data_dir: str, *flags: str) -> Any:
        argv = ["script.py", "--model_name_or_path", model_dir, "--dataset_name", data_dir, *FLAGS, *flags]
        monkeypatch.setattr(sys, "argv", [*argv, "--output_dir", str(tmp_path / "out")])
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(script, "script.py", "exec"), names)
        return names["trainer"]

    return run


def check_logs(trainer: DPOTrainer, steps: int = 2, evaluations: int = 2) -> None:
    """Every step and every evaluation is there, with finite numbers."""
    history = trainer.state.log_history
    assert sum("loss" in log for log in history) == trainer.state.global_step == steps
    assert sum("eval_loss" in log for log in history) == evaluations
    for log in history:
        assert all(math.isfinite(value) for value in log.values()), log


def num_completions(dataset: Dataset) -> int:
    return sum(map(len, dataset["completion_ids"]))


def loaded(trainer: DPOTrainer, auto_class: type = AutoModelForCausalLM) -> PreTrainedModel | PeftModel:
    """Load what was saved, as its users do, and check that it is what the trainer holds."""
    model = auto_class.from_pretrained(trainer.args.output_dir)
    is_trained = "lora_" if auto_class is AutoPeftModelForCausalLM else ""
    saved = {n: p for n, p in model.named_parameters() if is_trained in n and ".ref." not in n}
    trained = dict(trainer.model.named_parameters())
    assert saved and all(torch.equal(p, trained[n]) for n, p in saved.items())
    return model


# ---- The script ----


@pytest.mark.parametrize("name", ["ALoL", "CoPG"])
def test_the_scripts_differ_in_the_class_names_only(name):
    changed = [
        (old, new) for old, new in zip(DPO_SCRIPT.splitlines(), SCRIPTS[name].splitlines(), strict=True) if old != new
    ]
    assert len(changed) == 3 and "DPO" not in SCRIPTS[name]
    for old, new in changed:
        assert old.replace("DPO", name).replace("trl ", "trl_lol ") == new


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("script", SCRIPTS)
def test_script(run_script, data_dirs, model_dir, script, kind):
    trainer = run_script(SCRIPTS[script], data_dirs[kind])
    assert type(trainer).__name__ == f"{script}Trainer"
    check_logs(trainer)
    model = loaded(trainer)
    before = AutoModelForCausalLM.from_pretrained(model_dir)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    if script == "CoPG":
        assert trainer.train_dataset["rewards"][:] == [[1.0, 0.0]] * 12 and len(trainer.eval_dataset) == 4
    if script == "ALoL":  # 12 preferences without scores: 24 completions with rewards 1 and 0
        assert trainer.advantage_report.num_completions == 24 and trainer.advantage_report.rewards[0] == 0.0
        assert len(trainer.train_dataset) == trainer.advantage_report.num_kept < 24
        assert len(trainer.eval_dataset) == 8


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_with_lora(run_script, data_dirs, script):
    trainer = run_script(SCRIPTS[script], data_dirs["conversational"], *LORA_FLAGS)
    check_logs(trainer)
    model = loaded(trainer, AutoPeftModelForCausalLM)
    assert model.peft_config["default"].r == 32
    trained = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert trained and all(p.abs().max() > 0 for p in trained)  # they start at zero


@pytest.mark.parametrize(
    ("config_class", "added"),
    [
        (ALoLConfig, {"--epsilon", "--baseline", "--value_range", "--reward_weights"}),
        (CoPGConfig, {"--reward_weights"}),
    ],
)
def test_arguments_of_a_dpo_script_are_parsed_alike(config_class, added):
    """Every flag of a DPO script is one of ours, and takes the same values."""

    def flags(config_class: type) -> dict[str, tuple]:
        parser = TrlParser((ScriptArguments, config_class, ModelConfig))
        return {
            option: (getattr(action.type, "__qualname__", None), action.nargs, action.choices, action.const)
            for action in parser._actions
            for option in action.option_strings
        }

    theirs, ours = flags(DPOConfig), flags(config_class)
    assert theirs.items() <= ours.items() and len(theirs) > 200
    assert added <= ours.keys() - theirs.keys()


@pytest.mark.parametrize(("script", "accepted"), [("ALoL", "'alol'"), ("CoPG", "'copg'")])
def test_script_with_a_dpo_loss(run_script, data_dirs, script, accepted):
    """The flag is in many scripts, at its default. It is refused with what is accepted, before anything is loaded."""
    with pytest.raises(ValueError, match=rf"`loss_type.*\['sigmoid'\].*accepts .*{accepted}"):
        run_script(SCRIPTS[script], data_dirs["standard"], "--loss_type", "sigmoid", "--beta", "0.1")


# ---- The constructor ----


@pytest.fixture(params=[ALoLTrainer, CoPGTrainer])
def trainer_class(request) -> type[DPOTrainer]:
    return request.param


only_alol = pytest.mark.parametrize("trainer_class", [ALoLTrainer], indirect=True)


@pytest.fixture
def train(trainer_class, tmp_path, tokenizer, scored_pairs) -> Callable[..., DPOTrainer]:
    """Builds a trainer, trains 2 steps, evaluates and saves."""

    def run(model: Any, overrides: dict[str, Any] | None = None, **kwargs: Any) -> DPOTrainer:
        settings = {"max_steps": 2, "learning_rate": 1e-3, **(overrides or {})}
        args = cpu_args(trainer_class._config_class, tmp_path / "out", **settings)
        kwargs = {"train_dataset": scored_pairs.take(12), "eval_dataset": scored_pairs.skip(116), **kwargs}
        trainer = trainer_class(model, args=args, processing_class=tokenizer, **kwargs)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        return trainer

    return run


def first_log_ratio(trainer: DPOTrainer) -> float:
    """Of the first step: zero where the policy has started at the reference."""
    return trainer.state.log_history[0]["logratio/mean"]


def test_model_instance(train, tiny_model):
    trainer = train(tiny_model())
    check_logs(trainer, evaluations=1)
    loaded(trainer)
    assert first_log_ratio(trainer) == 0.0
    assert trainer.state.log_history[1]["logratio/mean"] != 0.0  # control: the reference stays where it was


def test_model_path_and_its_tokenizer(trainer_class, model_dir, tokenizer, tmp_path, scored_pairs):
    settings = {"max_steps": 2, "model_init_kwargs": {"dtype": "float32"}}
    args = cpu_args(trainer_class._config_class, tmp_path / "out", **settings)
    trainer = trainer_class(model_dir, args=args, train_dataset=scored_pairs.take(8))
    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()
    trainer.train()
    trainer.save_model()
    check_logs(trainer, evaluations=0)
    loaded(trainer)
    assert first_log_ratio(trainer) == 0.0


def test_positional_arguments(trainer_class, tiny_model, tokenizer, scored_pairs, tmp_path):
    """In DPOTrainer's order: model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class."""
    args = cpu_args(trainer_class._config_class, tmp_path)
    trainer = trainer_class(tiny_model(), None, args, None, scored_pairs.take(8), scored_pairs.skip(116), tokenizer)
    assert trainer.args is args and trainer.processing_class is tokenizer
    assert num_completions(trainer.eval_dataset) == 8


def test_eval_datasets(train, tiny_model, scored_pairs):
    """A dict of datasets, as `DatasetDict` as well; and whatever else `evaluate` is given later on."""
    trainer = train(tiny_model(), eval_dataset=DatasetDict(one=scored_pairs.skip(118), two=scored_pairs.skip(116)))
    logs = {name: value for log in trainer.state.log_history for name, value in log.items()}
    assert all(math.isfinite(value) for value in logs.values())
    assert logs["eval_one_loss"] != logs["eval_two_loss"]
    assert {name: num_completions(rows) for name, rows in trainer.eval_dataset.items()} == {"one": 4, "two": 8}
    later = trainer.evaluate(scored_pairs.skip(118))
    assert later["eval_loss"] == pytest.approx(logs["eval_one_loss"])
    later = trainer.evaluate({"new": scored_pairs.skip(116)})
    assert later["eval_new_loss"] == pytest.approx(logs["eval_two_loss"])


@only_alol
def test_iterable_datasets(train, tiny_model, scored_pairs, caplog):
    """A stream is read in its own order, which is said, and the reference answers live."""
    trainer = train(
        tiny_model(),
        train_dataset=scored_pairs.to_iterable_dataset(),
        eval_dataset=scored_pairs.skip(116).to_iterable_dataset(),
    )
    check_logs(trainer, evaluations=1)
    loaded(trainer)
    assert "completions are not drawn by advantage" in caplog.text
    assert trainer.ref_model is not None and first_log_ratio(trainer) == 0.0
    assert all(row["advantages"][0] > 0 for row in trainer.train_dataset.take(4))
    assert len(list(trainer.eval_dataset)) == 8

    caplog.clear()
    train(tiny_model(), {"sampling": "uniform"}, train_dataset=scored_pairs.to_iterable_dataset())
    assert "completions are not drawn by advantage" not in caplog.text


@only_alol
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"precompute_ref_log_probs": True}, "`precompute_ref_log_probs=True` needs the whole dataset"),
        ({"baseline": "batch_mean"}, '`baseline="batch_mean"` needs the whole dataset'),
        ({"dataloader_num_workers": 1}, "`dataloader_num_workers=0`"),
    ],
)
def test_what_a_stream_cannot_do(train, tiny_model, scored_pairs, overrides, expected):
    with pytest.raises(ValueError, match=expected):
        train(tiny_model(), overrides, train_dataset=scored_pairs.to_iterable_dataset())


def test_explicit_reference(train, tiny_model):
    """The policy starts elsewhere than a reference of another seed, and the reference is left as it was."""
    reference = tiny_model(seed=1)
    trainer = train(tiny_model(), ref_model=reference)
    check_logs(trainer, evaluations=1)
    loaded(trainer)
    assert trainer.ref_model is reference and abs(first_log_ratio(trainer)) > 0.1
    assert all(torch.equal(p, q) for p, q in zip(reference.parameters(), tiny_model(seed=1).parameters(), strict=True))
    model = tiny_model()
    with pytest.raises(ValueError, match="cannot be the same object"):
        train(model, ref_model=model)


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def test_peft_config(train, model_dir):
    trainer = train(AutoModelForCausalLM.from_pretrained(model_dir), peft_config=LORA)
    check_logs(trainer, evaluations=1)
    loaded(trainer, AutoPeftModelForCausalLM)
    assert trainer.ref_model is None and first_log_ratio(trainer) == 0.0
    assert trainer.state.log_history[1]["logratio/mean"] != 0.0


def test_peft_model(train, model_dir):
    """An adapter that was trained before: the reference is the model with it, not the one below."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    assert not torch.allclose(model(ids).logits, base)

    trainer = train(model)
    check_logs(trainer, evaluations=1)
    loaded(trainer, AutoPeftModelForCausalLM)
    assert trainer.ref_model is None and first_log_ratio(trainer) == 0.0
    assert trainer.state.log_history[1]["logratio/mean"] != 0.0


def test_no_arguments(trainer_class, model_dir, scored_pairs, tmp_path, monkeypatch):
    """
    `args=None` builds the trainer's own config, in a folder named after the model. On a CPU the default of half
    precision is refused, by DPOTrainer alike, so that the class is replaced by one with other defaults.
    """

    @dataclass
    class OnCPU(trainer_class._config_class):
        use_cpu: bool = True
        bf16: bool = False
        max_steps: int = 1
        report_to: str = "none"
        save_strategy: str = "no"
        logging_steps: float = 1
        disable_tqdm: bool = True

    monkeypatch.chdir(tmp_path)
    config_class = trainer_class._config_class
    monkeypatch.setattr(trainer_class, "_config_class", OnCPU)
    trainer = trainer_class(model_dir, train_dataset=scored_pairs.take(8))
    assert type(trainer.args) is OnCPU and trainer.args.output_dir == f"tiny-llama-{trainer_class._name}"
    trainer.train()
    check_logs(trainer, steps=1, evaluations=0)
    monkeypatch.undo()
    assert trainer_class._config_class is config_class


# ---- What is refused ----


def test_a_dpo_config_is_refused(trainer_class, tiny_model, tokenizer, scored_pairs, tmp_path):
    args = cpu_args(DPOConfig, tmp_path)
    ours = trainer_class._config_class.__name__
    message = rf"of type DPOConfig\. {trainer_class.__name__} expects {ours}.*replacing the class name"
    with pytest.raises(TypeError, match=message):
        trainer_class(tiny_model(), args=args, train_dataset=scored_pairs, processing_class=tokenizer)


DPO_ONLY = {
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.3,
    "label_smoothing": 0.1,
    "use_weighting": True,
    "ld_alpha": 0.5,
    "discopop_tau": 0.1,
    "padding_free": True,
    "truncation_mode": "keep_end",
}


@pytest.mark.parametrize(
    ("config_class", "name", "value"),
    [
        *((config_class, *field) for config_class in (ALoLConfig, CoPGConfig) for field in DPO_ONLY.items()),
        (ALoLConfig, "sync_ref_model", True),  # values would be stale
    ],
)
def test_fields_that_mean_something_to_dpo_only(config_class, name, value, tmp_path):
    assert getattr(cpu_args(DPOConfig, tmp_path, **{name: value}), name) == value  # control: DPO takes it
    with pytest.raises(ValueError, match=f"`{name}=.*{value}.*emove it"):
        cpu_args(config_class, tmp_path, **{name: value})


@pytest.mark.parametrize("loss_type", ["sigmoid", ["sigmoid"], ["alol", "sft"]])
def test_losses_of_dpo(loss_type, tmp_path):
    with pytest.raises(ValueError, match=r"`loss_type` has .*ALoLConfig accepts") as error:
        cpu_args(ALoLConfig, tmp_path, loss_type=loss_type)
    assert all(repr(accepted) in str(error.value) for accepted in ALOL_LOSS_TYPES)
    assert cpu_args(ALoLConfig, tmp_path, loss_type="alol_seq").loss_type == ["alol_seq"]  # control: a string will do
