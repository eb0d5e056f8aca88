"""Write docs/protocols.md, and docs/protocols.json beside it: what every protocol makes of every data set.

python docs/protocols.py           # the page, from protocols.json
python docs/protocols.py measure   # protocols.json first, from all data sets in ANOMALY_LAB_DATA: some minutes
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from anomaly_lab import datasets, splits
from anomaly_lab.images import Images, beside

ROOT = Path(__file__).resolve().parent.parent
PAGE, FACTS = ROOT / "docs/protocols.md", ROOT / "docs/protocols.json"

SETS: dict[str, type[datasets.Dataset] | functools.partial[datasets.Dataset]] = {
    "mnist": datasets.MNIST,
    "fashion_mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "coil100": datasets.COIL100,
    "digits": datasets.Digits,
    "usps": functools.partial(datasets.NPZ, name="usps"),
}

PROTOCOLS: list[type[splits.Split]] = [splits.Official, splits.Pooled, splits.Coil]
PROTOCOLS += [splits.Superclass, splits.Subclass, splits.OneAbnormal]

PROBLEMS = {
    "cifar10": (splits.Ood(anomalies=("mnist",)), "split.anomalies=mnist"),
    "digits": (splits.Pooled(), "normal_class=[3,8]"),
}
"""Of a data set an example of several classes that are one problem, and the key that makes it."""

FAULTS = {
    "mnist": (
        "The distance to the mean image has .87 on average, principal components .955 "
        "([floors](../experiments/beyond_mnist/README.md)): a mean below that is no evidence of learning."
    ),
    "fashion_mnist": (
        "A mean image tells most classes (.88 on average, .98 for sneakers); shirts, which look like T-shirts, "
        "pullovers and coats, have .77 to .83 under the floors "
        "([floors](../experiments/beyond_fashion_mnist/README.md))."
    ),
    "cifar10": (
        "3.3 % of the test images have a near-duplicate among the training images (Barz & Denzler 2020; secondary, "
        "not searched for here). Pixels tell little, and for some classes the wrong way round "
        "([floors](../experiments/beyond_cifar10/README.md))."
    ),
    "cifar100": (
        "10 % of the test images have a near-duplicate among the training images (Barz & Denzler 2020; secondary, "
        "not searched for here)."
    ),
    "coil100": (
        "Poses are 5° apart, so a test image mostly stands between two training images: AUROC is at its ceiling, "
        "and no method can be chosen by it ([floors](../experiments/beyond_coil100/README.md)). Not for commercial "
        "use."
    ),
    "digits": (
        "1,797 images of 8x8 pixels: for demonstrations. Held-out normals are too few for a threshold unless "
        "`split.val_share` is raised."
    ),
    "usps": (
        "Designs are developed on it ([one](../experiments/shared_ae_development/README.md)): its test labels have "
        "been looked at, and no figure of a method that was developed here is evidence for it."
    ),
}
"""What the bytes of the images do not say."""


MOST = 30  # classes of a protocol; of more the first ten are measured


def measure() -> dict[str, Any]:
    """Counts and fingerprints of every class at seed 0, and what repeats in a data set."""
    found: dict[str, Any] = {"datasets": {}, "partitions": []}
    for name, reader in SETS.items():
        folder = Path(os.environ["ANOMALY_LAB_DATA"])
        given = {"path": folder / f"{name}.npz"} if name == "usps" else {}
        images = reader(data_dir=folder, **given).load()
        digests = digested(images)
        found["datasets"][name] = about(images, digests)
        for kind in PROTOCOLS:
            split = kind()
            try:
                targets = split.targets(images)
            except ValueError:
                continue  # the protocol does not fit
            for target in targets if len(targets) <= MOST else targets[:10]:
                row = one_class(split, images, target, digests)
                found["partitions"].append({"dataset": name, **row, "classes": len(targets)})
            print(name, split.name, len(targets), file=sys.stderr)
        if name in PROBLEMS:
            found["partitions"].append({"dataset": name, **several(images, *PROBLEMS[name]), "classes": 1})
    return found


def digested(images: Images) -> np.ndarray:
    """The SHA-256 of each image."""
    return np.array([hashlib.sha256(one.tobytes()).hexdigest() for one in images.pixels])


def several(images: Images, split: splits.Split, by: str) -> dict[str, Any]:
    """Of several classes as one problem."""
    if isinstance(split, splits.Ood):
        folder = Path(os.environ["ANOMALY_LAB_DATA"])
        images = beside(images, [SETS[name](data_dir=folder).load() for name in split.anomalies])
        target = split.targets(images)
    else:
        target = split.resolve(images, json.loads(by.partition("=")[2]))
    named = "all" if by.startswith("split.") else "+".join(map(str, target))  # as in a run's identity
    return {**one_class(split, images, target, digested(images)), "class": named, "by": by}


def about(images: Images, digests: np.ndarray) -> dict[str, Any]:
    """What a data set is, and how many of its images there are twice, by their SHA-256."""
    _, group, count = np.unique(digests, return_inverse=True, return_counts=True)
    repeated = [np.flatnonzero(group == one) for one in np.flatnonzero(count > 1)]
    tested = images.is_test
    return {
        "shape": list(images.pixels.shape[1:]),
        "training": int((~tested).sum()),
        "test": int(tested.sum()),
        "classes": len(images.class_names),
        "sha256": images.sha256,
        "repeated": len(repeated),
        "repeated_with_other_labels": sum(len(set(images.labels[one].tolist())) > 1 for one in repeated),
        "test_copies": sum(int(tested[one].sum()) for one in repeated if not tested[one].all()),
    }


def one_class(split: splits.Split, images: Images, target: splits.Target, digests: np.ndarray) -> dict[str, Any]:
    """Of one class as the one that a run names."""
    partition = split(images, target, seed=0)
    known = set(digests[np.concatenate([partition.train, partition.val])].tolist())
    return {
        "split": split.name,
        "class": target,
        "name": split.title(images, target),
        "train": len(partition.train),
        "val": len(partition.val),
        "test_normal": int((partition.test_truth == 0).sum()),
        "test_anomalous": int((partition.test_truth == 1).sum()),
        "test_copies": sum(one in known for one in digests[partition.test].tolist()),
        "fingerprint": partition.fingerprint,
    }


HEAD = """\
<!-- Written by docs/protocols.py from protocols.json: edit those. -->
# Protocols

Who is normal, what trains, what is held out and what tests, for every data set, as counted from the images themselves.
A partition is a pure function of images, class and seed; its fingerprint is a hash of the protocol, its version and the
content of the images in each part. `anomaly-lab` writes it into every `result.json`, and a report refuses two runs of
the same data set, protocol, class and seed that differ in it: compare yours with those below before you compare
figures.

Counts and fingerprints are of seed 0, without contamination or caps. Another seed holds out other images, and in
`pooled`, `coil` and `one_abnormal` cuts others.
The facts of this page are in [protocols.json](protocols.json).
A row with a key is an example of several classes that are one problem, one column, one mean of their own.
*Test copies* are test images with the bytes of a training or held-out image of the same run.
"""


def page(facts: dict[str, Any]) -> str:
    """The whole page."""
    out = [HEAD, "## The rules", "", "| `split=` | version | rule |", "| --- | ---: | --- |"]
    for kind in (*PROTOCOLS, splits.Ood):
        rule = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())
        out.append(f"| `{kind.name}` | {kind.version} | {rule} |")
    out += [
        "",
        "A tenth of the training normals (`split.val_share`), at least 5, is held out of training in all of them.",
    ]
    for name, one in facts["datasets"].items():
        halves = f"{one['training']:,} training and {one['test']:,} test images"
        size = halves if one["test"] else f"{one['training']:,} images, no halves"
        channels, *side = one["shape"]
        out += [
            *("", f"## {name}", ""),
            f"{size}, {one['classes']} classes, {'colour' if channels == 3 else 'grey'}, {side[0]}x{side[1]}; "
            f"sha256 of all `{one['sha256'][:12]}` (`anomaly-lab-data check`).",
            "",
            f"**Known faults.** {repeats(one)} {FAULTS[name]}",
            "",
            "| `split=` | classes | train | held out | test, normal | test, anomalous | test copies |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        own = [p for p in facts["partitions"] if p["dataset"] == name]
        by_split: dict[str, list[dict[str, Any]]] = {}
        for p in own:
            by_split.setdefault(f"`{p['split']}`" + (f" `{p['by']}`" if "by" in p else ""), []).append(p)
        for split, found in by_split.items():
            counts = [span([p[key] for p in found]) for key in ("train", "val", "test_normal", "test_anomalous")]
            copied = sum(p["test_copies"] > 0 for p in found)
            first = "the first " if len(found) < found[0]["classes"] else ""
            copies = (
                f"{span([p['test_copies'] for p in found])} ({copied} of {first}{len(found)} classes)"
                if copied
                else "none"
            )
            classes = found[0]["name"] if "by" in found[0] else found[0]["classes"]
            out.append(f"| {split} | {classes} | {' | '.join(counts)} | {copies} |")
        out += ["", "Fingerprints at seed 0, by class:", ""]
        for split, found in by_split.items():
            fingerprints = ", ".join(f"{p['name']} `{p['fingerprint']}`" for p in found)
            first = f" (the first {len(found)} of {found[0]['classes']})" if len(found) < found[0]["classes"] else ""
            out.append(f"- {split}{first}: {fingerprints}")
    return "\n".join(out) + "\n"


def repeats(one: dict[str, Any]) -> str:
    """What of a data set there is twice."""
    if not one["repeated"]:
        return "No two images have the same bytes."
    text = f"{one['repeated']} groups of images have the same bytes, {one['repeated_with_other_labels']} under more"
    copies = f"; {one['test_copies']} test images are copies of training images" if one["test"] else ""
    return f"{text} than one label{copies}."


def span(values: list[int]) -> str:
    """`5,421 to 6,742`, or the one value."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def written(facts: dict[str, Any]) -> str:
    """A partition a line, so that a change of one is a line of a diff."""
    about = json.dumps(facts["datasets"], indent=1)
    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in facts["partitions"])
    return f'{{"datasets": {about},\n"partitions": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        FACTS.write_text(written(measure()), encoding="utf-8")
    PAGE.write_text(page(json.loads(FACTS.read_text(encoding="utf-8"))), encoding="utf-8")
