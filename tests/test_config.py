"""Configurations: identity, run folders, grids; and that every option is classified, reachable and documented."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from anomaly_lab import config

YAMLS = sorted(config.CONFIG_DIR.rglob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (config.CONFIG_DIR / "experiment").glob("*.yaml"))


def test_a_plain_run_has_nothing_changed_and_a_plain_folder() -> None:
    cfg = config.compose(["model=shared_ae", "normal_class=8", "seed=3"])
    assert config.changed(cfg) == {}
    assert config.run_dir(cfg) == Path("runs/shared_ae/digits/pooled/n8/s3")
    assert config.identity(cfg)["normal_class"] == 8


@pytest.mark.parametrize(
    "override",
    [
        "model.budget.epochs=7",
        "model.batch_size=32",
        "model.optimizer.lr=1e-3",
        "model.clip=1.0",
        "model.scheduler={_target_:torch.optim.lr_scheduler.StepLR,_partial_:true,step_size:1}",
        "model.input.fit=resize",
        "split.contamination.rate=0.05",
        "split.max_train=50",
        "split.seed=1",
        "trainer.precision=tf32",
        "trainer.threshold_quantile=0.9",
    ],
)
def test_what_can_change_a_result_makes_another_run(override: str) -> None:
    cfg = config.compose(["model=shared_ae", override])
    assert all(key.startswith(override.split("=")[0]) for key in config.changed(cfg))
    assert config.changed(cfg)
    assert re.fullmatch(r"s0-[0-9a-f]{8}", config.run_dir(cfg).name)


@pytest.mark.parametrize(
    "override",
    [
        "logger=none",
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        "trainer.progress=false",
        "trainer.watch_test=true",
        "trainer.measure_leak=true",
        "trainer.score_batch_size=7",
        "trainer.checkpoint_every=2",
        "trainer.capture=true",
        "trainer.channels_last=true",
    ],
)
def test_what_cannot_change_a_result_is_the_same_run(override: str) -> None:
    cfg = config.compose(["model=shared_ae", override])
    assert config.changed(cfg) == {} and config.run_dir(cfg) == config.run_dir(config.compose(["model=shared_ae"]))


def test_every_trainer_option_is_tested_one_way_or_the_other() -> None:
    here = Path(__file__).read_text()
    for option in config.compose().trainer:
        assert f'"trainer.{option}=' in here, f"decide whether trainer.{option} can change a result"


def test_the_same_number_written_otherwise_is_the_same_run() -> None:
    two, also_two = (config.compose([f"model.detector.alpha={text}"]) for text in ("2", "2.0"))
    assert config.run_dir(two) == config.run_dir(also_two) != config.run_dir(config.compose())


def test_a_setting_spelled_out_at_its_default_changes_nothing() -> None:
    assert config.changed(config.compose(["model=shared_ae", "model.budget.epochs=50"])) == {}


def test_an_experiment_is_named_but_is_no_part_of_the_identity() -> None:
    job = config.jobs(["experiment=shared_ae_readings"])[1]
    cfg = config.compose([*job, "dataset=digits", "split=pooled"])
    assert cfg.choices.experiment == "shared_ae_readings"
    assert "model.budget.epochs" in config.changed(cfg), "the experiment's body is not a group's default"


def test_a_number_that_is_one_classs_name_and_anothers_index_is_refused(tmp_path: Path) -> None:
    pixels = np.arange(36 * 64, dtype=np.uint32).astype(np.uint8).reshape(36, 1, 8, 8)
    labels, is_test = np.repeat([0, 1, 2], 12), np.tile([False, True], 18)
    np.savez(
        tmp_path / "a.npz", images=pixels, labels=labels, is_test=is_test, class_names=np.array(["1", "2", "good"])
    )
    base = ["dataset=npz", "dataset.name=own", f"dataset.path={tmp_path / 'a.npz'}"]
    with pytest.raises(ValueError, match="normal_class=1 is the name of class 0 and the index of class 2"):
        config.target(config.compose([*base, "normal_class=1"]))
    assert config.target(config.compose([*base, "normal_class='1'"])) == 0
    assert config.target(config.compose([*base, "normal_class=good"])) == 2


def test_jobs_of_a_multirun_are_hydras() -> None:
    jobs = config.jobs(["model=ede,shared_ae", "normal_class=range(0,3)", "trainer.progress=false"])
    assert len(jobs) == 6
    assert jobs[0] == ["model=ede", "normal_class=0", "trainer.progress=False"]
    assert jobs[-1] == ["model=shared_ae", "normal_class=2", "trainer.progress=False"]


def test_the_command_line_replaces_a_part_of_an_experiments_grid() -> None:
    whole = config.jobs(["experiment=jia2022_mnist"])
    assert len(whole) == 5 * 10 * 3
    assert len(config.jobs(["experiment=jia2022_mnist", "seed=0", "model=ede"])) == 10


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_a_grid_of_distinct_runs(experiment: str) -> None:
    jobs = config.jobs([f"experiment={experiment}"])
    assert len(jobs) > 1 and len({tuple(job) for job in jobs}) == len(jobs)
    cfg = config.compose(jobs[0])
    for part in (cfg.model, cfg.dataset, cfg.split):
        OmegaConf.to_container(part, resolve=True, throw_on_missing=True)
    header = (config.CONFIG_DIR / "experiment" / f"{experiment}.yaml").read_text()
    assert f"anomaly-lab -m experiment={experiment}" in header, "the header is the command that makes it"


def test_inside_a_running_hydra_job_the_global_state_survives() -> None:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(config.CONFIG_DIR), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        config.compose(["model=ede"])
        assert GlobalHydra.instance().hydra is before


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(config.CONFIG_DIR)))
def test_every_yaml_says_at_its_top_what_it_is_for(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert any(line.startswith("# ") for line in lines[:2])


# The arrows of the design: who may import whom when a module is loaded.
ALLOWED = {
    "__init__": set(),
    "batches": set(),
    "capture": set(),
    "config": set(),
    "files": set(),
    "errors": {"files"},
    "datasets": {"errors", "files"},
    "splits": set(),
    "data": {"batches", "datasets", "splits"},
    "metrics": set(),
    "course": {"batches", "errors", "metrics"},
    "players": set(),
    "randomness": set(),
    "switches": set(),
    "turns": {"switches"},
    "detector": {"batches", "course", "players", "randomness", "turns"},
    "build": {"capture", "config", "data", "detector", "files", "players", "randomness", "turns"},
    "cli": {"errors"},
    "figures": {"files", "metrics"},
    "measure": {"config", "course", "data", "detector", "figures", "metrics"},
    "networks": {"errors"},
    "predict": {"datasets", "errors", "files"},
    "results": {"files"},
    "slurm": {"errors", "files"},
    "status": {"files", "results", "slurm"},
    "tables": {"results"},
    "report": {"files", "results", "status", "tables"},
    "tracking": {"config", "errors", "files"},
    "run": {"build", "config", "data", "detector", "errors", "files", "measure", "switches", "tracking", "turns"},
    "sweep": {"config", "errors", "files", "slurm", "status"},
}
TORCHLESS = {"files", "datasets", "splits", "metrics", "figures", "config", "cli", "turns", "switches", "__init__"} | {
    *("results", "tables", "report", "status", "slurm", "sweep", "errors"),
}
PACKAGE = Path(config.__file__).parent


def imported(path: Path) -> set[str]:
    """Modules that ``path`` imports when it is loaded: not inside functions, not for type checkers alone."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_the_arrows_between_modules(path: Path) -> None:
    modules = imported(path)
    own = {name.split(".")[1] for name in modules if name.startswith("anomaly_lab.")}
    allowed = {"detector", "networks", "turns"} if path.parent.name == "methods" else ALLOWED[path.stem]
    assert own <= allowed
    if path.stem in TORCHLESS and path.parent == PACKAGE:
        heavy = {"torch", "lightning", "torchmetrics", "torchvision", "wandb", "pandas", "matplotlib"}
        assert not {name.split(".")[0] for name in modules} & heavy


def test_jobs_composed_together_are_those_composed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = config.jobs(["model=shared_ae,ganomaly", "normal_class=0,'1',good", "seed=0,1", "model.batch_size=8,16"])
    jobs += [["seed=1", "seed=2"], ["experiment=jia2022_mnist_small", "normal_class=3"], ["+model.new=1", "seed=4"], []]
    expected = [config.compose(job) for job in jobs]
    calls = []
    compose = config.compose
    monkeypatch.setattr(config, "compose", lambda overrides: calls.append(overrides) or compose(overrides))
    together = list(config.compose_all(jobs))
    assert [OmegaConf.to_yaml(cfg) for cfg in together] == [OmegaConf.to_yaml(cfg) for cfg in expected]
    assert len(jobs) == 28 and len(calls) == 4 + 3
    with pytest.raises(HydraException):
        list(config.compose_all([["seed=[1"]]))
    with pytest.raises(HydraException):
        list(config.compose_all([["seed=1,2"]]))
