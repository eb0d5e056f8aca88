"""The console commands as a user meets them: what they print, what they exit with, one line for every mistake."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, Said
from hydra.errors import HydraException

from anomaly_lab import __version__, cli, config, grids, record, sweep
from anomaly_lab.advice import NEIGHBOURS, advice
from anomaly_lab.record import LEARNED

TINY = "model.budget.epochs=1 model.budget.epoch_steps=1 model.detector.width=4 trainer.progress=false"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model=typo", "there is no model=typo: choose among aae, "),
        ("-m seed=0,1 model=ede,typo", "there is no model=typo: choose among"),
        ("model=ganomaly_small", "there is no model=ganomaly_small: write model=ganomaly size=small"),
        ("-m model=ede,ganomaly_small", "there is no model=ganomaly_small: write model=ganomaly size=small"),
        ("model=typo_small", "there is no model=typo_small: choose among"),
        ("size=medium", "size=medium: choose full, the paper's, or small"),
        ("size=medium --cfg job --resolve", "size=medium: choose full, the paper's, or small"),
        ("experiment=typo", "there is no experiment=typo: choose among akcay2018,"),
        ("hydra/launcher=typo", "there is no hydra/launcher=typo: choose among abreast, basic"),
        ("typo=1", "typo cannot be set"),
        ("model.detector.widht=1", "model.detector.widht cannot be set: write model.detector.width=1; "),
        (
            "-m model=mean_image,ede model.detector.width=9",
            "set for every model of this sweep (mean_image has none)",
        ),
        ("-m model=kde,knn,pca model.detector.bandwidth=1,2", "set for every model of this sweep (knn, pca have none)"),
        ("-m model=kde,ede model.detector.width=8 model.detector.pca_variance=null", "of this sweep (kde has none)"),
        (
            "-m model=kde,ocsvm model.detector.bandwith=1",
            "model.detector.bandwith cannot be set: write model.detector.",
        ),
        (
            "-m model=kde,ocsvm model.detector.bandwith=1 --dry-run",
            "model.detector.bandwith cannot be set: write model.",
        ),
        (r"""dataset.path="/a\'b" """, "is no key=value: "),
        ("epochs=3", "epochs cannot be set: write model.budget.epochs=3; "),
        ("-m epochs=3 seed=0,1", "epochs cannot be set: write model.budget.epochs=3; "),
        ("--dry-run epochs=3", "epochs cannot be set: write model.budget.epochs=3; "),
        ("model.batchsize=8 model=ganomaly", "model.batchsize cannot be set: write model.batch_size=8"),
        ("modle=ganomaly", "modle cannot be set: write model=ganomaly"),
        ("rate=0.1", "rate cannot be set: write split.known.rate=0.1 (or split.contamination.rate); "),
        ("model=ganomally", "there is no model=ganomally: write model=ganomaly"),
        ("dataset=fashion-mnist", "there is no dataset=fashion-mnist: write dataset=fashion_mnist"),
        ("contamination=0.1", "contamination cannot be set: write split.contamination.rate=0.1; "),
        ("known=0.1", "known cannot be set: write split.known.rate=0.1; "),
        ("optimizer=adam", "optimizer cannot be set: write model.optimizer.lr=...; "),
        ("data=mnist", "data cannot be set: write dataset=mnist; "),
        ("class=3", "class cannot be set: write normal_class=3; "),
        ("dataset.category=3", "dataset.category cannot be set: write normal_class=3; "),
        ("learning_rate=1e-3", "learning_rate cannot be set: write model.optimizer.lr=1e-3; "),
        ("model=pca learning_rate=1e-3", "learning_rate cannot be set (there is no such key): anomaly-lab --cfg job"),
        ("max_steps=9", "max_steps cannot be set: write model.budget.steps=9 model.budget.epochs=null; "),
        ("device=cuda", "device cannot be set: write trainer.accelerator=cuda; "),
        ("trainer.devices=1", "trainer.devices cannot be set: write trainer.accelerator=cuda; "),
        ("gpus=1", "gpus cannot be set: write trainer.accelerator=cuda; "),
        ("image_size=64", "image_size cannot be set: write model.input.size=64; "),
        ("num_workers=2", "num_workers cannot be set: write trainer.threads=2; "),
        ("threshold=0.9", "threshold cannot be set: write trainer.threshold_quantile=0.9; "),
        ("anomalies=mnist", "anomalies cannot be set: write split=ood split.anomalies=mnist; "),
        ("split=50", "split=50: split is chosen by name, split=NAME; anomaly-lab --help shows all"),
        ("-m dataset=null seed=0,1", "dataset=null: dataset is chosen by name, dataset=NAME; "),
        ("normal_class=3 seed=1 model=5", "model=5: model is chosen by name, model=NAME; "),
        ("split.known=null", "split.known=null: it has keys of its own, write split.known.rate=..."),
        ("split.contamination=0.1", "it has keys of its own, write split.contamination.rate=0.1"),
        ("normal_class=café", """quote the value and the whole, "normal_class='café'", or give the index"""),
        ("normal_class='a$é'", """quote the value and the whole, 'normal_class='"'"'a$é'"'"'', or give the index"""),
        ("'normal_class=[a b,thé]'", "or give the index of the class"),
        ("seed", "seed is no key=value"),
        ("'normal_class=range(0,3)'", "normal_class=range(0,3) asks for several runs: add -m"),
        ("normal_class=0,1", "normal_class=0,1 asks for several runs: add -m"),
        ("experiment=jia2022_mnist_small seed=0", "is a grid of runs: add -m, or ask for one of them with model=..."),
        ("experiment=everything", "is a grid of runs: add -m, or ask for one of them with experiment=..."),
        ("-m 'normal_class=range(0,0)'", "normal_class=range(0,0) has no value, so there is no run to make: range("),
        ("-m 'normal_class=range(0,0)' --dry-run", "normal_class=range(0,0) has no value, so there is no run to make"),
        ("--config-dir elsewhere", "go into the folder that ANOMALY_LAB_CONF names"),
        ("normal_class=ten", "no class 'ten': choose name or index among 0 (0), 1 (1)"),
        ("normal_class=10", "no class 10: choose"),
        ("normal_class=0.5", "no class 0.5: choose"),
        ("'normal_class=[0,0.5]'", "no class 0.5: choose"),
        ("split.val_share=half", "split.val_share=half: give a number between 0 and 1"),
        ("\"normal_class='café'\"", "no class 'café': choose name or index among 0 (0)"),
        ("split=official", "digits has no official test half: use split=pooled or split=one_abnormal"),
        ("split=one_abnormal normal_class=3", "write abnormal_class=3"),
        ("abnormal_class=3", "write normal_class=3"),
        ("split.contamination.rate=2", "split.contamination.rate=2 must be at least 0 and below 1"),
        ("dataset=npz", "dataset.name has no value: give dataset.name=..."),
        ("dataset=npz dataset.name=mine dataset.path=mine.npz", "dataset.path=mine.npz is not there"),
        ("dataset=npz dataset.name=mnist dataset.path=mine.npz", "is the name of dataset=mnist: choose that, or give"),
        ("dataset=image_folder dataset.name=usps dataset.path=mine", "dataset.name=usps is the name of dataset=usps"),
        ("split.max_test=99.5", "split.max_test=99.5: give a whole number from 2, or null for all"),
        ("dataset=image_folder dataset.name=mine dataset.path=mine", "dataset.path=mine is not a folder"),
        ("+model.detector.typo=1", "unexpected keyword argument 'typo'"),
        (
            "model.detector._target_=anomaly_lab.typo.Typo",
            "target 'anomaly_lab.typo.Typo': ModuleNotFoundError: No",
        ),
        ("model.detector._target_=anomaly_lab.methods.knn.Typo", "anomaly_lab.methods.knn has no Typo; traceback"),
        ("model.detector._target_=nowhere.Mine", "No module named 'nowhere': PYTHONPATH must name the folder of"),
        ("model.optimizer._partial_=false", "positional argument: 'params'\"): give it _partial_: true; traceback in"),
        ("model.budget.steps=3", "give model.budget one of epochs, steps and stages"),
        ("model=deep_sad model.budget.epochs=1", "of stages, change model.budget.stages."),
        ("model.optimizer.lr=fast", "model.optimizer makes no optimiser ("),
        ("trainer.accelerator=abacus", "You selected an invalid accelerator name"),
    ],
)
def test_a_mistake_gets_one_line(lab: Command, words: str, message: str) -> None:
    code, out, err = lab(words)
    assert (code, out) == (cli.MISTAKE, "")
    assert err.startswith("anomaly-lab: error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("word", [*NEIGHBOURS, "contamination", "budget", "rate"])
def test_what_is_advised_is_a_key(word: str) -> None:
    with pytest.raises(HydraException) as error:
        config.compose([f"{word}=0.5"])
    line = advice(error.value, [f"{word}=0.5"])
    assert line is not None
    [first] = re.findall(r"write (.*?)(?: \(or .*)?; anomaly-lab", line)
    assert "0.5" in first or first == "trainer.accelerator=cuda"
    words = first.replace("dataset=0.5", "dataset=digits").replace("anomalies=0.5", "anomalies=digits").split()
    config.compose(words)


def test_a_dry_run_names_a_missing_value_by_its_key(lab: Command) -> None:
    assert "dataset.name has no value: give dataset.name=..." in lab("dataset=image_folder --dry-run").out
    assert "dataset.path has no value: give dataset.path=..." in lab("dataset=npz dataset.name=x --dry-run").out


def test_the_page_shows_what_the_command_answers(lab: Command) -> None:
    page = (Path(__file__).parent.parent / "docs/command_line.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\$ anomaly-lab (.+)\n((?:(?!\$ |```).+\n)+)", page, re.M)
    assert len(shown) == 12
    for words, answer in shown:
        said = lab(words)
        assert said.out + said.err == answer, words


@pytest.mark.drawn
def test_one_run_prints_its_result_and_a_second_call_only_reads_it(lab: Command) -> None:
    code, out, _ = lab(TINY)
    assert code == 0
    shown = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    result_path = Path(shown["result"])
    result = json.loads(result_path.read_text())
    assert shown["AUROC"].startswith(f"{result['metrics']['auroc']:.3f}  (95 % interval ")
    assert shown["data"] == "digits, split pooled, normal class 0"
    explained = result["learned"]["explained_variance"]
    assert explained < LEARNED and shown["reconstruction"].startswith(
        f"no better than the mean image: explains {explained:.0%} of "
    )
    assert shown["balanced accuracy"].startswith("n/a  (14 held-out normals are too few for a threshold")
    assert "roc.png" in shown["figures"]
    before = result_path.stat().st_mtime_ns
    again = lab(TINY)
    assert again == (0, out, "")
    assert result_path.stat().st_mtime_ns == before

    # It is read and printed without torch, whose import takes seconds.
    command = f"sys.argv = {['anomaly-lab', *shlex.split(TINY)]}; cli.train(); assert 'torch' not in sys.modules"
    quick = [sys.executable, "-c", f"import sys; from anomaly_lab import cli; {command}"]
    assert subprocess.run(quick, capture_output=True, text=True, check=True).stdout == out

    assert lab(f"--dry-run {TINY} trainer.watch_test=true").out.startswith("missing ")
    result["metrics"]["oracle_auroc"], result["learned"]["parameter_change"] = 0.98765, 1e-9
    result_path.write_text(json.dumps(result))
    said = lab(TINY).out
    assert re.search(r"^oracle AUROC +0\.988  \(best epoch on the test labels: not a result\)$", said, re.M)
    assert re.search(r"^parameters +where they were: changed by 1e-09 of their norm \(†\)$", said, re.M)


@pytest.mark.parametrize("value", ["null", "0.5"])
def test_a_key_that_the_default_model_lacks_is_set_in_each_job_of_a_sweep(lab: Command, value: str) -> None:
    words = f"model=kde,ocsvm model.detector.pca_variance={value} trainer.progress=false logger=none"
    assert lab(f"-m {words} --dry-run").out.count("missing ") == 2
    code, out, err = lab(f"-m {words} normal_class=0,1")
    assert (code, err, out.splitlines()[-1]) == (0, "", "4 runs: 4 done")
    assert sum(line.endswith(f"pca_variance={value.replace('null', 'None')}") for line in out.splitlines()) == 4
    assert lab(f"-m {words} normal_class=0,1 --dry-run").out == "4 runs: 4 done, 0 to do\n"


def test_a_key_of_an_experiments_model_is_set_in_each_of_its_jobs(lab: Command) -> None:
    words = (
        "experiment=published_rules_kde dataset=digits split=pooled logger=none trainer.progress=false normal_class=0"
    )
    code, out, err = lab(f"-m {words} model.detector.bandwidth=3")
    assert (code, err, out.splitlines()[-1]) == (0, "", "2 runs: 2 done")
    assert out.count("  bandwidth=3") == 2 and out.count("  pca_variance=None") == 1


def test_models_are_named_by_a_pattern(lab: Command) -> None:
    code, out, err = lab("-m 'model=glob([mean*,kn*],exclude=*nothing)' trainer.progress=false logger=none")
    assert (code, err, out.splitlines()[-1]) == (0, "", "2 runs: 2 done")
    assert lab("-m --dry-run 'model=glob(mean*)'") == (0, "1 run: 1 done, 0 to do\n", "")


@pytest.mark.drawn
def test_a_run_without_figures_is_the_same_run(lab: Command) -> None:
    code, out, _ = lab(f"{TINY} trainer.figures=false logger=tensorboard")
    assert code == 0 and "figures" not in out
    [folder] = {path.parent for path in Path("runs").rglob("result.json")}
    assert not (folder / "figures").exists()
    assert lab(TINY) == (0, out, ""), "it is done"


def test_a_sweep_goes_on_after_a_failure_counts_it_and_tries_it_again(lab: Command) -> None:
    grid = f"-m {TINY} normal_class=0,99 model.optimizer.lr=1e-4,1e30"
    code, out, err = lab(grid)
    assert code == cli.FAILED
    first, *_, counts, advice = out.splitlines()
    assert re.fullmatch(
        r"shared_ae_50_small  digits  pooled  normal 0  seed 0  AUROC \d\.\d{3}  \d+ s  .*lr=0\.0001.*", first
    )
    assert counts == "4 runs: 1 done, 3 failed" and "tries again" in advice
    assert sum(line.startswith("failed: ") for line in err.splitlines()) == 3
    assert "training diverged" in err and "no class 99" in err and "Traceback" not in err
    summary = [line for line in out.splitlines() if line.startswith("failed  ")]
    assert [line.count("normal_class=99 model.optimizer.lr=") for line in summary] == [0, 1, 1]

    [failure], [result] = Path("runs").rglob("failure.json"), Path("runs").rglob("result.json")
    assert json.loads(failure.read_text())["error"].startswith("Diverged: training diverged")
    done_at = result.stat().st_mtime_ns
    failure.write_text("{}")
    again = lab(grid)
    assert again.code == cli.FAILED and again.out.startswith(f"{first}  (done before)\n")
    assert json.loads(failure.read_text())["error"].startswith("Diverged"), "the failed run was not tried again"
    assert result.stat().st_mtime_ns == done_at


def test_a_sweep_over_a_damaged_result_says_to_delete_it(lab: Command) -> None:
    assert lab("-m model=mean_image trainer.progress=false logger=none").code == 0
    [result] = Path("runs").rglob("result.json")
    result.write_text(result.read_text()[:-20])
    code, out, err = lab("-m model=mean_image trainer.progress=false logger=none")
    assert code == cli.FAILED and "result.json is damaged" in err
    assert out.splitlines()[-2:] == [
        "delete the files that are damaged",
        "the same command tries again what is not done",
    ]


def test_a_run_that_fails_in_a_queued_job_is_the_jobs_failure(lab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(record.SUBMITTED, "null")
    code, out, err = lab(f"-m {TINY} normal_class=99")
    assert (code, out) == (cli.MISTAKE, ""), "no summary: nothing else was asked of this process"
    assert "no class 99" in err


def test_a_diverged_run_is_a_failure_not_a_mistake(lab: Command) -> None:
    code, out, err = lab(f"{TINY} model.optimizer.lr=1e30")
    assert (code, out) == (cli.FAILED, "")
    assert err.startswith("anomaly-lab: error: training diverged") and err.count("\n") == 1


@pytest.mark.parametrize("sweep", ["", "-m "], ids=["one run", "sweep"])
def test_a_fault_of_ours_keeps_its_traceback(lab: Command, monkeypatch: pytest.MonkeyPatch, sweep: str) -> None:
    def broken(cfg: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("anomaly_lab.run.run", broken)
    code, _, err = lab(f"{sweep}{TINY}")
    assert code == cli.FAILED
    assert "Traceback" in err and "in broken" in err and "RuntimeError: a fault" in err


@pytest.mark.parametrize("sweep", ["", "-m "], ids=["one run", "sweep"])
def test_ctrl_c_ends_the_command_and_says_how_to_go_on(
    lab: Command, monkeypatch: pytest.MonkeyPatch, sweep: str
) -> None:
    def interrupted(cfg: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning does in the middle of training

    monkeypatch.setattr("anomaly_lab.run.run", interrupted)
    code, _, err = lab(f"{sweep}{TINY}")
    assert code == cli.INTERRUPTED
    assert err == "interrupted: the same command goes on after the last whole epoch\n"


@pytest.mark.slow
def test_a_terminated_process_says_so_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """A real process and a real SIGTERM, as schedulers send it, after the first checkpoint."""
    words = [*shlex.split(TINY), "model.budget.epochs=60", "trainer.threads=1"]
    command = [sys.executable, "-c", "from anomaly_lab.cli import train; train()", *words]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while not (found := list(tmp_path.rglob("last.ckpt"))):
            assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
            time.sleep(0.05)
        process.terminate()
        _, err = process.communicate(timeout=120)
    assert process.returncode == cli.TERMINATED, err
    assert "terminated: the same command goes on after the last whole epoch" in err
    assert not (found[0].parent / "result.json").exists()


def test_a_run_that_another_process_makes_is_left_to_it(lab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomaly_lab.run.run", lambda cfg: None)
    assert "left to the process that is busy with it: runs/shared_ae_50_small" in lab(TINY).err


def test_a_dry_run_counts_estimates_and_does_nothing(lab: Command) -> None:
    code, out, err = lab(f"-m {TINY} normal_class=0,1")
    assert (code, err) == (0, "")
    assert [line.split("  ")[3] for line in out.splitlines()[:2]] == ["normal 0", "normal 1"]
    assert out.splitlines()[2:] == ["2 runs: 2 done"]
    for result in Path("runs").rglob("result.json"):
        content = json.loads(result.read_text())
        result.write_text(json.dumps(content | {"seconds": {"fit": 100.0, "score": 20.0}}))
    before = sorted(Path().rglob("*"))

    code, out, _ = lab(f"--dry-run -m {TINY} normal_class=0,1,2,3")
    *todo, counts = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in todo] == ["missing", "missing"] and "/n2/" in todo[0] and "/n3/" in todo[1]
    assert counts == "4 runs: 2 done, 2 to do; about 4 minutes one after another"

    code, out, _ = lab(f"{TINY} seed=0,1 model=shared_ae_50,ede --dry-run")
    assert out.splitlines()[-1] == (
        "4 runs: 1 done, 3 to do; about 2 minutes one after another for 1 of them; "
        "no finished run tells how long 2 of them take"
    )

    code, out, _ = lab(f"--dry-run {TINY} normal_class=0,99")
    assert code == cli.MISTAKE
    assert out.splitlines()[0].startswith("impossible  normal_class=99  split=pooled of digits has no class 99")
    assert out.splitlines()[-1].startswith("2 runs: 1 done, 0 to do, 1 impossible")
    assert sorted(Path().rglob("*")) == before


def test_a_dry_run_lists_a_result_that_was_made_with_other_settings(lab: Command) -> None:
    assert lab(TINY).code == 0
    [file] = Path("runs").rglob("result.json")
    result = json.loads(file.read_text())
    result["settings"]["model.batch_size"] = 7
    file.write_text(json.dumps(result))
    code, out, err = lab(f"{TINY} --dry-run")
    assert (code, err) == (cli.MISTAKE, "")
    assert "impossible" in out and "was made with model.batch_size=7 (now 64)" in out and "0 done" in out


def test_a_dry_run_asks_once_for_images_that_are_not_there(lab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def nowhere(self: object) -> None:
        asked.append(self)
        raise ValueError("no network")

    monkeypatch.setattr("anomaly_lab.datasets.Digits.decode", nowhere)
    with tempfile.TemporaryDirectory() as empty:
        said = lab(f"--dry-run {TINY} 'normal_class=range(0,10)' seed=0,1 data_dir={empty}")
    first, counts = said.out.splitlines()
    assert first == "impossible  normal_class=0 seed=0 and 19 others  no network" and len(asked) == 1
    assert counts == "20 runs: 0 done, 0 to do, 20 impossible"


def test_a_dry_run_reads_an_experiments_grid(lab: Command) -> None:
    words = (
        "--dry-run -m experiment=jia2022_mnist_small dataset=digits split=pooled 'normal_class=range(0,2)' model=ede"
    )
    assert lab(words).out.splitlines()[-1].startswith("2 runs: 0 done, 2 to do")


def test_several_experiments_are_made_and_counted_as_one_sweep(
    lab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "own/experiment"
    folder.mkdir(parents=True)
    for name, params in {"floors": "{model: 'pca,knn'}", "mean": "{model: mean_image, normal_class: '0,1'}"}.items():
        text = f"# @package _global_\nhydra: {{sweeper: {{params: {params}}}}}\n"
        (folder / f"{name}.yaml").write_text(text)
    monkeypatch.setenv(config.EXTRA_CONFIGS, str(folder.parent))
    code, out, _ = lab("-m experiment=floors,mean trainer.progress=false")
    *lines, count = out.splitlines()
    rows = [(*line.split("  ")[:1], line.split("normal ")[1][0]) for line in lines]
    assert (code, rows) == (0, [("pca", "0"), ("knn", "0"), ("mean_image", "0"), ("mean_image", "1")])
    assert count == "4 runs: 4 done"
    assert {json.loads(path.read_text())["experiment"] for path in Path("runs").rglob("result.json")} == {
        "floors",
        "mean",
    }
    assert lab("-m experiment=floors,mean --dry-run").out.splitlines()[-1].startswith("4 runs: 4 done, 0 to do")


def test_help_shows_groups_and_commands_and_needs_nothing_heavy() -> None:
    code = (
        "import sys\nfrom anomaly_lab import cli\nsys.argv = ['anomaly-lab', '--help']\n"
        "try: cli.train()\n"
        "finally: print(sorted({'torch', 'lightning', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("[]\n")
    for group in ("model", "dataset", "split"):
        [line] = re.findall(rf"^{group}: (.+)$", out, re.M)
        # Below a group's folder may lie nothing but its choices.
        assert line.split(", ") == sorted(path.stem for path in (config.CONFIG_DIR / group).glob("*.yaml"))
    assert "anomaly-lab -m experiment=" in out and "--dry-run" in out
    assert max(len(line) for line in out.splitlines() if ": " not in line) <= 120


@pytest.mark.parametrize("name", sorted(name for name in cli.__all__ if name.islower()))
def test_every_command_says_its_version(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--version"])
    with contextlib.suppress(SystemExit):
        getattr(cli, name)()
    assert capsys.readouterr() == (f"anomaly-lab {__version__}\n", "")


def test_the_commands_that_help_shows_compose() -> None:
    shown = (config.CONFIG_DIR / "train.yaml").read_text()
    commands = re.findall(r"^ +anomaly-lab ((?:\S+ )*\S+)", shown, re.M)
    assert len(commands) >= 3
    for command in commands:
        assert grids.jobs([word for word in shlex.split(command) if not word.startswith("-")])


def test_a_sweeps_journal_outlives_torn_lines_and_is_not_made_anew_by_late_jobs(tmp_path: Path) -> None:
    with sweep.open_journal(tmp_path / "runs") as journal:
        journal.note("begun", ["seed=0"])
        with open(journal.path, "ab") as file:
            file.write(b'\n["begun", ["se')  # the disk was full
        journal.note("begun", ["seed=1"])
        journal.note("failed", ["seed=0"])
        assert journal.jobs() == [["seed=0"], ["seed=1"]]
        assert (journal.in_state("begun"), journal.in_state("failed")) == ([["seed=1"]], [["seed=0"]])
        with sweep.open_journal(tmp_path / "runs") as other:  # a second sweep in the same folder
            assert journal.path.exists() and other.path != journal.path
    journal.note("done", ["seed=1"])  # by a job that the sweep had left in a queue
    assert journal.jobs() == []
    left = tmp_path / "runs/.sweep-0123abcd.jsonl"
    left.write_text("of a sweep that was killed")
    gone = tmp_path / "runs/.sweep-89abcdef.jsonl"
    gone.symlink_to("nowhere")  # as where another sweep removes its own after it was listed
    with sweep.open_journal(tmp_path / "runs"):
        assert not left.exists()
    gone.unlink()
    assert not list((tmp_path / "runs").iterdir())


# anomaly-lab-data -------------------------------------------------------------------------------------------------


@pytest.fixture
def lab_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANOMALY_LAB_DATA", raising=False)

    def command(words: str) -> Said:
        try:
            code = cli.data(shlex.split(words))
        except SystemExit as end:
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return command


def test_data_sets_are_downloaded_listed_and_checked(lab_data: Command) -> None:
    listed = {line.split()[0]: line for line in lab_data("list").out.splitlines()}
    assert set(listed) == {path.stem for path in (config.CONFIG_DIR / "dataset").glob("*.yaml")}
    assert re.search(r"not there +data/digits\.npz  run `anomaly-lab-data download digits`$", listed["digits"])
    assert listed["npz"].endswith("yours: give dataset.name=... and dataset.path=...")

    assert lab_data("check digits").code == cli.MISTAKE
    assert lab_data("download digits") == (0, "digits: ready in data/digits.npz\n", "")
    assert lab_data("check digits").out.startswith("digits: 1797 images of 1x8x8, 10 classes")
    assert re.search(r"^digits +ready +data/digits\.npz$", lab_data("list").out, re.M)
    assert re.search(r"^digits +not there +else/digits\.npz", lab_data("list data_dir=else").out, re.M)


def test_a_data_set_of_ones_own_is_checked(lab_data: Command) -> None:
    arrays = {"images": np.zeros((4, 1, 2, 2), np.uint8), "labels": np.arange(4), "is_test": np.zeros(4, bool)}
    np.savez("mine.npz", class_names=np.array(list("abcd")), **arrays)
    said = lab_data("check npz dataset.name=mine dataset.path=mine.npz")
    assert said.code == 0 and said.out.startswith("mine: 4 images of 1x2x2, 4 classes")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("check typo", "there is no dataset=typo: choose among cifar10, "),
        ("check npz", "npz is your own data set: give dataset.name=... and dataset.path=..."),
        ("check image_folder dataset.name=x", "image_folder is your own data set: give dataset.path=..."),
        ("check npz dataset.name=x dataset.path=no.npz", "no.npz is not there"),
        ("download image_folder dataset.name=mnist dataset.path=.", "dataset.name=mnist is the name of dataset=mnist"),
        ("check digits dataset.typo=1", "dataset.typo cannot be set"),
        ("check digits", "data/digits.npz is not there or is stale: run `anomaly-lab-data download digits`"),
        ("check data_dir=here", "name a data set"),
        ("list digits", "list takes no names, got digits"),
    ],
)
def test_a_mistake_about_data_gets_one_line(lab_data: Command, words: str, message: str) -> None:
    code, out, err = lab_data(words)
    assert (code, out) == (cli.MISTAKE, "")
    assert err.startswith("anomaly-lab-data: error: ") and err.count("\n") == 1
    assert message in err


def test_one_data_set_that_fails_does_not_keep_the_others(lab_data: Command) -> None:
    Path("data").mkdir()
    Path("data/mnist.npz").write_bytes(b"not an archive")
    code, out, err = lab_data("download mnist digits")
    assert code == cli.MISTAKE
    assert out == "digits: ready in data/digits.npz\n"
    assert "data/mnist.npz is damaged or unreadable" in err


def test_a_model_in_a_subfolder_of_ones_own_configs_is_a_model_like_any_other(
    lab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "conf/model/mine/copy.yaml"
    own.parent.mkdir(parents=True)
    own.write_text((config.CONFIG_DIR / "model/autoencoder.yaml").read_text())
    monkeypatch.setenv(config.EXTRA_CONFIGS, str(tmp_path / "conf"))
    grid = "-m model=mine/copy normal_class=0,1 model.budget.epochs=1 model.budget.epoch_steps=1 trainer.progress=false"
    assert lab(grid).out.endswith("2 runs: 2 done\n")
    assert lab(f"{grid} --dry-run").out == "2 runs: 2 done, 0 to do\n"
    code, out, _ = lab(f"{grid} hydra/launcher=abreast")  # one of the launchers that plan their jobs
    assert code == 0 and out.count("(done before)") == 2
    assert cli.report(["runs", "--status"]) == 0 and cli.report(["runs"]) == 0
    assert "`mine/copy_small [" in (tmp_path / "runs/report/report.md").read_text()
