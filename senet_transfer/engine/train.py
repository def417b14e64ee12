"""One run of training or evaluation, which ends by writing ``results.json``."""

from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from senet_transfer.engine.checkpoints.checkpoint_history import newest_whole
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.results import metrics, write_results
from senet_transfer.engine.setup import RunOptions, resumes, setup
from senet_transfer.engine.signals import stop_at_step_end
from senet_transfer.engine.trainer import Trainer
from senet_transfer.utils.progress import no_bars

RESULTS = "results.json"


def main(options: RunOptions) -> None:
    """Train or evaluate, and write ``OUTPUT_DIR/results.json`` at the end.

    To be called in every process of the job, see :func:`~senet_transfer.engine.launch.run`.

    Args:
        options: of the run.

    Raises:
        UserError: the run can't start as asked; the message says why and what to do.
        RunError: it can't continue.
    """
    with no_bars(options.quiet):
        cfg = setup(options)
        run = _evaluate if options.eval_only else _train
        results = run(cfg, resumes(cfg, options))
    if comm.is_main_process():
        write_results(Path(cfg.OUTPUT_DIR, RESULTS), results)
        if options.quiet:  # otherwise the log has them
            print("\n".join(f"{name}: {value:g}" for name, value in metrics(results).items()))
        if options.eval_only:  # Trainer.train has compared those of a training run
            verify_results(cfg, results)


def _train(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    with stop_at_step_end():
        trainer.train()
    training = {"iterations": trainer.iter}
    if trainer.timer.steps:
        training["seconds_per_iteration"] = trainer.timer.seconds / trainer.timer.steps
    return {**trainer.results, "training": training}


def _evaluate(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    model = Trainer.build_model(cfg)
    # The whole model, or else what is new in it would be evaluated, too.
    if resume:
        Checkpointer(model).load(str(newest_whole(cfg.OUTPUT_DIR)))
    else:
        Checkpointer(model, family=cfg.MODEL.WEIGHTS_FAMILY).load(cfg.MODEL.WEIGHTS)
    return Trainer.evaluate(cfg, model)
