"""Searches: a sweeper that chooses its own points by val_score, counted, continued and summed up like a grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command
from omegaconf import DictConfig

from anomaly_lab import cli

TINY = "model.budget.epochs=1 model.budget.epoch_steps=1 model.detector.width=4 trainer.progress=false"
SEARCH = "-m hydra/sweeper=optuna_normals hydra.sweeper.n_trials=4 'model.optimizer.lr=tag(log,interval(1e-4,1e-2))'"


@pytest.fixture
def lab(lab: Command) -> Command:
    """``anomaly-lab`` for runs of a second."""
    return lambda words: lab(f"{words} {TINY}")


def needs_optuna() -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra: pip install anomaly-lab[optuna]")


def val_scores() -> dict[float, float]:
    """Learning rate and val_score of every finished run."""
    found = [json.loads(path.read_text()) for path in Path("runs").rglob("result.json")]
    return {r["identity"]["changed"]["model.optimizer.lr"]: r["metrics"]["val_score"] for r in found}


def test_a_search_minimises_val_score_and_given_again_proposes_the_same_points(lab: Command) -> None:
    needs_optuna()
    code, out, err = lab(SEARCH)
    assert code == 0, err
    found = val_scores()
    assert len(found) == 4
    best = yaml.safe_load(Path("runs/optimization_results.yaml").read_text())
    assert best["best_value"] == min(found.values())
    assert found[best["best_params"]["model.optimizer.lr"]] == best["best_value"]
    *lines, summary, counts = out.splitlines()
    assert sum("AUROC" in line for line in lines) == 4
    shown = f"lowest val_score: {best['best_value']:.6g}  runs/shared_ae_50_small/digits/pooled/n0/s0-"
    assert summary.startswith(shown)
    assert f"model.optimizer.lr={best['best_params']['model.optimizer.lr']}" in summary
    assert counts == "4 runs: 4 done"
    assert not list(Path("runs").glob(".sweep-*"))

    code, out, _ = lab(SEARCH.replace("n_trials=4", "n_trials=5"))  # and goes on from there
    assert code == 0 and out.count("(done before)") == 4 and out.endswith("5 runs: 5 done\n")
    assert val_scores().items() >= found.items()


def test_a_search_goes_on_after_a_failed_point_and_counts_it(lab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_optuna()
    import anomaly_lab.run as module

    real, count = module.run, iter(range(4))

    def second_fails(cfg: DictConfig) -> Any:
        if next(count) == 1:
            raise RuntimeError("a fault")
        return real(cfg)

    monkeypatch.setattr(module, "run", second_fails)
    code, out, err = lab(SEARCH)
    assert code == cli.FAILED
    assert "RuntimeError: a fault" in err and out.count("AUROC") == 3
    assert "4 runs: 3 done, 1 missing" in out and "lowest val_score" in out


def test_a_searchs_points_cannot_be_listed_beforehand_and_that_is_said(lab: Command) -> None:
    needs_optuna()
    code, out, err = lab(f"{SEARCH} --dry-run")
    assert (code, out) == (cli.MISTAKE, "")
    assert err.count("\n") == 1 and "chooses its points while it runs" in err


def test_a_search_without_its_package_says_what_to_install(lab: Command) -> None:
    try:
        import hydra_plugins.hydra_optuna_sweeper  # noqa: F401
    except ModuleNotFoundError:
        code, out, err = lab(SEARCH)
        assert (code, out) == (cli.MISTAKE, "")
        assert err == "anomaly-lab: error: hydra/sweeper/optuna needs an extra: pip install anomaly-lab[optuna]\n"
    else:
        pytest.skip("the package is here")
