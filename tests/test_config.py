"""Configurations: identity, run folders, grids; and that every option is classified, reachable and documented."""

from __future__ import annotations

import ast
import graphlib
import pickle
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from anomaly_lab import config, grids

YAMLS = sorted(config.CONFIG_DIR.rglob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (config.CONFIG_DIR / "experiment").glob("*.yaml"))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        *((f"model.detector.contrast={word}", "true or false") for word in ("no", "off", "null_", "1")),
        ("trainer.figures=no", "true or false"),
        ("trainer.watch_test=off", "true or false"),
        ("trainer.threads=0", "trainer.threads=0: give a whole number from 1"),
        ("trainer.score_batch_size=-3", "score_batch_size=-3: give a whole number from 1"),
        ("trainer.threshold_quantile=abc", "threshold_quantile=abc: give a number"),
        ("trainer.feature_cache_gb=abc", "feature_cache_gb=abc: give a number"),
        ("model.input.size=abc", "model.input.size=abc: give a number"),
        ("model.input.size=true", "model.input.size=True: give a number"),
        ("model.input.size=null", "model.input.size=null: give a number"),
        ("model.input.size=32.5", "model.input.size=32.5: give a whole number from 1"),
        ("trainer.threshold_quantile=null", "threshold_quantile=null: give a number"),
        ("trainer.feature_cache_gb=null", "feature_cache_gb=null: give a number"),
        *(
            (f"model.input.range={word}", "two growing numbers")
            for word in ("null", "5", "[0]", "[0,inf]", "[a,b]", "[1,0]")
        ),
        ("trainer.precision=16", "trainer.precision=16: choose 32-true, tf32 or bf16-mixed"),
        ("trainer.checkpoint_every=0", "trainer.checkpoint_every=0: give a whole number from 1"),
        ("model.batch_size=0", "model.batch_size=0: give a whole number from 2"),
        ("model.budget.epoch_steps=0", "epoch_steps=0: give a whole number from 1"),
        ("model.optimizer=adam", r"model.optimizer=adam: give a factory \(model.optimizer._target_, and"),
        ("split.contamination=0.1", "=0.1: it has keys of its own, write split.contamination.rate=0.1$"),
        ("split.known=null", "split.known=null: it has keys of its own, write split.known.rate=...$"),
        ("model.input=64", "model.input=64: it has keys of its own, write model.input.size=64$"),
        ("model.budget=5", "model.budget=5: it has keys of its own, write model.budget.epochs=5$"),
        ("model.input.augment={shift:2}", "ocsvm takes no training steps"),
    ],
)
def test_a_text_is_no_switch_and_no_number(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config.refuse_impossible(config.compose(["model=ocsvm", word]))


def test_a_section_that_is_left_out_has_no_switches() -> None:
    config.refuse_impossible(config.compose(["model=addpa", "model.detector.features=null"]))


def test_a_plain_run_has_nothing_changed_and_a_plain_folder() -> None:
    cfg = config.compose(["model=shared_ae", "size=full", "normal_class=8", "seed=3"])
    assert config.changed(cfg) == {}
    assert config.job(cfg).out == Path("runs/shared_ae/digits/pooled/n8/s3")
    assert config.job(cfg).identity["normal_class"] == 8


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
        "split.known.rate=0.05",
        "split.val_share=0.2",
        "split.max_train=50",
        "split.seed=1",
        "trainer.precision=tf32",
        "trainer.threshold_quantile=0.9",
    ],
)
def test_what_can_change_a_result_makes_another_run(override: str) -> None:
    cfg = config.compose(["model=deep_sad" if "known" in override else "model=shared_ae", override])
    assert all(key.startswith(override.split("=")[0]) for key in config.changed(cfg))
    assert config.changed(cfg)
    assert re.fullmatch(r"s0-[0-9a-f]{8}", config.job(cfg).out.name)


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
        "trainer.figures=false",
        "trainer.cuda_graphs=true",
        "trainer.channels_last=true",
        "trainer.feature_cache_gb=0",
    ],
)
def test_what_cannot_change_a_result_is_the_same_run(override: str) -> None:
    cfg = config.compose(["model=shared_ae", override])
    assert config.changed(cfg) == {} and config.job(cfg).out == config.job(config.compose(["model=shared_ae"])).out


def test_every_trainer_option_is_tested_one_way_or_the_other() -> None:
    here = Path(__file__).read_text()
    for option in config.compose().trainer:
        assert f'"trainer.{option}=' in here, f"decide whether trainer.{option} can change a result"


def test_the_same_number_written_otherwise_is_the_same_run() -> None:
    two, also_two = (config.compose([f"model.detector.alpha={text}"]) for text in ("2", "2.0"))
    assert config.job(two).out == config.job(also_two).out != config.job(config.compose()).out


def test_a_setting_spelled_out_at_its_default_changes_nothing() -> None:
    for size, epochs in (("full", 15), ("small", 5)):
        given = ["model=shared_ae", f"size={size}", f"model.budget.epochs={epochs}"]
        assert config.changed(config.compose(given)) == {}


def test_an_experiment_is_named_but_is_no_part_of_the_identity() -> None:
    job = grids.jobs(["experiment=shared_ae_readings"])[1]
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
    with pytest.raises(ValueError, match="normal_class=1 is the name of class 0 and the index of class 2") as error:
        config.target(config.compose([*base, "normal_class=1"]))
    assert str(error.value).endswith("write normal_class=\"'1'\" or normal_class=\"'2'\""), "2 is an index as well"
    assert config.target(config.compose([*base, "normal_class='1'"])) == 0
    assert config.target(config.compose([*base, "normal_class=good"])) == 2


def test_jobs_of_a_multirun_are_hydras() -> None:
    jobs = grids.jobs(["model=ede,shared_ae", "normal_class=range(0,3)", "trainer.progress=false"])
    assert len(jobs) == 6
    assert jobs[0] == ["model=ede", "normal_class=0", "trainer.progress=False"]
    assert jobs[-1] == ["model=shared_ae", "normal_class=2", "trainer.progress=False"]


VALUES = ["null", "true", "3", "1e-3", "a/b.c", "'a b'", r"'a\'b,c'", "[0,0.9]", "[]", "{size:28,fit:resize}", "-inf"]
REFERENCES = ["${seed}", "[${seed},1]", "${oc.env:HOME}/x", "'${oc.env:HOME}/x y'"]


@pytest.mark.parametrize("value", [*VALUES, *REFERENCES])
def test_what_a_sweep_sets_in_each_job_is_what_was_given(value: str) -> None:
    """However it is quoted on its way through Hydra's sweeper."""
    [words] = grids.grids(["model=ede,knn", f"model.key={value}"])
    moved = words[1].removeprefix("+hydra.sweeper.params=")
    [said] = config.parse([f"x={moved}"])
    [(key, text)] = OmegaConf.create(said.value()).items()
    [[job]] = BasicSweeper.split_arguments(config.parse([f"{key}={text}"]), None)
    assert config.parse(job)[0].value() == config.parse([f"model.key={value}"])[0].value()
    assert job == [word for word in grids.jobs(["model=ede,knn", f"model.key={value}"])[0] if "key" in word]
    assert grids.grids(["model=ede", f"model.key={value}", "seed=0,1"])[0][1] == f"model.key={value}", (
        "nothing is swept"
    )


@pytest.mark.parametrize("values", [["3,5", "4"], ["4", "3,5"]])
def test_of_a_key_that_a_sweep_sets_twice_the_last_values_count(values: list[str]) -> None:
    words = ["model=ede,knn", *(f"model.batch_size={value}" for value in values)]
    assert len(grids.grids(words)[0]) == 2 and len(grids.jobs(words)) == 2 * len(values[-1].split(","))
    assert {job[-1] for job in grids.jobs(words)} == {f"model.batch_size={value}" for value in values[-1].split(",")}


def test_a_key_that_some_experiments_models_lack_is_refused_by_their_names(users: Path) -> None:
    (users.parent / "experiment").mkdir()
    for name in ("knn", "kde"):
        text = f"# @package _global_\ndefaults: [override /model: {name}]\n"
        text += "hydra: {sweeper: {params: {seed: '0,1'}}}\n"
        (users.parent / "experiment" / f"of_{name}.yaml").write_text(text)
    jobs = grids.jobs(["experiment=of_knn,of_kde", "model.detector.pca_variance=0.9"])
    with pytest.raises(ValueError, match=r"pca_variance cannot be set for every model of this sweep \(knn has none\)"):
        grids.refuse_unknown_keys(jobs)
    grids.refuse_unknown_keys([job for job in jobs if "experiment=of_kde" in job])


def test_the_command_line_replaces_a_part_of_an_experiments_grid() -> None:
    whole = grids.jobs(["experiment=jia2022_mnist"])
    assert len(whole) == 12 * 10 * 3, "the ablation with both weights, three floors and the ceiling"
    assert len(grids.jobs(["experiment=jia2022_mnist", "seed=0", "model=ede"])) == 10


def test_several_experiments_are_their_grids_one_after_another(users: Path) -> None:
    (users.parent / "experiment").mkdir()
    for name, params in {
        "one": "{model: ede, seed: '0,1'}",
        "two": "{model: 'pca,knn'}",
        "both": "{experiment: 'one,two', normal_class: 1}",
    }.items():
        text = f"# @package _global_\nhydra: {{sweeper: {{params: {params}}}}}\n"
        (users.parent / "experiment" / f"{name}.yaml").write_text(text)
    one = [["model=ede", f"seed={seed}", "size=full", "experiment=one"] for seed in (0, 1)]
    two = [[f"model={model}", "size=full", "experiment=two"] for model in ("pca", "knn")]
    assert grids.jobs(["experiment=one,two", "size=full"]) == [*one, *two]
    assert grids.grids(["experiment=one", "size=full"]) == [["experiment=one", "size=full"]]
    named = grids.jobs(["experiment=both", "size=full"])
    assert [sorted(job) for job in named] == [sorted([*job, "normal_class=1"]) for job in [*one, *two]]
    assert {len(grids.jobs([f"experiment=both{words}"])) for words in (",one", ",two", ",both")} == {6, 8}
    assert [config.compose(words).choices.experiment for words in named] == ["one", "one", "two", "two"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_a_grid_of_distinct_runs(experiment: str) -> None:
    jobs = grids.jobs([f"experiment={experiment}"])
    assert len(jobs) > 1 and len({tuple(job) for job in jobs}) == len(jobs)
    cfg = config.compose(jobs[0])
    for part in (cfg.model, cfg.dataset, cfg.split):
        OmegaConf.to_container(part, resolve=True, throw_on_missing=True)
    text = (config.CONFIG_DIR / "experiment" / f"{experiment}.yaml").read_text()
    assert f"anomaly-lab -m experiment={experiment}" in text, "the header is the command that makes it"
    [size] = re.findall(r"^size: (.+)$", text, re.M)
    assert size in ("full", "small") and (size == "small" or not experiment.endswith("_small"))
    assert cfg.size == size or any(word.startswith("size=") for word in jobs[0])


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
    "methods": {"adversarial", "calibration", "detector", "errors", "methods", "networks"},
    "adversarial": set(),
    "archive": {"files", "record", "results"},
    "batches": set(),
    "cuda_graphs": set(),
    "config": {"record", "values"},
    "files": set(),
    "errors": {"files"},
    "datasets": {"errors", "files", "images", "pictures"},
    "images": {"errors", "files"},
    "pictures": {"errors"},
    "splits": set(),
    "data": {"batches", "features", "images", "splits", "values"},
    "metrics": set(),
    "course": {"batches", "errors", "metrics"},
    "players": set(),
    "randomness": set(),
    "switches": set(),
    "turns": {"switches"},
    "calibration": {"detector"},
    "detector": {"batches", "course", "players", "randomness", "turns"},
    "build": {
        "config",
        "course",
        "cuda_graphs",
        "data",
        "detector",
        "errors",
        "features",
        "files",
        "players",
        "randomness",
        "record",
        "turns",
        "values",
    },
    "advice": {"config", "values"},
    "grids": {"advice", "config", "errors"},
    "cli": {"errors", "files"},
    "extras": {"results", "tables"},
    "estimator": {
        "advice",
        "build",
        "config",
        "data",
        "detector",
        "errors",
        "images",
        "metrics",
        "players",
        "predict",
        "splits",
        "switches",
    },
    "export": {"errors", "files"},
    "features": {"errors", "files", "images"},
    "figures": {"files", "metrics"},
    "measure": {"build", "config", "course", "data", "detector", "errors", "figures", "metrics", "turns"},
    "networks": {"errors", "files"},
    "predict": {"errors", "files", "pictures", "record"},
    "record": {"files"},
    "results": {"files", "record"},
    "scattering": set(),
    "slurm": {"errors", "files", "record"},
    "status": {"files", "record", "results", "slurm"},
    "submission": {"archive", "errors", "files", "record", "results"},
    "tables": {"record", "results"},
    "report": {"extras", "files", "record", "results", "status", "tables"},
    "ranking": {"files", "report", "results", "tables"},
    "testing": {"batches", "build", "config", "data", "detector", "errors", "players", "switches"},
    "trust": {"detector"},
    "values": {"errors"},
    "tracking": {"config", "errors", "files"},
    "run": {
        "build",
        "calibration",
        "config",
        "data",
        "detector",
        "errors",
        "files",
        "measure",
        "record",
        "switches",
        "tracking",
    }
    | {"turns"},
    "sweep": {"config", "errors", "grids", "files", "record", "slurm", "status"},
}
TORCHLESS = {
    "files",
    "pictures",
    "datasets",
    "images",
    "splits",
    "metrics",
    "figures",
    "config",
    "cli",
    "turns",
    "switches",
    "__init__",
} | {
    *("results", "tables", "report", "status", "slurm", "sweep", "grids", "advice", "errors", "record", "pictures"),
    "values",
}
# Imports inside functions: what takes seconds or is an extra comes with the first use, so that --help, a dry run and a
# status report stay quick; and what looks at configurations only where there are any.
LATE = {
    "__init__": {"estimator", "predict"},
    "config": {"images"},
    "cli": {
        "advice",
        "archive",
        "config",
        "export",
        "files",
        "networks",
        "pictures",
        "predict",
        "ranking",
        "report",
        "results",
    }
    | {"submission", "sweep", "testing"}
    | {"hydra", "numpy", "omegaconf", "torch", "tqdm"},
    "datasets": {"sklearn", "torchvision", "tqdm"},
    "images": {"PIL"},
    "errors": {"hydra", "omegaconf"},
    "export": {"PIL", "onnxruntime", "onnxscript", "torch"},
    "figures": {"matplotlib"},
    "methods": {"scipy", "sklearn"},
    "gpnd": {"scipy"},
    "networks": {"torchvision"},
    "pictures": {"PIL"},
    "predict": {"build", "data", "figures", "switches", "trust", "hydra", "omegaconf", "torch"},
    "ranking": {"figures", "pandas", "scipy"},
    "report": {"figures", "grids", "run", "tracking", "hydra", "jinja2"},
    "record": {"metrics", "numpy"},
    "results": {"pandas"},
    "slurm": {"submitit"},
    "sweep": {"run", "tracking", "lightning", "torch"},
    "switches": {"torch"},
    "tables": {"pandas", "scipy"},
    "tracking": {"PIL", "requests", "torch", "wandb", "wandb_workspaces"},
    "turns": {"torch"},
}
PACKAGE = Path(config.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """What import statements among ``nodes`` name: modules of ours without the package's name, packages of others'."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {words[words[0] == "anomaly_lab"] for words in parts if words[0] not in sys.stdlib_module_names}


def inside_functions(tree: ast.Module) -> set[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return imported(inner for function in functions for inner in ast.walk(function))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_arrows_between_modules(path: Path) -> None:
    tree = ast.parse(path.read_text())
    loaded, ours = imported(tree.body), {source.stem for source in SOURCES} | {"methods"}
    room = "methods" if path.parent.name == "methods" else path.stem
    assert loaded & ours <= ALLOWED[room]
    assert inside_functions(tree) <= LATE.get(room, set()), "an import inside a function that LATE does not name"
    if path.stem in TORCHLESS and path.parent == PACKAGE:
        assert not loaded & {"torch", "lightning", "torchmetrics", "torchvision", "wandb", "pandas", "matplotlib"}


def test_no_module_is_reached_from_itself_whenever_it_imports() -> None:
    """Neither when modules are loaded, nor through an import inside a function."""
    trees = {path.stem: ast.parse(path.read_text()) for path in SOURCES if path.stem != "__init__"}
    arrows = {name: (imported(tree.body) | inside_functions(tree)) & trees.keys() for name, tree in trees.items()}
    assert list(graphlib.TopologicalSorter(arrows).static_order())


def test_an_import_inside_a_function_is_seen() -> None:
    tree = ast.parse(
        "import json\ndef f():\n    class A:\n        def g(self):\n            from anomaly_lab.run import run"
    )
    assert inside_functions(tree) == {"run"} and imported(tree.body) == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_rooms_have_walls(path: Path) -> None:
    """No file grows past 750 lines, no class of the contract past 200, and nobody reaches through the trainer."""
    text = path.read_text()
    assert len(text.splitlines()) <= 750
    assert not re.search(r"trainer\.(lightning_module|datamodule)|\.trainer\.model\b", text)
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == "Detector":
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 200


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ("model.input.range=[0,1]", "model.input.range=[0.0,1.0]"),
        ("model.optimizer.betas=[0,0.9]", "model.optimizer.betas=[0.0,0.9]"),
        ("split.contamination.classes=[3,5]", "split.contamination.classes=[5,3]"),
        ("split.contamination.classes=[3,5]", "split.contamination.classes=[5,3,5]"),
        ("split.contamination.classes=[3,5]", "split.contamination.classes=['5',3]"),
        ("split.contamination.classes=[3]", "split.contamination.classes=3"),
        ("seed=4", "seed=4 split.seed=4"),
    ],
)
def test_one_configuration_has_one_folder(one: str, same: str, tmp_path: Path) -> None:
    jobs = [config.job(config.compose([*f"{words} data_dir={tmp_path}".split()])) for words in (one, same)]
    assert jobs[0].out == jobs[1].out and jobs[0].identity == jobs[1].identity
    jobs[1].refuse_other_settings(jobs[0].settings)


def test_other_configurations_have_other_folders(tmp_path: Path) -> None:
    words = ["split.contamination.classes=[3]", "split.contamination.classes=[3,5]", "split.seed=1", "seed=1", ""]
    jobs = [config.job(config.compose([*f"{word} data_dir={tmp_path}".split()])) for word in words]
    assert len({job.out for job in jobs}) == len(words)


@pytest.mark.parametrize("words", ["model.optimizer.lr=inf", "model.optimizer.lr=nan", "model.detector.alpha=-inf"])
def test_numbers_that_are_not_finite_are_refused_before_training(words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"=(inf|nan|-inf): give a finite number"):
        config.job(config.compose([words, f"data_dir={tmp_path}"]))


def test_a_whole_number_may_be_written_as_a_float() -> None:
    words = ["model=conv_ae", "split.max_test=1e3", "model.batch_size=1e2", "model.budget.epochs=1e1", "seed=1e0"]
    words += ["trainer.threads=2.0", "model.optimizer.lr=1.0", "model.input.size=16.5"]
    for cfg in (config.compose(words), config.without_hydra(config.compose_with_hydra(words))):
        found = (cfg.split.max_test, cfg.model.batch_size, cfg.model.budget.epochs, cfg.seed, cfg.trainer.threads)
        assert found == (1000, 100, 10, 1, 2) and {*map(type, found)} == {int}
        assert type(cfg.model.optimizer.lr) is float, "the yaml has a float there"
        assert cfg.model.input.size == 16.5, "no whole number is made of another"


def test_the_name_of_a_data_set_is_that_of_its_reader(tmp_path: Path) -> None:
    own = [f"dataset.path={tmp_path}", f"data_dir={tmp_path}"]
    for dataset, name in (("npz", "mnist"), ("image_folder", "usps"), ("mnist", "cifar10")):
        words = [f"dataset={dataset}", f"dataset.name={name}", *own[dataset == "mnist" :]]
        with pytest.raises(ValueError, match=f"dataset.name={name} is the name of dataset={name}: choose that"):
            config.load_images(config.compose(words))
    assert config.reader(config.compose(["dataset=npz", "dataset.name=usps", *own]).dataset).name == "usps"


def test_each_choice_of_files_is_composed_once_and_each_job_is_what_hydra_composes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = grids.jobs(["model=shared_ae,ganomaly", "normal_class=0,'1',good", "seed=0,1", "model.batch_size=8,16"])
    jobs += [["seed=1", "seed=2"], ["experiment=jia2022_mnist_small", "normal_class=3"], ["+model.new=1", "seed=4"], []]
    jobs += [["split.contamination.rate=0.05", "trainer.precision=tf32", "logger=none", "runs=my runs", "data_dir=a/b"]]
    jobs += [["model.scheduler={a:1,b:{c:2}}", "model.scheduler.b.c=3", "model.input.range=[0,1]"]]
    jobs += [["experiment=jia2022_mnist_small", "model.budget.epochs=3", "model.budget.epochs=4", "size=full"]]
    jobs += [
        ["dataset=mnist", "model=ede", "split=official"],
        ["split=official", "logger=csv", "model=ede", "dataset=mnist"],
    ]
    jobs += [["experiment=jia2022_mnist_small", "dataset=digits", "split=pooled", "normal_class=3"]]
    expected = [config.without_hydra(config.compose_with_hydra(job)) for job in jobs]
    config._composed.cache_clear()
    real, calls = config.compose_with_hydra, []
    monkeypatch.setattr(config, "compose_with_hydra", lambda overrides: calls.append(overrides) or real(overrides))
    found = [config.compose(job) for job in jobs]
    assert [OmegaConf.to_yaml(cfg) for cfg in found] == [OmegaConf.to_yaml(cfg) for cfg in expected]
    assert all(OmegaConf.is_struct(cfg) for cfg in found)
    assert len(jobs) == 34 and len(calls) == 2 + 6
    found[30].model.budget.epochs = 99
    assert config.compose(jobs[30]).model.budget.epochs == 4, "what is kept is nobody's"


def test_ones_own_yamls_are_composed_as_they_were_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(config.EXTRA_CONFIGS, str(tmp_path))
    mine = tmp_path / "model" / "mine.yaml"
    mine.parent.mkdir()
    (mine.parent / ".#mine.yaml").symlink_to("user@host.123")  # an editor's lock
    text = (config.CONFIG_DIR / "model" / "knn.yaml").read_text()
    for more in ("", "new: 1\n", ""):
        mine.write_text(text + more)
        assert ("new" in config.compose(["model=mine"]).model) == bool(more)
        assert config.changed(config.compose(["model=mine"])) == {}, "its defaults are the file's present ones"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=[1"], r"\[1"),
        (["seed=1,2"], "seed=1,2"),
        (["model.batch_size=8,16"], "model.batch_size=8,16"),
        (["model.typo=1"], r"model\.typo"),
        (["size.typo=1"], r"size\.typo"),
        (["model=typo", "seed=1"], "typo"),
    ],
)
def test_what_cannot_be_composed_is_said_in_hydras_words(words: list[str], said: str) -> None:
    with pytest.raises(HydraException, match=said):
        config.compose(words)


# Sizes --------------------------------------------------------------------------------------------------------------


def sizes(*overrides: str) -> tuple[str, int, int, dict[str, object]]:
    """The name of a run of GANomaly, its width, its epochs, and what was changed."""
    cfg = config.compose(["model=ganomaly", *overrides])
    job = config.job(cfg)
    assert job.out.parts[1] == job.identity["model"] and cfg.choices.model == "ganomaly"
    return job.identity["model"], cfg.model.detector.width, cfg.model.budget.epochs, job.identity["changed"]


def test_a_size_is_a_key_and_the_names_of_runs_are_what_they_were() -> None:
    assert sizes("size=full") == ("ganomaly", 64, 15, {})
    assert sizes("size=small") == sizes() == ("ganomaly_small", 16, 5, {})
    assert "size" not in config.settings(config.compose(["model=ganomaly"]))


def test_a_value_on_the_command_line_wins_over_both_sizes() -> None:
    assert sizes("model.detector.width=8") == ("ganomaly_small", 8, 5, {"model.detector.width": 8})
    assert sizes("size=full", "model.detector.width=16") == ("ganomaly", 16, 15, {"model.detector.width": 16})
    assert sizes("model.detector.width=16") == sizes(), "the default of that size"
    every = ["model.detector.width=64", "model.budget.epochs=15"]
    assert sizes(*every)[0] == "ganomaly_small" and sizes(*every)[3] != {}, "no sized value is left, but its yaml has"


def test_sizes_can_be_swept() -> None:
    jobs = grids.jobs(["model=ganomaly,ede", "size=full,small"])
    names = [config.job(config.compose(words)).identity["model"] for words in jobs]
    assert names == ["ganomaly", "ganomaly_small", "ede", "ede_small"]


def test_a_grid_can_sweep_sizes(users: Path) -> None:
    (users.parent / "experiment").mkdir()
    grid = "hydra: {sweeper: {params: {size: 'full,small', model: ede}}}"
    (users.parent / "experiment/both.yaml").write_text(f"# @package _global_\n{grid}\n")
    assert [job.identity["model"] for job in grids.expected_runs("both")] == ["ede", "ede_small"]


def test_a_part_of_a_configuration_knows_the_size_of_the_whole() -> None:
    for size, widths in (("full", [32] * 4), ("small", [8] * 4)):
        cfg = config.compose(["model=piad_pixel_l1", f"size={size}"])
        assert instantiate(cfg.model.detector, _target_="builtins.dict")["encoder_widths"] == widths
        assert pickle.loads(pickle.dumps(cfg)).model.detector.encoder_widths == widths
        assert OmegaConf.to_container(cfg.model.detector, resolve=True)["encoder_widths"] == widths


@pytest.mark.parametrize("size", ["medium", "null", "1", "[full]", "Small"])
def test_another_size_is_refused_in_one_line(size: str) -> None:
    for model in ("ganomaly", "ganomaly model.detector.width=8 model.budget.epochs=1"):
        with pytest.raises(ValueError, match=r"size=.*: choose full, the paper's, or small"):
            config.job(config.compose([*f"model={model}".split(), f"size={size}"]))


def test_a_size_on_the_command_line_wins_over_an_experiments() -> None:
    assert config.compose(["experiment=jia2022_mnist_small"]).size == "small"
    assert config.compose(["experiment=jia2022_mnist_small", "size=full"]).size == "full"


# A user's yaml ------------------------------------------------------------------------------------------------------

NEIGHBOURS = '''
from anomaly_lab.detector import Detector

class Neighbours(Detector):
    """Distance to the k-th nearest training image."""

    def __init__(self, image_shape, *, k, p=2.0):
        super().__init__(image_shape)
        self.k, self.p = k, p

    def after_fit(self, images):
        self.set_fitted("bank", images.flatten(1))

    def score(self, x):
        return torch.cdist(x.flatten(1), self.bank, self.p).kthvalue(self.k).values

class Learning(Neighbours):
    def __init__(self, image_shape, *, k, width, part, p=2.0):
        super().__init__(image_shape, k=k, p=p)
        self.net = part

    def players(self):
        return {"net": [self.net]}
'''


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user's model yamls, beside a method without gradients."""
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "neighbours.py").write_text("import torch\n" + NEIGHBOURS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(config.EXTRA_CONFIGS, str(tmp_path / "conf"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "conf/model"


def test_the_yaml_of_a_method_without_gradients_holds_its_own_numbers_only(users: Path) -> None:
    (users / "neighbours.yaml").write_text("# k-NN.\ndetector: {_target_: neighbours.Neighbours, k: 3}\n")
    given = ["model=neighbours", "normal_class=0", "trainer.progress=false", "logger=none", "trainer.accelerator=cpu"]
    for size in ("full", "small"):
        job = config.job(config.compose([*given, f"size={size}"]))
        assert job.identity["model"] == "neighbours" and job.identity["changed"] == {}, "one size, one name"
        assert job.cfg.model.optimizer is None and not config.reduced(job.cfg)
    assert config.changed(config.compose([*given, "model.detector.k=5"])) == {"model.detector.k": 5}

    from anomaly_lab.run import run

    result = run(job.cfg)
    assert result is not None and result["epochs"] == result["steps"] == 0 and result["metrics"]["auroc"] > 0.9


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "schedular: {_target_: torch.optim.lr_scheduler.StepLR}",
            r"model\.schedular of model=mine .*: write model\.sch",
        ),
        ("bugdet: {epochs: 3}", r"model\.bugdet of model=mine is read by nothing: write model\.budget$"),
        ("budget: {epoch: 3}", r"write model\.budget\.epochs$"),
        ("input: {colours: 1}", r"model\.input\.colours .*: there are size, fit, range, channels, augment, features$"),
    ],
)
def test_a_key_of_ones_own_yaml_that_nothing_reads_is_refused(users: Path, line: str, said: str) -> None:
    (users / "mine.yaml").write_text(f"# k-NN.\ndetector: {{_target_: neighbours.Neighbours, k: 3}}\n{line}\n")
    with pytest.raises(ValueError, match=said):
        config.job(config.compose(["model=mine", "normal_class=0"]))


def test_what_a_yaml_lacks_is_named_at_once_with_its_file(users: Path) -> None:
    from anomaly_lab.run import make_detector

    own = ["_target_: neighbours.Learning", "width: ???", "part: {_target_: torch.nn.Linear, bias: false}"]
    (users / "learning.yaml").write_text("\n  ".join(["# Mine.\ndetector:", *own]))
    with pytest.raises(ValueError) as caught:
        make_detector(config.compose(["model=learning"]), (1, 8, 8))
    names = [f"model.detector.{name}" for name in ("k", "part.in_features", "part.out_features", "width")]
    assert str(caught.value) == f"{users / 'learning.yaml'} lacks {', '.join(names)}"

    part = "+model.detector.part.in_features=1 +model.detector.part.out_features=1"
    whole = ["model=learning", *part.split(), "+model.detector.k=1", "model.detector.width=1"]
    with pytest.raises(ValueError, match=r"lacks model\.budget\.epochs \(or \.steps or \.stages\), model\.optimizer$"):
        make_detector(config.compose(whole), (1, 8, 8))
    learns = ["model.budget.epochs=1", "model.optimizer={_target_:torch.optim.SGD,_partial_:true,lr:1}"]
    assert make_detector(config.compose([*whole, *learns]), (1, 8, 8)).players()

    (users / "empty.yaml").write_text("# Nothing yet.\nbatch_size: 8\n")
    with pytest.raises(ValueError, match=r"empty\.yaml lacks model\.detector\._target_$"):
        make_detector(config.compose(["model=empty"]), (1, 8, 8))
