"""The page: `write` makes README.md, and a roofline and a growth figure for each device, from what was measured.

Nothing is measured here, so the page can be made again anywhere. A section of the JSON is a list of flat rows, or such
a list as ``rows`` with a ``note``; a value with ``median``, ``low`` and ``high`` is shown as the median and the
quartiles. On a CPU, seconds of scoring and of growth are left out or shown as multiples of the first: they say more
about the machine than about the lab.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomaly_lab.figures import ANOMALOUS, MARKERS, NEUTRAL, NORMAL, PALETTE, _clean, _figure, save
from anomaly_lab.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
DEVICES = {"cpu": "CPU", "gpu": "GPU"}

TITLES = {
    "machine": "The machine's peaks",
    "training": "Throughput: the lab beside bare loops",
    "peers": "Throughput beside other packages",
    "shallow": "k-NN and PCA beside PyOD's, at equal scores",
    "abreast": "Many models at once",
    "startup": "Start-up",
    "scoring": "Scoring",
    "counts": "Operations, bytes and the share of the peak",
    "growth": "Growth",
}
"""Sections of the page in their order; others that were measured follow."""

PARTS = {"scoring": "purpose", "growth": "what"}
"""Sections whose rows are of several kinds, one table each: the column that says which."""

KINDS = {
    "method": "Every method, in the lab's own batches",
    "batch size": "In other batches",
    "import": "The process without a run",
    "images": "Number of training images",
    "size": "Image size",
    "runs": "Runs of one process",
    "cifar10": "CIFAR-10, whole runs",
}
"""Headings of those tables."""

HIDDEN = {"passes"}
"""Texts too long for a table: they have a section of their own."""

TARGET = 0.4
"""Share of the fastest convolution that feed-forward scoring is to reach on a CPU."""

LIMIT_MB = 2048
"""What a run on CIFAR-10 may hold on a CPU."""

UNITS = {"gflops": "GFLOP/s", "gb": "GB", "mb": "MB", "mflop": "MFLOP", "flop": "FLOP", "ms": "ms", "cpu": "CPU"}


def write(folder: Path) -> None:
    """Make ``folder``'s README.md and figures from its cpu.json and gpu.json; what was not measured is said.

    Raises:
        ValueError: neither file is there.
    """
    measured = {
        device: json.loads(path.read_text(encoding="utf-8"))
        for device in DEVICES
        for path in [folder / f"{device}.json"]
        if path.is_file()
    }
    if not measured:
        raise ValueError(f"{folder} has neither cpu.json nor gpu.json: make bench")
    for device, sections in measured.items():
        for name, draw in FIGURES.items():
            figure = draw(sections)
            if figure is not None:
                save(figure, folder / _file(name, device))
    write_atomically(folder / "README.md", lambda file: file.write(readme(measured).encode()))


def readme(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's text; ``measured`` maps a device to the content of its JSON file."""
    parts = [
        "# Speed, measured",
        "Written by `make bench` and `make bench-gpu` from `cpu.json` and `gpu.json` beside it; do not edit. What each "
        "section counts and what not stands at the top of its module. Ratios are taken in one process, ours and the "
        "other's by turns; brackets hold the quartiles.",
    ]
    for device, title in DEVICES.items():
        if device in measured:
            parts += _device(device, measured[device])
        else:
            command = {"cpu": "make bench", "gpu": "make bench-gpu"}[device]
            parts += [
                f"## {title}",
                f"{title} figures wait for a {title}: `{command}` measures them and adds them here.",
            ]
    return "\n\n".join(parts) + "\n"


def _device(device: str, sections: Mapping[str, Any]) -> list[str]:
    parts = [f"## {DEVICES[device]}", *_header(sections.get("header", {}))]
    names = [name for name in TITLES if name in sections]
    names += [name for name in sections if name not in TITLES and name != "header"]
    for name in names:
        rows, note = _section(sections, name)
        parts += [f"### {TITLES.get(name, name)}", *([note] if note else [])]
        for figure, of in (("roofline", "counts"), ("growth", "growth")):
            if name == of and FIGURES[figure](sections) is not None:
                parts.append(f"![{ALT[figure]}]({_file(figure, device)})")
        kinds = list(dict.fromkeys(row.get(PARTS.get(name, "")) for row in rows))
        for kind in kinds:
            some = [_shown(row, name, device) for row in rows if row.get(PARTS.get(name, "")) == kind]
            if name == "growth" and device == "cpu":
                some = _in_multiples(some)
            if kind is not None:
                parts.append(f"**{KINDS.get(kind, kind)}**")
            parts.append(_table(some))
        if name == "training":
            parts += _passes(rows)
    return parts


def _header(header: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in header.items():
        if key == "measured":
            continue
        text = ", ".join(f"{name} {found}" for name, found in value.items()) if isinstance(value, Mapping) else value
        lines.append(f"- {key}: {text}")
    parts = ["\n".join(lines)] if lines else []
    sections = header.get("measured", {})
    if sections:
        parts.append("When and with which code:")
        parts.append(_table([{"section": name, **about} for name, about in sections.items()]))
    return parts


def _section(sections: Mapping[str, Any], name: str) -> tuple[list[Row], str]:
    found = sections.get(name, [])
    return (found["rows"], found.get("note", "")) if isinstance(found, Mapping) else (found, "")


def _shown(row: Row, section: str, device: str) -> dict[str, Any]:
    hidden = HIDDEN | {PARTS.get(section, "")}
    if section == "scoring" and device == "cpu":
        hidden |= {"seconds"}
    return {key: value for key, value in row.items() if key not in hidden}


def _in_multiples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds as multiples of the first row's, and images a second likewise gone."""
    first = next((row["seconds"] for row in rows if row.get("seconds")), None)
    found = []
    for row in rows:
        kept = {key: value for key, value in row.items() if key not in ("seconds", "images_per_second")}
        if first and len(rows) > 1 and "seconds" in row:
            kept["time, in multiples of the first"] = row["seconds"] / first
        found.append(kept)
    return found


def _passes(rows: Sequence[Row]) -> list[str]:
    passes = {str(row.get("model", row.get("method"))): row["passes"] for row in rows if row.get("passes")}
    if not passes:
        return []
    lines = "\n".join(f"- `{model}`: {text}" for model, text in passes.items())
    return ["#### Passes that are not computed twice", lines]


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return "Nothing was measured."
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c for c in columns if all(isinstance(row.get(c), int | float | Mapping | None) for row in rows)} - {
        c for c in columns if any(isinstance(row.get(c), bool) for row in rows)
    }
    lines = [
        "| " + " | ".join(_heading(column) for column in columns) + " |",
        "|" + "|".join("--:" if column in numeric else "---" for column in columns) + "|",
    ]
    lines += ["| " + " | ".join(_cell(row.get(column), column) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _heading(column: str) -> str:
    words = column.replace("_per_", " / ").split("_")
    text = " ".join(UNITS.get(word, word) for part in words for word in part.split(" "))
    return text.replace("GB / s", "GB/s").replace("FLOP / byte", "FLOP/byte")


def _cell(value: Any, column: str = "") -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        if set(value) == {"median", "low", "high"}:
            low, median, high = (_cell(value[name], column) for name in ("low", "median", "high"))
            return f"{median} [{low}, {high}]"
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        if column.startswith(("share", "loop_share")):
            return f"{100 * value:.0f} %"
        if not math.isfinite(value):
            return "–"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_cell(inner) for inner in value)
    return " ".join(str(value).replace("|", "\\|").split())


# ------------------------------------------------------------------------------------------------- figures


def roofline(sections: Mapping[str, Any]) -> Figure | None:
    """GFLOP/s reached against operations per byte: each method's training step and scoring, under the two roofs.

    Methods whose training steps have the same counts share a point: the mean of their rates. None where `counts` or
    `machine` is missing.
    """
    rows, _ = _section(sections, "counts")
    machine, _ = _section(sections, "machine")
    if not rows or not machine:
        return None
    plain = [row for row in machine if row["precision"] == "float32"]
    gflops = max(row["gflops"] for row in plain if row["what"] == "convolution")
    bandwidth = max(row["gb_per_s"] for row in plain if row.get("gb_per_s"))
    trained = {
        row["method"]: tuple(f"{row[key]:.3g}" for key in ("mflop_per_image", "mb_per_image"))
        for row in rows
        if row["of"] != "scoring"
    }
    alike: dict[Any, list[str]] = {}
    for row in rows:  # the same networks in the same step, but for a few bytes
        alike.setdefault(trained.get(row["method"], row["method"]), []).append(row["method"])
    labels = {method: " = ".join(dict.fromkeys(some)) for some in alike.values() for method in some}
    styles = _styles(sorted(set(labels.values())))
    points: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        points.setdefault((row["of"], labels[row["method"]]), []).append(row)
    figure, axes = _figure(8.6, max(4.2, 0.2 * len(styles) + 1))
    xs, ys = [], []
    for (kind, name), group in points.items():
        colour, marker = styles[name]
        xs.append(group[0]["flop_per_byte"])
        ys.append(sum(row["gflops"] for row in group) / len(group))
        inside = colour if kind != "scoring" else "white"
        look = {"markerfacecolor": inside, "markeredgecolor": colour, "markeredgewidth": 1.6, "markersize": 8}
        axes.plot(xs[-1:], ys[-1:], marker=marker, linestyle="", zorder=3, **look)  # type: ignore[arg-type]
    ridge = gflops / bandwidth
    left, right = min(ridge, *xs) / 2, max(ridge, *xs) * 1.6
    bottom, top = min(*ys, TARGET * gflops) / 1.2, gflops * 1.3
    axes.plot([left, ridge, right], [left * bandwidth, gflops, gflops], color="black", lw=1.4)
    axes.plot([ridge, right], [TARGET * gflops] * 2, color=NEUTRAL, lw=1, linestyle=(0, (4, 3)))
    axes.text(right / 1.03, TARGET * gflops * 1.03, f"{TARGET:.0%} of it", fontsize=8, color=NEUTRAL, ha="right")
    peak = f"fastest convolution: {gflops:,.0f} GFLOP/s"
    axes.text(right / 1.03, gflops * 1.05, peak, fontsize=8.5, ha="right", va="bottom")
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.set(xlabel="operations per byte that operators move", ylabel="GFLOP/s")
    axes.set_title(
        f"Roofline; memory {bandwidth:,.0f} GB/s (the slope). Filled: training step; hollow: scoring",
        fontsize=9.5,
        loc="left",
    )
    for name, (colour, marker) in styles.items():
        axes.plot([], [], color=colour, marker=marker, linestyle="", label=name)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return figure


def growth(sections: Mapping[str, Any]) -> Figure | None:
    """Peak memory and time against number of images, image size and runs of one process; CIFAR-10 beside its limit."""
    from matplotlib.ticker import MaxNLocator

    rows, _ = _section(sections, "growth")
    if not rows:
        return None
    of = {
        kind: [row for row in rows if row["what"] == kind] for kind in ("images", "size", "runs", "cifar10", "import")
    }
    figure, _ = _figure(10.2, 5.6)
    figure.clear()
    panels = [figure.add_subplot(2, 3, number + 1) for number in range(6)]
    for axes in panels:
        _clean(axes)
    floor = of["import"][0]["peak_mb"] if of["import"] else None
    for axes, kind, label in ((panels[0], "images", "training images"), (panels[1], "size", "image size, pixels")):
        _line(axes, of[kind], kind, "peak_mb", NORMAL, label, "peak memory, MB")
        if floor:
            axes.axhline(floor, color=NEUTRAL, lw=1, linestyle=(0, (4, 3)), label="imports alone")
            axes.legend(frameon=False, fontsize=8, loc="upper left")
        axes.set_ylim(0, 1.25 * max(row["peak_mb"] for row in of[kind]) if of[kind] else None)
    _line(panels[2], of["runs"], "runs", "resident_mb", NORMAL, "runs in one process", "memory held after it, MB")
    panels[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[2].set_ylim(0, 1.25 * max([row["resident_mb"] for row in of["runs"]], default=1))
    for axes, kind, label, power in (
        (panels[3], "images", "training images", 1),
        (panels[4], "size", "image size, pixels", 2),
    ):
        some = [dict(row, time=row["seconds"] / of[kind][0]["seconds"]) for row in of[kind]]
        _line(axes, some, kind, "time", ANOMALOUS, label, "time of an epoch, first = 1")
        axes.set_yscale("log")
        if some:
            ideal = [(row[kind] / some[0][kind]) ** power for row in some]
            name = "as the images" if power == 1 else "as the pixels"
            axes.plot([row[kind] for row in some], ideal, color=NEUTRAL, lw=1, linestyle=(0, (4, 3)), label=name)
            axes.legend(frameon=False, fontsize=8, loc="upper left")
        _plain_ticks(axes.yaxis)
    last = panels[5]
    if of["cifar10"]:
        names = [row["run"].replace(", ", ",\n") for row in of["cifar10"]]
        values = [row["peak_mb"] for row in of["cifar10"]]
        last.barh(names, values, color=NORMAL, height=0.5)
        for position, value in enumerate(values):
            last.text(value - 30, position, f"{value:,.0f}", ha="right", va="center", color="white", fontsize=8.5)
        last.axvline(LIMIT_MB, color=ANOMALOUS, lw=1.2, linestyle=(0, (4, 3)))
        last.set_xlim(0, 1.1 * max(LIMIT_MB, *values))
        last.set_ylim(-0.6, len(values) - 0.1)
        last.text(0.985 * LIMIT_MB, len(values) - 0.15, "2 GB", fontsize=8.5, color=ANOMALOUS, ha="right", va="top")
        last.set(xlabel="peak memory on CIFAR-10, MB")
    else:
        last.set_axis_off()
        last.text(0.5, 0.5, "CIFAR-10 was not measured", ha="center", color=NEUTRAL, transform=last.transAxes)
    return figure


FIGURES: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {"roofline": roofline, "growth": growth}
ALT = {
    "roofline": "GFLOP/s reached against operations per byte, under the machine's roofs",
    "growth": "Memory and time against number of images, image size and number of runs",
}


def _file(name: str, device: str) -> str:
    return f"{name}.png" if device == "cpu" else f"{name}_{device}.png"


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name, no pair twice."""
    return {
        name: (PALETTE[number % len(PALETTE)], MARKERS[(number + number // len(PALETTE)) % len(MARKERS)])
        for number, name in enumerate(names)
    }


def _line(axes: Axes, rows: Sequence[Row], x: str, y: str, colour: str, xlabel: str, ylabel: str) -> None:
    axes.plot([row[x] for row in rows], [row[y] for row in rows], color=colour, marker="o", markersize=4.5, lw=1.7)
    if x in ("images", "size"):
        axes.set_xscale("log")
        axes.set_xticks([row[x] for row in rows], [f"{row[x]:,}" for row in rows])
        axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel=ylabel)


def _plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, 20, ... in plain numbers on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())
