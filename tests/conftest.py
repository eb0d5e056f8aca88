"""What all tests share: the real data's folder, and hypothesis without deadlines (the machines are slow and noisy)."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets, or a skip that says how to get it."""
    folder = os.environ.get("ANOMALY_LAB_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real data: set ANOMALY_LAB_DATA to a folder with the data sets")
    return Path(folder)
