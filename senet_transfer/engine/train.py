"""Entry point for training and evaluation runs."""

import logging
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch import nn

from senet_transfer.engine.checkpoints.checkpoint_history import newest_whole
from senet_transfer.engine.hooks import AVERAGE_NAME
from senet_transfer.engine.inference.ensembles import build_detectors
from senet_transfer.engine.model_from import ModelSource
from senet_transfer.engine.results import (
    duration,
    metrics,
    summary,
    with_diagnostics,
    write_results,
)
from senet_transfer.engine.setup import RunOptions, resumes, setup
from senet_transfer.engine.signals import stop_at_step_end
from senet_transfer.engine.trainer import Trainer
from senet_transfer.errors import RunError, UserError
from senet_transfer.models.build import backbone_name
from senet_transfer.utils.progress import no_bars
from senet_transfer.utils.read_once import read_once
from senet_transfer.weights.file_geometry import examine_config_weights

RESULTS = "results.json"


def evaluated_file(cfg: CfgNode) -> str:
    """Return the name of the weight file that is evaluated at the end of a training run."""
    return f"{AVERAGE_NAME}.pth" if cfg.SOLVER.EMA.ENABLED else "model_final.pth"


def main(options: RunOptions) -> dict[str, Any]:
    """Train or evaluate a model, and write the results to ``OUTPUT_DIR/results.json``.

    This function must be called in every process of the job; see
    :func:`~senet_transfer.engine.launch.run`.

    Args:
        options: The run's options.

    Returns:
        The written results. They are complete only in the main process.

    Raises:
        UserError: If the run can't start with these options.
        RunError: If the run fails for a reason other than a bug, such as a non-finite loss.
    """
    logging.getLogger("detectron2.engine.train_loop").addFilter(_has_traceback)
    with no_bars(options.quiet):
        with read_once():
            cfg = setup(options)
            load = _load_model if options.eval_only else _load_trainer
            loaded = load(cfg, resumes(cfg, options))
        results = Trainer.evaluate(cfg, loaded) if options.eval_only else _train(loaded)
    if comm.is_main_process():
        written = with_diagnostics(cfg, results)
        write_results(Path(cfg.OUTPUT_DIR, RESULTS), written)
        if options.quiet:  # Otherwise, the log contains the metrics.
            print("\n".join(f"{name}: {value:g}" for name, value in metrics(results).items()))
        else:
            print(f"\n{_summary(cfg, results, loaded)}", flush=True)
        if options.eval_only:  # Trainer.train verifies the results of a training run.
            verify_results(cfg, results)
        return written
    return results


def _has_traceback(record: logging.LogRecord) -> bool:
    """Filter out log records that contain the traceback of a UserError or RunError."""
    return not (record.exc_info and isinstance(record.exc_info[1], UserError | RunError))


def _summary(cfg: CfgNode, results: dict[str, Any], loaded: Trainer | nn.Module) -> str:
    evaluated = {name: value for name, value in results.items() if name != "training"}
    done = f"Evaluated {backbone_name(cfg)}"
    if isinstance(loaded, Trainer):
        count = loaded.timer.steps
        steps = f"{count} step{'s' * (count != 1)} in {duration(loaded.timer.seconds)}"
        if loaded.start_iter:
            steps = f"{steps}, to step {loaded.iter}"
        if loaded.max_iter < loaded.cfg.SOLVER.MAX_ITER:
            steps = f"{steps}, and ended early"
        done = f"Trained {backbone_name(cfg)} for {steps}"
    return summary(done, evaluated, list(cfg.DATASETS.TEST), cfg.OUTPUT_DIR)


def _load_trainer(cfg: CfgNode, resume: bool) -> Trainer:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def _load_model(cfg: CfgNode, resume: bool) -> nn.Module:
    """Build the model or ensemble to evaluate, and check that all of its weights are loaded."""
    checkpoint = str(newest_whole(cfg.OUTPUT_DIR)) if resume else None
    return build_detectors(ModelSource(cfg, examine_config_weights(cfg, checkpoint))).model


def _train(trainer: Trainer) -> dict[str, Any]:
    with stop_at_step_end():
        trainer.train()
    training: dict[str, Any] = {"iterations": trainer.iter}
    if trainer.timer.steps:
        training["seconds_per_iteration"] = trainer.timer.seconds / trainer.timer.steps
    return {**trainer.results, "training": training}
