"""One-class anomaly detection in images: methods, protocols and tables that can be re-run in one command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AnomalyDetector", "load_run"]

if TYPE_CHECKING:
    from anomaly_lab.estimator import AnomalyDetector
    from anomaly_lab.predict import load_run


def __getattr__(name: str) -> Any:
    # Importing the package must stay quick (the commands' --help, the configs); torch and Lightning come on use.
    if name == "load_run":
        from anomaly_lab.predict import load_run

        return load_run
    if name == "AnomalyDetector":
        from anomaly_lab.estimator import AnomalyDetector

        return AnomalyDetector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
