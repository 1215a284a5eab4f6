"""What a run takes. Also for the environment with an older TRL: nothing here imports what that does not have."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class Meter(TrainerCallback):
    """
    Measures a run, without what is done with the policy along the way.

    Memory on the CPU is the peak of the process over what it held when this object was made: make it after the imports
    and before the models. It is read before the first stop, since later on it would hold what was done there, too.

    Args:
        visit (`Callable[[int], None]`, *optional*):
            What to do along the way, given the number of completions seen by then.
        points (`dict[int, int]`, *optional*):
            Optimizer step after which to do it: completions seen by then.
    """

    def __init__(
        self, visit: Callable[[int], None] = lambda completions: None, points: Mapping[int, int] | None = None
    ) -> None:
        self.visit, self.points = visit, points or {}
        self.wall = self.cpu = 0.0
        self.peak_memory: float | None = None
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # else the imports' own peak would count
        self.base = _memory("VmRSS")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.points:
            self._stop()
            self.visit(self.points[state.global_step])
            self._start()

    def measure(self, work: Callable[[], Any]) -> dict[str, float]:
        """
        Measure what is done.

        Args:
            work (`Callable`):
                What to do, which has this object among its trainer's callbacks.

        Returns:
            `dict[str, float]`: `wall_s`, `cpu_s` (of all threads of the process), `gpu_s` (wall time where there is a
            GPU) and `peak_memory_mb` (MiB; of the GPU where there is one).
        """
        self._start()
        work()
        self._stop()
        return {
            "wall_s": self.wall,
            "cpu_s": self.cpu,
            "gpu_s": self.wall if torch.cuda.is_available() else 0.0,
            "peak_memory_mb": self.peak_memory,
        }

    def _start(self) -> None:
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()

    def _stop(self) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()
        if self.peak_memory is None:
            if torch.cuda.is_available():
                self.peak_memory = torch.cuda.max_memory_allocated() / 2**20
            else:
                self.peak_memory = (_memory("VmHWM") - self.base) / 1024


def _memory(field: str) -> int:
    """VmRSS or VmHWM of this process, in kB. `ru_maxrss` would not do: it begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
