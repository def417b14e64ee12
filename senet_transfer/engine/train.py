"""One run of training or evaluation, which ends by writing ``results.json``."""

from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch import nn

from senet_transfer.engine.checkpoints.checkpoint_history import newest_whole
from senet_transfer.engine.model_from import ModelSource
from senet_transfer.engine.results import metrics, write_results
from senet_transfer.engine.setup import RunOptions, resumes, setup
from senet_transfer.engine.signals import stop_at_step_end
from senet_transfer.engine.trainer import Trainer
from senet_transfer.utils.progress import no_bars
from senet_transfer.utils.read_once import read_once
from senet_transfer.weights.file_geometry import examine_config_weights

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
        with read_once():
            cfg = setup(options)
            load = _load_model if options.eval_only else _load_trainer
            loaded = load(cfg, resumes(cfg, options))
        results = Trainer.evaluate(cfg, loaded) if options.eval_only else _train(loaded)
    if comm.is_main_process():
        write_results(Path(cfg.OUTPUT_DIR, RESULTS), results)
        if options.quiet:  # otherwise the log has them
            print("\n".join(f"{name}: {value:g}" for name, value in metrics(results).items()))
        if options.eval_only:  # Trainer.train has compared those of a training run
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
    training = {"iterations": trainer.iter}
    if trainer.timer.steps:
        training["seconds_per_iteration"] = trainer.timer.seconds / trainer.timer.steps
    return {**trainer.results, "training": training}
