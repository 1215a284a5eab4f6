"""Stages of a run, each in a process of its own that is killed or finds its disk full: see test_kills.py."""

import errno
import gc
import hashlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from conftest import cpu_args, early_tokens, logged
from datasets import Dataset, disable_progress_bars
from torch import nn
from transformers import PreTrainedModel

from trl_lol import (
    ALoLTrainer,
    APATrainer,
    CoPGTrainer,
    DRPOTrainer,
    PPOTrainer,
    _cache,
    _resume,
    cache_rewards,
    estimate_advantages,
    sample_completions,
    score_dataset,
    toy,
)
from trl_lol.rewards import call_reward_funcs


disable_progress_bars()
DIALOGUES = toy.make_dialogues(num_prompts=12)
TOKENIZER = toy.make_tokenizer(DIALOGUES)
DATA = "data"  # rows on disk, whose caches `datasets` keeps beside them
WORK = {"rewards": 0, "forwards": 0}
gc.collect()
gc.freeze()  # every `train()` collects garbage, and would walk all that was imported


# ---- Stages: what a user's script does, in a folder. The same command again is the same call. ----


def judge(prompts: list, completions: list, **columns: Any) -> list[float | None]:
    WORK["rewards"] += len(completions)
    rewards = toy.oracle_reward(prompts, completions)
    return [None if reward > 4 else reward / 3 for reward in rewards]


def model() -> PreTrainedModel:
    return toy.make_model(TOKENIZER, hidden_size=32, num_layers=2)


def scores(root: Path) -> Any:
    return score_dataset(DIALOGUES, judge, batch_size=16, cache_dir=root / "cache")["rewards"][:]


def cached_rewards(root: Path) -> Any:
    reward = cache_rewards(judge, root / "cache", columns=[])
    rows = [(row["prompt"], completion) for row in DIALOGUES for completion in row["completions"]]
    batches = [zip(*rows[start : start + 16], strict=True) for start in (0, 8, 16)]
    return [call_reward_funcs(reward, None, *map(list, batch)) for batch in batches]


def completions(root: Path) -> Any:
    rows = DIALOGUES.select_columns("prompt")
    rows = sample_completions(rows, model(), TOKENIZER, 2, max_new_tokens=4, cache_dir=root / "cache")
    return rows["completions"][:]


def advantages(root: Path, value_source: str = "dataset") -> Any:
    settings = {"max_prompts": 8, "num_train_epochs": 2, "max_completion_length": 4, "value_source": value_source}
    rows = estimate_advantages(DIALOGUES, model(), judge, TOKENIZER, cache_dir=root / "cache", **settings)
    return rows["advantages"][:]


def rollouts(root: Path) -> Any:
    return advantages(root, "rollouts")


def prepare(root: Path) -> Any:
    """A-LoL's constructor: tokens, scores, value head, values, reference log-probabilities."""
    rows = Dataset.load_from_disk(root / DATA)
    trainer = offline(ALoLTrainer, root, rows, precompute_ref_log_probs=True, max_steps=1)
    return trainer.train_dataset.to_dict()


def alol(root: Path) -> Any:
    return train(offline(ALoLTrainer, root, toy.preference_pairs(DIALOGUES), precompute_ref_log_probs=True))


def copg(root: Path) -> Any:
    return train(offline(CoPGTrainer, root, DIALOGUES))


def offline(trainer_class: type, root: Path, rows: Dataset, **settings: Any) -> Any:
    if trainer_class is ALoLTrainer:
        settings |= {"value_num_train_epochs": 2, "value_max_prompts": 8}
    args = cpu_args(trainer_class._config_class, root / "run", **SAVING | settings)
    return trainer_class(model(), args=args, train_dataset=rows, processing_class=TOKENIZER, reward_funcs=judge)


def ppo(root: Path) -> Any:
    return train(online(PPOTrainer, root))


def apa(root: Path) -> Any:
    return train(online(APATrainer, root))


def drpo(root: Path) -> Any:
    return train(online(DRPOTrainer, root, reset_prob=0.5))


def online(trainer_class: type, root: Path, **settings: Any) -> Any:
    """Two steps of each generation, so that some checkpoints hold rollouts."""
    rows = DIALOGUES.map(lambda row: {"reference": row["completions"][0]}).select_columns(["prompt", "reference"])
    settings |= {"num_iterations": 2, "max_completion_length": 4, "beta": 0.05}
    args = cpu_args(trainer_class._config_class, root / "run", **SAVING | settings)
    return trainer_class(model(), reward_funcs=early_tokens, args=args, train_dataset=rows, processing_class=TOKENIZER)


SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "learning_rate": 1e-2}


def train(trainer: Any) -> Any:
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=True if any(folder.glob("checkpoint-*/trl_lol.json")) else None)
    return logged(trainer, "loss"), {name: digest(tensor) for name, tensor in trainer.model.state_dict().items()}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def ppo_anew(root: Path) -> Any:
    """A run that begins anew in the folder of another one, and has one checkpoint."""
    trainer = online(PPOTrainer, root, seed=1, save_steps=3)
    trainer.train()
    return [digest(tensor) for tensor in trainer.model.state_dict().values()]


def scores_in_place(root: Path) -> Any:
    """Control: a cache that is written at its own place."""
    with patch.object(_cache, "write_tensors", lambda tensors, path: _cache.save_file(tensors, path)):
        return scores(root)


def ppo_from_any_checkpoint(root: Path) -> Any:
    """Control: a trainer that resumes from any folder."""
    trainer = online(PPOTrainer, root)
    found = any(Path(trainer.args.output_dir).glob("checkpoint-*"))
    with patch.object(_resume, "_fault", lambda checkpoint: None):
        trainer.train(resume_from_checkpoint=True if found else None)
    return train(trainer)


CACHES = (scores, cached_rewards, completions, advantages, rollouts, prepare)
TRAINERS = (alol, copg, ppo, apa, drpo)
OTHERS = (ppo_anew, scores_in_place, ppo_from_any_checkpoint)
STAGES: dict[str, Callable[[Path], Any]] = {stage.__name__: stage for stage in (*CACHES, *TRAINERS, *OTHERS)}


# ---- Points ----


@dataclass(frozen=True)
class Point:
    """
    A moment in which the process is about to change a file below the folder.

    Args:
        event (`int`):
            How many such changes were made before.
        file (`int`):
            Which of the files that were written since the one before is cut, in order of time; −1 for none.
        share (`float`):
            The part of what was written to that file that is left. What was written to others after it is taken away.
        what (`str`):
            What the change is.
    """

    event: int
    file: int = -1
    share: float = 1.0
    what: str = ""


class Watch:
    """
    Notices every change of files below a folder: Python tells of each before it happens; what is written outside of
    Python, as tensors are, is found by looking at the folder at the next such moment.

    Args:
        root (`Path`):
            The folder.
        fault (`str`, *optional*):
            What happens at the point: `"kill"`; or, from there on, `"full"`, no file can be written to, and
            `"read-only"`, nothing at all be changed.
        at (`Point`, *optional*):
            The point.
    """

    def __init__(self, root: Path, fault: str | None = None, at: Point | None = None) -> None:
        self.root = str(root)
        self.fault, self.at = fault, at
        self.points: list[Point] = []
        self.event = 0
        self.is_looking = False
        self.appended: set[str] = set()
        self.renamed: str | None = None
        self.before = self._files()
        self.is_broken = False

    def __call__(self, event: str, args: tuple) -> None:
        if self.is_looking or event not in EVENTS:
            return
        path = args[EVENTS[event]]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return
        if event in ("os.remove", "os.rmdir") and args[1] >= 0:  # `shutil.rmtree` names files within a folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), os.fsdecode(path))
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(self.root) or (event == "os.mkdir" and os.path.exists(path)):
            return
        self.is_looking = True
        self._reach(f"{event} {os.path.relpath(path, self.root)}")
        self.renamed = path if event == "os.rename" else None
        if event == "open" and args[2] & os.O_APPEND:
            self.appended.add(path)
        self.is_looking = False
        if self.is_broken and self.fault == "read-only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    def finish(self) -> None:
        self.is_looking = True
        self._reach("the end")

    def _files(self) -> dict[str, tuple[int, int, int]]:
        files = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                with suppress(FileNotFoundError):  # another rank has removed it
                    status = os.stat(path := os.path.join(folder, name))
                    files[path] = status.st_mtime_ns, status.st_size, status.st_ino
        return files

    def _reach(self, what: str) -> None:
        files = self._files()
        written = [
            path
            for path in sorted(files, key=files.get)
            if files[path] != self.before.get(path)
            and not (self.renamed and (path + os.sep).startswith(self.renamed + os.sep))
        ]
        points = [
            Point(self.event, i, share, f"{share:.0%} of {os.path.relpath(path, self.root)}")
            for i, path in enumerate(written)
            for share in (0.0, 0.5)
        ]
        self.points += [*points, Point(self.event, what=f"before {what}")]
        if self.at is not None and self.event == self.at.event:
            self._break(written, files)
        self.before = files
        self.event += 1

    def _break(self, written: list[str], files: dict[str, tuple[int, int, int]]) -> None:
        if self.fault == "kill":
            if self.at.file >= 0:
                path, *later = written[self.at.file :]
                start = self.before[path][1] if path in self.appended and path in self.before else 0
                os.truncate(path, start + int(self.at.share * (files[path][1] - start)))
                for other in later:
                    if other not in self.before:
                        os.remove(other)
            os.kill(os.getpid(), signal.SIGKILL)
        self.is_broken = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


# Where each event names the path that changes
EVENTS = {"open": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.truncate": 0, "os.link": 1}


def run(stage: str, root: Path, result: Path, fault: str | None = None, at: Point | None = None) -> None:
    """
    Run a stage in this process, which does nothing else, and write down what came of it.

    Args:
        stage (`str`):
            Name of the stage.
        root (`Path`):
            Its folder.
        result (`Path`):
            File for its outcome, what it computed for that, the points that it came by, and its error.
        fault, at:
            See [`Watch`].
    """
    with open(os.devnull, "w") as devnull:  # which a limit on the size of files does not concern
        os.dup2(devnull.fileno(), 1)
        os.dup2(devnull.fileno(), 2)
    watch = Watch(root, fault, at)
    sys.addaudithook(watch)
    nn.modules.module.register_module_forward_hook(count_forwards)
    found: dict[str, Any] = {}
    try:
        found["outcome"] = STAGES[stage](root)
        watch.finish()
    except Exception as error:
        found |= {"error": "".join(traceback.format_exception_only(error)), "trace": traceback.format_exc()}
        watch.is_looking = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found |= {"work": sum(WORK.values()), "points": [vars(point) for point in watch.points]}
    result.write_text(json.dumps(found))


def count_forwards(module: nn.Module, inputs: Any, output: Any) -> None:
    WORK["forwards"] += isinstance(module, PreTrainedModel) and module.base_model is module


if __name__ == "__main__":  # a rank, and at which of its changes one of the ranks is killed
    stage, root, rank, event = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    at = Point(event) if state.process_index == rank else None
    run(stage, root, root.with_name(f"{root.name}.{state.process_index}.json"), "kill", at)
    gc.collect()
    state.wait_for_everyone()  # gloo aborts a process whose peer has left before it
    state.destroy_process_group()
