"""What it takes for a resumed run to equal one that was not interrupted."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from . import __version__
from ._cache import written_beside


logger = get_logger(__name__)

CHECKPOINT_FILE = "trl_lol.json"


class WholeCheckpointsMixin(Trainer):
    """
    A trainer that reads whole checkpoints only.

    The last file of a checkpoint, `trl_lol.json`, holds the version of this package, the number of processes and the
    sizes of all other files. A run that is killed while it saves leaves a folder without it, which no later run takes
    for a checkpoint; the checkpoints before it are deleted, if at all, only afterwards.
    """

    _later: dict[str, Any] = {}  # noqa: RUF012

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with _changed(self.args, self._later):  # they are written as they are
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        args, run_dir = self.args, self._get_output_dir(trial=trial)
        folder = Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        # What makes the checkpoint public, or takes an older one away, waits until it is whole
        self._later = {"push_to_hub": args.push_to_hub, "save_total_limit": args.save_total_limit}
        try:
            if args.should_save and folder.exists():  # of an earlier run in the same output directory
                (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
                shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
            with _changed(args, {"push_to_hub": False, "save_total_limit": None}):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if args.should_save:
                files = [path for path in folder.rglob("*") if path.is_file()]
                sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}
                num_processes = self.accelerator.num_processes
                content = {"trl_lol": __version__, "num_processes": num_processes, "files": sizes}
                with written_beside(folder / CHECKPOINT_FILE) as beside:
                    beside.write_text(json.dumps(content, indent=2))
        except Exception as error:
            error.add_note(
                f"{folder} could not be saved, and is no checkpoint. Those saved before are whole: make room or "
                "choose another `output_dir`, then go on from the last one with `resume_from_checkpoint`."
            )
            raise
        finally:
            self._later = {}
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            _rotate(run_dir, args.save_total_limit, {folder, Path(self.state.best_model_checkpoint or folder)})

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint:
            resume_from_checkpoint = whole_checkpoint(resume_from_checkpoint, self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from its last checkpoint, within an epoch, a run would take a step more than it was asked for
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True  # a stream has epochs without end

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with same_dtypes(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with same_dtypes(self.model):
            super()._load_best_model()


def _rotate(run_dir: str, limit: int | None, kept: set[Path]) -> None:
    """
    Delete the oldest checkpoints beyond a limit, but first of all those that are none. (The function of transformers
    may keep one of these for the latest, and delete the one that was just saved.)
    """
    if limit is None or limit <= 0:
        return
    checkpoints = [Path(path) for path in sort_checkpoints(run_dir, use_mtime=True)]
    others = [path for path in checkpoints if path not in kept]
    others.sort(key=lambda path: _fault(path) is None)
    room = limit - (len(checkpoints) - len(others))
    for path in others[: len(others) - max(room, 0)]:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _changed(args: TrainingArguments, fields: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(args, name) for name in fields}
    vars(args).update(fields)
    try:
        yield
    finally:
        vars(args).update(before)


def whole_checkpoint(resume_from_checkpoint: str | Path | bool, output_dir: str | Path) -> str:
    """
    The checkpoint to resume from, which rank 0 has found to be whole.

    Args:
        resume_from_checkpoint (`str`, `Path` or `bool`):
            A checkpoint, or `True` for the last whole one of the output directory.
        output_dir (`str` or `Path`):
            The output directory.

    Returns:
        `str`: Path of the checkpoint.

    Raises:
        `ValueError`: If there is none, or the one that was asked for is not whole.
    """
    if resume_from_checkpoint is True:
        candidates = sort_checkpoints(str(output_dir))[::-1] if Path(output_dir).is_dir() else []
    else:
        candidates = [str(resume_from_checkpoint)]
    faults = []
    for candidate in candidates:
        if (fault := _fault(Path(candidate))) is None:
            break
        faults.append(f"{candidate} is no whole checkpoint: {fault}.")
    choice: list[Any] = [candidate if len(faults) < len(candidates) else None, faults]
    broadcast_object_list(choice)
    chosen, faults = choice
    if chosen is None:
        raise ValueError(
            f"{' '.join(faults)} A run that is killed while it saves leaves such folders. Resume from another "
            "checkpoint, or start anew without `resume_from_checkpoint`."
            if faults
            else f"There is no checkpoint in {output_dir} to resume from. Start without `resume_from_checkpoint`."
        )
    for fault in faults:
        logger.warning(f"{fault} Going on from {chosen}.")
    content = json.loads(Path(chosen, CHECKPOINT_FILE).read_text())
    saved_by, num_processes = content["trl_lol"], PartialState().num_processes
    if content.get("num_processes", num_processes) != num_processes:
        logger.warning(
            f"{chosen} was saved by {content['num_processes']} processes, and this run has {num_processes}: it goes "
            "on with other batches than it would have had."
        )
    if saved_by != __version__:
        logger.warning(
            f"{chosen} was saved by trl_lol {saved_by}, and this is {__version__}: the run goes on, though perhaps "
            "not as it would have with that version."
        )
    return chosen


def _fault(checkpoint: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not (checkpoint / CHECKPOINT_FILE).exists():
        return (
            f"it has no {CHECKPOINT_FILE}, which is written last, so it is half-written, or of another trainer or an "
            'earlier version (one that you know to be whole is taken with `{"trl_lol": "", "files": {}}` there)'
        )
    try:
        sizes = json.loads((checkpoint / CHECKPOINT_FILE).read_text())["files"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return f"its {CHECKPOINT_FILE} is damaged"
    for name, size in sizes.items():
        path = checkpoint / name
        found = path.stat().st_size if path.exists() else 0
        is_text = path.suffix in (".json", ".md", ".jinja", ".txt")  # which people edit
        if found < (1 if is_text else size):
            return f"{name} has {found} bytes of {size}"
    return None


@contextmanager
def same_dtypes(model: nn.Module) -> Iterator[None]:
    """
    Leave the parameters in the types that they had: TRL trains the adapter of a quantised model in bfloat16, and PEFT
    reads it from a checkpoint into float32.

    Args:
        model (`torch.nn.Module`):
            The model, whose parameters are loaded within the context.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))  # an adapter may be new


class HasEpoch(Protocol):
    """A sampler whose order depends on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""


class SetEpochCallback(TrainerCallback):
    """
    Tells the sampler the epoch when an epoch begins.

    The training loop does so as well, but after a resume in the middle of an epoch the data loader is wrapped once
    more to skip batches, and on several ranks accelerate then no longer reaches the sampler.
    """

    def __init__(self, sampler: HasEpoch) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.sampler.set_epoch(int(state.epoch))
