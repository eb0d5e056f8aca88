"""What examples/ holds runs, from the first line to the last."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# Lightning's advice on workers and loggers is left out; the notebook shows a figure of a run.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.drawn]


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANOMALY_LAB_DATA", str(data))


def program(name: str) -> str:
    text = (EXAMPLES / name).read_text()
    statements = [line for line in text.splitlines() if line.strip()]
    assert len(statements) <= 20, f"{name} has {len(statements)} lines"
    return text


def test_bare_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    exec(program("bare_lightning.py"), {})
    [auroc] = re.findall(r"^AUROC (0\.\d{3})$", capsys.readouterr().out, re.M)
    assert float(auroc) > 0.8


def test_a_sweep_from_python(capsys: pytest.CaptureFixture[str]) -> None:
    text = program("sweep.py")
    short = text.replace('"seed=0,1"', '"seed=0", "model.budget.epoch_steps=2"')
    assert short != text
    exec(short, {})
    said = capsys.readouterr().out
    assert len(re.findall(r"^(autoencoder_small|knn) [38] AUROC 0\.\d{3}$", said, re.M)) == 4
    assert Path("runs/report/report.html").is_file()


@pytest.mark.slow
def test_the_notebook_runs_in_its_order_and_shows_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((EXAMPLES / "digits.ipynb").read_text())
    assert notebook["nbformat"] == 4 and {"cells", "metadata"} <= notebook.keys()
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    said = capsys.readouterr().out
    assert len(re.findall(r"digit [368]  AUROC 0\.\d{3}|digit [368]  AUROC 1\.000", said)) == len(names["results"]) == 6
    assert "report.html" in said.splitlines()[-1]
