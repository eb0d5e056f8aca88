"""A run's process-wide switches: on as long as it lasts, and as they were afterwards."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from conftest import process_state

from anomaly_lab import switches


def test_numbers_alone_take_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a program needs it that scores with a finished run (`anomaly_lab.predict`)."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = process_state()
    with switches.numerics("tf32"):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert process_state()["threads"] == before["threads"]
        assert switches.current() == ("high", True, torch.backends.cudnn.benchmark, False, True, True)
    assert process_state() == before


def test_a_users_own_workspace_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with switches.numerics("32-true"):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_threads_are_all_cores_or_the_launchers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(before + 2)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with switches.resources():
        assert torch.get_num_threads() == before
    monkeypatch.delenv("OMP_NUM_THREADS")
    with switches.resources():
        assert torch.get_num_threads() == before + 2
    with monkeypatch.context() as macos:
        macos.delattr(os, "sched_getaffinity")
        macos.setattr(os, "cpu_count", lambda: before + 3)
        with switches.resources():
            assert torch.get_num_threads() == before + 3
    with switches.resources(before + 1):
        assert torch.get_num_threads() == before + 1
    with pytest.raises(RuntimeError), switches.of_a_run("32-true", 0):
        pass
    assert torch.get_num_threads() == before


FREED = """
import resource, torch
from anomaly_lab import switches

def faults():
    for repeat in range(12):
        if repeat == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(4_000_000) for _ in range(12)]  # 16 MB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
with switches.resources():
    print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_what_a_step_frees_is_there_for_the_next_one() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 1000 and after < before / 10


@pytest.mark.parametrize("end", ["finished", "failed"])
def test_what_a_run_frees_is_given_back_when_it_is_over(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """By glibc's word: how much of a heap it can give back depends on what happens to lie at its end."""
    thresholds: dict[int, int] = {}
    monkeypatch.setattr(switches.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=thresholds.__setitem__))
    with suppress(RuntimeError), switches.of_a_run("32-true", 1):
        assert thresholds == {-1: 2**30, -3: 2**25}
        if end == "failed":
            raise RuntimeError
    assert thresholds == {-1: 2**26, -3: 2**25}
