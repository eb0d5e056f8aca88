"""The wheel as a stranger gets it: built, installed beside its dependencies, used from another folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def done(*command: str | Path, **options: object) -> str:
    """What a command prints; an error with all it printed where it fails."""
    # Neither PYTHONPATH nor the working directory may show it the checkout.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "ANOMALY_LAB"))}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, **options)  # type: ignore[call-overload]
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install hatchling")
    pytest.importorskip("pip", reason="pip is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    without_network = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    done(sys.executable, "-m", "pip", "wheel", ".", *without_network, "--wheel-dir", folder, cwd=ROOT)
    [built] = folder.glob("anomaly_lab-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment that holds the wheel and sees the dependencies installed here."""
    venv = tmp_path_factory.mktemp("venv")
    done(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check")
    done(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel)
    # A plain path: the .pth files of an editable install in that folder are not read.
    [packages] = venv.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(
        "\n".join(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))
    )
    return python.parent


def test_the_wheel_holds_what_the_code_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = {f"anomaly_lab/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "anomaly_lab").rglob("*.py")}
    data = {"anomaly_lab/published.csv"} | {
        str(path.relative_to(ROOT)) for path in (ROOT / "anomaly_lab" / "templates").iterdir()
    }
    assert len(configs) > 20 and len(data) > 1
    assert not (configs | modules | data) - names
    # Hydra takes launchers from the namespace package that all its plugins share, and from nowhere else.
    assert "hydra_plugins/anomaly_lab_launchers.py" in names and "hydra_plugins/__init__.py" not in names
    own = ("anomaly_lab", "hydra_plugins/anomaly_lab_launchers.py")
    strangers = {name for name in names if not name.startswith(own)}
    assert not strangers, "the wheel would install more than the package"


def test_the_installed_commands_work_from_anywhere(installed: Path, tmp_path: Path) -> None:
    shown = done(installed / "anomaly-lab", "--help", cwd=tmp_path)
    choices = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))
    assert f"model: {', '.join(choices)}\n" in shown
    listed = done(installed / "anomaly-lab-data", "list", cwd=tmp_path)
    assert "anomaly-lab-data download digits" in listed
    for command in ("anomaly-lab-report", "anomaly-lab-score"):
        assert done(installed / command, "--help", cwd=tmp_path).startswith(f"usage: {command}")


def test_the_installed_package_reads_its_own_configs(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, anomaly_lab\n"
        "from anomaly_lab import config, results\n"
        "cfg = config.compose(['model=autoencoder', 'experiment=jia2022_mnist_small'])\n"
        "figures = results.published('shared_ae', 'mnist', 'official')\n"
        "print(json.dumps([anomaly_lab.__file__, str(config.CONFIG_DIR), cfg.choices.model, len(figures)]))"
    )
    file, conf, model, figures = json.loads(done(installed / "python", "-c", code, cwd=tmp_path))
    packages = installed.parent
    assert Path(file).is_relative_to(packages), "not the wheel's package"
    assert Path(conf).is_relative_to(packages) and Path(conf) == Path(file).parent / "conf"
    assert model == "autoencoder" and figures > 0


def test_a_fresh_environment_that_follows_the_first_page_gets_what_it_shows(installed: Path, tmp_path: Path) -> None:
    """Its commands and its program as they stand there, but for the installation: of the wheel, as in `installed`."""
    page = (ROOT / "docs/start.md").read_text(encoding="utf-8")
    install, *blocks = re.findall(r"^```(bash|python)\n(.*?)^```(?:\n\n```\n(.*?)^```)?", page, re.M | re.S)
    assert "pip install ." in install[1] and len(blocks) == 4
    program = "set -e\nPATH=$1:$PATH\ncd $2\n"
    for kind, text, shown in blocks:
        if kind == "python":
            (tmp_path / "mine.py").write_text(text)
            continue
        said = done("bash", "-c", program + text, "bash", installed, tmp_path)
        wanted, found = ([one for line in of.splitlines() for one in line.split()[:1]] for of in (shown, said))
        assert wanted and not set(wanted) - {"..."} - set(found), f"{text}: {said}"
        for label, value in re.findall(r"^(AUROC|\| `\w+`) [ |]*(\d\.\d+)", shown, re.M):
            [same] = re.findall(rf"^{re.escape(label)} [ |]*(\d\.\d+)", said, re.M)[:1]
            assert abs(float(same) - float(value)) < 0.02, f"{label} is {same}, the page says {value}"
    assert (tmp_path / "runs/report/report.html").is_file()
