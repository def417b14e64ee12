"""Training and evaluation with a LazyConfig.

This module follows Detectron2's ``tools/lazyconfig_train_net.py``, but uses this project's training
step, checkpoints and graceful shutdown.
"""

import logging
from pathlib import Path
from typing import Any

from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.engine import HookBase, create_ddp_model, default_setup
from detectron2.engine import hooks as detectron2_hooks
from detectron2.engine.defaults import default_writers
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from senet_transfer.data.detection.coco import register_datasets
from senet_transfer.engine import hooks
from senet_transfer.engine.checkpoints import checkpoint_history as history
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.checkpoints.output_folder import claim_output_folder
from senet_transfer.engine.results import write_results
from senet_transfer.engine.setup import (
    RunOptions,
    available_device,
    check_overwrite,
    escape_names,
    restarted,
    resumes,
)
from senet_transfer.engine.signals import stop_at_step_end
from senet_transfer.engine.train_step import StepTrainer
from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_line

_SECTIONS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")

# Command-line flags that change keys of a YAML config.
_UNSUPPORTED = ("classes", "deterministic", "quiet", "data", "val", "images")

logger = logging.getLogger(__name__)


def load_lazy_config(options: RunOptions) -> DictConfig:
    """Load a LazyConfig and apply the options, such as ``train.max_iter=1000``.

    Raises:
        UserError: If the file or a section is missing, or if an option is invalid.
    """
    check_overwrite(options)
    path = options.config_file
    if not Path(path).is_file():
        raise UserError(
            f"The config file {path} does not exist. Pass the path of an existing file."
        )
    if given := [name for name in _UNSUPPORTED if getattr(options, name)]:
        raise UserError(
            f"--{given[0]} is not supported with a LazyConfig. Remove it, and set the "
            f"corresponding values in {path}."
        )
    cfg = LazyConfig.load(path)
    if missing := [name for name in _SECTIONS if name not in cfg]:
        raise UserError(
            f"The LazyConfig {path} does not contain {', '.join(missing)}; expected "
            f"{', '.join(_SECTIONS)}, as in Detectron2's configs/common. Add the missing entries."
        )
    cfg.train = OmegaConf.merge(model_zoo.get_config("common/train.py").train, cfg.train)
    try:
        return LazyConfig.apply_overrides(cfg, list(options.options))
    except Exception as error:  # Hydra's parser and OmegaConf raise exceptions of various types.
        raise UserError(
            f"The options {' '.join(options.options)} can't be applied to the LazyConfig {path}: "
            f"{first_line(error)}. Expected KEY=VALUE, such as train.max_iter=1000."
        ) from error


def main(options: RunOptions) -> None:
    """Train or evaluate a model, and write the results to ``results.json``.

    This function must be called in every process of the job, like
    :func:`senet_transfer.engine.train.main`.

    Args:
        options: The run's options. ``config_file`` must be a LazyConfig.

    Raises:
        UserError: If the run can't start with these options.
        RunError: If the run fails for a reason other than a bug, such as a non-finite loss.
    """
    cfg = load_lazy_config(options)
    cfg.train.device = available_device(cfg.train.device, logger)
    # The functions for the output folder read these keys.
    run = CfgNode({"OUTPUT_DIR": cfg.train.output_dir})
    run.MODEL = CfgNode({"WEIGHTS": cfg.train.init_checkpoint})
    resume = resumes(run, options)
    if not (resume or options.eval_only):
        claim_output_folder(run, overwrite=options.overwrite, restarted=restarted())
    rank = comm.get_rank()
    escape_names(setup_logger(cfg.train.output_dir, distributed_rank=rank, name="senet_transfer"))
    default_setup(cfg, options)
    register_datasets(options.datasets)
    model = instantiate(cfg.model).to(cfg.train.device)
    if options.eval_only:
        checkpoint = str(history.newest_whole(run.OUTPUT_DIR)) if resume else run.MODEL.WEIGHTS
        Checkpointer(model).load(checkpoint)
        results = _evaluate(cfg, _distributed(cfg, model))
    else:
        results = _train(cfg, _distributed(cfg, model), resume)
    if comm.is_main_process():
        write_results(Path(cfg.train.output_dir, "results.json"), results)


def _distributed(cfg: DictConfig, model: nn.Module) -> nn.Module:
    on_cpu = {"device_ids": None} if cfg.train.device == "cpu" else {}
    return create_ddp_model(model, **cfg.train.ddp, **on_cpu)


class LazyTrainer(StepTrainer):
    """Trainer that runs this project's training step and hooks.

    Attributes:
        timer: The hook that times the steps. It must also be in the list of hooks.
    """

    timer: hooks.StepTimer

    @property
    def stops(self) -> bool:
        """True if the run must stop after this step."""
        return self.guard.stops


def _train(cfg: DictConfig, model: nn.Module, resume: bool) -> dict[str, Any]:
    cfg.optimizer.params.model = model
    trainer = LazyTrainer(
        model,
        instantiate(cfg.dataloader.train),
        instantiate(cfg.optimizer),
        dtype="" if cfg.train.amp.enabled else None,
        output_dir=cfg.train.output_dir,
    )
    trainer.timer = hooks.StepTimer()
    keep = cfg.train.checkpointer.get("max_to_keep") or 0
    # A run could not resume if its only checkpoint were corrupted.
    checkpointer = Checkpointer(
        model, cfg.train.output_dir, keep=max(keep, 2) if keep else 0, trainer=trainer
    )
    results: dict[str, Any] = {}

    def evaluate() -> dict[str, Any]:
        results.clear()
        results.update(_evaluate(cfg, model))
        return dict(results)

    trainer.register_hooks(_hooks(cfg, trainer, checkpointer, evaluate))
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    if comm.is_main_process():
        history.sweep(cfg.train.output_dir)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    with stop_at_step_end():
        trainer.train(start, cfg.train.max_iter)
    return {**results, "training": {"iterations": trainer.iter}}


def _hooks(
    cfg: DictConfig, trainer: LazyTrainer, checkpointer: Checkpointer, evaluate: Any
) -> list[HookBase]:
    found: list[HookBase] = [
        trainer.timer,
        detectron2_hooks.IterationTimer(),
        detectron2_hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        hooks.DataWaits(),
        hooks.CheckpointSaver(checkpointer, cfg.train.checkpointer.period),
        detectron2_hooks.EvalHook(cfg.train.eval_period, evaluate),
    ]
    if comm.is_main_process():
        history.drop_torn_line(Path(cfg.train.output_dir, "metrics.json"))
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        found.append(detectron2_hooks.PeriodicWriter(writers, period=cfg.train.log_period))
    return [*found, hooks.GracefulStop()]


def _evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Return the evaluator's metrics, or an empty dict if the config has no evaluator."""
    if "evaluator" not in cfg.dataloader:
        return {}
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return results
