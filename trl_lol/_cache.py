"""Results of expensive passes over a dataset, kept on disk under the hash of everything they depend on."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ._trl import hash_module
from .engines import is_sharded, whole_weights


logger = get_logger(__name__)


def content_key(dataset: Dataset, columns: list[str]) -> str:
    """
    Hash what some columns hold, whichever way the dataset came about.

    A dataset's own fingerprint depends on its history, and differs between ranks for a dataset made in memory.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        columns (`list[str]`):
            Names of the columns to hash.

    Returns:
        `str`: The hash, equal across processes.
    """
    digest = hashlib.sha256()
    for batch in dataset.with_format(None).select_columns(columns).iter(batch_size=1000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def model_key(model: PreTrainedModel) -> tuple:
    """
    What a model's outputs depend on: its weights, and the configs of the model and its adapters.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.

    Returns:
        `tuple`: The hash of the weights, the settings and the adapters in use, equal across processes. For a sharded
        model, which all of them must call this on, that of process 0 counts.
    """
    configs = [model.config, *(model.peft_config.values() if is_peft_model(model) else ())]
    # Which of the adapters are in use is in neither; a base model, too, may have their layers
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    adapters = sorted({(*layer.active_adapters, layer.disable_adapters) for layer in layers}, key=str)
    names = {"_name_or_path", "base_model_name_or_path"}  # where the weights came from does not matter
    settings = [
        # a set of strings has another order in every process
        {k: str(sorted(v) if isinstance(v, set) else v) for k, v in config.to_dict().items() if k not in names}
        for config in configs
    ]
    if is_sharded(model):  # the shards are no key: under ZeRO-3 those of all models are alike
        weights = whole_weights(model)
        return hash_module(SimpleNamespace(state_dict=lambda: weights)), settings, adapters
    return hash_module(model), settings, adapters


def tokenizer_key(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> tuple:
    """
    What decides the tokens. The tokenizer object itself would not do: it changes when it is used.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor.

    Returns:
        `tuple`: The vocabulary, how texts are cut by it, the special tokens and the chat template.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if tokenizer.is_fast:
        # All but what the last call was asked for
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {name: part for name, part in parts.items() if name not in ("truncation", "padding")}
    else:
        content = sorted(tokenizer.get_vocab().items())
    return json.dumps(content, sort_keys=True), special, processing_class.chat_template


def cached(
    cache_dir: str | Path | None, name: str, key: Any, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """
    Read tensors from the cache, or compute and keep them.

    Rank 0 decides, and its tensors are everyone's; `compute` runs on all ranks, so that it may hold collective
    operations. The file is written beside its place and then renamed: a process that is killed leaves nothing that a
    later one could mistake for a result.

    Args:
        cache_dir (`str`, `Path` or `None`):
            Folder of the cache. If `None`, the tensors are computed and not kept.
        name (`str`):
            What the tensors are; the file's name begins with it.
        key (`Any`):
            Everything that the tensors depend on.
        compute (`Callable[[], dict[str, torch.Tensor]]`):
            Computes the tensors. What it returns counts on rank 0 only.

    Returns:
        `dict[str, torch.Tensor]`: The tensors, on the CPU.

    Raises:
        `OSError`: If the cache cannot be written to. A folder that nothing can be written to is found before the
            tensors are computed.
    """
    state = PartialState()
    path = tensors = None
    if state.is_main_process and cache_dir is not None:
        path = Path(cache_dir) / f"{name}-{Hasher.hash(key)}.safetensors"
        tensors = _read_tensors(path)
        if tensors is None:
            check_writable(path.parent)
    is_hit = [tensors is not None]
    if state.num_processes > 1:
        broadcast_object_list(is_hit)
    if not is_hit[0]:
        tensors = compute()
        if state.is_main_process:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            if path is not None:
                write_tensors(tensors, path)
    result = [tensors]
    if state.num_processes > 1:
        broadcast_object_list(result)
    return result[0]


def _read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file, if there is one."""
    try:
        return load_file(path) if path.exists() else None
    except SafetensorError as error:  # a full disk or a power failure, for those who have copied it here
        logger.warning(f"{path} is damaged ({error}), and is computed again.")
        return None


def check_writable(folder: str | Path) -> None:
    """
    Make a folder, and see whether files can be written there: before hours of work whose results would be lost.

    Args:
        folder (`str` or `Path`):
            The folder.

    Raises:
        `OSError`: If they cannot.
    """
    with _explaining(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Let errors of writing say what could not be written, what is left and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        message = (
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}. What was kept before is whole: "
            "make room, or choose a folder that can be written to, and run the same again."
        )
        code = getattr(error, "errno", None)  # tensors are written outside of Python, and their errors have none
        raise (OSError(message) if code is None else OSError(code, message)) from error


def cache_digest(key: Any) -> str:
    """Hash a key, as process 0 does it."""
    digest = [Hasher.hash(key)]
    return broadcast_object_list(digest)[0] if PartialState().num_processes > 1 else digest[0]


class JsonLines:
    """
    Values in a folder, written one at a time, a file for each process. What was written before a process was killed is
    there for those that come after it, in whatever number.

    Args:
        folder (`str` or `Path`):
            The folder, which is made for the first value.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def read(self) -> Iterator[Any]:
        """All values, of all processes."""
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # the last line of a process that was killed
                    yield json.loads(line)

    def write(self, value: Any) -> None:
        """Add a value."""
        path = self.folder / f"{PartialState().process_index}.jsonl"
        for last in (False, False, True):
            try:
                with _explaining(path):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    with open(path, "a") as file:
                        file.write("\n" + json.dumps(value) + "\n")  # a line of its own also behind half a line
                return
            except (FileNotFoundError, FileExistsError):  # another run is done, and removes the folder at this moment
                if last:
                    raise

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, so that no half-written one is ever read."""
    with written_beside(path) as beside:
        save_file(tensors, beside)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to, which is renamed to `path` when all is written."""
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    with _explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())  # a machine that fails must not keep the name without the content
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
