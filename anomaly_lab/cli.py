"""The console commands. Heavy imports stay inside the functions, so that ``--help`` answers at once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DRY_RUN = "--dry-run"


def train() -> None:
    """``anomaly-lab``: train and evaluate one run, or with ``-m`` every run of a grid that is not there yet.

    ``--dry-run`` says what is done, what is to do and about how long it will take, and does nothing.
    """
    if DRY_RUN in sys.argv:
        sys.exit(_dry_run([word for word in sys.argv[1:] if word != DRY_RUN]))

    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from anomaly_lab import config

    multirun = any(word in ("-m", "--multirun") for word in sys.argv[1:])

    @hydra.main(config_path=str(config.CONFIG_DIR), config_name="train", version_base="1.3")
    def job(cfg: DictConfig) -> None:
        from anomaly_lab.run import run

        _quiet()
        cfg = config.with_choices(cfg, HydraConfig.get().runtime.choices)
        try:
            result = run(cfg)
        except ValueError as error:
            # A user's mistake is one line; anything else is ours and keeps its traceback. In a sweep the other runs
            # go on, so the failure must not end the process.
            print(f"error: {error}", file=sys.stderr)
            if not multirun:
                sys.exit(2)
            return
        if result is not None:
            _print_result(result, config.run_dir(cfg))

    job()
    if multirun:
        sys.exit(_summary(_overrides(sys.argv[1:])))


def _quiet() -> None:
    """Keep Lightning's greetings and known harmless warnings off the screen."""
    import warnings

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*weights_only. was not set.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def _print_result(result: dict[str, Any], out: Path) -> None:
    identity, measured = result["identity"], result["metrics"]

    def number(name: str) -> str:
        return "n/a" if measured[name] is None else f"{measured[name]:.3f}"

    rows = [
        ("model", identity["model"]),
        (
            "data",
            f"{identity['dataset']}, split {identity['split']}, {result['role']} class {result['class_name']}",
        ),
        ("AUROC", f"{number('auroc')}  (95 % interval {number('auroc_low')} to {number('auroc_high')})"),
        ("average precision", number("average_precision")),
        ("FPR at 95 % TPR", number("fpr95")),
        ("balanced accuracy", number("balanced_accuracy")),
    ]
    if measured["oracle_auroc"] is not None:
        rows.append(("oracle AUROC", f"{number('oracle_auroc')}  (best epoch on the test labels: not a result)"))
    rows += [
        ("training", f"{result['epochs']} epochs, {result['seconds']['fit']:.0f} s on {result['device']}"),
        ("result", str(out / "result.json")),
        ("figures", ", ".join(str(path) for path in sorted((out / "figures").glob("*.png")))),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows), flush=True)


def _overrides(words: Sequence[str]) -> list[str]:
    """Those command-line words that are overrides, not flags of Hydra's."""
    return [word for word in words if not word.startswith("-")]


def _states(overrides: Sequence[str]) -> list[tuple[Any, Path, str]]:
    from anomaly_lab import config, results

    configs = [config.compose(job) for job in config.jobs(overrides)]
    folders = [config.run_dir(cfg) for cfg in configs]
    return [(cfg, out, results.state(out)) for cfg, out in zip(configs, folders, strict=True)]


def _summary(overrides: Sequence[str]) -> int:
    states = [state for _, _, state in _states(overrides)]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    print(f"{len(states)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    if "failed" in counts:
        print("the reasons: anomaly-lab-report runs --status; the same command tries them again")
    return int(counts != {"done": len(states)})


def _dry_run(words: Sequence[str]) -> int:
    import json
    from statistics import median

    try:
        states = _states(_overrides(words))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds: dict[Any, list[float]] = {}
    for cfg, out, state in states:
        if state == "done":
            spent = json.loads((out / "result.json").read_text())["seconds"]
            seconds.setdefault(_kind(cfg), []).append(spent["fit"] + spent["score"])
    left = [(cfg, out, state) for cfg, out, state in states if state != "done"]
    for _, out, state in left:
        print(f"{state:<12}{out}")
    known = [median(seconds[_kind(cfg)]) for cfg, _, _ in left if _kind(cfg) in seconds]
    print(f"{len(states)} runs: {len(states) - len(left)} done, {len(left)} to do", end="")
    if known:
        print(f", about {sum(known) / 60:.0f} minutes one after another for {len(known)} of them", end="")
    print("" if len(known) == len(left) else f"; no finished run tells how long {len(left) - len(known)} take")
    return 0


def _kind(cfg: Any) -> tuple[Any, ...]:
    """Runs of one kind take about the same time: all but class and seed are equal."""
    from anomaly_lab import config

    return (cfg.choices.model, cfg.dataset.name, cfg.choices.split, str(config.changed(cfg)))


def data(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-data download|list|check``: the data sets' caches, where there is a network to fetch them."""
    import argparse

    parser = argparse.ArgumentParser(prog="anomaly-lab-data", description="Fetch, list and verify data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the data sets there are configs for, and whether they are ready")
    for name, text in (("download", "fetch and decode data sets once"), ("check", "verify their checksums")):
        command = commands.add_parser(name, help=text)
        command.add_argument("names", nargs="+", metavar="NAME")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as dataset.path=DIR")
    arguments, extra = parser.parse_known_args(argv)
    del extra

    from hydra.utils import instantiate
    from omegaconf.errors import MissingMandatoryValue

    from anomaly_lab import config

    if arguments.command == "list":
        for path in sorted((config.CONFIG_DIR / "dataset").glob("*.yaml")):
            try:
                dataset = instantiate(config.compose([f"dataset={path.stem}"]).dataset)
            except MissingMandatoryValue:
                print(f"{path.stem:<16}yours: give dataset.name and dataset.path")
                continue
            print(f"{path.stem:<16}{'ready' if dataset.cache.exists() else 'not there'}  {dataset.cache}")
        return 0
    names = [word for word in arguments.names if "=" not in word]
    overrides = [word for word in (*arguments.names, *arguments.overrides) if "=" in word]
    for name in names:
        try:
            dataset = instantiate(config.compose([f"dataset={name}", *overrides]).dataset)
            print(dataset.check() if arguments.command == "check" else f"{name}: ready in {dataset.download()}")
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def report(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-report``: tables, figures and tests of difference from finished runs."""
    from anomaly_lab import results

    return results.main(argv)


def score(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-score``: scores and decisions of new images by a finished run."""
    from anomaly_lab import predict

    return predict.main(argv)
