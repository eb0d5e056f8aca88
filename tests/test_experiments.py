"""Committed results: every page under experiments/ is what its own results.csv says, of runs that can be repeated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anomaly_lab import config, grids, report, results

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
def test_every_run_of_a_page_belongs_to_a_clean_commit(page: Path) -> None:
    for run in results.read_csv(page / "results.csv").itertuples():
        assert re.fullmatch(r"[0-9a-f]{12}", run.git_sha) and not run.dirty
        assert 0 <= run.auroc <= 1


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_committed_run_is_still_where_and_what_it_was(
    page: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that its page's grid has no more, or whose folder or settings were others today, could not be repeated."""
    monkeypatch.setenv("ANOMALY_LAB_DATA", str(data_dir))
    frame = results.read_csv(page / "results.csv")
    made = {f"model={name.removesuffix('_small')}" for name in frame["model"]}
    grid = [words for words in grids.jobs([f"experiment={page.name}"]) if not made.isdisjoint(words)]
    jobs = [config.job(config.compose(words)) for words in grid]
    now = {str(job.out.relative_to("runs")): results._digest(job.settings) for job in jobs}
    for run in frame.itertuples():
        assert run.path in now
        assert run.settings in ("", now[run.path]), "the settings of the first runs were not kept"


def test_the_index_lists_every_page_and_every_experiment_has_a_command() -> None:
    index = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    for name in [path.stem for path in (config.CONFIG_DIR / "experiment").glob("*.yaml")]:
        assert name in index, f"experiments/README.md does not list {name}"
    for page in PAGES:
        assert f"]({page.name}/README.md)" in index


def test_the_first_table_of_readme_is_what_the_pages_hold() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text[text.index("| method | 0 |") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    frame = results.union(results.read_pages(ROOT / "experiments"))
    runs = frame[(frame["dataset"] == "mnist") & (frame["split"] == "official")]
    assert rows[0][-3:] == ["mean", "published", "gap"] and len(rows) > 10
    for head, *classes, mean, published, gap in rows[2:]:
        (label,) = re.findall(r"`(\w+)`", head)
        own = runs[runs["label"] == label]
        assert [f"{value:.3f}" for value in own.groupby("normal_class")["auroc"].mean()] == classes, label
        seeds = own.groupby("seed")["auroc"].mean()
        spread = f" ± {seeds.std():.3f}" if len(seeds) > 1 else ""
        assert mean.replace("*", "") == f"{seeds.mean():.3f}{spread}", label
        figure = results.published(own["published_as"].iloc[0], "mnist", "official").get("mean")
        assert published == (f"*{figure.value:.3f}*" if figure and figure.status == "verified" else ""), label
        assert gap == (f"{seeds.mean() - figure.value:+.3f}".replace("-", "−") if published else ""), label


ELSEWHERE = {
    "deep_sad",  # without known anomalies it is deep_svdd
    *("addpa", "piad", "piad_squeezenet", "piad_pixel_l1"),  # downloads; half an hour a run
    "addpa_growing",  # a download, and 64 pixels, which no table's images have
    *("transform_knn", "rotation_contrast"),  # run where it was developed alone; wants a GPU
    *("ede", "shared_ae_no_adversary", "shared_ae_printed"),  # the weights under which none learns: jia2022_mnist_small
}


@pytest.mark.parametrize(
    ("experiment", "own"),
    [
        ("everything_mnist", "digits"),
        ("everything_cifar10", "cifar10"),
        ("table_mnist", "digits"),
        ("table_fashion_mnist", "fashion"),
        ("table_cifar10", "cifar10"),
    ],
)
def test_grids_of_every_method_have_every_method(experiment: str, own: str) -> None:
    words = [f"experiment={experiment}", "normal_class=0", "seed=0"]
    trained = {word.removeprefix("model=") for job in grids.jobs(words) for word in job if "model=" in word}
    names = {path.stem for path in (config.CONFIG_DIR / "model").glob("*.yaml")}
    methods = {name for name in names if not re.search(r"_(cifar10|coil100|fashion)$", name)} - ELSEWHERE
    assert trained == {f"{name}_{own}" if f"{name}_{own}" in names else name for name in methods}
