"""Nothing unpickles what it is given, runs code that comes with a model, or talks to a network."""

import ast
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import early_tokens

import trl_lol
from trl_lol import ALoLTrainer, PPOTrainer, RewardModel


ROOT = Path(trl_lol.__file__).parent
FILES = sorted([*ROOT.rglob("*.py"), *(ROOT.parent / "recipes").glob("*.py")])
# Modules that read pickles or call home
FORBIDDEN = {
    "cloudpickle", "joblib", "marshal", "shelve", "requests", "httpx", "urllib", "http", "socket", "aiohttp", "wandb",
}  # fmt: skip
UNSAFE_CALLS = {"eval", "exec", "send_telemetry", "pickle.load", "pickle.loads", "dill.load", "dill.loads"}


def unsafe(source: str) -> list[str]:
    """What of a module's source could run what it reads, or send something."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in UNSAFE_CALLS or "allow_pickle" in keywords:
            found.append(name)
        if name in ("torch.load", "load") and keywords.get("weights_only") != "True":
            found.append(f"{name} without weights_only")
        if keywords.get("trust_remote_code", "False") not in ("False", "args.trust_remote_code"):
            found.append("trust_remote_code")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT.parent).as_posix())
def test_sources_read_no_pickles_and_send_nothing(path):
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import requests",
        "from urllib.request import urlopen",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(data)",
        "eval(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "from transformers.utils.hub import send_telemetry\nsend_telemetry('x')",
    ],
)
def test_what_is_unsafe_is_caught(source):
    assert unsafe(source)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_bomb_goes_off(tmp_path):
    """The control of what follows."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["rollouts_0.pt", "value_head.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_from_a_stranger_runs_nothing(build_online_trainer, tmp_path, name):
    settings = {"num_iterations": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    build_online_trainer(PPOTrainer, reward_funcs=early_tokens, **settings).train()
    path = tmp_path / "checkpoint-1" / name
    assert path.exists()
    if name.endswith(".safetensors"):
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")).ljust(path.stat().st_size))
    else:
        torch.save({"key": Bomb(tmp_path / "exploded"), "filler": torch.zeros(10**6)}, path)
    resumed = build_online_trainer(PPOTrainer, reward_funcs=early_tokens, **settings)
    with pytest.raises(Exception, match=r"weights_only|[Hh]eader"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not (tmp_path / "exploded").exists()


def test_a_cache_from_a_stranger_runs_nothing(build_trainer, scored_pairs, tmp_path):
    def build():
        return build_trainer(
            ALoLTrainer, train_dataset=scored_pairs, value_num_train_epochs=1, precompute_ref_log_probs=True
        )

    build()
    files = [path for path in (tmp_path / "_cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl"} and len(files) >= 2
    for path in files:
        content = path.read_bytes()
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        build()
        assert path.read_bytes() == content  # computed again
    assert not (tmp_path / "exploded").exists()


CODE = """
    from pathlib import Path
    Path({path!r}).touch()
    from transformers import LlamaConfig, LlamaForSequenceClassification
    class StrangeConfig(LlamaConfig):
        model_type = "strange"
    class StrangeModel(LlamaForSequenceClassification):
        config_class = StrangeConfig
"""


@pytest.fixture
def strange_model(tmp_path, tokenizer):
    """A model folder that brings its own code, and the file that the code leaves behind when it is run."""
    folder = tmp_path / "strange"
    tokenizer.save_pretrained(folder)
    (folder / "strange.py").write_text(textwrap.dedent(CODE).format(path=str(tmp_path / "exploded")))
    auto_map = {
        "AutoConfig": "strange.StrangeConfig",
        "AutoModelForSequenceClassification": "strange.StrangeModel",
        "AutoModelForCausalLM": "strange.StrangeModel",
    }
    config = {"model_type": "strange", "architectures": ["StrangeModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 16, "num_attention_heads": 1}))
    return folder, tmp_path / "exploded"


@pytest.mark.parametrize("place", ["reward model", "policy", "online policy", "online reward model"])
def test_code_of_a_model_is_not_run(place, strange_model, build_trainer, build_online_trainer, scored_pairs):
    folder, exploded = strange_model
    with pytest.raises(ValueError, match="trust_remote_code"):
        if place == "reward model":
            RewardModel(str(folder))
        elif place == "policy":
            build_trainer(ALoLTrainer, str(folder), train_dataset=scored_pairs)
        elif place == "online policy":
            build_online_trainer(PPOTrainer, str(folder))
        else:
            build_online_trainer(PPOTrainer, reward_funcs=str(folder))
    assert not exploded.exists()


def test_code_of_a_model_is_run_when_asked_for(strange_model):
    """The control: the folder does hold code."""
    folder, exploded = strange_model
    with pytest.raises(OSError, match="safetensors"):  # it has no weights
        RewardModel(str(folder), trust_remote_code=True)
    assert exploded.exists()


NO_NETWORK = """
    import sys
    attempts = []
    def hook(event, arguments):
        if event == "socket.getaddrinfo":
            attempts.append(arguments)
        elif event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] != "127.0.0.1":
            attempts.append(arguments)
    sys.addaudithook(hook)
    {body}
    print(len(attempts), attempts[:3])
"""
IMPORTS = """
    import pkgutil, importlib, trl_lol
    for module in pkgutil.walk_packages(trl_lol.__path__, "trl_lol."):
        if "__main__" not in module.name:
            importlib.import_module(module.name)
    for name in trl_lol.__all__:
        getattr(trl_lol, name)
"""
TRAINS = """
    from trl_lol import ALoLConfig, ALoLTrainer, score_dataset, toy
    dialogues = toy.make_dialogues(num_prompts=20)
    tokenizer = toy.make_tokenizer(dialogues)
    args = ALoLConfig({folder!r}, use_cpu=True, bf16=False, max_steps=1, save_strategy="steps", save_steps=1)
    model = toy.make_model(tokenizer, hidden_size=32, num_layers=2)
    rows = score_dataset(toy.preference_pairs(dialogues), toy.oracle_reward)
    ALoLTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer).train()
"""
CALLS_HOME = """
    import socket
    try:
        socket.getaddrinfo("localhost", 80)
    except OSError:
        pass
"""


@pytest.mark.parametrize("body", [IMPORTS, TRAINS, CALLS_HOME], ids=["imports", "trains", "control"])
def test_no_network(body, tmp_path):
    """Without the variables that forbid it: only the telemetry is switched off that TRL's trainers have."""
    script = textwrap.dedent(NO_NETWORK).format(body=textwrap.dedent(body).format(folder=str(tmp_path)))
    env = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    env["HF_HUB_DISABLE_TELEMETRY"] = "1"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    count, attempts = done.stdout.splitlines()[-1].split(" ", 1)
    assert (int(count) > 0) == (body is CALLS_HOME), attempts


def test_weights_are_safetensors(build_online_trainer, tmp_path):
    trainer = build_online_trainer(PPOTrainer, reward_funcs=early_tokens, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert {path.suffix for path in tmp_path.glob("*model*")} <= {".safetensors", ".json"}
    assert (tmp_path / "value_head.safetensors").exists()
