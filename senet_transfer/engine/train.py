"""One run from a command line: training or evaluation, ended by ``results.json``."""

import argparse
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from senet_transfer.engine.checkpoints.checkpoint_history import newest_whole
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.results import metrics, write_results
from senet_transfer.engine.setup import setup
from senet_transfer.engine.signals import stop_at_step_end
from senet_transfer.engine.trainer import Trainer
from senet_transfer.utils.progress import no_bars

RESULTS = "results.json"


def main(args: argparse.Namespace) -> None:
    """Runs in every process of the job, and leaves ``OUTPUT_DIR/results.json`` when it is through.

    Args:
        args: of :func:`~senet_transfer.cli.arguments.argument_parser`.
    """
    with no_bars(args.quiet):
        cfg = setup(args)
        results = _evaluate(cfg, args.resume) if args.eval_only else _train(cfg, args.resume)
    if comm.is_main_process():
        write_results(Path(cfg.OUTPUT_DIR, RESULTS), results)
        if args.quiet:  # otherwise the log has them
            print("\n".join(f"{name}: {value:g}" for name, value in metrics(results).items()))
        if args.eval_only:  # a training run has been held to them by Detectron2's trainer
            verify_results(cfg, results)


def _train(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    with stop_at_step_end():
        trainer.train()
    # Without DATASETS.TEST there was no evaluation.
    found = getattr(trainer, "_last_eval_results", {})
    training = {"iterations": trainer.iter}
    if trainer.clock.steps:
        training["seconds_per_iteration"] = trainer.clock.seconds / trainer.clock.steps
    return {**found, "training": training}


def _evaluate(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    model = Trainer.build_model(cfg)
    # The whole model, or else what is new in it would be evaluated, too.
    if resume:
        Checkpointer(model).load(str(newest_whole(cfg.OUTPUT_DIR)))
    else:
        Checkpointer(model, family=cfg.MODEL.WEIGHTS_FAMILY).load(cfg.MODEL.WEIGHTS)
    return Trainer.evaluate(cfg, model)
