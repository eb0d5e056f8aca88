"""Loggers. The run folder's files are the truth; trackers mirror them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger


def csv_logger(out: Path, identity: dict[str, Any], resolved: dict[str, Any]) -> Logger:
    """``metrics.csv`` in the run's folder, a row an epoch."""
    return CSVLogger(out, name="", version="")
