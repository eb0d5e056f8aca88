"""Pages from finished runs: Markdown, LaTeX, HTML, and the page of a committed experiment.

    frame --sections--> Section --> Markdown, LaTeX, HTML

Everything printed about an experiment is made from its `results.csv` alone (`experiment_readme`), so a committed table
can be made again from committed numbers. AUROC is written on the scale 0 to 1 with three decimals.
"""

from __future__ import annotations

import base64
import functools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from anomaly_lab import results, status
from anomaly_lab.extras import Extra, extras
from anomaly_lab.files import remove_parts, write_text
from anomaly_lab.record import LEARNED
from anomaly_lab.tables import LEVEL, MINIMUM_PAIRS, Cell, Comparison, Table, signed, significance, table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from anomaly_lab.config import Job


LISTED = 100
"""Comparisons of a section that are all shown; of more, those that differ after Holm's correction."""


class _Line(NamedTuple):
    kind: str  # method | published | difference | oracle | gap | block
    label: str
    cells: list[str]


@dataclass(frozen=True)
class Section:
    """All that is shown of one (data set, split)."""

    table: Table
    title: str
    slug: str
    frame: pd.DataFrame
    comparisons: list[Comparison]
    figures: dict[str, Callable[[], Figure]]  # file name -> how to draw it


def sections(frame: pd.DataFrame, expected: Sequence[Job] = (), epochs: pd.DataFrame | None = None) -> list[Section]:
    """The sections of a report, one for every (data set, split); figures are drawn when called.

    `epochs` is the frame of `results.read_epochs`; without it the figure of the course over epochs cannot be drawn.
    """
    from anomaly_lab import figures

    pairs = {*zip(frame["dataset"], frame["split"], strict=True)}
    pairs |= {(job.identity["dataset"], job.identity["split"]) for job in expected}
    found = []
    for dataset, split in sorted(pairs):
        part = frame[(frame["dataset"] == dataset) & (frame["split"] == split)]
        title, slug = f"{dataset} · {split}", re.sub(r"[^\w.-]", "_", f"{dataset}-{split}")
        draw: dict[str, Callable[[], Figure]] = {}
        short, common = _short(part)
        heading = f"{title} ({', '.join(common)})" if common else title
        if len(part):
            draw[f"{slug}-classes.png"] = functools.partial(figures.class_heat_map, short, heading)
        if part["label"].value_counts().max() > 2:
            draw[f"{slug}-spread.png"] = functools.partial(figures.box_plot, short, heading)
        for key, curve in _sensitivities(short).items():
            draw[f"{slug}-{key}.png"] = functools.partial(
                figures.lines, curve, key, "auroc", "line", heading, xlabel=key.partition(".")[2]
            )
        if 0 < short.loc[short["oracle_auroc"].notna(), "label"].nunique() <= 2 * len(figures.PALETTE):
            # More curves than colours, solid and dashed, cannot be told apart: epochs.csv has them.
            draw[f"{slug}-epochs.png"] = functools.partial(_course, short, epochs, heading)
        comparisons = significance(frame, dataset, split)
        found.append(Section(table(frame, dataset, split, expected), title, slug, part, comparisons, draw))
    return found


def _short(part: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """For figures: labels with the last word of a key, and without the changes that all the runs share (second)."""
    items = [changed.split() for changed in part["changed"]]
    shared = set(items[0]).intersection(*items[1:]) if items else set()
    keys = {item.split("=", 1)[0] for run in items for item in run}
    last = {key: key.rpartition(".")[2] for key in keys}
    clear = len(set(last.values())) == len(last)

    def word(item: str) -> str:
        key, _, value = item.partition("=")
        return f"{last[key] if clear else key}={value}"

    changed = [" ".join(item for item in run if item not in shared) for run in items]
    labels = [
        results.label(model, " ".join(map(word, text.split())))
        for model, text in zip(part["model"], changed, strict=True)
    ]
    return part.assign(label=labels, changed=changed), [word(item) for item in sorted(shared)]


def _sensitivities(short: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Frames to draw AUROC against a parameter: those that take three values or more, a line a method."""
    curves = {}
    for key in results.parameters(short):
        values = short[key].map(
            lambda v: float(v) if isinstance(v, int | float) and not isinstance(v, bool) else math.nan
        )
        rest = [
            results.label(model, " ".join(item for item in changed.split() if not item.startswith(f"{key}=")))
            for model, changed in zip(short["model"], short["changed"], strict=True)
        ]
        curve = short.assign(**{key: values, "line": rest}).dropna(subset=[key])
        curve = curve[curve.groupby("line")[key].transform("nunique") > 1]
        if curve[key].nunique() > 2:
            curves[key] = curve
    return curves


def _course(short: pd.DataFrame, epochs: pd.DataFrame | None, heading: str) -> Figure:
    from anomaly_lab import figures

    assert epochs is not None, "the course over epochs is drawn from the frame of read_epochs"
    joined = epochs[["path", "epoch", "oracle_auroc"]].merge(
        short[["path", "label", "normal_class", "seed"]], on="path"
    )
    title = f"{heading}: test AUROC after every epoch (looks at test labels)"
    return figures.lines(joined, "epoch", "oracle_auroc", "label", title)


def _extras(frame: pd.DataFrame) -> list[Extra]:
    short, common = _short(frame)
    return extras(short.assign(own=frame["changed"] == frame["problem"]), common)


def _header(shown: Table) -> list[str]:
    return ["method", *shown.classes.values(), "mean", "seeds"]


def _lines(shown: Table, oracle: bool) -> Iterator[_Line]:
    keys: list[int | str] = [*shown.classes, "mean"]
    blocks = [
        ("", [row for row in shown.rows if not row.pretrained and not row.labels]),
        ("with features pretrained on ImageNet", [row for row in shown.rows if row.pretrained]),
        ("with the labels of anomalies: a ceiling, no detector", [row for row in shown.rows if row.labels]),
    ]
    for heading, rows in blocks:
        if heading and rows:
            yield _Line("block", heading, [""] * (len(keys) + 1))
        above: tuple[str, list[_Line]] = "", []  # of the row above: not repeated under its method's other settings
        for row in rows:
            cells = [row.cells[key] for key in keys]
            seeds = str(row.seeds) if row.seeds == shown.seeds else f"{row.seeds}/{shown.seeds}"
            yield _Line("method", row.label, [*map(_cell_text, cells), seeds])
            kinds = dict.fromkeys((c.published.status, c.published.setting) for c in cells if c.published)
            if all(c.difference is None for c in cells):
                kinds = {}  # nothing of this row can be compared
            figures: list[_Line] = []
            for standing, setting in kinds:
                words = [standing, *([setting] if setting else []), *(["full size"] if row.reduced else [])]
                texts = [
                    f"{c.published.value:.3f}" if c.published and c.published[1:3] == (standing, setting) else ""
                    for c in cells
                ]
                whose = f" for {row.published_as}" if row.published_as else ""
                figures.append(_Line("published", f"published{whose} ({', '.join(words)})", [*texts, ""]))
            said, above = above, (row.label.partition(" [")[0], figures)
            yield from figures if above != said else []
            if any(c.difference is not None for c in cells):
                yield _Line("difference", "difference", [*(signed(c.difference) for c in cells), ""])
            if oracle and any(c.oracle is not None for c in cells):
                texts = ["" if c.oracle is None else f"{c.oracle:.3f}" for c in cells]
                yield _Line("oracle", "oracle (best epoch on test)", [*texts, ""])
                yield _Line("gap", "oracle - honest", [*(signed(c.gap) for c in cells), ""])


def _cell_text(cell: Cell) -> str:
    if cell.mean is None:
        return f"0/{cell.expected}" if cell.expected else ""
    text = f"{cell.mean:.3f}" + "†" * bool(cell.unlearned) + (f" ± {cell.sd:.3f}" if cell.sd is not None else "")
    if cell.flag:
        return f"{text} ({cell.flag})"
    return f"{text} ({cell.present}/{cell.expected})" if cell.present < cell.expected else text


def _caption(section: Section) -> str:
    shown = section.table
    if not shown.runs:
        return "No finished runs yet."
    seeds = sorted(set(section.frame["seed"]))
    spread = "mean ± sd over" if len(seeds) > 1 else "only"
    names = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    text = f"AUROC, {spread} {names}; {shown.runs} run{'s' if shown.runs > 1 else ''}."
    text += f" Columns: the {shown.role} class."
    if shown.role == "abnormal":
        text += " All the other classes are normal."
    if any(row.reduced and any(c.difference is not None for c in row.cells.values()) for row in shown.rows):
        text += " Methods named _small are a reduced size, the published figures beside them of the full size."
    if any(cell.unlearned for row in shown.rows for cell in row.cells.values()):
        text += (
            f" †: no better than the mean image: reconstructions explain less than {LEARNED:.0%} of the variance of "
            "held-out normals around it, or training left the parameters where they were."
        )
    copied = section.frame[section.frame["test_copies"] > 0].drop_duplicates("normal_class")
    if len(copied):
        counts = [f"{int(run.test_copies)} with class {run.class_name}" for run in copied.itertuples()]
        text += f" Test images that are byte copies of training images: {', '.join(counts)}."
    means = [row.cells["mean"] for row in shown.rows]
    if any(cell.flag for cell in means):
        text += " Brackets name a mean over fewer classes or runs than there should be"
        partial = any(cell.published and not cell.comparable for cell in means)
        text += "; over fewer classes it is not compared with a published mean." if partial else "."
    return text


def _mean_text(values: pd.Series[float]) -> str:
    known = int(values.notna().sum())
    return "n/a" if not known else f"{values.mean():.3f}" + f" ({known}/{len(values)})" * (known < len(values))


def _summary(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The other metrics of one section, each the mean over its runs."""
    shown = [column for column in results.COLUMNS if column.heading]
    header = ["method", "runs", *(column.heading for column in shown), "epochs", "images/s"]
    rows = []
    for name, part in frame.groupby("label", sort=False):
        texts = [_mean_text(part[column.name]) for column in shown]
        epochs = sorted(set(part["epochs"]))
        span = str(epochs[0]) if len(epochs) == 1 else f"{epochs[0]}-{epochs[-1]}"
        speed = part["images_per_second"].mean()
        rows.append([str(name), str(len(part)), *texts, span, "" if math.isnan(speed) else f"{speed:,.0f}"])
    return header, rows


def _tests(comparisons: Sequence[Comparison]) -> tuple[list[list[str]], str]:
    """Rows of the table of differences, and what it leaves out."""
    tested = [c for c in comparisons if c.p is not None]
    rows = []
    for c in comparisons:
        if c.p is None or c.p_holm is None or (len(tested) > LISTED and c.p_holm >= LEVEL):
            continue
        classes = f"{c.classes} ({c.ties} ties)" if c.ties else str(c.classes)
        rows.append([c.first, c.second, classes, str(c.seeds), signed(c.difference), _p_text(c.p), _p_text(c.p_holm)])
    said = []
    if len(rows) < len(tested):
        none = "none" if not rows else "no other"
        said.append(f"Of {len(tested):,} comparisons {none} has a p below {LEVEL} after Holm's correction over all.")
    if few := len(comparisons) - len(tested):
        text = "1 comparison has" if few == 1 else f"{few} comparisons have"
        said.append(f"{text} too few classes (fewer than {MINIMUM_PAIRS} that differ) for a test.")
    return rows, " ".join(said)


_TESTS_HEADER = ["method", "against", "classes", "seeds", "mean difference", "p", "p (Holm)"]
_TESTS_NOTE = (
    "Wilcoxon signed-rank tests, two-sided, paired over classes, the seeds of each averaged first, "
    "with Holm's correction over all the tests of this table. One seed carries no claim about a method."
)


def _summary_note(frame: pd.DataFrame) -> str:
    """What calls an image anomalous, method by method; results of earlier code do not say it."""
    text = "Other metrics, each the mean over the runs; an image is called anomalous "
    if (frame["decided_by"] == "").any():
        return (
            f"{text}by its method's own rule where its paper has one (of training errors), else by a threshold from "
            "held-out normals alone."
        )
    own = [f"`{name}`" for name in frame["label"][frame["decided_by"] == "own rule"].unique()]
    rule = f"by the method's own rule by {', '.join(own)}, else " if own else ""
    return f"{text}{rule}by a threshold from held-out normals alone."


def _p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def markdown(parts: Sequence[Section], *, oracle: bool = False, folder: str = "") -> str:
    """Tables, tests of difference and links to the figures in `folder` (none without it)."""
    return "\n".join(_markdown_section(section, oracle, folder) for section in parts)


def _markdown_section(section: Section, oracle: bool, folder: str) -> str:
    shown = section.table
    rows = []
    for line in _lines(shown, oracle):
        name = f"`{line.label}`" if line.kind == "method" else f"*{line.label}*"
        rows.append([name, *(f"*{cell}*" if cell and line.kind != "method" else cell for cell in line.cells)])
    out = [f"## {_inert(section.title)}", "", _inert(_caption(section)), "", *markdown_table(_header(shown), rows), ""]
    if folder:
        for name in section.figures:
            out += [f"![{_inert(_figure_text(section, name))}]({folder}/{name})", ""]
    if len(section.frame):
        header, summary = _summary(section.frame)
        out += [
            _summary_note(section.frame),
            "",
            *markdown_table(header, [[f"`{row[0]}`", *row[1:]] for row in summary]),
            "",
        ]
    for extra in _extras(section.frame):
        named = [[row[0] if row[0].startswith("published") else f"`{row[0]}`", *row[1:]] for row in extra.rows]
        block = [_inert(extra.note), "", *markdown_table(extra.header, named)]
        out += [*_folded(extra.title, block, len(named) > 24), ""]
    tests, left_out = _tests(section.comparisons)
    if tests:
        body = markdown_table(_TESTS_HEADER, [[f"`{row[0]}`", f"`{row[1]}`", *row[2:]] for row in tests])
        out += [*_folded("Tests of difference", [_TESTS_NOTE, "", *body], len(tests) > 12), ""]
    if left_out:
        out += [left_out, ""]
    return "\n".join(out)


def _folded(title: str, block: list[str], long: bool) -> list[str]:
    return [f"<details><summary>{title}</summary>", "", *block, "", "</details>"] if long else block


def _figure_text(section: Section, name: str) -> str:
    kind = name.removeprefix(section.slug + "-").removesuffix(".png")
    words = {
        "classes": "AUROC by method and class",
        "spread": "AUROC of every run by method",
        "epochs": "Test AUROC after every epoch, which no training looked at",
    }
    return f"{words.get(kind, f'AUROC against {kind}')}, {section.title}"


def _inert(text: str) -> str:
    """What a result.json says of itself, as text: a page in Markdown may hold HTML."""
    return text.replace("<", r"\<")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown: first column to the left, numbers to the right."""
    cells = [[re.sub(r"([|<])", r"\\\1", text) for text in row] for row in [header, *rows]]
    align = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in [cells[0], align, *cells[1:]]]


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "−": "$-$",
    "–": "--",
    "·": r"$\cdot$",
}


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def latex(parts: Sequence[Section], *, oracle: bool = False) -> str:
    r"""A `table` environment for every section; needs `\usepackage{booktabs,graphicx}`."""
    out = [r"% needs \usepackage{booktabs,graphicx}"]
    for section in parts:
        header = _header(section.table)
        wide = len(header) > 9
        out += [r"\begin{table}", r"\centering", rf"\caption{{{_latex_text(f'{section.title}. {_caption(section)}')}}}"]
        out += [rf"\label{{tab:{section.slug}}}", *([r"\resizebox{\linewidth}{!}{%"] if wide else [])]
        out += [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule"]
        out += [" & ".join(map(_latex_text, header)) + r" \\", r"\midrule"]
        for line in _lines(section.table, oracle):
            if line.kind == "block":
                out += [r"\midrule", rf"\multicolumn{{{len(header)}}}{{l}}{{{_latex_text(line.label)}}} \\"]
                continue
            name = _latex_text(line.label)
            name = name if line.kind == "method" else rf"\quad\emph{{{name}}}"
            out.append(" & ".join([name, *map(_latex_text, line.cells)]) + r" \\")
        out += [r"\bottomrule", r"\end{tabular}" + ("}" if wide else ""), r"\end{table}", ""]
    return "\n".join(out)


def html(
    parts: Sequence[Section],
    frame: pd.DataFrame,
    pictures: Mapping[str, bytes],
    *,
    oracle: bool = False,
    notices: Sequence[str] = (),
) -> str:
    """One page that needs nothing else: styles and figures are in it, light or dark as the system asks.

    `pictures` are the sections' figures as PNG, by file name; `notices` are lines to read first.
    """
    import jinja2

    shown = []
    for section in parts:
        images = [(_figure_text(section, name), base64.b64encode(pictures[name]).decode()) for name in section.figures]
        tests, left_out = _tests(section.comparisons)
        shown.append(
            {
                "title": section.title,
                "slug": section.slug,
                "caption": _caption(section),
                "header": _header(section.table),
                "lines": list(_lines(section.table, oracle)),
                "images": images,
                "summary": _summary(section.frame) if len(section.frame) else ([], []),
                "summary_note": _summary_note(section.frame).replace("`", ""),
                "extras": _extras(section.frame),
                "tests": tests,
                "left_out": left_out,
            }
        )
    columns = [
        *("model", "changed", "dataset", "split", "class_name", "seed", "auroc", "auroc_low", "auroc_high"),
        *("epochs", "seconds", "git_sha", "path"),
    ]
    source = resources.files("anomaly_lab").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source).render(
        title="Results",
        notices=list(notices),
        provenance=_provenance(frame),
        sections=shown,
        tests_header=_TESTS_HEADER,
        tests_note=_TESTS_NOTE,
        run_header=columns,
        runs=[[results.csv_cell(v) for v in row] for row in frame[columns].itertuples(index=False, name=None)],
    )


def _provenance(frame: pd.DataFrame) -> str:
    if not len(frame):
        return "No finished runs."
    shas = ", ".join(sorted({sha or "unknown" for sha in frame["git_sha"]}))
    devices = " and ".join(sorted({device or "unknown" for device in frame["device"]}))
    hours = frame["seconds"].sum() / 3600
    text = f"{len(frame)} run{'s' if len(frame) > 1 else ''}, {hours:.1f} hours in all, on {devices}; code {shas}"
    pairs = zip(frame["earlier_code"], frame["git_sha"], strict=True)
    begun = [others for shas, own in pairs if (others := set(shas.split()) - {own})]
    if begun:
        number, resumed = len(begun), set().union(*begun)
        text += f"; {number} of them begun by other code ({', '.join(sorted(resumed))})"
    dirty = int(frame["dirty"].sum())
    return text + (f"; {dirty} of them from a tree with uncommitted changes." if dirty else ".")


def experiment_readme(frame: pd.DataFrame, notes: str, command: str) -> str:
    """The README of a committed experiment, from the frame of its `results.csv`, its notes, the command."""
    out = [
        "<!-- Written by anomaly-lab-report from results.csv and notes.md: edit notes.md, not this file. -->",
        notes.strip(),
        "",
        "## The command",
        "",
        "```sh",
        command.strip(),
        "```",
        "",
        f"{_inert(_provenance(frame))} Every number below is made from [results.csv](results.csv), a row a run.",
        "",
        markdown(sections(frame), oracle=bool(frame["oracle_auroc"].notna().any()), folder="figures"),
    ]
    return "\n".join(out).rstrip() + "\n"


# ----------------------------------------------------------------------------------------- the command


def write(
    runs: Path, out: Path | None = None, experiment: str | None = None, oracle: bool = False, verify: bool = False
) -> None:
    """Write the report on the runs under `runs`, by default into `runs`/report, and print its tables.

    Of an experiment only the runs of its grid, and those recorded under its name; results.csv, figures and README.md
    are then written, by default into experiments/<name>. With `verify`, only those whose metrics follow from their
    scores.

    Raises:
        ValueError: there is no finished run, or there are some that cannot share a table.
        OSError: the tables are printed, and cannot be written there.
    """
    frame, expected, notices = selected(runs, experiment, verify)
    out = out or (Path("experiments", experiment) if experiment else runs / "report")
    with suppress(OSError):  # where nothing can be written the tables are printed all the same
        remove_parts(out, seconds=3600)  # of reports that were killed; nobody writes one for an hour
    results.refuse_mixtures(frame)
    epochs = results.read_epochs(runs, frame)
    if experiment is not None:
        try:
            _write_experiment(frame, epochs, experiment, out)
        finally:  # also where nothing can be written
            print(markdown(sections(frame, expected or ()), oracle=oracle))
        missing = "" if expected is None else f"; {len(places(expected) - set(frame['path']))} of the grid are missing"
        print(f"written: {out / 'README.md'} from {len(frame)} runs{missing}")
        return
    parts = sections(frame, epochs=epochs)
    try:
        _write_report(frame, parts, out, oracle, notices)
    finally:
        print(markdown(parts, oracle=oracle))
    print(f"written: {out / 'report.html'} (one file, opens anywhere), beside it report.md, report.tex, results.csv")


def selected(
    runs: Path, experiment: str | None, verify: bool = False
) -> tuple[pd.DataFrame, list[Job] | None, list[str]]:
    """The finished runs under `runs` or of an experiment, its grid where it is known, and what is printed on damage.

    Raises:
        ValueError: there are none.
    """
    expected: list[Job] | None = None
    if experiment is not None:
        try:
            expected = _grid(experiment)
        except ValueError as error:
            # The grid needs the data set's class names, and a machine that only reports may lack the data set.
            if not _recorded_under(runs, experiment):
                raise
            print(
                f"only runs recorded under the name {experiment}, for its grid is not known here: {error}",
                file=sys.stderr,
            )
    frame = results.read(runs, verify=verify)
    notices: list[str] = frame.attrs["damaged"]
    failed = [state for state in status.under(runs, expected) if state.state == "failed"]
    notices += [f"{s.path} failed: {s.detail} (run it again, or delete its folder)" for s in failed]
    for line in notices:
        print(line, file=sys.stderr)
    if experiment is not None:
        # The runs of the grid, and those recorded under the experiment's name with further seeds or settings.
        frame = _selection(frame, frame["path"].isin(places(expected or ())) | (frame["experiment"] == experiment))
    if not len(frame):
        what = f"run of experiment {experiment}" if experiment else "run"
        raise ValueError(f"no finished {what} under {runs}: see anomaly-lab-report {runs} --status")
    return frame, expected, notices


def places(expected: Iterable[Job]) -> set[str]:
    """Where the runs of a grid lie, below the folder of runs."""
    return {job.out.relative_to(job.cfg.runs).as_posix() for job in expected}


def print_states(runs: Path, experiment: str | None = None) -> None:
    """Print how far every run under `runs` is, or every run of an experiment's grid."""
    expected = None if experiment is None else _grid(experiment)
    print(status.text(status.under(runs, expected)))


def prune(runs: Path, experiment: str | None = None) -> None:
    """Reduce the checkpoints of the finished runs under `runs`, or of an experiment's grid, to what scores images.

    Raises:
        ValueError: checkpoints that cannot be read, when all others are reduced.
    """
    from anomaly_lab import run  # torch and Lightning: seconds

    expected = None if experiment is None else _grid(experiment)
    folders = [runs / state.path for state in status.under(runs, expected) if state.state == "done"]
    freed, damaged = list[int](), list[str]()
    for folder in folders:
        try:
            freed.append(run.prune(folder))
        except ValueError as error:
            damaged.append(str(error))
    pruned = sum(amount > 0 for amount in freed)
    print(f"pruned {pruned} of {len(folders)} finished runs: {sum(freed) / 1e6:.1f} MB less")
    if damaged:
        raise ValueError(f"{len(damaged)} not pruned: {'; '.join(damaged)}")


def save_dashboard(place: str) -> None:
    """Lay out a workspace of Weights & Biases at `place`, "entity/project".

    Raises:
        ValueError: `place` is something else, or the workspace could not be saved.
    """
    from anomaly_lab.tracking import workspace  # Lightning and wandb: seconds

    entity, slash, project = place.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise ValueError(f"--dashboard {place}: give ENTITY/PROJECT, as in the address of the project's page")
    made = workspace(entity, project)
    try:
        made.save()
    except Exception as error:  # no key, no project, no network: wandb's errors have no common base
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the dashboard could not be saved ({type(error).__name__}: {reason}): see wandb login"
        ) from error
    print(f"written: {made.url}")


def _grid(experiment: str) -> list[Job]:
    from hydra.errors import HydraException  # late, so that --help is quick

    from anomaly_lab import grids

    try:
        return grids.expected_runs(experiment)
    except HydraException as error:  # an unknown name, with the known ones, over many lines
        text = str(error).partition("Config search path")[0]
        raise ValueError(" ".join(text.split())) from None


def _recorded_under(runs: Path, name: str) -> bool:
    return runs.is_dir() and bool((results.read(runs)["experiment"] == name).any())


def _selection(frame: pd.DataFrame, chosen: pd.Series[bool]) -> pd.DataFrame:
    """Some of the runs, without the parameters in which only others differ."""
    frame = frame[chosen].reset_index(drop=True)
    used = {item.split("=", 1)[0] for changed in frame["changed"] for item in changed.split()}
    return frame.drop(columns=[key for key in results.parameters(frame) if key not in used])


def _write_experiment(frame: pd.DataFrame, epochs: pd.DataFrame, name: str, out: Path) -> None:
    from anomaly_lab import figures

    results.write_csv(frame, out / "results.csv")
    # Read back, so that the README can be made again from the file alone.
    frame = results.read_csv(out / "results.csv")
    if len(epochs):
        rows = epochs.itertuples(index=False, name=None)
        results.write_rows(out / "epochs.csv", list(epochs.columns), rows)
    for section in sections(frame, epochs=epochs):
        for file, draw in section.figures.items():
            figures.save(draw(), out / "figures" / file)
    notes = out / "notes.md"
    if not notes.exists():
        print(f"write {notes}: what was expected, what came out, and why", file=sys.stderr)
    text = notes.read_text(encoding="utf-8") if notes.exists() else f"# {name}\n"
    write_text(out / "README.md", experiment_readme(frame, text, experiment_command(name)))


def experiment_command(name: str) -> str:
    """The two commands that make an experiment's runs and its page."""
    return f"anomaly-lab -m experiment={name}\nanomaly-lab-report runs --experiment {name} --out experiments/{name}"


def _write_report(
    frame: pd.DataFrame, parts: Sequence[Section], out: Path, oracle: bool, notices: Sequence[str]
) -> None:
    from anomaly_lab import figures

    pictures = {}
    for section in parts:
        for file, draw in section.figures.items():
            pictures[file] = figures.save(draw(), out / "figures" / file, dpi=110).read_bytes()
    head = "\n".join(
        ["# Results", "", *(f"> {_inert(line)}\n" for line in notices), _inert(_provenance(frame)), "", ""]
    )
    write_text(out / "report.md", head + markdown(parts, oracle=oracle, folder="figures"))
    write_text(out / "report.tex", latex(parts, oracle=oracle))
    write_text(out / "report.html", html(parts, frame, pictures, oracle=oracle, notices=notices))
    results.write_csv(frame, out / "results.csv")
