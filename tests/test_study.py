"""The study of criteria without labels: it finds what was planted, and its page is made from the committed tables;
so is the page on rounding."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from programs import load

from anomaly_lab import results

STUDY = Path(__file__).parent.parent / "docs/study.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load("study")


@pytest.fixture(scope="module")
def planted() -> pd.DataFrame:
    """Twelve classes, ten methods each: a criterion that is a monotone function of AUROC, and one drawn by lot."""
    random = np.random.RandomState(0)
    auroc = random.uniform(0.5, 1, 120)
    named = [str(i // 10) for i in range(120)]
    return pd.DataFrame(
        {
            **{"dataset": "planted", "class_name": named, "fingerprint": named, "auroc": auroc},
            **{"told": -np.exp(5 * auroc), "drawn": random.randn(120), "constant": 1.0},
        }
    )


def test_a_monotone_function_of_auroc_has_correlation_1_and_chooses_the_best(
    study: ModuleType, planted: pd.DataFrame
) -> None:
    found = study.finding(study.groups_of(planted, ["fingerprint"], "told", -1))
    assert found.rho == found.low == found.high == pytest.approx(1)
    assert found.gain == pytest.approx(found.best) and found.best > 0.1
    assert (found.groups, found.problems) == (12, 12)
    other = study.finding(study.groups_of(planted, ["fingerprint"], "told", 1))
    assert other.rho == pytest.approx(-1) and other.gain < -0.1


def test_a_criterion_drawn_by_lot_has_an_interval_around_0_and_gains_nothing(
    study: ModuleType, planted: pd.DataFrame
) -> None:
    found = study.finding(study.groups_of(planted, ["fingerprint"], "drawn", 1))
    assert found.low < 0 < found.high and found.high - found.low < 1
    assert abs(found.gain) < found.best / 3


def test_what_does_not_vary_or_has_too_few_classes_has_no_finding(study: ModuleType, planted: pd.DataFrame) -> None:
    assert study.finding(study.groups_of(planted, ["fingerprint"], "constant", 1)) is None
    assert study.finding(study.groups_of(planted[:20], ["fingerprint"], "told", -1)) is None


def test_a_class_counts_once_however_many_groups_it_has(study: ModuleType) -> None:
    up, down = np.arange(3.0), np.arange(3.0)[::-1]
    groups = [study.Group(("d", "a"), up, up)] * 8 + [study.Group(("d", name), down, up) for name in "bcd"]
    assert study.finding(groups).rho == pytest.approx(-0.5)


def test_the_page_is_of_every_committed_run_once(study: ModuleType) -> None:
    runs, epochs = study.committed(STUDY.parent.parent / "experiments")
    assert not runs.duplicated(["fingerprint", "model", "changed", "seed"]).any() and len(runs) > 500
    found = study.findings(runs, epochs)
    assert found.keys() == study.QUESTIONS.keys() and found["methods"]["held-out score"].problems > 20
    page, written = study.page(runs, epochs, found), study.PAGE.read_text(encoding="utf-8")
    headings = [line for line in page.splitlines() if line.startswith(("#", "| held-out", "!["))]
    for line in headings:
        assert line.split("|")[1 if line.startswith("|") else 0] in written


def test_the_page_on_rounding_is_made_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load("rounding")
    page = tmp_path / "rounding.md"
    page.write_text(re.sub(r"(?s)<!-- table -->.*<!-- end -->", "<!-- table -->\n<!-- end -->", made.PAGE.read_text()))
    committed = made.PAGE.read_text()
    monkeypatch.setattr(made, "PAGE", page)
    made.main()
    assert page.read_text() == committed and committed.count("| `") == 6
    rows, theirs = results.read_csv(made.ROWS), results.read_csv(made.COMMITTED)
    now = rows.assign(device=rows["device"] + ", 1 thread")  # as a repetition of the page's command names it
    assert made.table(now, theirs) == made.table(rows, theirs)
    with pytest.raises(AssertionError):
        made.table(rows.assign(device="AMD EPYC, AVX2, 1 thread"), theirs)
