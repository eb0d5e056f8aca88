"""A sweep without the command line: python examples/sweep.py writes runs/ and runs/report/."""

from pathlib import Path

from anomaly_lab import config, grids, report
from anomaly_lab.run import run

grid = ["model=autoencoder,knn", "normal_class=3,8", "seed=0,1", "trainer.progress=false", "logger=none"]

for overrides in grids.jobs(grid):
    result = run(config.compose(overrides))  # returned as it is where it is finished, resumed where it is begun
    if result is not None:  # else another process is busy with it
        print(result["identity"]["model"], result["class_name"], f"AUROC {result['metrics']['auroc']:.3f}")
report.write(Path("runs"))
