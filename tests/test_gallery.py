"""The page of all methods is what its generator writes."""

from __future__ import annotations

from types import ModuleType

import pytest
from PIL import Image
from programs import load

from anomaly_lab import archive, config, results


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    return load("gallery")


def test_the_gallery_is_what_its_generator_writes(gallery: ModuleType) -> None:
    written = gallery.PAGE.read_text(encoding="utf-8")
    assert gallery.page() == written, "run python docs/gallery.py"
    for path in (config.CONFIG_DIR / "model").glob("*.yaml"):
        assert f"\n| `{path.stem}` |" in written


def test_every_method_that_was_run_shows_its_scores(gallery: ModuleType) -> None:
    """And each figure is of the scores that are committed: their checksum stands in its header."""
    written = gallery.PAGE.read_text(encoding="utf-8")
    archived, frame = archive.Archive(gallery.SCORES), results.read_csv(gallery.RESULTS)
    pictures = {path.stem: path for path in gallery.FIGURES.iterdir()}
    assert set(pictures) == set(frame["method"]), "run python docs/gallery.py"
    for model, path in pictures.items():
        (run,) = gallery.shown(model, frame).itertuples()
        assert f"on {run.dataset} {run.class_name}: AUROC {run.auroc:.3f}](methods/{path.name})\n" in written
        assert (run.dataset, run.normal_class) == gallery.SHOWN or "_cifar10" in model
        with Image.open(path) as picture:
            assert picture.info["Source"] == archived.entries[run.path]["scores_sha256"], path
    assert sum(path.stat().st_size for path in pictures.values()) < 1_500_000


def test_a_cost_is_the_median_of_what_the_runs_took(gallery: ModuleType) -> None:
    frame = results.read_csv(gallery.RESULTS)
    runs = frame[frame["method"] == "hrn"]
    (line,) = (line for line in gallery.table(["hrn"], frame, []) if "`hrn`" in line)
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[4:7] == [f"{runs['seconds'].median():.0f}", "20", f"{runs['images_per_second'].median():,.0f}"]
    (line,) = (line for line in gallery.table(["knn"], frame, []) if "`knn`" in line)
    assert line.split("|")[6].strip() == "", "nothing is trained"


def test_published_are_means_and_where_none_is_single_classes(gallery: ModuleType) -> None:
    assert gallery.published("puzzle_ae_fashion").startswith(
        "mnist official 0: 0.996, 1: 0.999, 2: 0.971, 3: 0.970 (verified, column headers lost, "
        "read as digits 0 to 3); cifar10 official 0: 0.789,"
    )
    assert gallery.published("geotrans").startswith("mnist official 0.980 (verified); fashion_mnist official 0.935")
    assert gallery.published("ede") == "mnist official 0.961 (verified, split not stated, likely official)"


def test_a_docstring_becomes_paragraphs_and_equations(gallery: ModuleType) -> None:
    class Method:
        """What it does.

        A paper, with

            L = |x - y|
              + 1

        and a score. *Where we differ:*
        here.

        Args:
            width: no part of the page.
        """

    parts = list(gallery.documented(Method))
    assert parts == [
        "What it does.\n\nA paper, with\n",
        "```text\nL = |x - y|\n  + 1\n```\n",
        "and a score. *Where we differ:*\nhere.\n",
    ]
