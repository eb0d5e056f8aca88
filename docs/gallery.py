"""Write docs/methods.md: of every method its docstring, its sizes, and what it costs and detects in `everything`.

A histogram of the scores of every configuration goes to docs/methods/, drawn from the archive of `everything`.

python docs/gallery.py
"""

from __future__ import annotations

import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pandas as pd
from hydra.utils import get_class
from omegaconf import OmegaConf

from anomaly_lab import archive, config, figures, results

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/methods.md"
FIGURES = ROOT / "docs/methods"
RESULTS = ROOT / "experiments/everything/results.csv"
SCORES = RESULTS.with_name("scores.npz")
SHOWN = ("mnist", 8)  # whose scores are drawn, where a configuration has it

HEAD = """\
<!-- Written by docs/gallery.py from docstrings, conf/model and the results of experiments/everything: edit those. -->
# The methods

Every method with the equations that it computes, its source, and where it differs from its public code. The tables name
the configurations of each (`anomaly-lab model=NAME`): what differs between `size=full` and `size=small`; then, at the
small size, what a run of [everything](../experiments/everything/README.md) took for training and scoring (wall time on
a busy machine, an upper bound), its epochs, how many training images it took in a second of training, and its AUROC on
digits {digits} and on CIFAR-10's {other}, where `mean_image`, `pca` and `knn` are the floors; what is empty has no
result there. Published are means over all classes at the full size, and single classes (0: the first) where no mean is,
with their status: another experiment than the columns before them, and PIAD's own in the rows of its stand-ins. A
figure shows the scores of one of these runs: of the test images of eights, or of automobiles, and of all others.
"""

FUSED = """\
Finished runs of other methods as one: their scores are added on the scale of how rare each is among the held-out
normals x_v of its run, beyond the largest of which the tail is exponential. It has no parameters, and trains nothing.

```text
A(x) = sum_m -log P(A_m(x_v) >= A_m(x))    over the members m
```
"""


def page() -> str:
    """The whole page."""
    frame = results.read_csv(RESULTS)
    problems = sorted(
        {(run.dataset, run.normal_class, run.class_name) for run in frame.itertuples()},
        key=lambda problem: (problem[0] != "mnist", problem[1]),
    )
    digits = ", ".join(name for dataset, _, name in problems if dataset == "mnist")
    other = ", ".join(name for dataset, _, name in problems if dataset != "mnist")
    sections = dict[str, list[str]]()
    for path in sorted((config.CONFIG_DIR / "model").glob("*.yaml")):
        sections.setdefault(said(path.stem, "detector._target_") or "", []).append(path.stem)
    out = [HEAD.format(digits=digits, other=other)]
    named = {target: target.rpartition(".")[2] or "Fused" for target in sections}
    out += [" · ".join(f"[{name}](#{name.lower()})" for name in sorted(named.values(), key=str.lower)), ""]
    for target, models in sorted(sections.items(), key=lambda item: named[item[0]].lower()):
        out += [f"## {named[target]}", "", *(documented(get_class(target)) if target else [FUSED]), ""]
        out += table(models, frame, problems)
        out += pictures(models, frame)
    return "\n".join(out).rstrip() + "\n"


def text(model: str) -> str:
    return (config.CONFIG_DIR / "model" / f"{model}.yaml").read_text(encoding="utf-8")


def said(model: str, key: str) -> str | None:
    """What a model's yaml says, or the one that it starts from."""
    found = OmegaConf.create(text(model))
    value = OmegaConf.select(found, key)
    bases = [base for base in found.get("defaults", []) if base != "_self_"]
    return str(value) if value is not None else said(bases[0], key) if bases else None


def documented(cls: type) -> Iterator[str]:
    """The class's docstring without its arguments; indented lines are equations."""
    whole = (inspect.getdoc(cls) or "").partition("\nArgs")[0]
    for equations, lines in itertools.groupby(whole.splitlines(), key=lambda line: line.startswith("    ")):
        if block := "\n".join(lines).strip("\n"):
            yield f"```text\n{textwrap.dedent(block)}\n```\n" if equations else f"{block}\n"


def table(models: list[str], frame: pd.DataFrame, problems: list[tuple[str, int, str]]) -> Iterator[str]:
    """The configurations of one class."""
    header = ["`model=`", "what", "full / small", "s a run", "epochs", "images/s"]
    header += [f"{dataset} {name}" for dataset, _, name in problems] + ["published"]
    yield f"| {' | '.join(header)} |"
    yield f"| --- | --- | --- |{' ---: |' * (len(header) - 4)} --- |"
    for model in models:
        runs = frame[frame["method"] == model]
        cost = [f"{median(runs['seconds']):.0f}", f"{runs['epochs'].iloc[0]}"] if len(runs) else ["", ""]
        speed = runs["images_per_second"].median()
        cost.append(f"{speed:,.0f}" if speed == speed else "")
        found = [runs[(runs["dataset"] == d) & (runs["normal_class"] == c)]["auroc"] for d, c, _ in problems]
        cells = [f"{one.iloc[0]:.3f}" if len(one) else "" for one in found]
        row = [f"`{model}`", first_sentence(model), sizes(model), *cost, *cells, published(model)]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def shown(model: str, frame: pd.DataFrame) -> pd.DataFrame:
    """The run whose scores are drawn, in a frame of one row; empty for a model without runs."""
    runs = frame[frame["method"] == model]
    eights = runs[(runs["dataset"] == SHOWN[0]) & (runs["normal_class"] == SHOWN[1])]
    return eights if len(eights) else runs[:1]


def pictures(models: list[str], frame: pd.DataFrame) -> Iterator[str]:
    """Links to the figures of one class's configurations."""
    for model in models:
        for run in shown(model, frame).itertuples():
            said = f"Scores of {model} on {run.dataset} {run.class_name}: AUROC {run.auroc:.3f}"
            yield f"![{said}]({FIGURES.name}/{model}.png)"
    yield ""


def draw() -> None:
    """Write the figures; each says by a checksum which scores it was drawn from."""
    archived = archive.Archive(SCORES)
    for model in sorted({str(method) for method in archived.frame["method"]}):
        for run in shown(model, archived.frame).itertuples():
            scores = archived.scores(run.path)
            title = f"{model}, {run.dataset} {run.class_name}: AUROC {run.auroc:.3f}"
            figure = figures.score_histogram(scores["score"], scores["truth"], title=title)
            source = archived.entries[run.path]["scores_sha256"]
            figures.save(figure, FIGURES / f"{model}.png", dpi=72, source=source)


def first_sentence(model: str) -> str:
    """Of the note at the top of the model's yaml."""
    note = itertools.takewhile(lambda line: line.startswith("#"), text(model).splitlines())
    words = itertools.takewhile(lambda line: not line.startswith("#   "), note)  # its commands
    joined = " ".join(line.removeprefix("#").strip() for line in words)
    return re.split(r"; |[.:] (?=[A-Z])", joined)[0].rstrip(".")


def sizes(model: str) -> str:
    """What the yaml gives two values: ``width 64 / 16``."""
    pairs = re.findall(r"([\w-]+): \"?\$\{size:((?:\[[^]]*\])|[^,}]*),([^}]*)\}", text(model))
    return ", ".join(f"{key} {full} / {small}" for key, full, small in pairs)


def published(model: str) -> str:
    """Means over classes, by data set and split; without one, the single classes."""
    method = said(model, "published") or model
    found = []
    for dataset in ("mnist", "fashion_mnist", "cifar10", "cifar100", "coil100"):
        for split in ("official", "pooled", "coil", "subclass", "superclass"):
            cells = results.published(method, dataset, split)
            wanted = {"": cells["mean"]} if "mean" in cells else {f"{c}: ": cells[c] for c in sorted(cells, key=str)}
            kinds = itertools.groupby(wanted.items(), key=lambda cell: (cell[1].status, cell[1].setting))
            for (status, setting), part in kinds:
                figures_of = ", ".join(f"{name}{figure.value:.3f}" for name, figure in part)
                found.append(f"{dataset} {split} {figures_of} ({', '.join(filter(None, [status, setting]))})")
    return "; ".join(found)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    draw()
