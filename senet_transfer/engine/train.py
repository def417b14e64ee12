"""One run from a command line: training or evaluation, ended by ``results.json``."""

import argparse
import json
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from senet_transfer.engine.arguments import argument_parser
from senet_transfer.engine.checkpoint import Checkpointer
from senet_transfer.engine.checks import last_checkpoint
from senet_transfer.engine.launch import run
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer

RESULTS = "results.json"


def main(args: argparse.Namespace) -> None:
    """Runs in every process of the job, and leaves ``OUTPUT_DIR/results.json`` when it is through.

    Args:
        args: of :func:`~senet_transfer.engine.arguments.argument_parser`.
    """
    cfg = setup(args)
    results = _evaluate(cfg, args.resume) if args.eval_only else _train(cfg, args.resume)
    if comm.is_main_process():
        # Whole or not at all: who finds it takes the run for done.
        partial = os.path.join(cfg.OUTPUT_DIR, f".{RESULTS}.partial")
        with open(partial, "w") as file:
            json.dump(results, file, indent=2)
        os.replace(partial, os.path.join(cfg.OUTPUT_DIR, RESULTS))


def _train(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
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
        Checkpointer(model).load(last_checkpoint(cfg))
    else:
        Checkpointer(model, family=cfg.MODEL.WEIGHTS_FAMILY).load(cfg.MODEL.WEIGHTS)
    return Trainer.evaluate(cfg, model)


if __name__ == "__main__":
    run(main, argument_parser().parse_args())
