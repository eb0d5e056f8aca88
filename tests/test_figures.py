"""Figures say what they should, are made without global state, and are written whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib._pylab_helpers import Gcf
from PIL import Image

from anomaly_lab import figures

RNG = np.random.default_rng(0)
TRUTH = np.repeat([0, 1], [60, 540])
SCORE = TRUTH + RNG.normal(0, 0.4, 600)
IMAGES = RNG.random((4, 1, 8, 8))
CAPTIONS = ["normal", "normal", "anomalous", "anomalous"]
RUNS = pd.DataFrame(
    {
        "label": [m for m in ("one", "two") for _ in range(6)],
        "normal_class": [c for _ in range(2) for c in (0, 0, 1, 1, 2, 2)],
        "class_name": [n for _ in range(2) for n in ("cat", "cat", "dog", "dog", "frog", "frog")],
        "seed": [0, 1] * 6,
        "auroc": np.linspace(0.7, 1.0, 12),
        "size": [1, 1, 4, 4, 16, 16] * 2,
    }
)


def texts(figure) -> str:
    """Every text drawn in a figure."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


FIGURES = {
    "roc": lambda: figures.roc(SCORE, TRUTH, (0.9, 0.95), "title"),
    "score_histogram": lambda: figures.score_histogram(SCORE, TRUTH, 0.6, "title"),
    "training_curves": lambda: figures.training_curves([{"epoch": 1, "loss_a": 1.0, "val_score": 0.5}], "title"),
    "reconstruction_grid": lambda: figures.reconstruction_grid(IMAGES, IMAGES**2, IMAGES[:, 0], SCORE[:4], CAPTIONS),
    "heat_map_overlay": lambda: figures.heat_map_overlay(IMAGES[0], IMAGES[1, 0], "title"),
    "class_heat_map": lambda: figures.class_heat_map(RUNS, "title"),
    "box_plot": lambda: figures.box_plot(RUNS, "title"),
    "lines": lambda: figures.lines(RUNS, "size", "auroc", "label", "title"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_written_and_has_the_same_bytes_twice(name: str, tmp_path: Path) -> None:
    first, second = (figures.save(FIGURES[name](), tmp_path / f"{i}.png") for i in (1, 2))
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 2  # more than a blank page
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["1.png", "2.png"]


def test_figures_from_threads_equal_those_made_alone(tmp_path: Path) -> None:
    def draw(number: int) -> bytes:
        return figures.save(FIGURES["roc"](), tmp_path / f"{number}.png").read_bytes()

    open_before = len(Gcf.figs)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(draw, range(6)))) == 1
    assert len(Gcf.figs) == open_before  # pyplot keeps none of them


def test_failed_save_leaves_the_old_picture_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "roc.png"
    path.write_bytes(b"old")
    figure = FIGURES["roc"]()
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        figures.save(figure, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_roc_names_the_auroc_and_its_interval() -> None:
    perfect = figures.roc(TRUTH.astype(float), TRUTH, (0.99, 1.0))
    assert "AUROC 1.000 [0.990, 1.000]" in texts(perfect)


def test_histogram_says_how_many_scores_are_clipped() -> None:
    tail = SCORE.copy()
    tail[-3:] = 500.0
    shown = texts(figures.score_histogram(tail, TRUTH))
    assert "scores above" in shown and "up to 500" in shown
    assert "outermost bin" not in texts(figures.score_histogram(SCORE, TRUTH))


def test_histogram_keeps_the_threshold_in_view() -> None:
    axes = figures.score_histogram(SCORE, TRUTH, threshold=50.0).axes[0]
    assert axes.get_xlim()[1] >= 50
    assert "threshold 50" in texts(axes.figure)


def test_histogram_of_equal_scores_is_drawn() -> None:
    axes = figures.score_histogram(np.zeros(10), np.arange(10) % 2).axes[0]
    assert axes.get_xlim()[0] < 0 < axes.get_xlim()[1]


def test_oracle_has_a_panel_of_its_own_that_says_what_it_is() -> None:
    history = [{"epoch": e, "loss_a": 1 / e, "val_score": 1 / e, "oracle_auroc": 0.9} for e in (1, 2)]
    with_oracle = figures.training_curves(history)
    assert "oracle (looks at test labels)" in [axes.get_title(loc="left") for axes in with_oracle.axes]
    without = figures.training_curves([{k: v for k, v in row.items() if k != "oracle_auroc"} for row in history])
    assert "oracle" not in texts(without)


def test_losses_of_one_stage_only_are_drawn_over_its_epochs() -> None:
    history = [{"epoch": 1, "loss_a": 1.0}, {"epoch": 2, "loss_b": 2.0}, {"epoch": 3, "loss_b": float("nan")}]
    drawn = {line.get_label(): list(line.get_xdata()) for line in figures.training_curves(history).axes[0].lines}
    assert drawn == {"a": [1], "b": [2, 3]}


@pytest.mark.parametrize(
    ("reconstructions", "maps", "rows"),
    [
        (IMAGES, IMAGES[:, 0], ["input", "reconstruction", "error"]),
        (None, IMAGES[:, 0], ["input", "anomaly map"]),
        (None, None, ["input"]),
    ],
)
def test_grid_has_the_rows_a_method_can_give(reconstructions, maps, rows: list[str]) -> None:
    figure = figures.reconstruction_grid(IMAGES, reconstructions, maps, SCORE[:4], CAPTIONS)
    assert len(figure.axes[0].images) == 4 * len(rows)
    written = texts(figure).splitlines()
    assert [text for text in written if text in ("input", "reconstruction", "error", "anomaly map")] == rows
    assert [text for text in written if text in CAPTIONS] == ["normal", "anomalous"]  # once a group


def test_heat_map_leaves_out_the_mean_of_a_method_that_lacks_a_class() -> None:
    lacking = RUNS[(RUNS["label"] == "one") | (RUNS["normal_class"] < 2)]
    shown = texts(figures.class_heat_map(lacking)).splitlines()
    assert shown.count("–") == 2  # the class and the mean
    assert {"cat", "dog", "frog", "mean"} <= set(shown)


def test_line_uses_only_classes_that_are_there_at_every_value() -> None:
    rows = [
        {"x": x, "auroc": 0.5 if c else 0.9, "seed": 0, "normal_class": c, "group": "g"}
        for x in (1, 2, 3)
        for c in (0, 1)
        if (x, c) != (2, 1)
    ]
    axes = figures.lines(pd.DataFrame(rows), "x", "auroc", "group").axes[0]
    assert list(axes.lines[0].get_ydata()) == [0.9, 0.9, 0.9]
    assert axes.get_ylabel() == "AUROC (1 class)"


def test_lines_without_any_value_say_so() -> None:
    assert "nothing was recorded" in texts(figures.lines(RUNS[:0], "size", "auroc", "label"))


@pytest.mark.parametrize(
    ("seeds", "named"), [((0,), "mean ± sd over 2 classes"), ((0, 1), "mean over 2 classes, ± sd over seeds")]
)
def test_band_is_named_for_what_it_is_over(seeds: tuple[int, ...], named: str) -> None:
    rows = [
        {"x": x, "auroc": 0.8 + 0.01 * x * c, "seed": s, "normal_class": c, "group": "g"}
        for x in (1, 2)
        for c in (0, 1)
        for s in seeds
    ]
    axes = figures.lines(pd.DataFrame(rows), "x", "auroc", "group").axes[0]
    assert axes.get_ylabel() == f"AUROC ({named})"
