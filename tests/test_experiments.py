"""Committed results: every page under experiments/ is what its own results.csv says, of runs that can be repeated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anomaly_lab import config, report, results

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.parent for path in (ROOT / "experiments").glob("*/results.csv"))


def test_there_are_results() -> None:
    assert PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_made_from_its_results(page: Path) -> None:
    frame = results.read_csv(page / "results.csv")
    notes = (page / "notes.md").read_text(encoding="utf-8")
    assert "What came out" in notes, "a table without its reasons"
    written = (page / "README.md").read_text(encoding="utf-8")
    assert report.experiment_readme(frame, notes, report.experiment_command(page.name)) == written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_run_of_a_page_belongs_to_its_grid_and_to_a_clean_commit(page: Path) -> None:
    frame = results.read_csv(page / "results.csv")
    jobs = [config.compose(job) for job in config.jobs([f"experiment={page.name}"])]
    grid = {(cfg.choices.model, cfg.dataset.name, cfg.choices.split, int(cfg.seed)) for cfg in jobs}
    for run in frame.itertuples():
        assert (run.model, run.dataset, run.split, int(run.seed)) in grid
        assert re.fullmatch(r"[0-9a-f]{12}", run.git_sha) and not run.dirty
        assert 0 <= run.auroc <= 1


def test_the_index_lists_every_page_and_every_experiment_has_a_command() -> None:
    index = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    for name in [path.stem for path in (config.CONFIG_DIR / "experiment").glob("*.yaml")]:
        assert name in index, f"experiments/README.md does not list {name}"
    for page in PAGES:
        assert f"]({page.name}/README.md)" in index
