"""The site: it builds without a warning, links and anchors lead somewhere, nothing is fetched from elsewhere, and the
table of everything says what the committed results say; the page of protocols says what the protocols do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
from programs import load

from anomaly_lab import archive, config, results, submission, tables

ROOT = Path(__file__).parent.parent
SERVED = "https://example.org/lab/"


class Page(HTMLParser):
    """The links, anchors and rows of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.rows: list[dict[str, str | None]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := given.get(key))}
        if tag == "tr" and "data-method" in given:
            self.rows.append(given)
        target = given.get("src") or given.get("href")
        if target:
            self.links.append(target)
            if tag != "a" and given.get("rel") != "canonical":
                self.fetched.append(target)


@cache
def parsed(path: Path) -> Page:
    return Page(path)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", "site/mkdocs.yml", "-d", str(out)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": path, "SITE_URL": SERVED}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.fixture(scope="module")
def entries() -> list[tables.Entry]:
    archives = {str(p): archive.Archive(p).frame for p in ROOT.glob("experiments/*/scores.npz")}
    submissions = submission.read_pages(ROOT / "experiments")
    return tables.overview(results.read_pages(ROOT / "experiments"), submissions, archives)


@pytest.mark.slow
def test_the_site_is_whole(site: Path, entries: list[tables.Entry]) -> None:
    """One test: each worker that runs one builds the site."""
    links_lead_somewhere_and_nothing_is_fetched_from_elsewhere(site)
    every_page_of_the_repository_is_there(site)
    the_table_has_a_row_for_every_method_of_every_result(site, entries)


def links_lead_somewhere_and_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    checked = 0
    for path in sorted(site.rglob("*.html")):
        for link in parsed(path).links:
            if path.name == "404.html" and link.startswith("/"):  # a server sends it for any depth
                assert (site / link.removeprefix(urlsplit(SERVED).path)).exists(), link
                continue
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert link not in parsed(path).fetched, f"{path.relative_to(site)} fetches {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.relative_to(site)} links to {link}"
            if parts.fragment and target.suffix == ".html" and target.name != "everything.html":
                assert unquote(parts.fragment) in parsed(target).anchors, f"{path.relative_to(site)} links to {link}"
            checked += 1
    assert checked > 1000
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", path.read_text(encoding="utf-8")), path


def every_page_of_the_repository_is_there(site: Path) -> None:
    experiments = sorted(path.parent.name for path in ROOT.glob("experiments/*/README.md"))
    assert sorted(path.parent.name for path in site.glob("experiments/*/index.html")) == experiments
    for page in ROOT.glob("docs/*.md"):
        assert (site / f"docs/{page.stem}.html").is_file() or page.stem == "start"
    assert "Start in a minute" in (site / "index.html").read_text(encoding="utf-8")


def the_table_has_a_row_for_every_method_of_every_result(site: Path, entries: list[tables.Entry]) -> None:
    rows = parsed(site / "everything.html").rows
    assert Counter((r["data-method"], r["data-dataset"], r["data-split"], r["data-size"]) for r in rows) == Counter(
        (e.method, e.dataset, e.split, e.size) for e in entries
    )
    text = (site / "everything.html").read_text(encoding="utf-8")
    figures = re.findall(r'<td class="number" data-value="([\d.e-]+)"><b>', text)
    assert [float(figure) for figure in figures] == [entry.mean.mean for entry in entries]
    assert [row["data-standing"] for row in rows] == [entry.standing for entry in entries]


def test_every_row_is_there_once_and_says_what_it_rests_on(entries: list[tables.Entry]) -> None:
    rows = [(e.dataset, e.split, e.label) for e in entries]
    assert len(set(rows)) == len(rows) and {e.standing for e in entries} == set(tables.STANDINGS)
    submitted = {path.relative_to(ROOT / "experiments").as_posix() for path in ROOT.glob("experiments/*/submissions/*")}
    used = {name for e in entries for name in e.submissions}
    assert used <= submitted
    for name in submitted - used:  # of the draws of two processors the first counts (`results.union`)
        content = json.loads((ROOT / "experiments" / name).read_text(encoding="utf-8"))
        of = content["protocol"]["dataset"], content["protocol"]["split"], content["method"]
        counted = next(e.submissions for e in entries if (e.dataset, e.split, e.label) == of)
        others = [json.loads((ROOT / "experiments" / other).read_text(encoding="utf-8")) for other in counted]
        devices, own = ({r["row"]["device"] for c in some for r in c["runs"]} for some in (others, [content]))
        assert devices and devices.isdisjoint(own), name
    for e in entries:
        assert (e.standing == "figures only") == (not e.verified and not e.archived)
        some = len(e.classes) < (e.whole or 0) or e.archived < e.mean.present
        assert e.standing != "scores of some classes" or some, e.label
        if e.standing == tables.STANDINGS[0] and len(e.submissions) == 1:
            content = json.loads((ROOT / "experiments" / e.submissions[0]).read_text(encoding="utf-8"))
            # Of the runs themselves, and not of the six digits of results.csv.
            assert e.mean.mean == pytest.approx(content["auroc"], abs=2e-9) and list(e.seeds) == content["seeds"]


VIEWS: dict[str, Callable[[tables.Entry], bool]] = {
    "": lambda e: True,
    "dataset=mnist&split=official&block=floor": lambda e: (
        (e.dataset, e.split) == ("mnist", "official") and e.method in tables.FLOORS
    ),
    "standing=verified+from+scores": lambda e: e.standing == "verified from scores",
    "method=SHARED_ae&size=small&whole=1": lambda e: (
        "shared_ae" in e.label and e.size == "small" and len(e.classes) == e.whole
    ),
    "settings=default&sort=-auroc": lambda e: not e.changed,
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium, which runs the page's script")
def test_the_fragment_filters_and_sorts(site: Path, entries: list[tables.Entry], tmp_path: Path) -> None:
    for fragment, keeps in VIEWS.items():
        address = f"{(site / 'everything.html').as_uri()}#{fragment}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
        done = subprocess.run(["chromium", *options, address], capture_output=True, text=True, timeout=300)
        (tmp_path / "page.html").write_text(done.stdout, encoding="utf-8")
        shown = [row for row in Page(tmp_path / "page.html").rows if "hidden" not in row]
        assert Counter(row["data-method"] for row in shown) == Counter(e.method for e in entries if keeps(e)), fragment
        assert f"<output>{len(shown)}</output>" in done.stdout
        if "sort=-auroc" in fragment:
            figures = [float(x) for x in re.findall(r'<td class="number" data-value="([\d.e-]+)"><b>', done.stdout)]
            assert figures == sorted(figures, reverse=True)


def test_floors_are_the_methods_whose_yaml_says_so() -> None:
    notes = {path.stem: path.read_text(encoding="utf-8") for path in (config.CONFIG_DIR / "model").glob("*.yaml")}
    assert set(tables.FLOORS) == {name for name, note in notes.items() if note.startswith("# Floor: ")}


@pytest.fixture(scope="module")
def protocols() -> ModuleType:
    return load("protocols")


def test_the_page_of_protocols_is_what_its_generator_writes(protocols: ModuleType) -> None:
    text = protocols.FACTS.read_text(encoding="utf-8")
    assert protocols.written(json.loads(text)) == text
    assert protocols.page(json.loads(text)) == protocols.PAGE.read_text(encoding="utf-8"), (
        "run python docs/protocols.py"
    )


def holds(protocols: ModuleType, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether what is measured now is what the page was made from."""
    monkeypatch.setattr(protocols, "SETS", {name: protocols.SETS[name]})
    monkeypatch.setenv("ANOMALY_LAB_DATA", str(folder))
    facts = json.loads(protocols.FACTS.read_text(encoding="utf-8"))
    own = [one for one in facts["partitions"] if one["dataset"] == name]
    return protocols.measure() == {"datasets": {name: facts["datasets"][name]}, "partitions": own}


def test_the_facts_about_digits_are_those_of_the_images(
    protocols: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert holds(protocols, "digits", tmp_path, monkeypatch)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "coil100", "usps"])
def test_the_facts_about_real_sets_are_those_of_the_images(
    protocols: ModuleType, name: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert holds(protocols, name, data_dir, monkeypatch)


def test_committed_runs_have_the_fingerprints_of_the_page_of_protocols() -> None:
    facts = json.loads((ROOT / "docs/protocols.json").read_text(encoding="utf-8"))
    stated = {(p["dataset"], p["split"], p["class"]): p["fingerprint"] for p in facts["partitions"]}
    compared = 0
    for path in ROOT.glob("experiments/*/results.csv"):
        for run in results.read_csv(path).itertuples():
            key = (run.dataset, run.split, run.normal_class)
            if run.seed == 0 and not run.problem and key in stated:
                assert run.fingerprint == stated[key], run.path
                compared += 1
    assert compared > 400
