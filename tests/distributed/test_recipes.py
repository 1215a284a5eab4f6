"""The configs of recipes/accelerate are what accelerate understands, and the recipes run with them."""

import json
import os
import subprocess
import sys

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from test_engines import CONFIGS, NO_DEEPSPEED, ROOT, launch
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType


SHORT = [
    "--toy_prompts", 40, "--max_test_rows", 8, "--max_eval_prompts", 8, "--reference_sft_steps", 3, "--max_steps", 3,
    "--disable_tqdm", "true",
]  # fmt: skip
ONLINE = ["--per_device_train_batch_size", 4, "--steps_per_generation", 1, "--max_completion_length", 12,
          "--num_iterations", 1]  # fmt: skip
LORA = ["--use_peft", "true", "--lora_r", 4, "--lora_target_modules", "all-linear"]
RECIPES = {
    "alol_hh": [],
    "copg_gsm8k": [],
    "ppo_hh": ONLINE,
    "apa_hh": ONLINE,
    "drpo_tldr": ONLINE,
    "reward_model": ["--train_policy", "true"],
}

SCRIPT = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "recipes")!r})
import alol_hh, common
from accelerate import Accelerator
from pathlib import Path
from trl_lol import ALoLConfig
sys.argv = [sys.argv[0], "--output_dir", sys.argv[1]]
common.parse(alol_hh.RecipeArguments, ALoLConfig, Path({str(ROOT / "recipes/configs/alol_hh_toy.yaml")!r}))
accelerator = Accelerator()
accelerator.prepare_model(common.torch.nn.Linear(1, 1))
ranks = accelerator.gather(common.torch.tensor([accelerator.process_index]))
if accelerator.is_main_process:
    Path(FOLDER, "ranks.json").write_text(json.dumps([accelerator.num_processes, ranks.tolist()]))
"""


def read(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple:
    """A config as `accelerate launch` reads it, and what it tells the processes."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "script.py"])
    args, defaults, _ = _validate_launch_command(args)
    args.main_process_port = 0
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, env = prepare_deepspeed_cmd_env(args)
    else:
        env = prepare_multi_gpu_env(args)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    return args, env


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_config(monkeypatch, name):
    args, env = read(name, monkeypatch)
    assert args.num_processes == 2 and env["ACCELERATE_MIXED_PRECISION"] == "no"
    assert parse_flag_from_env("ACCELERATE_USE_FSDP") == (name == "fsdp2")
    assert parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") == name.startswith("zero")
    assert args.multi_gpu == (name in ("ddp", "two_cpus")) and args.use_cpu == (name == "two_cpus")
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert "/" not in text.replace("recipes/", "") and "ip" not in [line.split(":")[0] for line in text.splitlines()]


def test_fsdp_settings(monkeypatch):
    read("fsdp2", monkeypatch)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert not isinstance(plugin.cpu_offload, CPUOffloadPolicy)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_settings(monkeypatch, stage):
    """What accelerate will make of them; DeepSpeed itself need not be there."""
    _, env = read(f"zero{stage}", monkeypatch)
    settings = {name.removeprefix("ACCELERATE_DEEPSPEED_"): value for name, value in env.items()}
    assert settings["ZERO_STAGE"] == str(stage)
    assert settings["OFFLOAD_OPTIMIZER_DEVICE"] == settings["OFFLOAD_PARAM_DEVICE"] == "none"
    assert settings["ZERO3_INIT"] == ("true" if stage == 3 else "false")
    assert settings.get("ZERO3_SAVE_16BIT_MODEL", "false") == ("true" if stage == 3 else "false")


def test_two_cpus_are_two_processes(tmp_path):
    """Which see each other. Control: with accelerate's own flags there is one."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("FOLDER", repr(str(tmp_path))))
    launch("two_cpus", script, tmp_path / "out", timeout=200, is_forced=False)
    assert json.loads((tmp_path / "ranks.json").read_text()) == [2, [0, 1]]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", script, tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert json.loads((tmp_path / "ranks.json").read_text()) == [1, [0]]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], LORA], ids=["full", "lora"])
@pytest.mark.parametrize("engine", ["two_cpus", *(pytest.param(z, marks=NO_DEEPSPEED) for z in ("zero2", "zero3"))])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(tmp_path, recipe, engine, lora):
    backend = [] if engine == "two_cpus" else ["--ddp_backend", "gloo"]
    script = ROOT / "recipes" / f"{recipe}.py"
    options = [*SHORT, *RECIPES[recipe], *lora, *backend, "--output_dir", tmp_path]
    done = launch(engine, script, *options, timeout=600, is_forced=False)
    results = json.loads(
        (tmp_path / ("policy/results.json" if recipe == "reward_model" else "results.json")).read_text()
    )
    assert len(results) >= 3 and all(result["length"] > 0 for result in results.values())
    assert done.stdout.count("== The reference policy: SFT on all completions ==") == 1  # not one for each process
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / name).exists()
