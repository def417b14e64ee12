"""Helpers that write the files of a training run without training."""

import json
from pathlib import Path

from senet_transfer.config import get_senet_config

# Pages must show this as text. If it is parsed as HTML, the script runs.
HOSTILE = "<script>document.title='owned'</script>&amp;\"'"


def write_run(folder: Path, options: list, rows: list[dict], environment: str = "") -> Path:
    """Write the config, metrics and environment files of a run, and return its folder."""
    folder.mkdir(parents=True)
    cfg = get_senet_config()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder), *options])
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "environment.txt").write_text(
        f"tools/train_net.py --config-file a.yaml\n\ntorch==2.14.1\n{environment}"
    )
    return folder


def training_rows(iterations: int, decay: float) -> list[dict]:
    return [
        {
            "iteration": step,
            "total_loss": 2 * decay**step + 0.1,
            "lr": 0.01,
            "time": 0.5 + step / 10_000,
            "eta_seconds": float(iterations - 1 - step),
            "elapsed_seconds": 0.5 * (step + 1),
            "peak_memory_mb": 800.0 + step,
        }
        for step in range(19, iterations, 20)
    ]
