#!/usr/bin/env python
"""Trains or evaluates a model from a config; see --help for examples."""

import os

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from senet_transfer.engine.arguments import argument_parser
from senet_transfer.engine.checkpoint import Checkpointer
from senet_transfer.engine.checks import last_checkpoint
from senet_transfer.engine.launch import run
from senet_transfer.engine.results import write_results
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer


def main(args):
    """Runs in every process of the job."""
    cfg = setup(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        return
    model = Trainer.build_model(cfg)
    # The whole model, or else what is new in it would be evaluated, too.
    if args.resume:
        Checkpointer(model).load(last_checkpoint(cfg))
    else:
        Checkpointer(model, family=cfg.MODEL.WEIGHTS_FAMILY).load(cfg.MODEL.WEIGHTS)
    results = Trainer.evaluate(cfg, model)
    if comm.is_main_process():
        write_results(os.path.join(cfg.OUTPUT_DIR, "results.json"), results)
        verify_results(cfg, results)


if __name__ == "__main__":
    run(main, argument_parser().parse_args())
