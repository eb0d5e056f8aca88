"""What all tests share: the real data's folder, the command in this process, hypothesis without deadlines (the machines
are slow and noisy), and what lets tests be dealt out to several workers in any order (``pytest -n 2``)."""

from __future__ import annotations

import itertools
import logging
import os
import random
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # read when torch is imported: workers share the cores
    _workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // _workers)))

import hypothesis
import numpy as np
import pytest
import torch
from finished import Runs

from anomaly_lab import cli, switches

hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell that starts the tests in the background asks for that
    signal.signal(signal.SIGINT, signal.default_int_handler)


def process_state() -> dict[str, object]:
    """All that a run switches in its process, as far as it can be read."""
    variables = {name: os.environ.get(name) for name in switches.VARIABLES}
    return {"torch": switches.current(), "threads": torch.get_num_threads(), **variables}


@pytest.fixture(autouse=True)
def _no_test_meets_another() -> Iterator[None]:
    """Which tests came before in a process is chance: each begins with the same random state and the same surroundings.

    A run that leaves its own switches behind fails the test.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    switched, root = process_state(), logging.getLogger()
    variables, folder, path, level = dict(os.environ), os.getcwd(), sys.path[:], root.level
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    known = root.handlers[:]
    yield
    left = process_state()
    for name in set(os.environ) - set(variables):
        del os.environ[name]
    os.environ.update(variables)
    os.chdir(folder)
    sys.path[:] = path
    root.setLevel(level)
    root.handlers[:] = known  # Hydra's write to a screen that is gone
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert left == switched


@pytest.fixture(autouse=True)
def _figures_where_a_test_asks_for_them(request: pytest.FixtureRequest) -> Iterator[None]:
    """A run of seconds spends half of them on its figures: those of tests that are not marked ``drawn`` leave them out.

    Runs of wider fixtures and of processes of their own draw.
    """
    with pytest.MonkeyPatch.context() as patch:  # a test's own monkeypatch is undone before the state is looked at
        if request.node.get_closest_marker("drawn") is None:
            patch.setattr("anomaly_lab.run.draw", lambda *_: None)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if " object at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid} has another name in every process: give parametrize its ids=")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        waiting = shares([item for item in items if waits(item)], workers)
        others = shares([item for item in items if not waits(item)], workers)
        items[:] = [item for share in zip(waiting, others, strict=True) for half in share for item in half]


def waits(item: pytest.Item) -> bool:
    """Whether a test starts clusters, processes or trainings, as far as its marks say."""
    return any(item.get_closest_marker(mark) for mark in ("slow", "ray"))


def shares(items: Sequence[pytest.Item], workers: int) -> list[list[pytest.Item]]:
    """Tests in as many shares of one size, a file's in one share: its cluster starts once.

    ``--dist worksteal`` deals each worker one stretch of all tests; a worker that is done takes from another's end.
    Tests that wait come first in each: the cores have others to do meanwhile, and none of them is left to the end.
    """
    dealt: list[list[pytest.Item]] = [[] for _ in range(workers)]
    files = [list(tests) for _, tests in itertools.groupby(items, lambda item: item.path)]
    for tests in sorted(files, key=len, reverse=True):
        min(dealt, key=len).extend(tests)
    return dealt


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets, or a skip that says how to get it."""
    folder = os.environ.get("ANOMALY_LAB_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real data: set ANOMALY_LAB_DATA to a folder with the data sets")
    return Path(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for data sets that a module's tests decode once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """An empty folder, to be filled with finished runs."""
    return Runs(tmp_path / "runs")


class Said(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[[str], Said]


@pytest.fixture
def lab(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """``anomaly-lab`` in this process (every other one would import torch anew), in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANOMALY_LAB_DATA", str(data))

    def command(words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["anomaly-lab", *shlex.split(words)])
        try:
            cli.train()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        return Said(code, *capfd.readouterr())

    return command
