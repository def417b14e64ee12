#!/usr/bin/env python
"""Trains or evaluates a model from a config; see --help for examples."""

import json
import os

from detectron2.utils import comm

from senet_transfer.engine.arguments import argument_parser
from senet_transfer.engine.checkpoint import Checkpointer
from senet_transfer.engine.history import newest_whole
from senet_transfer.engine.interruption import stop_at_step_end
from senet_transfer.engine.launch import run
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer


def main(args):
    """Runs in every process of the job."""
    cfg = setup(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        with stop_at_step_end():
            trainer.train()
        return
    model = Trainer.build_model(cfg)
    # The whole model, or else what is new in it would be evaluated, too.
    if args.resume:
        Checkpointer(model).load(str(newest_whole(cfg.OUTPUT_DIR)))
    else:
        Checkpointer(model, family=cfg.MODEL.WEIGHTS_FAMILY).load(cfg.MODEL.WEIGHTS)
    results = Trainer.evaluate(cfg, model)
    if comm.is_main_process():
        with open(os.path.join(cfg.OUTPUT_DIR, "results.json"), "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    run(main, argument_parser().parse_args())
