"""Console commands: argument parsing, error lines and exit codes. Heavy imports stay inside the functions, so that
``--help`` answers at once."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from anomaly_lab import __version__
from anomaly_lab.errors import (
    DONE,
    FAILED,
    INTERRUPTED,
    MISTAKE,
    TERMINATED,
    Terminated,
    exit_code,
    explained,
    ignore_pipe,
    printable,
    unwritten,
)
from anomaly_lab.files import UNWRITABLE

__all__ = [
    "DONE",
    "FAILED",
    "INTERRUPTED",
    "MISTAKE",
    "TERMINATED",
    "check",
    "check_submission",
    "data",
    "export",
    "features",
    "report",
    "score",
    "train",
]

DRY_RUN = "--dry-run"

VERSION = f"anomaly-lab {__version__}"
"""What every command answers to ``--version``."""


Command = TypeVar("Command", bound=Callable[..., Any])


def _read_in_part(command: Command) -> Command:
    """Wrap a command: a closed output pipe (``| head``) ends it without a traceback."""

    @functools.wraps(command)
    def safe(*arguments: Any) -> Any:
        try:
            try:
                return command(*arguments)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            ignore_pipe(sys.stdout)
            return DONE

    return safe  # type: ignore[return-value]


@_read_in_part
def train() -> None:
    """``anomaly-lab``: train and evaluate one run, or with ``-m`` every run of a grid that is not there yet.

    ``--dry-run`` says what is done, what is to do and about how long it will take, and does nothing.
    """
    if "--version" in sys.argv:  # Hydra's own flag says Hydra's
        print(VERSION)
        return

    from hydra import main
    from hydra._internal.utils import get_args_parser

    from anomaly_lab import config, sweep

    dry = DRY_RUN in sys.argv
    sys.argv[1:] = [word for word in sys.argv[1:] if word != DRY_RUN]
    asked = get_args_parser().parse_args(sys.argv[1:])
    # OpenMP's threads spin while they wait; where cores are shared with other processes that makes steps many times
    # slower. Read when torch is loaded, and inherited by a launcher's workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as exceptions, not as pages of Hydra's own
    for name in ("hydra", "hydra_plugins", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a sweep prints a line a run, not two more of the launcher
    try:
        if asked.config_dir or asked.config_path or asked.config_name:
            raise ValueError(
                f"configs of your own go into the folder that {config.EXTRA_CONFIGS} names, not into flags"
            )
        if dry:
            sys.exit(sweep.dry_run(asked.overrides))
        flags = [word for word in sys.argv[1:] if word not in asked.overrides]
        hydra_main = main(config_path=str(config.CONFIG_DIR), config_name="train", version_base="1.3")(sweep.job)

        def start(overrides: Sequence[str]) -> None:
            sys.argv[1:] = [*flags, *overrides, *config.search_path()]
            hydra_main()

        if asked.multirun:
            sys.exit(sweep.make(start, asked.overrides))
        start(asked.overrides)
    except Terminated:
        print("terminated: the same command goes on after the last whole epoch", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("interrupted: the same command goes on after the last whole epoch", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        raise
    except Exception as error:
        from anomaly_lab.advice import advice

        line = advice(error, asked.overrides) or explained(error)
        if line is None:
            raise
        sys.exit(_mistake("anomaly-lab", line, exit_code(error)))


def _parser(**described: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(**described)
    parser.add_argument("--version", action="version", version=VERSION)
    return parser


def _mistake(program: str, line: str, code: int = MISTAKE) -> int:
    print(f"{program}: error: {printable(line)}", file=sys.stderr)
    return code


@_read_in_part
def data(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-data download|list|check``: list, download and verify the data sets' caches."""
    parser = _parser(
        prog="anomaly-lab-data",
        description="Fetch, list and verify data sets. They lie in data_dir: ANOMALY_LAB_DATA, else ./data.",
        epilog="example: anomaly-lab-data download mnist cifar10; "
        "anomaly-lab-data check image_folder dataset.name=bottles dataset.path=photos/bottles",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("list", "say which data sets are ready"),
        ("download", "fetch and decode data sets, each once"),
        ("check", "verify the checksums of decoded data sets"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        if name != "list":
            command.add_argument("names", nargs="+", metavar="NAME", help="as in anomaly-lab-data list")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as data_dir=DIR")
    arguments = parser.parse_args(argv)
    # argparse gives everything to the first list that takes it.
    words = [*getattr(arguments, "names", ()), *arguments.overrides]
    names = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]

    from anomaly_lab import config

    if arguments.command == "list":
        if names:
            return _mistake(parser.prog, f"list takes no names, got {' '.join(names)}")
        extra = os.environ.get(config.EXTRA_CONFIGS)
        folders = [config.CONFIG_DIR, Path(extra)] if extra else [config.CONFIG_DIR]
        names = sorted({path.stem for folder in folders for path in (folder / "dataset").glob("*.yaml")})
    elif not names:
        return _mistake(parser.prog, "name a data set, see anomaly-lab-data list")
    code = DONE
    for name in names:
        try:
            print(_data_line(arguments.command, name, overrides), flush=True)
        except BrokenPipeError:
            raise
        except Exception as error:
            line = explained(error)
            if line is None:
                raise
            code = _mistake(parser.prog, line if name in line else f"{name}: {line}")
    return code


def _data_line(command: str, name: str, overrides: Sequence[str]) -> str:
    from omegaconf import OmegaConf

    from anomaly_lab import config

    given = config.compose([f"dataset={name}", *overrides]).dataset
    if missing := sorted(OmegaConf.missing_keys(given)):
        needed = " and ".join(f"{key}=..." for key in missing)
        if command == "list":
            return f"{name:<16}yours: give {needed}"
        raise ValueError(f"{name} is your own data set: give {needed}")
    dataset = config.reader(given)
    if command == "check":
        return str(dataset.check())
    if command == "download":
        return f"{name}: ready in {dataset.download()}"
    state = "ready" if dataset.cache.exists() else "not there"
    advice = "" if dataset.cache.exists() else f"  {dataset.how_to_get}"
    return f"{name:<16}{state:<11}{dataset.cache}{advice}"


@_read_in_part
def report(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-report``: tables, figures and tests of difference from finished runs."""
    parser = _parser(
        prog="anomaly-lab-report",
        description="Tables, tests of difference and figures from finished runs, "
        "as Markdown, CSV, LaTeX and one HTML page.",
    )
    parser.add_argument(
        "runs",
        nargs="?",
        default="runs",
        type=Path,
        metavar="RUNS",
        help="folder of runs (default: runs); for --submission also an archive of --scores",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: RUNS/report)")
    parser.add_argument(
        "--experiment",
        metavar="NAME",
        help="only the runs of conf/experiment/NAME.yaml; writes results.csv, figures and README.md "
        "(default for --out: experiments/NAME); what you write into notes.md there opens the README",
    )
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="also show oracle_auroc, which looks at the test labels (an experiment's README always does)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compute every run's metrics anew from its scores; leave out what differs"
    )
    parser.add_argument(
        "--status", action="store_true", help="list the state of every run; with --experiment the missing ones as well"
    )
    parser.add_argument(
        "--ranking",
        action="store_true",
        help="instead of a report: rank the methods over all classes and protocols that they share, and show what the "
        "best epoch by test labels would add to each",
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="instead of a report: reduce the last.ckpt of finished runs to what scores new images",
    )
    parser.add_argument(
        "--dashboard",
        metavar="ENTITY/PROJECT",
        help="instead of a report: lay out a workspace for the runs that logger=wandb has sent there",
    )
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="instead of a report: write the scores of all test images of the runs, or of those of --experiment, into "
        "one .npz from which their table can be computed anew",
    )
    parser.add_argument(
        "--submission",
        type=Path,
        metavar="FILE",
        help="instead of a report: write the runs, all of one method on one protocol (RUNS/METHOD/DATASET/SPLIT), as a "
        ".json that anomaly-lab-check-submission can hold to their scores; or a folder, for a file of each method",
    )
    asked = parser.parse_args(argv)
    instead = [name for name in ("status", "prune", "dashboard", "scores", "submission") if getattr(asked, name)]
    if asked.out and instead:
        return _mistake(parser.prog, f"--out says where a report goes, and --{instead[0]} writes none: leave one out")

    from anomaly_lab import report

    try:
        if asked.scores or asked.submission:
            _handed_on(asked)
        elif asked.dashboard:
            report.save_dashboard(asked.dashboard)
        elif asked.prune:
            report.prune(asked.runs, asked.experiment)
        elif asked.ranking:
            from anomaly_lab import ranking

            ranking.write(asked.runs, asked.out, asked.experiment)
        elif asked.status:
            report.print_states(asked.runs, asked.experiment)
        else:
            report.write(asked.runs, asked.out, asked.experiment, asked.oracle, asked.verify)
    except BrokenPipeError:
        raise
    except OSError as error:
        misplaced = isinstance(error, NotADirectoryError | FileExistsError)  # below a file
        if error.errno not in UNWRITABLE and not misplaced:
            return _mistake(parser.prog, explained(error) or str(error))
        other = "--scores FILE" if asked.scores else "--submission FILE" if asked.submission else "--out DIR"
        return _mistake(parser.prog, unwritten(error, other), exit_code(error))
    except ValueError as error:
        return _mistake(parser.prog, str(error))
    return DONE


def _handed_on(asked: argparse.Namespace) -> None:
    """Write what others check: scores, submissions."""
    from anomaly_lab import archive, report, results, submission

    frame = None
    if not (asked.runs.is_file() and asked.submission and not asked.scores and not asked.experiment):
        frame, expected, _ = report.selected(asked.runs, asked.experiment)
    if asked.submission:
        entries, out = submission.entries(asked.runs, frame), asked.submission
        one = out.suffix == ".json"
        written = 0
        for file, said in [(out, submission.write(entries, out))] if one else submission.write_each(entries, out):
            if isinstance(said, str):
                print(f"not written: {said}", file=sys.stderr)
            else:
                print(f"{submission.line(said)}\nwritten: {file}")
                written += 1
        if not written:
            raise ValueError(f"no method has all that a submission needs: nothing was written into {out}")
    if asked.scores:
        assert frame is not None
        results.refuse_mixtures(frame)
        archive.write(asked.runs, frame, asked.scores)
        print(f"written: {asked.scores}: the scores of {len(frame)} runs, {asked.scores.stat().st_size / 1e6:.2f} MB")
        if lacking := sorted(report.places(expected or ()) - set(frame["path"])):
            print(f"{len(lacking)} runs of the grid are not in it, the first {lacking[0]}: run them", file=sys.stderr)


@_read_in_part
def check_submission(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-check-submission FILE...``: hold submissions to themselves, each other, and the scores behind."""
    parser = _parser(
        prog="anomaly-lab-check-submission",
        description="Hold submissions to the protocol (one method, one partition, every class with every seed) and, "
        "with --runs or --scores, every number in them to the scores that it comes from. A guard against accident: "
        "whoever makes up scores can make up both.",
        epilog="example: anomaly-lab-check-submission knn.json pca.json --scores scores.npz",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="from anomaly-lab-report --submission")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--runs", type=Path, metavar="RUNS", help="the folder of runs that they were written from")
    source.add_argument("--scores", type=Path, metavar="FILE", help="an archive of scores that has their runs")
    asked = parser.parse_args(argv)

    from anomaly_lab import archive, submission

    code, sound = DONE, []
    try:
        scores = archive.Archive(asked.scores) if asked.scores else None
        for file in asked.files:
            try:
                content = submission.read(file)
                if asked.runs or scores:
                    submission.refuse_unfounded(content, str(file), asked.runs, scores)
            except ValueError as error:
                code = _mistake(parser.prog, str(error), FAILED)
                continue
            sound.append(content)
            print(f"{file}: {submission.line(content)}: {'verified' if asked.runs or scores else 'held to no scores'}")
        submission.frame(sound)
    except (ValueError, OSError) as error:
        return _mistake(parser.prog, str(error), FAILED)
    return code


@_read_in_part
def score(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-score RUN IMAGES...``: a CSV of scores and decisions, and heat maps on request."""
    parser = _parser(
        prog="anomaly-lab-score",
        description="Score image files with a finished run. Higher scores are more anomalous; the decision compares "
        "them with the threshold that the run took from held-out normal images.",
        epilog="example: anomaly-lab-score runs/shared_ae/mnist/official/n8/s0 photos/ --heat-maps maps",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, with its result.json")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="image files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("scores.csv"), help="the CSV to write (default: scores.csv)")
    parser.add_argument("--heat-maps", type=Path, metavar="DIR", help="also draw there where each image looks wrong")
    parser.add_argument("--skip-broken", action="store_true", help="leave out files that cannot be read, and name them")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    _add_run_options(parser)
    asked = parser.parse_args(argv)

    from anomaly_lab import predict

    try:
        files = predict.image_files(asked.images)
        fitted = predict.load_run(asked.run, asked.device, asked.data_dir, asked.trust)
    except (ValueError, OSError) as error:
        return _mistake(parser.prog, str(error))
    try:
        broken = predict.score_files(fitted, files, asked.out, asked.heat_maps, skip_broken=asked.skip_broken)
    except OSError as error:  # of writing: what cannot be read is named by a ValueError
        another = "--out FILE" + " or --heat-maps DIR" * (asked.heat_maps is not None)
        return _mistake(parser.prog, unwritten(error, another), exit_code(error))
    except ValueError as error:
        return _mistake(parser.prog, str(error))
    for fault in broken:
        print(f"left out: {fault}", file=sys.stderr)
    print(f"{len(files) - len(broken)} images scored: {asked.out}")
    if fitted.threshold is None and fitted.result.get("decided_by") != "own rule":
        print(f"no decisions: {predict.NO_THRESHOLD}", file=sys.stderr)
    return DONE


@_read_in_part
def export(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-export RUN --out FILE``: a finished run as an ONNX file, held to the run's scores."""
    parser = _parser(
        prog="anomaly-lab-export",
        description="Write a finished run as an ONNX file: prepared images in, anomaly scores out, the preparation and "
        "the threshold in its metadata. Nothing is written unless ONNX Runtime gives the run's own scores.",
        epilog="example: anomaly-lab-export runs/shared_ae/mnist/official/n8/s0 --out model.onnx",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, with its result.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .onnx to write")
    parser.add_argument(
        "--images", nargs="+", type=Path, default=[], metavar="IMAGES", help="compare the scores of these as well"
    )
    _add_run_options(parser)
    asked = parser.parse_args(argv)

    from anomaly_lab import export, predict

    try:
        files = predict.image_files(asked.images) if asked.images else []
        fitted = predict.load_run(asked.run, "cpu", asked.data_dir, asked.trust)
        images = fitted.read(files)
    except (ValueError, OSError) as error:
        return _mistake(parser.prog, str(error), exit_code(error))
    try:
        made = export.export(fitted, asked.out, images)
    except OSError as error:
        return _mistake(parser.prog, unwritten(error, "--out FILE"), exit_code(error))
    except ValueError as error:
        return _mistake(parser.prog, str(error), exit_code(error))
    print(
        f"{asked.out}: {made.images} images score as in the run, to {made.difference:.1g} "
        f"(standard deviation of the scores {made.spread:.3g})"
    )
    return DONE


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """What commands that load a run have in common."""
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where pretrained weights lie, if not where they did"
    )
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of your own that the run's method comes from: a run folder may have classes of anomaly_lab "
        "called, and of such modules only",
    )


@_read_in_part
def check(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-check model=NAME``: hold a method to the contract that every method here keeps."""
    parser = _parser(
        prog="anomaly-lab-check",
        description="Train a method for a few steps, straight through and killed after every epoch, and say what "
        "breaks the contract: a score that depends on its batch, a parameter that nobody trains, noise that a resumed "
        "run draws anew, ... One line a fault, with what to do; exit code 1 where there is any.",
        epilog="example: ANOMALY_LAB_CONF=conf anomaly-lab-check model=mine model.detector.width=8",
    )
    parser.add_argument(
        "overrides", nargs="+", metavar="KEY=VALUE", help="model=NAME, and smaller networks to be quick"
    )
    overrides = parser.parse_args(argv).overrides
    if not any(word.startswith("model=") for word in overrides):
        return _mistake(parser.prog, "name a method: model=NAME")

    from anomaly_lab import testing

    number = 0
    try:
        for held, faults in testing.examine(overrides):
            print(f"{'FAULT' if faults else 'ok':<7}{held}", flush=True)
            for fault in faults:
                print(f"         {fault}", flush=True)
            number += len(faults)
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        return _mistake(parser.prog, line)
    return FAILED if number else DONE


@_read_in_part
def features(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-features``: channel statistics of pretrained features over a folder of images."""
    parser = _parser(
        prog="anomaly-lab-features",
        description="Mean and standard deviation of each channel of a model's pretrained features over the images in a "
        "folder and all folders below (ImageNet, as PIAD has it), in one file with where they come from. A run uses it "
        "with model.detector.features.statistics.path=FILE and .sha256=CHECKSUM.",
        epilog="example: anomaly-lab-features imagenet/train --model piad --limit 50000 --out vgg19.npz",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="images, in it or in folders below")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as model.detector.features.path=FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .npz to write")
    parser.add_argument("--model", default="piad", help="whose features (default: piad)")
    parser.add_argument(
        "--size", type=int, metavar="N", help="pixels images are stretched to (default: the model's input)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only so many images, spread evenly over the sorted list"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    arguments = parser.parse_intermixed_args(argv)  # KEY=VALUE may also come last
    try:
        print(_features(arguments))
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        return _mistake(parser.prog, line)
    return DONE


def _features(asked: argparse.Namespace) -> str:
    import hashlib
    from datetime import UTC, datetime
    from importlib.metadata import version

    import numpy as np
    import torch
    from hydra.utils import instantiate
    from tqdm import tqdm

    from anomaly_lab import config, networks, predict
    from anomaly_lab.files import write_atomically
    from anomaly_lab.pictures import open_image

    cfg = config.compose([f"model={asked.model}", *asked.overrides])
    described = cfg.model.detector.get("features")
    if described is None:
        raise ValueError(f"model={asked.model} has no pretrained features: name one that has, such as piad")
    if described.weights == "random":
        raise ValueError("random features are drawn anew by every run, which computes their statistics itself")
    size = cfg.model.input.size if asked.size is None else asked.size
    if size < 1 or (asked.limit is not None and asked.limit < 1):
        raise ValueError("--size and --limit are whole numbers from 1")
    if not asked.folder.is_dir():
        raise ValueError(f"{asked.folder} is not a folder: give one with images, in it or in folders below")
    files = predict.image_files([asked.folder])
    if asked.limit is not None and asked.limit < len(files):
        files = [files[i * len(files) // asked.limit] for i in range(asked.limit)]
    network = instantiate(described, _convert_="all")().to(asked.device)
    if size < network.smallest:
        raise ValueError(f"--size {size}: {network.architecture} needs images of {network.smallest} pixels or more")
    checksum = hashlib.sha256()

    def batches() -> Iterator[torch.Tensor]:
        for start in tqdm(range(0, len(files), 64), desc="images, in batches of 64", disable=not sys.stderr.isatty()):
            some = files[start : start + 64]
            images = np.stack([open_image(file, str(file), 3, size) for file in some])
            for file, image in zip(some, images, strict=True):
                checksum.update(file.relative_to(asked.folder).as_posix().encode() + b"\0" + image.tobytes())
            yield network(torch.from_numpy(images).to(asked.device) / 127.5 - 1)  # [-1, 1]

    with torch.no_grad():
        mean, std = networks.channel_statistics(batches())
    origin = {
        "folder": asked.folder.resolve().name,
        "images": len(files),
        "images_sha256": checksum.hexdigest(),  # of names and pixels
        "size": size,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("anomaly-lab", "torch", "torchvision")},
    }
    write_atomically(asked.out, lambda file: networks.save_statistics(file, network, mean, std, **origin))
    digest = hashlib.sha256(asked.out.read_bytes()).hexdigest()
    option = "model.detector.features.statistics"
    return f"{len(files)} images, {len(mean)} channels: {option}.path={asked.out} {option}.sha256={digest}"
