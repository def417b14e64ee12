"""One run from a command line: training or evaluation, ended by ``results.json``."""

import argparse
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch import nn

from senet_transfer.engine.checkpoints.checkpoint_history import newest_whole
from senet_transfer.engine.model_from import ModelSource
from senet_transfer.engine.results import metrics, write_results
from senet_transfer.engine.setup import setup
from senet_transfer.engine.signals import stop_at_step_end
from senet_transfer.engine.trainer import Trainer
from senet_transfer.utils.progress import no_bars
from senet_transfer.utils.read_once import read_once
from senet_transfer.weights.file_geometry import examine_config_weights

RESULTS = "results.json"


def main(args: argparse.Namespace) -> None:
    """Runs in every process of the job, and leaves ``OUTPUT_DIR/results.json`` when it is through.

    Args:
        args: of :func:`~senet_transfer.cli.arguments.argument_parser`.
    """
    with no_bars(args.quiet):
        with read_once():
            cfg = setup(args)
            load = _load_model if args.eval_only else _load_trainer
            loaded = load(cfg, args.resume)
        results = Trainer.evaluate(cfg, loaded) if args.eval_only else _train(loaded)
    if comm.is_main_process():
        write_results(Path(cfg.OUTPUT_DIR, RESULTS), results)
        if args.quiet:  # otherwise the log has them
            print("\n".join(f"{name}: {value:g}" for name, value in metrics(results).items()))
        if args.eval_only:  # a training run has been held to them by Detectron2's trainer
            verify_results(cfg, results)


def _load_trainer(cfg: CfgNode, resume: bool) -> Trainer:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def _load_model(cfg: CfgNode, resume: bool) -> nn.Module:
    """Return the model to evaluate, all of it loaded: nothing untrained is evaluated."""
    checkpoint = str(newest_whole(cfg.OUTPUT_DIR)) if resume else None
    return ModelSource(cfg, examine_config_weights(cfg, checkpoint)).build().model


def _train(trainer: Trainer) -> dict[str, Any]:
    with stop_at_step_end():
        trainer.train()
    # Without DATASETS.TEST there was no evaluation.
    found = getattr(trainer, "_last_eval_results", {})
    training = {"iterations": trainer.iter}
    if trainer.clock.steps:
        training["seconds_per_iteration"] = trainer.clock.seconds / trainer.clock.steps
    return {**found, "training": training}
