"""Nothing that dies loses a run, makes one twice or leaves half a file: tests/soak.py, as far as CI has time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(2400)  # a busy machine is no failure
def test_a_sweep_killed_at_any_moment_ends_with_the_same_bits(tmp_path: Path) -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm: a second file system is needed")
    few = ["--kills", "6", "--commands", "1", "--classes", "3"]
    words = [*few, "--folder", str(tmp_path), "--out", str(tmp_path / "soak.json")]
    done = subprocess.run([sys.executable, str(SOAK), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "soak.json").read_text())
    assert figures["faults"] == []
    assert sum(figures["kills"].values()) >= 6 and figures["kills"]["the command"] == 1
    assert figures["died in a write"] >= 1 and figures["interrupts"] >= 1
    assert figures["files checked whole"] > 100
