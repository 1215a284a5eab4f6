"""Trains every method for a few steps with the engine that it is launched with, and writes down what came out."""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer
from trl import GRPOTrainer
from worker import GLOBAL_BATCH, look_up, share_of_early_tokens
from worlds import short_rows

from trl_lol import (
    ALoLTrainer,
    APATrainer,
    CoPGTrainer,
    DRPOTrainer,
    GenerationEvalCallback,
    PPOTrainer,
    sample_completions,
    toy,
    weighted_sum,
)
from trl_lol._cache import model_key


OFFLINE = ("full", "lora", "cached", "path")
LOGGED = ("alol", "copg", "copg_shared")
ONLINE = ("full", "lora", "path")
TYPES = {
    "one": DistributedType.NO, "fsdp2": DistributedType.FSDP, "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}  # fmt: skip


def let_fsdp_run_on_cpus() -> None:
    """accelerate takes FSDP's settings for GPUs and the like only, and would train with DDP, without a word."""
    init = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def main(engine: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if engine == "fsdp2":
        let_fsdp_run_on_cpus()
    is_deepspeed = engine.startswith("zero")
    state = PartialState(backend="gloo") if is_deepspeed else PartialState(cpu=True)
    assert state.num_processes == (1 if engine == "one" else 2)
    dialogues = toy.make_dialogues(num_prompts=31)
    tokenizer = toy.make_tokenizer(dialogues)
    pairs, groups = short_rows(dialogues)
    prompts = dialogues.select_columns("prompt")
    references = prompts.add_column("reference", [completions[0] for completions in dialogues["completions"]])
    online = {"num_iterations": 3, "max_completion_length": 8, "value_learning_rate": 0.3}
    methods: dict[str, tuple[type[Trainer], Dataset, dict[str, Any], dict[str, Any]]] = {
        "alol": (ALoLTrainer, pairs, {"reward_funcs": weighted_sum([toy.oracle_reward], [0.01])},
                 {"value_num_train_epochs": 2, "value_max_prompts": 20}),
        "copg": (CoPGTrainer, groups, {"reward_funcs": weighted_sum([toy.oracle_reward], [0.1])}, {}),
        "copg_shared": (CoPGTrainer, groups, {"reward_funcs": weighted_sum([toy.oracle_reward], [0.1])},
                        {"shared_prompts": True}),
        "ppo": (PPOTrainer, prompts, {"reward_funcs": share_of_early_tokens}, {"beta": 0.05, **online}),
        "apa": (APATrainer, prompts, {"reward_funcs": share_of_early_tokens},
                {"beta": 1.0, "learning_rate": 0.02, **online}),
        "drpo": (DRPOTrainer, references, {"reward_funcs": share_of_early_tokens},
                 {"beta": 0.05, "reset_prob": 0.5, "seed": 10, **online}),
    }  # fmt: skip

    def make_model() -> Any:
        return toy.make_model(tokenizer, hidden_size=32, num_layers=2)

    if state.is_main_process:
        make_model().save_pretrained(folder / "model")
    state.wait_for_everyone()

    def build(method: str, kind: str, run: str, model: Any = None, **kwargs: Any) -> Trainer:
        trainer_class, rows, inputs, settings = methods[method]
        if kind == "cached":
            kwargs["precompute_ref_log_probs"] = True
        args = trainer_class._config_class(
            str(folder / method / kind / run),
            **{
                "use_cpu": not is_deepspeed, "ddp_backend": "gloo" if is_deepspeed else None, "bf16": False,
                "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "max_steps": 3,
                # Adam divides by the size of the gradient, and so makes much of rounding errors
                "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
                "per_device_train_batch_size": GLOBAL_BATCH // state.num_processes,
                "per_device_eval_batch_size": GLOBAL_BATCH // state.num_processes,
                **settings,
                **kwargs,
            },
        )  # fmt: skip
        return trainer_class(
            model=model or (str(folder / "model") if kind == "path" else make_model()),
            args=args,
            train_dataset=rows,
            eval_dataset=rows.take(12),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
            if kind == "lora"
            else None,
            **inputs,
        )

    def losses(trainer: Trainer) -> list[float]:
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    results: dict[str, dict[str, Any]] = {}

    def run(method: str, kind: str) -> dict[str, Any]:
        trainer = build(method, kind, "run")
        trainer.train()
        assert trainer.accelerator.distributed_type == TYPES[engine]
        assert (trainer.accelerator.state.deepspeed_plugin.zero_stage if is_deepspeed else 0) == int(
            engine.removeprefix("zero") if is_deepspeed else 0
        )
        found = {"loss": losses(trainer)}
        if kind in OFFLINE and method in LOGGED:
            judge = GenerationEvalCallback(
                trainer, dialogues, toy.heldout_reward, num_prompts=5, max_new_tokens=4, temperature=0.0
            )
            trainer.add_callback(judge)
            metrics = trainer.evaluate()
            found |= {name: metrics[name] for name in ("eval_loss", "eval_generation/reward", "eval_generation/kl")
                      if name in metrics}  # fmt: skip
        trainer.save_model(str(folder / method / kind / "final"))
        found["key"], *_ = model_key(trainer.accelerator.unwrap_model(trainer.model))
        # Resumed in the middle of a generation, whose completions would be others if they were made anew
        adam = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4}
        whole = build(method, kind, "whole", **adam, save_strategy="steps", save_steps=2)
        whole.train()
        whole.save_model(str(folder / method / kind / "whole-final"))
        resumed = build(method, kind, "resumed", **adam)
        resumed.train(resume_from_checkpoint=str(folder / method / kind / "whole" / "checkpoint-2"))
        resumed.save_model(str(folder / method / kind / "resumed-final"))
        return found | {"whole": losses(whole), "resumed": losses(resumed)}

    with patch.object(GRPOTrainer, "_generate_single_turn", look_up):
        for method in methods:
            for kind in OFFLINE if method in LOGGED else ONLINE:
                results[f"{method}, {kind}"] = run(method, kind)

    # Completions of their own, which end at other places on the other rank. Shards wait for each other
    for kind in ("full", "lora"):
        model = make_model()
        model.generation_config.eos_token_id = list(range(6, 200))
        trainer = build("ppo", kind, "generated", model=model, max_completion_length=24, num_iterations=1)
        trainer.train()
        lengths = {key: [entry[f"completions/{key}_length"] for entry in trainer.state.log_history[:3]] for key in
                   ("min", "max")}  # fmt: skip
        results[f"generated, {kind}"] = lengths

    errors = {}
    if engine in ("fsdp2", "zero3"):
        rows = dialogues.take(2)
        for name, call in {
            "sampling": lambda: sample_completions(rows, trainer.model, tokenizer, 2, max_new_tokens=2),
            "resetting": lambda: build("apa", "full", "reset", reset_ref_patience=1, eval_strategy="steps"),
        }.items():
            try:
                call()
            except ValueError as error:
                errors[name] = str(error)
    if state.is_main_process:
        (folder / "results.json").write_text(json.dumps({"runs": results, "errors": errors}))
    state.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads outlive the group
