"""Write docs/practice.md: what each method's published practice decides by test labels, and what that is worth here.

python docs/practice.py
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from anomaly_lab import ranking, results
from anomaly_lab.files import write_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/practice.md"

HEAD = """\
<!-- Written by docs/practice.py from experiments/*/results.csv and from what it quotes: edit those. -->
# What each method's published practice owes to test labels

A detector of one class is trained on normal images, but its published figure may have seen the test labels: in the
choice of an epoch, of a setting, of a score, of the test images themselves. This page has one row a method: what its
public code or its paper decides so, and what the choice adds in the committed runs of this repository, where nothing
is decided so. What is said of code was read in the commit named, and holds for that commit.

*The best epoch* is the mean of `oracle_auroc - auroc`: the best test AUROC of any epoch less that of the last, over all
runs that were watched, whatever the method's own practice is
([the table with its spread](ranking.md#{anchor})). A method stands for its small size, and for its full one where
`_small` stands beside it. *Sorted batches*: batch norm by the statistics of test batches of one label each, less the
honest score ([a page of its own](test_labels.md)). *A grid*: for every class the best test AUROC among the settings of
[published rules](../experiments/published_rules/README.md) that differ in what is named, less that of the rule that
sees normals alone. Choices are not added to each other. Few runs at small sizes measure the order of such a gain, not
the gain of a published figure.
"""

SECTIONS = {
    "labels": ("## Something is decided by test labels", "Public code or the paper does so."),
    "open": ("## Not known", "No code of it is public, or what is public does not say."),
    "normals": ("## Nothing is decided by test labels", "As far as what was read shows."),
}
UNMEASURED = """\
## What cannot be measured

Of the methods of [everything](../experiments/everything/README.md) these have scores only when the fit has ended:
{late}. What scales or carries their score is found from all training images at the end, or each image is searched for
at a cost of its own, so an epoch before the last has no test AUROC to choose by.

Nothing here says that a published figure was made with such a choice. It says what the code at hand would do, and what
that would be worth.
"""
BEST_EPOCH = "What the best epoch by test labels adds"  # the heading in docs/ranking.md


class Practice(NamedTuple):
    """What is published of a method, and which rows measure it."""

    method: str  # of conf/model
    kind: str  # of SECTIONS
    decides: str
    source: str
    other: str = ""  # why a choice beside the epoch has no number here
    rows: tuple[str, ...] = ()  # methods whose runs measure it, where they are others
    grid: tuple[str, ...] = ()  # keys of model.detector or model.input over which published_rules has a grid


PRACTICE = (
    Practice("hrn", "labels", "The best test epoch is what is printed.", "morning-dews/HRN@22a7984, main.py"),
    Practice(
        "ganomaly",
        "labels",
        "The test set is scored after every epoch, and the best AUROC and its weights are kept. Batch norm normalises "
        "test batches by their own statistics, on a test set that one path of the code sorts by label. Scores are "
        "scaled by the test set's extremes, which moves no AUROC.",
        "samet-akcay/ganomaly@78da4ea, issues 25, 47, 83, 97",
    ),
    Practice(
        "ocsvm",
        "labels",
        "nu and gamma are those of the best test AUROC over a grid (Golan & El-Yaniv), or gamma is chosen on a tenth "
        "of the test set (Ruff et al.).",
        "izikgo/AnomalyDetectionTransformations@6327041; Ruff et al. 2018",
        grid=("gamma", "nu"),
    ),
    Practice(
        "rda",
        "labels",
        "lambda is chosen over a grid by the labels of the very images that it detects in.",
        "zc8340311/RobustAutoencoder@f87cfdd",
        other="lambda by labels: cannot be measured, for that of the runs follows from the expected contamination",
    ),
    Practice(
        "addpa",
        "labels",
        "Hyper-parameters and the epoch at which training stops are validated on one class of true anomalies.",
        "ninatu/anomaly_detection@6fa35f3",
        other="validation on anomalies: cannot be measured, for no run here has such a set",
        rows=("addpa_squeezenet",),
    ),
    Practice(
        "goad",
        "labels",
        "The test AUROC is printed after each of 16 epochs; the code keeps none but the last, and the choice is the "
        "reader's.",
        "lironber/GOAD@3655b86",
    ),
    Practice(
        "ocgan",
        "labels",
        "The epoch is that of the smallest error on held-out normals, but four test AUROCs, of two discriminators and "
        "of errors, are printed beside each other. A TensorFlow port prints the test AUROC after every epoch, does not "
        "say which one its README has, and scores about half of MNIST's test set, in the order of the file.",
        "PramuPerera/OCGAN@0dda279; nuclearboy95/Anomaly-Detection-OCGAN-tensorflow@6be4602",
        other="which score: cannot be measured, for runs keep one; the half of the test set neither, for they hold "
        "2000 images of it",
    ),
    Practice(
        "puzzle_ae",
        "labels",
        "No epoch is chosen; the largest, the smallest and the mean error over the orders of tiles are each tried as "
        "the score, and their test AUROCs printed.",
        "Niousha12/Puzzle_Anomaly_Detection@e08befb",
        other="which score: cannot be measured, for runs keep the mean alone",
    ),
    Practice(
        "gpnd",
        "labels",
        "The threshold is that of the best F1 on a validation set that holds anomalies.",
        "podgorskiy/GPND@d44896b",
        other="the threshold moves F1 and no AUROC",
    ),
    Practice(
        "shared_ae",
        "open",
        "The paper names neither epochs nor weights, and no code is public. What its family's code does, GANomaly's, "
        "is tried on its rows.",
        "Jia & Liu 2022",
        rows=("shared_ae", "shared_ae_50", "shared_ae_no_adversary_50", "ede_50"),
    ),
    Practice(
        "f_anogan",
        "open",
        "Encoders are saved at 12 numbers of iterations, and no rule in the code chooses one.",
        "tSchlegl/f-AnoGAN@35b1de9",
    ),
    Practice(
        "lsa",
        "open",
        "Weights and the code that tests them are public, how they were chosen is not. The scales of the score come "
        "from training normals.",
        "aimagelab/novelty-detection@055d393",
    ),
    Practice(
        "rotnet",
        "open",
        "The code for one class of CIFAR-10 is not public.",
        "hendrycks/ss-ood@8051356, issue 14",
    ),
    Practice(
        "anogan",
        "open",
        "No official code was found; the figures in tables are re-runs.",
        "LeeDoYup/AnoGAN@4c650b3, a port",
    ),
    Practice("pixelcnn", "open", "No code behind the column of OCGAN's tables was found.", "Perera et al. 2019"),
    Practice(
        "anonagn_reconstruction",
        "open",
        "Its abstract is all that was read; no code was found.",
        "Chen et al. 2020",
    ),
    Practice(
        "dagpr_reconstruction",
        "open",
        "Its abstract is all that was read; no code was found.",
        "Fan et al. 2020",
    ),
    Practice(
        "bigan",
        "open",
        "Two scores are published, by features and by the discriminator's cross entropy, and not which one to take.",
        "houssamzenati/Efficient-GAN-Anomaly-Detection@15568ab",
    ),
    Practice(
        "isolation_forest",
        "open",
        "Whether it sees principal components is an argument of the script. Both were evidently run; how the one in "
        "the table was chosen is not said.",
        "lukasruff/Deep-SVDD@e20f18c",
        grid=("contrast", "pca_variance", "size"),
    ),
    Practice(
        "alad",
        "normals",
        "Training stops by the score of held-out normals; the weights that are tested are those of eleven epochs "
        "later.",
        "houssamzenati/Adversarially-Learned-Anomaly-Detection@1f1c310",
    ),
    Practice(
        "deep_svdd",
        "normals",
        "A fixed number of epochs; the last weights count.",
        "lukasruff/Deep-SVDD-PyTorch@1901612",
        rows=("deep_svdd", "deep_svdd_soft", "conv_ae"),
    ),
    Practice(
        "vae",
        "normals",
        "A fixed number of epochs, as a baseline in Deep SAD's code.",
        "lukasruff/Deep-SAD-PyTorch@2e7aca3",
    ),
    Practice(
        "kde",
        "normals",
        "The bandwidth is chosen by the cross-validated likelihood of normals.",
        "lukasruff/Deep-SVDD@e20f18c",
        grid=("bandwidth",),
    ),
    Practice("piad", "normals", "The last weights count.", "ninatu/piad@adcb8fa", rows=("piad_pixel_l1",)),
    Practice(
        "geotrans",
        "normals",
        "Three epochs; the score is fitted to training normals.",
        "izikgo/AnomalyDetectionTransformations@6327041",
    ),
    Practice(
        "adgan",
        "normals",
        "A fixed number of epochs. 5000 test images are drawn without a seed, not by their labels.",
        "izikgo/AnomalyDetectionTransformations@6327041, no official code",
    ),
    Practice(
        "itsr",
        "normals",
        "Rounds and quantiles are the same in all settings, by a summary of the paper; no code was found.",
        "Beggel et al. 2019",
        rows=("itsr", "aae", "autoencoder_beggel"),
    ),
)


def page() -> str:
    """The whole page."""
    pages = results.read_pages(ROOT / "experiments")
    frame = results.union(pages)
    whole = frame[frame["changed"] == frame["problem"]]
    out = [HEAD.format(anchor=BEST_EPOCH.lower().replace(" ", "-"))]
    for kind, (heading, why) in SECTIONS.items():
        rows = [line(one, whole, pages["published_rules"]) for one in PRACTICE if one.kind == kind]
        header = ["method", "what is decided, and how", "the best epoch adds here", "another choice"]
        rows = [header, ["---"] * len(header), *rows]
        out += [heading, "", why, "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    late = ", ".join(f"`{name}`" for name in ranking.unwatched(pages["everything"]))
    out.append(UNMEASURED.format(late=late))
    return "\n".join(out).rstrip() + "\n"


def line(one: Practice, whole: pd.DataFrame, rules: pd.DataFrame) -> list[str]:
    """A method's row, of `page`."""
    others = [text for text in (grid(one, rules), sorted_batches(one, whole), one.other) if text]
    return [f"`{one.method}`", f"{one.decides} *{one.source}*", best_epoch(one, whole), "; ".join(others)]


def best_epoch(one: Practice, whole: pd.DataFrame) -> str:
    """The gain by the best epoch over the runs that measure a method, or why there is none."""
    wanted = {part for name in one.rows or (one.method,) for part in (name, f"{name}_small")}
    found = []
    for run in ranking.best_epochs(whole).itertuples():
        if run.method in wanted:
            on = ", ".join(f"{dataset} {mean:+.3f}" for dataset, mean in run.datasets.items())
            more = f"; {on}" if len(run.datasets) > 1 else ""
            counted = f"{runs(run.runs)}, {run.epochs} epochs{more}"
            found.append(f"`{run.method}` **{run.mean:+.3f}**, at most {run.largest:+.3f} ({counted})")
    if found:
        return "; ".join(found)
    own = whole[whole["method"].isin(wanted)]
    if len(own) and (own["epochs"] > 1).any():
        return "cannot be measured: scored only after the fit"
    if len(own) and (own["epochs"] == 1).all():
        return "cannot be measured: one epoch at the small size, and scored only after the fit"
    return "has no epochs" if len(own) else "not run here"


def sorted_batches(one: Practice, whole: pd.DataFrame) -> str:
    """The gain by batches of one label each, over the runs that measured it."""
    own = whole[whole["method"].isin(one.rows or (one.method,)) & whole["oracle_sorted_auroc"].notna()]
    gain = own["oracle_sorted_auroc"] - own["auroc"]
    parts = [f"`{model}` **{part.mean():+.3f}** ({runs(len(part))})" for model, part in gain.groupby(own["model"])]
    return f"sorted batches: {', '.join(parts)}" if parts else ""


def grid(one: Practice, rules: pd.DataFrame) -> str:
    """The gain by the best setting for each class, over the settings that differ in `one.grid` alone."""
    if not one.grid:
        return ""
    keys = {f"model.{part}.{key}" for part in ("detector", "input") for key in one.grid}
    changed = rules["changed"].map(lambda text: {item.partition("=")[0] for item in text.split()})
    own = rules[(rules["method"] == one.method) & changed.map(lambda found: found <= keys)]
    best = own.groupby("normal_class")["auroc"].max()
    rule = own[own["changed"] == ""].set_index("normal_class")["auroc"]
    names = " and ".join(filter(None, [", ".join(one.grid[:-1]), one.grid[-1]]))
    return (
        f"a grid of {own['changed'].nunique()} settings of {names}: **{(best - rule).mean():+.3f}** "
        f"({rule.mean():.3f} by the rule; {runs(len(own))})"
    )


def runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


if __name__ == "__main__":
    write_text(PAGE, page())
