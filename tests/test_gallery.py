"""The page of all methods is what its generator writes."""

from __future__ import annotations

from types import ModuleType

import pytest
from programs import load

from anomaly_lab import config


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    return load("gallery")


def test_the_gallery_is_what_its_generator_writes(gallery: ModuleType) -> None:
    written = gallery.PAGE.read_text(encoding="utf-8")
    assert gallery.page() == written, "run python docs/gallery.py"
    for path in (config.CONFIG_DIR / "model").glob("*.yaml"):
        assert f"\n| `{path.stem}` |" in written


def test_a_docstring_becomes_paragraphs_and_equations(gallery: ModuleType) -> None:
    class Method:
        """What it does.

        A paper, with

            L = |x - y|
              + 1

        and a score. *Where we differ:*
        here.

        Args:
            width: no part of the page.
        """

    parts = list(gallery.documented(Method))
    assert parts == [
        "What it does.\n\nA paper, with\n",
        "```text\nL = |x - y|\n  + 1\n```\n",
        "and a score. *Where we differ:*\nhere.\n",
    ]
