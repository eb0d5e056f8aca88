"""The page of the benchmarks: made from what was measured, all of it, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page

FOLDER = Path(__file__).parent.parent / "benchmarks"


def measured() -> dict[str, Any]:
    def count(method: str, of: str, mflop: float, gflops: float) -> dict[str, Any]:
        own = {"method": method, "of": of, "mflop_per_image": mflop, "mb_per_image": mflop / 40, "gflops": gflops}
        return own | {"flop_per_byte": 40 * mflop / 500, "share_of_peak": gflops / 120}

    def growth(what: str, **row: Any) -> dict[str, Any]:
        return {"what": what, **row}

    return {
        "header": {
            "cpu": "2 × a slow one",
            "versions": {"torch": "2.14.1", "python": "3.11"},
            "measured": {"training": {"date": "2026-11-25", "threads": 2, "quick": False, "git_sha": "0123456789ab"}},
        },
        "machine": {
            "rows": [
                {"what": "convolution", "precision": "float32", "of": "3×3", "gflops": 120.0, "threads": 2},
                {"what": "convolution", "precision": "tf32", "of": "3×3", "gflops": 999.0, "threads": 2},
                {"what": "triad", "precision": "float32", "of": "3 arrays", "gb_per_s": 25.0, "threads": 2},
            ],
            "note": "The best of 9.",
        },
        "training": [
            {
                "model": "ganomaly",
                "against": "bare",
                "ratio_cpu": {"median": 0.9876, "low": 0.97, "high": 1.0},
                "passes": "D runs twice, not four times.",
            }
        ],
        "scoring": {
            "rows": [
                {"purpose": "method", "method": "aae", "images": 10010, "share_of_peak": 0.666, "seconds": 12.5},
                {"purpose": "batch size", "method": "ganomaly", "batch": 100, "share_of_peak": 0.5, "seconds": 9.5},
            ]
        },
        "counts": [
            count("shared_ae", "training step", 1186.0, 80.0),
            count("shared_ae_printed", "training step", 1186.0, 82.0),
            count("shared_ae", "scoring", 174.0, 70.0),
            count("ganomaly", "training step", 551.0, 75.0),
        ],
        "growth": [
            growth("import", peak_mb=800.0),
            growth("images", images=500, seconds=2.0, images_per_second=250.0, peak_mb=900.0),
            growth("images", images=5000, seconds=19.0, images_per_second=263.0, peak_mb=950.0),
            growth("size", size=8, images=450, seconds=1.0, peak_mb=900.0),
            growth("size", size=16, images=450, seconds=3.5, peak_mb=910.0),
            growth("runs", runs=1, resident_mb=880.0, peak_mb=900.0),
            growth("runs", runs=2, resident_mb=881.0, peak_mb=900.0),
            growth("cifar10", run="ganomaly, one class normal", peak_mb=1330.0),
        ],
        "later": [{"name": "a section nobody | thought of", "value": 3, "list": [64, 32], "gone": None}],
    }


def test_the_committed_page_is_made_from_the_committed_measurements() -> None:
    files = {device: FOLDER / f"{device}.json" for device in page.DEVICES}
    content = {device: json.loads(path.read_text(encoding="utf-8")) for device, path in files.items() if path.is_file()}
    assert "cpu" in content, "make bench"
    assert page.readme(content) == (FOLDER / "README.md").read_text(encoding="utf-8"), "do not edit the page"
    for picture in (FOLDER / "roofline.png", FOLDER / "growth.png"):
        assert picture.is_file() and f"]({picture.name})" in page.readme(content)
    assert not any(about["quick"] for some in content.values() for about in some["header"]["measured"].values())


def test_every_section_has_a_table_with_its_note() -> None:
    text = page.readme({"cpu": measured()})
    titles = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")]
    expected = ("machine", "training", "scoring", "counts", "growth")
    assert titles == [title for name, title in page.TITLES.items() if name in expected] + ["later"]
    assert (
        "The best of 9." in text and "- cpu: 2 × a slow one" in text and "- versions: torch 2.14.1, python 3.11" in text
    )
    assert "| ganomaly | bare | 0.988 [0.97, 1] |" in text, "the median and its quartiles"
    assert "- `ganomaly`: D runs twice, not four times." in text and "| passes" not in text
    assert "| a section nobody \\| thought of | 3 | 64, 32 | – |" in text
    assert "| training | 2026-11-25 | 2 | no | 0123456789ab |" in text and "**Image size**" in text


def test_a_number_that_changes_changes_the_page() -> None:
    other = measured()
    other["training"][0]["ratio_cpu"]["median"] = 0.5
    assert page.readme({"cpu": other}) != page.readme({"cpu": measured()}) == page.readme({"cpu": measured()})


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    text = page.readme({"cpu": measured()})
    assert "GPU figures wait for a GPU: `make bench-gpu`" in text and "](growth.png)" in text
    both = page.readme({"cpu": measured(), "gpu": measured()})
    assert "wait for" not in both and "](roofline_gpu.png)" in both
    with pytest.raises(ValueError, match="make bench"):
        page.write(tmp_path)


def test_seconds_are_shown_for_a_gpu_and_as_multiples_for_a_cpu() -> None:
    cpu = page.readme({"cpu": measured()})
    assert "12.5" not in cpu and "| aae | 10,010 | 67 % |" in cpu
    assert "| 5,000 | 950 | 9.5 |" in cpu, "19 s against 2 s"
    gpu = page.readme({"gpu": measured()})
    assert "| aae | 10,010 | 67 % | 12.5 |" in gpu and "| 5,000 | 19 | 263 | 950 |" in gpu


def test_figures_are_drawn_from_what_there_is(tmp_path: Path) -> None:
    without = {name: rows for name, rows in measured().items() if name not in ("machine", "growth")}
    assert page.roofline(without) is None and page.growth(without) is None
    (tmp_path / "gpu.json").write_text(json.dumps(without))
    page.write(tmp_path)
    assert ".png" not in (tmp_path / "README.md").read_text() and not list(tmp_path.glob("*.png"))
    sections = measured()
    sections["growth"] = [row for row in sections["growth"] if row["what"] in ("import", "images")]
    assert page.growth(sections) is not None, "a part of it"


def test_the_roofline_has_a_point_for_each_kind_of_step_under_the_float32_roof() -> None:
    figure = page.roofline(measured())
    assert figure is not None
    (axes,) = figure.axes
    points = [line for line in axes.lines if line.get_marker() not in ("None", "") and len(line.get_xdata())]
    rates = sorted(float(line.get_ydata()[0]) for line in points)  # type: ignore[index, arg-type]
    assert rates == [70.0, 75.0, 81.0], "one for two methods that compute the same"
    roof = max(float(max(line.get_ydata())) for line in axes.lines if len(line.get_xdata()) == 3)  # type: ignore[arg-type]
    assert roof == 120.0, "tf32 is another roof"
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["ganomaly", "shared_ae = shared_ae_printed"]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for line in points:
        x, y = float(line.get_xdata()[0]), float(line.get_ydata()[0])  # type: ignore[index, arg-type]
        assert left < x < right and bottom < y < top


def test_writing_makes_the_page_and_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text(json.dumps(measured()))
    page.write(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == page.readme({"cpu": measured()})
    assert {path.name for path in tmp_path.glob("*.png")} == {"roofline.png", "growth.png"}


def test_no_two_methods_look_the_same() -> None:
    names = [str(number) for number in range(60)]
    assert len(set(page._styles(names).values())) == len(names)
