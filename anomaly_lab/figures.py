"""Every figure, for one run and for many.

All functions return a `matplotlib.figure.Figure` made without pyplot, so they may be called from several threads and
never open a window. Colours are Okabe and Ito's ("Color Universal Design", 2008), distinct for colour-blind readers;
normal is blue and anomalous is vermilion everywhere.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anomaly_lab import metrics
from anomaly_lab.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from anomaly_lab.ranking import Ranking

NORMAL = "#0072B2"
ANOMALOUS = "#D55E00"
NEUTRAL = "#5F6368"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MISSING = "#E8EAED"


def save(figure: Figure, path: str | Path, *, dpi: int = 130, source: str | None = None) -> Path:
    """Write a PNG whole or not at all; same figure, same bytes. Its header says `source`: what it was drawn from."""
    plain = {"Software": None, "Source": source}  # matplotlib's version in the header would change the bytes
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=dpi, facecolor="white", metadata=plain))
    return Path(path)


# ------------------------------------------------------------------------------------------------- one run


def roc(score: np.ndarray, truth: np.ndarray, interval: tuple[float, float] | None = None, title: str = "") -> Figure:
    """ROC curve of raw scores (N,) against truth (N,), 1 anomalous; `interval` is the AUROC's, for the legend."""
    fpr, tpr = metrics.roc_curve(score, truth)
    label = f"AUROC {metrics.auroc(score, truth):.3f}"
    if interval is not None:
        label += f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    figure, axes = _figure(4.6, 4.4)
    axes.fill_between(fpr, tpr, color=NORMAL, alpha=0.08, linewidth=0)
    axes.plot(fpr, tpr, color=NORMAL, linewidth=1.8, label=label, clip_on=False)
    axes.plot([0, 1], [0, 1], color=NEUTRAL, linewidth=1, linestyle=(0, (4, 3)), label="chance")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="false positive rate", ylabel="true positive rate")
    axes.set_aspect("equal")
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    _title(axes, title, 46)
    return figure


def score_histogram(score: np.ndarray, truth: np.ndarray, threshold: float | None = None, title: str = "") -> Figure:
    """Histogram of raw scores (N,) by truth (N,), with the threshold where there is one.

    Counts are logarithmic when one kind would otherwise vanish beside the other. Scores far outside the
    central 99 % are put in the outermost bin, and a line under the figure says how many.
    """
    score = np.asarray(score, dtype=float)
    low, high, notice = _range(score, threshold)
    edges = np.linspace(low, high, int(np.clip(2 * np.sqrt(len(score)), 12, 50)) + 1).tolist()
    shown = np.clip(score, low, high)
    normal, anomalous = shown[truth == 0], shown[truth == 1]
    tops = [np.histogram(part, edges)[0].max(initial=0) for part in (normal, anomalous)]
    figure, axes = _figure(6.0, 3.8)
    for part, colour, name in ((normal, NORMAL, "normal"), (anomalous, ANOMALOUS, "anomalous")):
        if not len(part):
            continue
        axes.hist(part, edges, color=colour, alpha=0.35, linewidth=0)
        axes.hist(part, edges, color=colour, histtype="step", linewidth=1.4, label=f"{name} ({len(part):,})")
    if min(tops) > 0 and max(tops) > 8 * min(tops):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    if threshold is not None:
        axes.axvline(threshold, color="black", linewidth=1.2, linestyle=(0, (4, 2)), label=f"threshold {threshold:.4g}")
    axes.set_xlim(low, high)
    axes.set(xlabel="score (higher is more anomalous)", ylabel="images")
    axes.margins(y=0.12)
    # Above the axes: a legend inside would sit on one of the two humps.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=9, borderaxespad=0.2)
    if title:
        figure.suptitle(_wrap(title, 72), fontsize=11)
    if notice:
        figure.text(0.99, 0.008, notice, fontsize=7.5, color=NEUTRAL, ha="right", va="bottom")
        figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))  # type: ignore[union-attr, call-arg]
    return figure


def training_curves(history: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Curves of one training: every `loss_*`, `val_score`, and every `oracle_*` that was recorded.

    `history` holds a dict an epoch with the key `epoch`; an entry may lack keys (stages of a training differ).
    """
    keys = list(dict.fromkeys(key for entry in history for key in entry))
    drawn = {
        "losses": [key for key in keys if key.startswith("loss_")],
        "val_score: mean score of held-out normals": [key for key in keys if key == "val_score"],
        "oracle (looks at test labels)": [key for key in keys if key.startswith("oracle_")],
    }
    panels = [(heading, names) for heading, names in drawn.items() if names]
    figure, first = _figure(4.3 * max(1, len(panels)), 3.5)
    if not panels:
        first.set_axis_off()
        first.text(0.5, 0.5, "nothing was recorded while training", ha="center", va="center", color=NEUTRAL)
        return figure
    figure.clear()
    first_epoch, last_epoch = (bound([entry["epoch"] for entry in history]) for bound in (min, max))
    for column, (heading, names) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), column + 1)
        _clean(axes)
        finite: list[float] = []
        for number, key in enumerate(names):
            points = [(entry["epoch"], entry[key]) for entry in history if entry.get(key) is not None]
            epoch, value = np.array(points, dtype=float).reshape(-1, 2).T
            finite += value[np.isfinite(value)].tolist()
            colour = ANOMALOUS if key == "oracle_auroc" else PALETTE[number % len(PALETTE)]
            marker = MARKERS[number % len(MARKERS)] if len(epoch) <= 30 else None
            style: dict[str, Any] = {"color": colour, "linewidth": 1.6, "marker": marker, "markersize": 4}
            axes.plot(epoch, value, label=key.removeprefix("loss_"), **style)
        if names[0].startswith("oracle_"):
            axes.set_ylabel("AUROC on the test set")
        elif finite and min(finite) > 0 and max(finite) > 30 * min(finite):
            axes.set_yscale("log")
        if heading == "losses" or len(names) > 1:
            axes.legend(frameon=False, fontsize=8, ncols=1 if len(names) < 5 else 2)
        _title(axes, heading, 46)
        axes.set_xlabel("epoch")
        if last_epoch - first_epoch < 6:
            axes.set_xticks(range(first_epoch, last_epoch + 1))
        axes.set_xlim(first_epoch - 0.04 * (last_epoch - first_epoch) - 0.2, last_epoch + 0.2)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def reconstruction_grid(
    images: np.ndarray,
    reconstructions: np.ndarray | None,
    maps: np.ndarray | None,
    scores: np.ndarray,
    captions: Sequence[str],
) -> Figure:
    """Input, reconstruction and error, a column an image.

    Args:
        images: (B,C,H,W) float in [0,1], grey or RGB.
        reconstructions: same shape, or None for a method that does not reconstruct.
        maps: (B,H,W), or None for a method without anomaly maps. All columns share one colour scale.
        scores: (B,), written above the columns.
        captions: (B,); neighbours with the same caption form a group with one heading.
    """
    count = len(images)
    assert count == len(scores) == len(captions)
    rows = [("input", images)]
    if reconstructions is not None:
        rows.append(("reconstruction", reconstructions))
    if maps is not None:
        rows.append(("error" if reconstructions is not None else "anomaly map", maps))
    top = float(np.quantile(maps, 0.999)) or 1.0 if maps is not None else 1.0
    groups = [0] + [i for i in range(1, count) if captions[i] != captions[i - 1]]
    gap = [0.35 * sum(start <= column for start in groups[1:]) for column in range(count)]
    # Placed by hand, in inches, on one axes: layout engines are slow and uneven with many small squares, and an axes of
    # its own for each of them took most of the seconds of a short run.
    cell, left, foot = 0.82, 1.12, 0.08
    spans = [end - start for start, end in zip(groups, [*groups[1:], count], strict=True)]
    headings = [_wrap(captions[i], max(10, int(cell * span * 13))) for i, span in zip(groups, spans, strict=True)]
    head = 0.36 + 0.15 * max(text.count("\n") + 1 for text in headings)
    width, height = left + cell * (count + gap[-1]) + 0.08, head + cell * len(rows) + foot
    figure, axes = _figure(width, height, layout=None)
    axes.set_axis_off()
    axes.set(position=(0, 0, 1, 1), xlim=(0, width), ylim=(0, height), autoscale_on=False)
    side = 0.95 * cell
    small: dict[str, Any] = {"fontsize": 7.5, "color": NEUTRAL, "ha": "center"}
    for row, (name, block) in enumerate(rows):
        bottom = height - head - cell * (row + 1)
        axes.text(left - 0.1, bottom + cell / 2, name, fontsize=9, ha="right", va="center")
        for column in range(count):
            x = left + cell * (column + gap[column])
            place: dict[str, Any] = {"extent": (x, x + side, bottom, bottom + side), "aspect": "auto"}
            if block.ndim == 3:
                axes.imshow(block[column], cmap="magma", vmin=0, vmax=top, interpolation="nearest", **place)
            else:
                _picture(axes, block[column], **place)
            if row == 0:
                axes.text(x + side / 2, bottom + side + 0.035, f"{scores[column]:.3g}", **small)
    for start, span, text in zip(groups, spans, headings, strict=True):
        x = left + cell * (start + gap[start] + span / 2) - 0.02
        axes.text(x, height - head + 0.28, text, fontsize=8.5, ha="center", va="bottom")
    return figure


def heat_map_overlay(image: np.ndarray, anomaly_map: np.ndarray, title: str = "") -> Figure:
    """The image (C,H,W) in [0,1], beside itself with the anomaly map (H,W) laid over it; strong means anomalous."""
    figure, first = _figure(6.4, 3.1)
    first.remove()
    high = float(np.quantile(anomaly_map, 0.995))
    low = float(anomaly_map.min())
    for column in (0, 1):
        axes = figure.add_subplot(1, 2, column + 1)
        axes.set_axis_off()
        _picture(axes, image)
        if column:
            strength = np.clip((anomaly_map - low) / ((high - low) or 1.0), 0, 1)
            rows, columns = image.shape[-2:]
            layer = axes.imshow(
                anomaly_map,
                cmap="inferno",
                vmin=low,
                vmax=high if high > low else low + 1,
                alpha=0.25 + 0.65 * strength,  # the image stays visible where nothing is wrong
                interpolation="nearest",
                extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
            )
            layer.set_zorder(2)
            bar = figure.colorbar(layer, ax=axes, fraction=0.046, pad=0.03)
            bar.ax.tick_params(labelsize=7)
            bar.outline.set_visible(False)
    if title:
        figure.suptitle(_wrap(title, 72), fontsize=10)
    return figure


# ------------------------------------------------------------------------------------------------- many runs


def class_heat_map(frame: pd.DataFrame, title: str = "") -> Figure:
    """Methods by classes: the mean AUROC over seeds, and in a column of its own the mean over classes.

    `frame` has one row a run with the columns label, normal_class, class_name and auroc. A class that a method lacks
    stays grey, and so does the mean of its row, which would be over other classes.
    """
    labels = list(dict.fromkeys(frame["label"]))
    classes = dict(zip(frame["normal_class"].tolist(), map(str, frame["class_name"]), strict=True))
    classes = {c: classes[c] for c in sorted(classes, key=lambda c: (isinstance(c, str), c))}  # several classes last
    means = frame.groupby(["label", "normal_class"])["auroc"].mean()
    table = np.array([[means.get((label, c), np.nan) for c in classes] for label in labels])  # (methods, classes)
    names = [*classes.values(), "mean"]
    lefts = np.arange(len(names)) + np.where(np.arange(len(names)) == len(classes), 0.3, 0)  # a gap before the mean
    table = np.column_stack([table, table.mean(1)])
    low = min(0.9, np.floor(20 * np.nanmin(table)) / 20)
    numbers = len(names) <= 34
    wrapped = [_wrap(label, 34) for label in labels]
    lines_in_labels = sum(text.count("\n") + 1 for text in wrapped)
    cell = 0.52 if numbers else 0.16
    figure, axes = _figure(
        2.6 + cell * max(len(names), 6),  # room for the title and the colour bar beside few classes
        1.35 + max(0.34 * len(labels), 0.19 * lines_in_labels) + (0.3 if title else 0),
    )
    from matplotlib import colormaps

    colours = colormaps["cividis"].with_extremes(bad=_MISSING)
    rows = np.arange(len(labels) + 1)
    style: dict[str, Any] = {"cmap": colours, "vmin": low, "vmax": 1.0, "edgecolors": "white", "linewidth": 1.2}
    axes.pcolormesh(np.arange(len(classes) + 1), rows, np.ma.masked_invalid(table[:, :-1]), **style)
    mesh = axes.pcolormesh(lefts[-1] + np.arange(2), rows, np.ma.masked_invalid(table[:, -1:]), **style)
    for (row, column), value in np.ndenumerate(table):
        if not np.isfinite(value):
            text, colour = "–", NEUTRAL
        elif numbers:
            text = f"{value:.3f}".removeprefix("0") if value < 0.9995 else "1.00"
            colour = "white" if (value - low) / (1 - low) < 0.55 else "black"
        else:
            continue
        axes.text(float(lefts[column]) + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color=colour)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(labels)) + 0.5, wrapped, fontsize=8.5)
    long = max(map(len, names)) > 6 or not numbers
    axes.set_xticks(
        lefts + 0.5,
        [_shorten(name, 18) for name in names],
        fontsize=8.5 if numbers else 6,
        rotation=40 if long else 0,
        ha="right" if long else "center",
        rotation_mode="anchor" if long else "default",
    )
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, fraction=0.03, pad=0.02, aspect=12)
    bar.ax.tick_params(labelsize=7.5, length=0)
    bar.outline.set_visible(False)
    bar.set_label("AUROC", fontsize=8)
    _title(axes, title, 80)
    return figure


def box_plot(frame: pd.DataFrame, title: str = "") -> Figure:
    """AUROC of every method over classes and seeds: box of the quartiles, a point a run, white dot the mean.

    `frame` has one row a run with the columns label and auroc.
    """
    labels = list(dict.fromkeys(frame["label"]))
    values = [frame.loc[frame["label"] == label, "auroc"].to_numpy(float) for label in labels]
    wrapped = [_wrap(label, 34) for label in labels]
    lines_in_labels = sum(text.count("\n") + 1 for text in wrapped)
    figure, axes = _figure(6.6, 1.1 + max(0.46 * len(labels), 0.2 * lines_in_labels) + (0.25 if title else 0))
    # By hand: the keyword that lays `boxplot` on its side differs between supported versions of matplotlib.
    for number, points in enumerate(values):
        colour = PALETTE[number % len(PALETTE)]
        low, first, median, third, high = np.quantile(points, [0, 0.25, 0.5, 0.75, 1])
        axes.plot([low, high], [number, number], color=NEUTRAL, linewidth=1, zorder=1)
        axes.barh(number, third - first, 0.56, left=first, color="white", zorder=1.5)
        axes.barh(number, third - first, 0.56, left=first, color=colour, alpha=0.28, linewidth=0, zorder=2)
        axes.plot([median, median], [number - 0.28, number + 0.28], color="black", linewidth=1.4, zorder=2.5)
        offset = 0.2 * (np.arange(len(points)) * 0.618 % 1 - 0.5)  # by rank: same results, same picture
        axes.plot(points, number + offset, "o", color=colour, markersize=3.6, alpha=0.75, markeredgewidth=0)
        axes.plot(points.mean(), number, "o", color="white", markersize=6, markeredgecolor="black", zorder=4)
        corner = ((1, number), (5, 0), ("axes fraction", "data"), "offset points")
        axes.annotate(f"n={len(points)}", *corner, fontsize=7.5, color=NEUTRAL, va="center")
    axes.set_yticks(range(len(labels)), wrapped, fontsize=8.5)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    lowest, highest = min(part.min() for part in values), max(part.max() for part in values)
    pad = max(0.04 * (highest - lowest), 0.002)
    if lowest < 0.5:
        axes.axvline(0.5, color=NEUTRAL, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(lowest - pad, highest + pad)
    axes.set_xlabel("AUROC")
    _title(axes, title, 80)
    return figure


def critical_difference(ranking: Ranking, title: str = "") -> Figure:
    """Mean ranks of methods on a line each, best on top; a bar joins those that Nemenyi's test does not tell apart."""
    names, ranks = [str(name) for name in ranking.ranks.index], ranking.ranks.tolist()
    groups = [(names.index(first), names.index(last)) for first, last in ranking.groups()]
    figure, axes = _figure(7.2, 1.3 + 0.19 * len(names))
    axes.hlines(range(len(names)), 1, ranks, color=_MISSING, linewidth=1, zorder=1)
    axes.plot(ranks, range(len(names)), "o", color=NORMAL, markersize=4.5, zorder=3)
    right = max(ranks)
    for number, (first, last) in enumerate(groups):  # beside the points, one column each
        x = right * (1.04 + 0.025 * number)
        axes.plot([x, x], [first - 0.25, last + 0.25], color=PALETTE[1], linewidth=2.4, solid_capstyle="butt")
    width = ranking.critical_difference
    axes.errorbar(1 + width / 2, -1.4, xerr=width / 2, color="black", capsize=3, linewidth=1.2)
    axes.annotate(
        f"critical difference {width:.1f}",
        (1 + width, -1.4),
        (6, 0),
        textcoords="offset points",
        fontsize=8,
        va="center",
    )
    axes.set_yticks(range(len(names)), [_shorten(name, 44) for name in names], fontsize=7.5)
    axes.set_ylim(len(names) - 0.4, -2.2)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"mean rank over {ranking.problems} problems (1: the best)")
    _title(axes, title, 80)
    return figure


def lines(frame: pd.DataFrame, x: str, y: str, group: str, title: str = "", *, xlabel: str | None = None) -> Figure:
    """`y` against the numeric parameter `x`, a line for every value of `group`, in a band of ± one sd.

    `frame` has one row a run with the columns x, y, group, normal_class and seed. A point is the mean over classes,
    then over seeds; the band is over seeds where there are several, else over classes (the axis says which). Classes
    that a group lacks at some x are left out, so that a line moves for no other reason than x.
    """
    frame = frame.dropna(subset=[x, y])
    groups = list(dict.fromkeys(frame[group]))
    over_seeds = frame["seed"].nunique() > 1
    ticks = np.array(sorted(set(frame[x].astype(float))))
    classes: set[int] = set()
    outside = len(groups) > 5  # a long legend would hide the lines
    figure, axes = _figure(8.6 if outside else 5.8, max(3.9, 0.31 * len(groups)))
    for number, name in enumerate(groups):
        part = frame[frame[group] == name]
        values = part.groupby("normal_class")[x].nunique()
        everywhere = values.index[values == part[x].nunique()]
        part = part[part["normal_class"].isin(everywhere)] if len(everywhere) else part
        classes.add(part["normal_class"].nunique())
        per = part.groupby([x, "seed" if over_seeds else "normal_class"])[y].mean().groupby(level=0)
        mean, sd = per.mean(), per.std(ddof=1)
        colour = PALETTE[number % len(PALETTE)]
        at, dash = mean.index.astype(float), "-" if number < len(PALETTE) else (0, (4, 2))
        marker = MARKERS[number % len(MARKERS)] if len(mean) <= 30 else None
        style: dict[str, Any] = {"marker": marker, "markersize": 4.5, "linewidth": 1.7, "linestyle": dash}
        axes.plot(at, mean.to_numpy(), color=colour, label=_wrap(str(name), 40), **style)
        if sd.notna().any():
            spread = sd.fillna(0).to_numpy()
            axes.fill_between(at, mean - spread, mean + spread, color=colour, alpha=0.14, linewidth=0)
    if len(ticks) and ticks.min() > 0 and ticks.max() >= 8 * ticks.min() and not _evenly(ticks):
        axes.set_xscale("log")
    if 1 < len(ticks) <= 12:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        if len(ticks) > 2 and axes.get_xscale() == "linear" and np.diff(ticks).min() < 0.04 * np.ptp(ticks):
            axes.tick_params(axis="x", rotation=60)  # labels of neighbours would lie over each other
        axes.minorticks_off()
    axes.set_xlabel(xlabel or x)
    number_of = f"{min(classes)} to {max(classes)}" if len(classes) > 1 else f"{max(classes, default=0)}"
    over = f"{number_of} class{'' if classes == {1} else 'es'}"
    if over_seeds:
        spread = f"mean over {over}, ± sd over seeds"
    else:
        spread = f"mean ± sd over {over}" if max(classes, default=0) > 1 else over
    axes.set_ylabel(f"{'AUROC' if y in ('auroc', 'oracle_auroc') else y} ({spread})")
    if not groups:
        axes.text(0.5, 0.5, "nothing was recorded", transform=axes.transAxes, ha="center", color=NEUTRAL)
    elif outside:
        axes.legend(
            frameon=False, fontsize=8, handlelength=4, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0
        )
    else:
        axes.legend(frameon=False, fontsize=8.5)
    _title(axes, title, 100 if outside else 70)
    return figure


# ------------------------------------------------------------------------------------------------- parts


def _figure(width: float, height: float, layout: str | None = "constrained") -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _clean(axes)
    return figure, axes


def _clean(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(color="#E3E5E8", linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9AA0A6")
    axes.tick_params(color="#9AA0A6", labelsize=8.5)
    axes.xaxis.label.set_fontsize(9.5)
    axes.yaxis.label.set_fontsize(9.5)


def _picture(axes: Axes, image: np.ndarray, **place: Any) -> None:
    """Draw (C,H,W) in [0,1], one channel in grey, three in colour."""
    image = np.clip(image, 0, 1)
    if image.shape[0] == 1:
        axes.imshow(image[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest", **place)
    else:
        axes.imshow(image.transpose(1, 2, 0), interpolation="nearest", **place)


def _range(score: np.ndarray, threshold: float | None) -> tuple[float, float, str]:
    """Range of a histogram, and a notice of the scores beyond the central 99 % by more than its width."""
    low, high = float(score.min()), float(score.max())
    inner_low, inner_high = np.quantile(score, [0.005, 0.995])
    width = inner_high - inner_low
    notices = []
    if width > 0 and high > inner_high + width:
        high = float(inner_high + 0.1 * width)
        notices.append(f"{int((score > high).sum()):,} scores above {high:.3g}, up to {score.max():.3g}")
    if width > 0 and low < inner_low - width:
        low = float(inner_low - 0.1 * width)
        notices.append(f"{int((score < low).sum()):,} scores below {low:.3g}, down to {score.min():.3g}")
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    if high <= low:  # all scores are the same
        low, high = low - 0.5, high + 0.5
    return low, high, f"outermost bin: {'; '.join(notices)}" if notices else ""


def _title(axes: Axes, text: str, width: int) -> None:
    if text:
        axes.set_title(_wrap(text, width), fontsize=10, loc="left")


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)) or text


def _evenly(ticks: np.ndarray) -> bool:
    steps = np.diff(ticks)
    return len(steps) > 1 and bool(np.allclose(steps, steps[0]))


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
