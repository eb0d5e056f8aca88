"""What the site is made of, beside site/pages: the repository's own pages under their own paths, and the table of
everything, from every committed submission and results.csv through `anomaly_lab.tables.overview`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

from anomaly_lab import archive, results, submission, tables

ROOT = Path(__file__).resolve().parent.parent
FRONT = {"docs/start.md": "index.html", "README.md": "overview.html"}  # where they stand on the site
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
CODE = re.compile(r"^(`{3,}).*?^\1", re.M | re.S)


def pages() -> list[str]:
    """The repository's pages, by their paths."""
    globs = (
        "*.md",
        "docs/*.md",
        "experiments/README.md",
        "experiments/*/README.md",
        "examples/*.md",
        "benchmarks/*.md",
    )
    return [path.relative_to(ROOT).as_posix() for glob in globs for path in sorted(ROOT.glob(glob))]


def links(page: str) -> Iterator[str]:
    """The repository's files that a page links to or shows, by their paths."""
    for _, target, _ in LINK.findall(CODE.sub("", (ROOT / page).read_text(encoding="utf-8"))):
        path = (ROOT / page).parent.joinpath(target).resolve()
        if "://" not in target and path.is_file() and path.is_relative_to(ROOT):
            yield path.relative_to(ROOT).as_posix()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Experiments, and pages of docs/ that mkdocs.yml does not name, come into the navigation by themselves."""
    assert config.nav is not None
    known = str(config.nav)
    for section in config.nav:
        if "Experiments" in section:
            section["Experiments"] += [page for page in pages() if re.match(r"experiments/.+/", page)]
        if "Guides" in section:
            section["Guides"] += [page for page in pages() if page.startswith("docs/") and f"'{page}'" not in known]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The repository's pages, every file that they link to, and the submissions."""
    own = pages()
    submissions = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("experiments/*/submissions/*.json"))]
    for path in dict.fromkeys([*own, *(target for page in own for target in links(page)), *submissions]):
        file = File.generated(config, path, abs_src_path=str(ROOT / path))
        if path in FRONT:
            file.dest_uri = FRONT[path]
            file.name = Path(FRONT[path]).stem
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to folders, which GitHub lists, lead to their README; a title is found only where nothing is before it."""
    folder = Path(page.file.src_uri).parent

    def whole(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        readme = (ROOT / folder / target / "README.md").resolve()
        return f"{before}{target.rstrip('/')}/README.md{after}" if readme.is_file() else match.group()

    return indented(LINK.sub(whole, re.sub(r"\A<!--.*?-->\s*", "", markdown, flags=re.S)))


def indented(markdown: str) -> str:
    """GitHub's lists for Python-Markdown, which wants four blanks before an item's further paragraphs and an empty line
    behind them."""
    lines: list[str] = []
    missing, paragraphs = 0, False
    for line in markdown.split("\n"):
        if item := re.match(r"([-*]|\d+\.) ", line):
            if paragraphs and lines[-1]:
                lines.append("")
            missing, paragraphs = 4 - len(item.group()), False
        elif line and not line.startswith(" "):
            missing, paragraphs = 0, False
        elif line and not lines[-1]:
            paragraphs = True
        lines.append(" " * missing + line if line.startswith("  ") else line)
    return "\n".join(lines)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The table of everything."""
    if page.file.src_uri != "everything.md":
        return html

    def address(source: str) -> str:
        file = files.get_file_from_path(source)
        assert file is not None, source
        return get_relative_url(file.url, page.url)

    return html.replace("<p>[everything]</p>", everything(address))


def everything(address: Any) -> str:
    """The table as HTML; `address` gives the link to a page of the repository."""
    frames = results.read_pages(ROOT / "experiments")
    submissions = submission.read_pages(ROOT / "experiments")  # each is held to its scores
    archives = {str(path): archive.Archive(path).frame for path in sorted(ROOT.glob("experiments/*/scores.npz"))}
    entries = tables.overview(frames, submissions, archives)
    methods = address("docs/methods.md")
    sections = {entry.method: section(entry.method) for entry in entries}
    template = (Path(__file__).parent / "everything.html.j2").read_text(encoding="utf-8")
    strict: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    return (
        jinja2.Environment(autoescape=True, **strict)
        .from_string(template)
        .render(
            entries=entries,
            runs=sum(entry.mean.present for entry in entries),
            facets={
                "dataset": ("data set", sorted({entry.dataset for entry in entries})),
                "split": ("protocol", sorted({entry.split for entry in entries})),
                "size": ("size", ["small", "full"]),
                "standing": ("standing", [name for name in tables.STANDINGS if name in {e.standing for e in entries}]),
                "block": ("block", [b for b in tables.BLOCKS if b in {entry.block for entry in entries}]),
            },
            method_link={name: f"{methods}#{anchor}" for name, anchor in sections.items() if anchor},
            page_link={name: address(f"experiments/{name}/README.md") for name in frames},
            submission_link={name: address(f"experiments/{name}") for name in submissions},
        )
    )


def section(method: str) -> str:
    """The anchor of a method in docs/methods.md; empty for one that has no yaml here."""
    if not (ROOT / f"conf/model/{method}.yaml").is_file():
        return ""
    return (gallery().said(method, "detector._target_") or "Fused").rpartition(".")[2].lower()


def gallery() -> Any:
    """docs/gallery.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs/gallery.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
