"""Results of expensive passes over a dataset, kept on disk under the hash of everything they depend on."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from datasets.fingerprint import Hasher
from safetensors.torch import load_file, save_file
from torch import Tensor


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
    for batch in dataset.select_columns(columns).iter(batch_size=1000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def cached(
    cache_dir: str | Path | None, name: str, key: Any, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """
    Read tensors from the cache, or compute and keep them.

    Rank 0 decides for all ranks, so that `compute` may hold collective operations. The file is written beside its place
    and then renamed: a process that is killed leaves nothing that a later one could mistake for a result.

    Args:
        cache_dir (`str`, `Path` or `None`):
            Folder of the cache. If `None`, the tensors are computed and not kept.
        name (`str`):
            What the tensors are; the file's name begins with it.
        key (`Any`):
            Everything that the tensors depend on.
        compute (`Callable[[], dict[str, torch.Tensor]]`):
            Computes the tensors; returns the same on every rank.

    Returns:
        `dict[str, torch.Tensor]`: The tensors, on the CPU.
    """
    if cache_dir is None:
        return compute()
    state = PartialState()
    path = Path(cache_dir) / f"{name}-{Hasher.hash(key)}.safetensors"
    decision = [(str(path), path.exists())]
    if state.num_processes > 1:
        broadcast_object_list(decision)
    path, hit = Path(decision[0][0]), decision[0][1]
    if not hit:
        tensors = compute()
        if state.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}.tmp")
            try:
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside)
                os.replace(beside, path)
            finally:
                beside.unlink(missing_ok=True)
        state.wait_for_everyone()
    return load_file(path)
