"""Whether two revisions compute the same: one config of every method trained for a few steps, scores.npz byte by byte.

    python tests/same_scores.py BEFORE [AFTER]      git revisions; AFTER is the working tree unless given

Both sides train on the embedded digits, on one CPU thread, in a process of their own. Exit code 1 and the names of the
methods if anything differs. Methods that only one side has are named and not compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import json, sys
from pathlib import Path
from omegaconf import OmegaConf
from anomaly_lab import config
from anomaly_lab.run import run

shrink = {
    "detector.width": 4, "detector.critic_width": 8,
    "detector.encoder_widths": [4, 4, 4, 4], "detector.generator_widths": [4, 4, 4, 4],
    "detector.image_critic_widths": [4, 4, 4, 4], "detector.latent_critic_widths": [4, 4],
    "detector.gamma_every": 3, "detector.rounds": 2,
    "detector.features.architecture": "squeezenet1_0", "detector.features.weights": "random",
    "detector.features.path": "null", "detector.features.sha256": "null",
}
out, size = Path(sys.argv[1]), ["size=full"] if "\\nsize:" in (config.CONFIG_DIR / "train.yaml").read_text() else []
for path in sorted((config.CONFIG_DIR / "model").glob("*.yaml")):
    if path.stem.endswith("_small"):
        continue
    given = [f"model={path.stem}", *size]
    model = config.compose(given).model
    short = [f"model.{key}={value}" for key, value in shrink.items() if OmegaConf.select(model, key) is not None]
    if OmegaConf.select(model, "detector.features") is not None:
        short.append("model.pretrained=null")
    stages = model.budget.get("stages")
    epochs = "stages={%s}" % ",".join(f"{name}:2" for name in stages) if stages else "epochs=3"
    short += [f"model.budget.{epochs}", "model.budget.epoch_steps=4"] + ["model.budget.steps=null"] * (not stages)
    cfg = config.compose([*given, *short, "dataset=digits", "split=pooled", "normal_class=3", "seed=1",
        "split.contamination.rate=0.05", "trainer.accelerator=cpu", "trainer.threads=1", "trainer.progress=false",
        "logger=none", f"runs={out / path.stem}", f"data_dir={out}"])
    print(path.stem, run(cfg)["metrics"]["auroc"], flush=True)
"""


@contextmanager
def checkout(revision: str | None) -> Iterator[Path]:
    """The files of a revision, the working tree for None."""
    if revision is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "tree")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", place, revision], cwd=ROOT, check=True)
        try:
            yield place
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", place], cwd=ROOT, check=True)


def scores(revision: str | None, out: Path) -> dict[str, str]:
    """SHA-256 of scores.npz by method."""
    with checkout(revision) as tree:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, "-c", PROGRAM, out], cwd=out, env=environment, check=True, stdout=sys.stderr)
    found = {path.relative_to(out).parts[0]: path for path in out.rglob("scores.npz")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(found.items())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="read BEFORE's checksums there, or write them")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("before", "after"):
            Path(folder, name).mkdir()
        if asked.keep and asked.keep.exists():
            before = json.loads(asked.keep.read_text())
        else:
            before = scores(asked.before, Path(folder, "before"))
            if asked.keep:
                asked.keep.write_text(json.dumps(before, indent=1))
        after = scores(asked.after, Path(folder, "after"))
    for name in sorted(before.keys() | after.keys()):
        both = name in before and name in after
        print(f"{name:<28}{('equal' if before[name] == after[name] else 'DIFFERENT') if both else 'on one side only'}")
    different = [name for name in before.keys() & after.keys() if before[name] != after[name]]
    print(f"{len(before.keys() & after.keys())} methods compared, {len(different)} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
