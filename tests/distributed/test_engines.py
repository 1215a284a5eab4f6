"""
FSDP2 and DeepSpeed train as a single process does. Two processes without a GPU (gloo), with the configs of
recipes/accelerate; each world is launched once, and the tests compare what it wrote.

DeepSpeed is not among the packages that the tests need: `pip install deepspeed`. accelerate has FSDP for GPUs only, so
that `engines.py` lets it run on CPUs; what is beyond that, is torch's own.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_lol._cache import model_key


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
WORKER = Path(__file__).parent / "engines.py"
RUNS = [
    f"{method}, {kind}" for method in ("alol", "copg", "copg_shared") for kind in ("full", "lora", "cached", "path")
]
RUNS += [f"{method}, {kind}" for method in ("ppo", "apa", "drpo") for kind in ("full", "lora", "path")]
NO_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
ENGINES = ["fsdp2", pytest.param("zero2", marks=NO_DEEPSPEED), pytest.param("zero3", marks=NO_DEEPSPEED)]


def launch(engine: str, *script: object, timeout: int, is_forced: bool = True) -> subprocess.CompletedProcess:
    """Two processes with one of the configs, or a single one, without a GPU."""
    command: list[object] = [sys.executable]
    if engine != "one":
        command += ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{engine}.yaml"]
        command += ["--num_processes", "2", "--main_process_port", "0"]
    env = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    if engine.startswith("zero"):  # accelerate takes DeepSpeed for nothing that is told to be a CPU
        env["DS_ACCELERATOR"] = "cpu"
    elif is_forced:
        env["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [*map(str, command), *map(str, script)],
        env={**env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """What each engine wrote, and the folder that its models are in. Launched when it is first asked for."""
    found = {}

    def world(engine: str) -> tuple[dict, dict, Path]:
        if engine not in found:
            folder = tmp_path_factory.mktemp(engine)
            launch(engine, WORKER, engine, folder, timeout=1500)
            results = json.loads((folder / "results.json").read_text())
            found[engine] = results["runs"], results["errors"], folder
        return found[engine]

    return world


def weights(folder: Path, run: str, name: str) -> dict:
    """The trained weights, as plain transformers and PEFT load them, and the value head."""
    method, kind = run.split(", ")
    path = folder / method / kind / name
    if kind == "lora":
        policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), path)
    else:
        policy = AutoModelForCausalLM.from_pretrained(path)
    head = load_file(path / "value_head.safetensors") if method in ("ppo", "apa", "drpo") else {}
    return {**policy.state_dict(), **head}


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_equal_one(worlds, engine, run):
    """Losses, evaluation, greedy answers and their KL, and what was saved. With SGD: Adam makes much of rounding."""
    (one, _, alone), (two, _, together) = worlds("one"), worlds(engine)
    assert len(one[run]["loss"]) == 3
    assert one[run].keys() == two[run].keys()
    for name in one[run].keys() - {"whole", "resumed", "key"}:
        # The KL sums over 4 tokens, of differences of log-probabilities around -6.6, which float32 spaces by 4.8e-7
        rounding = 4 * 2 * 4.8e-7 if name == "eval_generation/kl" else 1e-6
        assert one[run][name] == pytest.approx(two[run][name], rel=0, abs=rounding), name
    assert distance(weights(alone, run, "final"), weights(together, run, "final")) <= 5e-6
    # Control: training does something
    start = AutoModelForCausalLM.from_pretrained(alone / "model")
    if "lora" not in run:
        trained = weights(together, run, "final")
        assert distance(start.state_dict(), {n: trained[n] for n in start.state_dict()}) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("run", RUNS)
def test_resumed_run_equals_the_whole_one(worlds, engine, run):
    """With Adam, from a checkpoint in the middle of a generation: weights, value head, optimizer and rollouts."""
    runs, _, folder = worlds(engine)
    assert len(runs[run]["whole"]) == 4 and runs[run]["resumed"] == runs[run]["whole"]
    assert distance(weights(folder, run, "resumed-final"), weights(folder, run, "whole-final")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("run", ["alol, full", "alol, path", "copg, cached"])
def test_caches_know_sharded_models_by_their_weights(worlds, engine, run):
    runs, _, folder = worlds(engine)
    saved = AutoModelForCausalLM.from_pretrained(folder / run.replace(", ", "/") / "final")
    assert (
        runs[run]["key"] == model_key(saved)[0] != model_key(AutoModelForCausalLM.from_pretrained(folder / "model"))[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_ranks_generate_in_step(worlds, engine, kind):
    """A rank whose completions are done goes on with the others, that would wait for its shards for ever."""
    lengths = worlds(engine)[0][f"generated, {kind}"]
    assert len(lengths["min"]) == 3
    assert all(low < high for low, high in zip(lengths["min"], lengths["max"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=NO_DEEPSPEED)])
def test_what_shards_cannot_do_is_said(worlds, engine):
    errors = worlds(engine)[1]
    assert "load" in errors["sampling"] and "ZeRO-2" in errors["sampling"]
    assert "reset_ref_patience" in errors["resetting"] and "ZeRO-2" in errors["resetting"]
