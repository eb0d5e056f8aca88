"""What commands import, and how long they take to begin: nothing heavy before it is needed."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from anomaly_lab.datasets import Digits

HEAVY = (
    "torch",
    "torchmetrics.metric",
    "lightning",
    "torchvision",
    "scipy",
    "sklearn",
    "pandas",
    "matplotlib",
    "wandb",
)
"""What takes from a quarter of a second to several seconds to import."""

LIMIT = 10.0  # seconds of CPU time; the targets are 2 without and 4 with all extras, on an idle machine


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits are decoded already, and the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANOMALY_LAB_DATA", str(tmp_path / "data"))
    Digits(data_dir=tmp_path / "data").download()


def imported_by(program: str) -> set[str]:
    """Those of HEAVY that a fresh process has imported when ``program`` is over."""
    listing = f"\nimport sys, json; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program + listing], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


COMMAND = """
import sys
from anomaly_lab import cli
sys.argv = ["anomaly-lab", *{words}]
try:
    code = cli.{function}()
except SystemExit as end:
    code = end.code
assert not code, code
"""


@pytest.mark.parametrize(
    "function, words",
    [
        ("train", "--help"),
        ("train", "--cfg job model=ganomaly dataset=cifar10"),
        ("train", "-m normal_class=0,1 --dry-run"),
        ("report", "--help"),
        ("score", "--help"),
    ],
)
def test_a_command_that_trains_nothing_imports_nothing_heavy_and_answers_at_once(
    function: str, words: str, digits: None
) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert imported_by(COMMAND.format(function=function, words=words.split())) == set()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < LIMIT


def test_a_run_is_ready_to_begin_without_the_packages_that_only_some_runs_use(digits: None) -> None:
    program = """
from anomaly_lab import build, config, run
cfg = config.compose()
data = build.make_data(config.job(cfg))
build.make_detector(cfg, data.image_shape)
"""
    # torchmetrics, which Lightning imports, brings torchvision, SciPy and matplotlib.
    assert imported_by(program).isdisjoint({"sklearn", "pandas", "wandb"})
