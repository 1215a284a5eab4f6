"""
Killed at every write and rename, or at any moment, out of disk, or without the right to write: the same command again
finishes with the result of a run that was left alone.

A stage of a run is a function of `killing.py`. What it writes is counted in a run that is left alone; then every point
has a run that ends there, and another one in the same folder. Processes are forked from one that has imported all, so
that one takes a tenth of a second or two.
"""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import killing
import pytest
from killing import CACHES, TRAINERS, Point

from trl_lol import toy
from trl_lol._resume import _fault


FAST = {"scores": 1, "cached_rewards": 1, "completions": 1, "advantages": 3, "prepare": 9, "alol": 25, "ppo": 21}

CLEAR = (
    "cannot be written: ",
    "could not be saved, and is no checkpoint. Those saved before are whole: make room or choose another `output_dir`",
)


def stages(*every):
    """Each stage with the share of its points that are tried by default, and all of them marked as slow."""
    names = [stage.__name__ for stage in every]
    fast = [pytest.param(name, FAST[name], id=name) for name in names if name in FAST]
    slow = [
        pytest.param(name, 1, id=f"{name}, all", marks=pytest.mark.slow) for name in names if FAST.get(name, 0) != 1
    ]
    return pytest.mark.parametrize(("stage", "stride"), fast + slow)


@dataclass
class Found:
    """What a process has left: the signal that it died of, and what it wrote down."""

    killed_by: int | None
    outcome: Any = None
    work: int | None = None
    error: str | None = None
    trace: str | None = None
    points: tuple[Point, ...] = ()


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Runs stages in processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield Forks(tmp_path_factory.mktemp("kills"))


class Forks:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.data = folder / killing.DATA
        toy.preference_pairs(killing.DIALOGUES).save_to_disk(self.data)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["killing"])
        self.alone = cache(self._alone)

    def root(self) -> Path:
        """A folder for the files of a run."""
        self.count += 1
        root = self.folder / str(self.count)
        shutil.copytree(self.data, root / killing.DATA)
        return root

    def start(self, stage: str, root: Path, *fault: Any) -> Any:
        process = self.context.Process(target=killing.run, args=(stage, root, self._result(root), *fault))
        process.start()
        return process

    def _result(self, root: Path) -> Path:
        return root.with_name(f"{root.name}.json")

    def finish(self, process: Any, root: Path) -> Found:
        process.join(120)
        if process.exitcode is None:
            process.kill()
            pytest.fail("The run hangs.")
        if process.exitcode != 0:
            return Found(killed_by=-process.exitcode)
        found = json.loads(self._result(root).read_text())
        return Found(None, **found | {"points": tuple(Point(**point) for point in found["points"])})

    def run(self, stage: str, root: Path, *fault: Any) -> Found:
        return self.finish(self.start(stage, root, *fault), root)

    def _alone(self, stage: str) -> tuple[Found, Path, float]:
        """A run that is left alone, its folder, and the seconds that it took."""
        root, start = self.root(), time.perf_counter()
        found = self.run(stage, root)
        assert found.error is None, found.trace
        return found, root, time.perf_counter() - start


def half_written(root: Path, whole: Path) -> list[str]:
    """The cache files that are not as large as those of a run that was left alone."""
    paths = [*root.rglob("*cache/*.safetensors"), *root.rglob("cache-*.arrow")]
    return [str(path) for path in paths if path.stat().st_size != (whole / path.relative_to(root)).stat().st_size]


def num_whole(root: Path) -> int:
    """Number of whole checkpoints."""
    return sum(_fault(folder) is None for folder in (root / "run").glob("checkpoint-*"))


def first_whole(points: tuple[Point, ...]) -> float:
    """The first event that finds a whole checkpoint."""
    saved = [p.event + 1 for p in points if p.what == "before os.rename run/checkpoint-1/trl_lol.json"]
    return saved[0] if saved else math.inf


@stages(*CACHES, *TRAINERS)
def test_killed_at_every_point(forks, stage, stride):
    alone, whole, _ = forks.alone(stage)
    assert len(alone.points) > 5
    work = []
    for point in alone.points[::-stride]:
        root = forks.root()
        assert forks.run(stage, root, "kill", point).killed_by == signal.SIGKILL, point
        assert half_written(root, whole) == [], point
        assert num_whole(root) >= (point.event >= first_whole(alone.points)), point
        again = forks.run(stage, root)
        assert again.error is None, f"{point}\n{again.trace}"
        assert again.outcome == alone.outcome, point
        work.append(again.work)
    # Control: what was done before is not done again
    assert work[0] == min(work) < alone.work and max(work) <= alone.work


@stages(*CACHES, *TRAINERS)
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_disk_is_full_or_read_only_from_a_point_on(forks, stage, stride, fault):
    """The error says what could not be written. What was whole before stays whole."""
    alone, whole, _ = forks.alone(stage)
    num_failed = 0
    for point in [p for p in alone.points if p.file < 0][:: 2 * stride if stride > 1 else 1]:
        root = forks.root()
        found = forks.run(stage, root, fault, point)
        if point.event == 0 and stage != "cached_rewards":
            assert found.work == 0 and found.error, point  # before any work that would be lost
        if found.error is None:  # what was left to do was to remove files
            assert found.outcome == alone.outcome, point
        elif "/datasets/" not in found.trace:  # which has errors of its own
            assert any(said in found.error for said in CLEAR), found.trace
            num_failed += 1
        assert half_written(root, whole) == [], point
        assert num_whole(root) >= (point.event >= first_whole(alone.points)), point
        again = forks.run(stage, root)
        assert again.error is None, f"{point}\n{again.trace}"
        assert again.outcome == alone.outcome, point
    assert num_failed


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage.__name__, marks=() if stage.__name__ in ("scores", "prepare", "ppo") else pytest.mark.slow)
        for stage in (*CACHES, *TRAINERS)
    ],
)
def test_killed_at_any_moment(forks, stage):
    alone, _, seconds = forks.alone(stage)
    rng = random.Random(stage)
    for _ in range(5):
        root, killed_by, share = forks.root(), None, rng.random()
        while killed_by is None:  # a busy machine is not as fast in one run as in the next
            process = forks.start(stage, root)
            process.join(share * seconds)
            process.kill()
            killed_by = forks.finish(process, root).killed_by
            share *= 0.8
        again = forks.run(stage, root)
        assert again.error is None and again.outcome == alone.outcome, again.trace


def test_a_checkpoint_over_one_of_an_earlier_run(forks):
    """With the same name and files as large: from the first change on it is not whole, until all of it is new."""
    first = forks.root()
    forks.run("ppo", first)
    assert num_whole(first) == 1
    copies = (shutil.copytree(first, forks.root(), dirs_exist_ok=True) for _ in iter(int, 1))
    points = forks.run("ppo_anew", next(copies)).points
    changes = [p for p in points if "checkpoint-3" in p.what]
    saved = next(p for p in changes if p.what == "before os.rename run/checkpoint-3/trl_lol.json")
    for point in points[:: -(len(points) // 10)]:
        root = next(copies)
        assert forks.run("ppo_anew", root, "kill", point).killed_by == signal.SIGKILL
        is_whole = point.event <= changes[0].event or point.event > saved.event
        assert num_whole(root) == is_whole, point


def test_what_is_written_in_place_is_noticed(forks):
    """Controls: a cache file at its own place is found half-written, and a trainer that resumes from any folder fails
    or gives another result."""
    alone, whole, _ = forks.alone("scores_in_place")
    found = []
    for point in alone.points:
        root = forks.root()
        assert forks.run("scores_in_place", root, "kill", point).killed_by == signal.SIGKILL
        found += half_written(root, whole)
    assert found
    alone, *_ = forks.alone("ppo_from_any_checkpoint")
    again = []
    for point in alone.points[4:40:5]:
        root = forks.root()
        assert forks.run("ppo_from_any_checkpoint", root, "kill", point).killed_by == signal.SIGKILL
        again.append(forks.run("ppo_from_any_checkpoint", root))
    assert any(run.outcome != alone.outcome for run in again)


# ---- Folders and files as they are found ----


def test_a_damaged_cache_file_is_computed_again(forks):
    alone, *_ = forks.alone("scores")
    root = forks.root()
    forks.run("scores", root)
    (path,) = root.glob("cache/*.safetensors")
    size = path.stat().st_size
    for share in (0.0, 0.5, 0.99):
        os.truncate(path, int(share * size))
        again = forks.run("scores", root)
        assert (again.error, again.outcome, again.work) == (None, alone.outcome, alone.work)
        assert path.stat().st_size == size
    assert forks.run("scores", root).work == 0  # Control


@pytest.mark.parametrize("stage", ["scores", "completions", "advantages"])
def test_a_whole_cache_needs_no_writing(forks, stage):
    alone, *_ = forks.alone(stage)
    root = forks.root()
    forks.run(stage, root)
    again = forks.run(stage, root, "read-only", Point(0))
    assert (again.error, again.outcome, again.work) == (None, alone.outcome, 0)


@pytest.mark.parametrize("stage", ["scores", "advantages", "alol", "ppo"])
@pytest.mark.parametrize("obstacle", ["file", "permission"])
def test_a_folder_that_cannot_be_written_is_found_before_any_work(forks, stage, obstacle):
    root = forks.root()
    for name in ("cache", "run"):
        if obstacle == "file":
            (root / name).write_text("")
        else:
            (root / name).mkdir(mode=0o555)
            if os.access(root / name, os.W_OK):
                pytest.skip("root may write anywhere")
    found = forks.run(stage, root)
    assert found.work == 0 and CLEAR[0] in found.error and str(root) in found.error
    for name in ("cache", "run"):
        (root / name).unlink() if obstacle == "file" else (root / name).rmdir()
    assert forks.run(stage, root).outcome == forks.alone(stage)[0].outcome


# ---- Two ranks ----


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["scores", "ppo"])
def test_one_of_two_ranks_is_killed(forks, stage):
    """In the middle of what rank 0 writes, and at the last of what rank 1 writes. The launcher then ends the other."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", killing.__file__]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def ranks(root: Path, rank: int = -1, event: int = -1) -> list[dict[str, Any]]:
        command = [*launch, stage, str(root), str(rank), str(event)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert ("Signal 9 (SIGKILL)" in done.stderr) == (done.returncode != 0) == (rank >= 0), done.stderr[-4000:]
        return [json.loads(root.with_name(f"{root.name}.{r}.json").read_text()) for r in range(2 if rank < 0 else 0)]

    alone = ranks(forks.root())
    assert alone[0]["outcome"] == alone[1]["outcome"]
    last = [max(point["event"] for point in found["points"]) for found in alone]
    for rank, event in ((0, last[0] // 2), (1, last[1] - 1)):
        root = forks.root()
        ranks(root, rank, event)
        assert [found["outcome"] for found in ranks(root)] == [found["outcome"] for found in alone]
