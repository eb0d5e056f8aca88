"""Methods as a user writes them, outside the repository and from docs/adding_a_method.md alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import ROOT, files

from anomaly_lab import config, testing

OUTSIDE = Path(__file__).parent / "outside"
SMALL = {
    "my_knn": [],
    "my_svdd": ["model.detector.width=4"],
    "my_anogan": ["model.detector.width=4", "model.detector.steps=3"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: two methods of the page, and one that searches at test time."""
    shutil.copytree(OUTSIDE, tmp_path / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    for name, (_, block) in files(ROOT / "docs/adding_a_method.md").items():
        (tmp_path / "mine" / name).write_text(block)
    return tmp_path / "mine"


@pytest.mark.parametrize("model", SMALL)
def test_a_method_of_fifty_lines_keeps_the_contract(
    model: str, folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len((folder / f"{model}.py").read_text().splitlines()) < 50
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv(config.EXTRA_CONFIGS, str(folder / "conf"))
    monkeypatch.setenv("ANOMALY_LAB_DATA", str(data))
    testing.check(model, *SMALL[model])


@pytest.mark.slow
def test_a_method_killed_in_every_stage_ends_with_the_same_bytes(folder: Path, data: Path) -> None:
    environment = {**os.environ, "ANOMALY_LAB_DATA": str(data), "PYTHONPATH": str(ROOT)}
    program = Path(__file__).parent / "kills.py"
    done = subprocess.run([sys.executable, program, folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same bytes") == len(SMALL)
