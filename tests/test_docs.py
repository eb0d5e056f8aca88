"""The documentation says what the code does: the tutorial is executed, its lines are counted, links lead somewhere."""

from __future__ import annotations

import functools
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from anomaly_lab import __version__, config, grids

ROOT = Path(__file__).parent.parent
FRONT = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = [*FRONT, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").glob("*/README.md"))]


def files(page: Path) -> dict[str, tuple[int, str]]:
    """Files a page shows: the name and the stated number of lines, and the block that follows."""
    found = re.findall(r"^`([\w./]+)` \((\d+) lines\):\n\n```\w+\n(.*?)^```", page.read_text(), re.M | re.S)
    return {name: (int(lines), block) for name, lines, block in found}


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["model=denoising", "model.budget.epochs=2"], "denoising_small"),
        (["model=my_knn"], "my_knn"),
        (["model=my_svdd", "model.budget.stages={pretrain: 2, train: 1}"], "my_svdd_small"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_tutorial_adds_a_method_in_one_file_and_one_yaml(
    words: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = files(ROOT / "docs/adding_a_method.md")
    assert list(shown) == [
        name for method in ("denoising", "my_knn", "my_svdd") for name in (f"{method}.py", f"conf/model/{method}.yaml")
    ]
    for name, (lines, block) in shown.items():
        assert block.count("\n") == lines, f"{name} has {block.count(chr(10))} lines"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(block)

    from anomaly_lab.run import run

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(config.EXTRA_CONFIGS, str(tmp_path / "conf"))
    monkeypatch.setenv("ANOMALY_LAB_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    result = run(config.compose([*words, "trainer.progress=false"]))
    assert result is not None and result["metrics"]["auroc"] > 0.9
    assert (tmp_path / f"runs/{folder}/digits/pooled/n0").is_dir()


def test_the_bare_lightning_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/adding_a_method.md").read_text()
    [program] = re.findall(r"^```python\n(from lightning import Trainer.*?)^```", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(program, found)
    assert len(found["scores"]) == 1 and len(found["scores"][0]) > 0  # type: ignore[arg-type,index]


def test_a_folder_of_configs_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config.compose()  # which is kept
    monkeypatch.setenv(config.EXTRA_CONFIGS, "/nowhere")
    with pytest.raises(ValueError, match="ANOMALY_LAB_CONF=/nowhere is not a folder"):
        config.compose()


def test_a_config_of_ours_cannot_be_shadowed_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/ede.yaml").write_text("# mine\n")
    monkeypatch.setenv(config.EXTRA_CONFIGS, str(tmp_path))
    with pytest.raises(ValueError, match=r"ede\.yaml has the name of a config of anomaly_lab"):
        config.compose()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# A page of results shows the command that makes all of its grid, of which tests/test_config.py composes the first run.
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * page.is_relative_to(ROOT / "experiments")) for page in PAGES],
    ids=[str(page.relative_to(ROOT)) for page in PAGES],
)
def test_commands_in_the_pages_compose(page: Path) -> None:
    """Every ``anomaly-lab`` command shown composes, or shows a placeholder in capitals."""
    refused = "anomaly-lab: error|impossible|missing .*\\nimpossible"  # is asked for by tests/test_cli.py
    for command in re.findall(rf"^(?:\$ )?anomaly-lab (?!--)(.+)$(?!\n(?:{refused}))", page.read_text(), re.M):
        words = [word.strip("'") for word in command.split("#")[0].split()]
        overrides = [word for word in words if not word.startswith("-")]
        if any(re.search(r"=[A-Z]{3,}|denoising|\.\.\.|~", word) for word in overrides):
            continue
        if any(word.startswith("hydra/sweeper=") for word in overrides):  # tests/test_search.py makes one
            continue
        _composes(tuple(overrides))


@functools.cache  # the same command stands on several pages
def _composes(overrides: tuple[str, ...]) -> None:
    named = re.compile(rf"({'|'.join(config.NAMES_OF_RUNS)})=")  # runs of other classes and seeds compose alike
    for job in {tuple(word for word in job if not named.match(word)) for job in grids.jobs(overrides)}:
        config.compose(job)


def test_nothing_of_one_machine_is_in_the_repository() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/tmp/|/root/|/home/\w")
    names = [
        n for n in tracked.stdout.split() if n.endswith((".py", ".yaml", ".md", ".toml", ".csv", ".txt", "Makefile"))
    ]
    for name in names:
        if name != "tests/test_docs.py" and (ROOT / name).exists():
            found = pattern.search((ROOT / name).read_text())
            assert not found, f"{name}: {found and found.group()}"


def test_what_an_archive_asks_for_is_there_and_agrees() -> None:
    """The citation, the package and the changelog say the same version; the issue form is one that GitHub can show."""
    citation = OmegaConf.load(ROOT / "CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation.version == project["version"] == __version__ and citation.license == project["license"]
    assert f"\n## {project['version']}\n" in (ROOT / "CHANGELOG.md").read_text()
    for key in ("title", "abstract", "keywords", "authors", "date-released", "type", "references"):
        assert citation[key], key
    for reference in citation.references:
        assert reference.title and reference.authors and reference.year
    form = OmegaConf.load(ROOT / ".github/ISSUE_TEMPLATE/my-figure-differs.yml")
    assert {"name", "description", "body"} <= set(form)
    for part in form.body:
        assert part.type in ("markdown", "input", "textarea", "checkboxes") and part.attributes


def test_every_python_that_is_named_is_tested() -> None:
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    job = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["test"]
    versions = job["strategy"]["matrix"]["python-version"]
    tested = [f"Programming Language :: Python :: {python}" for python in versions]
    assert tested and tested == [name for name in named if re.search(r"Python :: 3\.\d+$", name)]
    targets = " ".join(step["run"] for step in job["steps"] if "run" in step).replace("make", "").split()
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"lint", "test", "package"} <= set(targets) <= set(rules)


def test_every_release_says_which_results_changed() -> None:
    releases = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1:]
    assert all("### Results changed\n- " in release for release in releases[:-1]), (
        "the first release has none before it"
    )
