"""Trainer for detectors and classifiers, based on Detectron2's DefaultTrainer."""

import contextlib
import logging
import os
import weakref
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PeriodicWriter
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, verify_results
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from senet_transfer.config import is_classification
from senet_transfer.config.validation import config_errors
from senet_transfer.data import build as classification
from senet_transfer.data.cifar.loader import CifarEvalLoader, CifarTrainLoader
from senet_transfer.data.classification.loader import ClassificationLoader
from senet_transfer.data.detection import loader as detection
from senet_transfer.data.detection.mapper import CheckedDatasetMapper
from senet_transfer.data.workers import RaisingLoader
from senet_transfer.engine import hooks, solver
from senet_transfer.engine.capture.captured_backbone import CapturedBackbone
from senet_transfer.engine.capture.graphs import CudaGraphs, Graphs
from senet_transfer.engine.checkpoints import checkpoint_history as history
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer, UntaggedCheckpointer
from senet_transfer.engine.inference.augmentation import with_augmentation
from senet_transfer.engine.little_data.stages import GradualUnfreezing
from senet_transfer.engine.numerics import set_memory_format, settings
from senet_transfer.engine.run_checks import check_batch_norms
from senet_transfer.engine.train_step import StepTrainer
from senet_transfer.evaluation.classification_evaluator import ClassificationEvaluator
from senet_transfer.evaluation.coco import FastCOCOEvaluator
from senet_transfer.evaluation.evaluators import evaluator_kinds, other_evaluator
from senet_transfer.evaluation.validation_loss import validation_losses
from senet_transfer.layers.fused.functions import set_fused, uses_kernels
from senet_transfer.models.build import weights_follow
from senet_transfer.utils.private_api import limit_history
from senet_transfer.utils.text import folder_name
from senet_transfer.utils.tracking import build_tracking_writers
from senet_transfer.weights.choice import config_choice

# Number of past values to keep per metric for smoothing.
_HISTORY = 400

# Number of iterations between two writes of metrics, the default of Detectron2's PeriodicWriter.
_WRITE_PERIOD = 20

# Devices for which reading a value synchronises the host. On a CPU, values are read in every step.
_ASYNCHRONOUS = ("cuda",)

# Hook names in version 0.1 checkpoints, and their current names.
_HOOK_NAMES = {"WeightAverage": "ModelEMA"}

logger = logging.getLogger(__name__)


class _EndOfTraining(BaseException):
    """Exception that ends Detectron2's training loop early, without an error.

    It subclasses BaseException, because the loop logs every subclass of Exception as an error.
    """


class Trainer(DefaultTrainer):
    """Trainer for detectors and classifiers.

    It extends Detectron2's DefaultTrainer with:

    - training of classifiers;
    - checks of images against their entries in the annotation file;
    - strict loading of checkpoints;
    - mixed precision and multiple processes on a CPU;
    - an optional second evaluation with test-time augmentation;
    - the additional solver options in ``senet_transfer/config/defaults.py``.

    Attributes:
        results: The metrics of the last evaluation, by task. Empty before the first evaluation.
        periodic_writers: The hooks that write metrics.
    """

    iter: int

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: The config, as returned by :func:`senet_transfer.engine.setup.setup`.
        """
        # DefaultTrainer's constructor is not called because it always uses Detectron2's
        # checkpointer, CUDA for mixed precision, and one GPU per process.
        TrainerBase.__init__(self)
        with config_errors("scaled config"):
            cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        if is_classification(cfg):
            images = len(classification.open_train_dataset(cfg))
            cfg = solver.epochs_to_iterations(cfg, images)
        self.step_seed = hooks.StepSeed(cfg.SEED)
        with config_errors("model"), weights_follow():
            model = self.build_model(cfg)
        check_batch_norms(cfg, model)
        with config_errors("optimizer"):
            optimizer = self.build_optimizer(cfg, model)
        with config_errors("data loader"):
            data_loader: Any = self.build_train_loader(cfg, self.step_seed.seed)
        if cfg.SOLVER.EPOCHS is not None and not is_classification(cfg):
            # The loader's dataset excludes the images that Detectron2 filters out, such as those
            # without objects.
            cfg = solver.epochs_to_iterations(cfg, len(data_loader.dataset))
        parameter = next(model.parameters())
        self._device = parameter.device
        fuses = cfg.MODEL.SE.FUSED == "auto" and uses_kernels("auto", parameter)
        if fuses and cfg.SOLVER.COMPILE == "graph":
            # Replaying a graph has no launch overhead, so fused kernels are faster for all layers.
            set_fused(model, True)
        if cfg.SOLVER.COMPILE == "default":
            # Unlike torch.compile(model), this keeps the model object and its tensor names.
            (model if is_classification(cfg) else model.backbone).compile()
        elif cfg.SOLVER.COMPILE == "graph" and not is_classification(cfg):
            self.capture_backbone(model.backbone)
        model = _distribute(model)
        self._trainer = StepTrainer(
            model,
            data_loader,
            optimizer,
            dtype=cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else None,
            micro_batches=cfg.SOLVER.MICRO_BATCHES,
            max_skips=cfg.SOLVER.MAX_NONFINITE_STEPS,
            output_dir=cfg.OUTPUT_DIR,
            reads_after=partial(_reads_after, cfg) if self._device.type in _ASYNCHRONOUS else None,
            graphs=self.build_graphs(cfg, self._device),
        )
        with config_errors("schedule"):
            self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            family=cfg.MODEL.WEIGHTS_FAMILY,
            choice=config_choice(cfg),
            keep=cfg.SOLVER.CHECKPOINTS_KEPT,
            classes=cfg.DATASETS.CLASSES,
            trainer=weakref.proxy(self),
        )
        self.results: OrderedDict = OrderedDict()
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.average: hooks.ModelEMA | None = None
        self.early_stopping: hooks.EarlyStopping | None = None
        self._evaluated_after = -1
        self.timer = hooks.StepTimer()
        self.register_hooks(self.build_hooks())

    @property
    def stops(self) -> bool:
        """True if the run must stop after this step."""
        return self._trainer.guard.stops

    @property
    def waited(self) -> float:
        """Total time that this process has spent waiting for batches, in seconds."""
        return self._trainer.waited

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the newest checkpoint, starting with the next batch, or load initial weights.

        A new run deletes the checkpoint list left by an earlier run in the same folder, so that it
        can be resumed only from its own checkpoints.
        """
        super().resume_or_load(resume=resume)
        if comm.is_main_process():
            history.sweep(self.cfg.OUTPUT_DIR)
            if not resume:
                history.forget(self.cfg.OUTPUT_DIR)
        if self.start_iter:
            self._trainer.reset_data_loader(
                lambda: self.build_train_loader(self.cfg, self.step_seed.seed, self.start_iter)
            )

    def train(self) -> None:
        """Train until the last iteration, and verify ``TEST.EXPECTED_RESULTS``.

        Training ends earlier if ``TEST.PATIENCE`` is set and the metric no longer improves.
        """
        if self.early_stopping and self.early_stopping.stops:
            # The resumed run had already ended early.
            self.early_stopping.log()
            self.max_iter = self.start_iter
        with contextlib.suppress(_EndOfTraining):
            TrainerBase.train(self, self.start_iter, self.max_iter)
        if comm.is_main_process():
            verify_results(self.cfg, self.results)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, including the batch size and numerical settings."""
        own = {"divided": self._division(), "numerics": settings(self.cfg)}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint, and warn if the run can't be resumed exactly."""
        hooks_state = state_dict.get("hooks", {})
        renamed = {_HOOK_NAMES.get(name, name): state for name, state in hooks_state.items()}
        super().load_state_dict({**state_dict, "hooks": renamed})
        numerics = settings(self.cfg)
        saved = {**numerics, **state_dict.get("numerics", {})}
        if changed := [key for key in numerics if numerics[key] != saved[key]]:
            logger.warning(
                "The run can't be resumed exactly: %s. These settings affect rounding, so the "
                "results differ from those of an uninterrupted run.",
                ", ".join(f"{key} {saved[key]} before, {numerics[key]} now" for key in changed),
            )
        now = self._division()
        before = state_dict.get("divided", now)
        if changed := [key for key in now if now[key] != before[key]]:
            logger.warning(
                "The run can't be resumed exactly: %s. The weights and the schedule are restored "
                "exactly, but the data order and the random numbers differ from those of an "
                "uninterrupted run.",
                ", ".join(f"{key} {before[key]} before, {now[key]} now" for key in changed),
            )

    def _division(self) -> dict[str, int]:
        division = {"images a step": self.cfg.SOLVER.IMS_PER_BATCH}
        division["processes"] = comm.get_world_size()
        if is_classification(self.cfg):
            division["workers a process"] = self.cfg.DATALOADER.NUM_WORKERS
        return division

    def before_train(self) -> None:
        """Run the hooks, and limit the number of past values that are stored for each metric.

        Detectron2 keeps up to a million values.
        """
        limit_history(self.storage, _HISTORY)
        super().before_train()

    def after_step(self) -> None:
        """Run the hooks, and leave the training loop if training ends early."""
        super().after_step()
        if self.early_stopping and self.early_stopping.stops:
            self.iter += 1  # after_train then treats training as complete.
            raise _EndOfTraining

    def after_train(self) -> None:
        """Run the hooks or, if training was interrupted, only flush the metric writers."""
        # Detectron2 counts an iteration after its loop even if a resumed run was complete.
        self.iter = min(self.iter, max(self.start_iter, self.max_iter))
        if self.iter >= self.max_iter:
            super().after_train()
            return
        self.storage.iter = self.iter
        # Reading the losses is a collective operation, which could hang if a process has failed.
        if comm.get_world_size() == 1:
            self._trainer.read()
        for writer in self.periodic_writers:
            # On a full disk, an OSError here would hide the error that ended the run.
            with contextlib.suppress(OSError):
                writer.after_train()

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model from the config, in the config's memory format."""
        return set_memory_format(cfg, super().build_model(cfg))

    @classmethod
    def build_graphs(cls, cfg: CfgNode, device: torch.device) -> Graphs | None:
        """Return the backend that captures the training step, or None to run the step eagerly."""
        captures = cfg.SOLVER.COMPILE == "graph" and is_classification(cfg)
        return CudaGraphs(device) if captures else None

    @classmethod
    def capture_backbone(cls, backbone: nn.Module) -> None:
        """Replace the forward pass of a detector's backbone with captured CUDA graphs."""
        CapturedBackbone(backbone)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """Build the optimizer from the config."""
        return solver.build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        """Build the learning rate schedule from the config."""
        return solver.build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(
        cls, cfg: CfgNode, seed: int | None = None, start_iter: int = 0
    ) -> RaisingLoader | ClassificationLoader | CifarTrainLoader:
        """Build the training data loader.

        Args:
            cfg: The config.
            seed: The seed for the data order and augmentation. If None, it is random.
            start_iter: The iteration whose batch is loaded first.
        """
        if seed is None:
            seed = comm.shared_random_seed()
        if is_classification(cfg):
            return classification.train_loader(cfg, seed, start_iter)
        mapper = CheckedDatasetMapper(cfg, is_train=True)
        return detection.build_train_loader(cfg, mapper, seed=seed, start_iter=start_iter)

    @classmethod
    def build_test_loader(
        cls, cfg: CfgNode, dataset_name: str
    ) -> RaisingLoader | ClassificationLoader | CifarEvalLoader:
        """Build the data loader for an evaluation dataset. Broken images raise an error."""
        if is_classification(cfg):
            return classification.test_loader(cfg, dataset_name)
        mapper = CheckedDatasetMapper(cfg, is_train=False)
        return detection.build_test_loader(cfg, dataset_name, mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, folder: str = "inference"
    ) -> DatasetEvaluator:
        """Build the evaluator for a dataset.

        Detectors are evaluated with the metrics of the dataset's ``evaluator_type``, and
        classifiers with the top-1 and top-5 error. A detector's predictions and diagnostics are
        written to ``OUTPUT_DIR/<folder>/<dataset_name>``.

        Raises:
            UserError: If the model's predictions can't be evaluated on the dataset.
        """
        if is_classification(cfg):
            dataset = classification.open_test_dataset(cfg, dataset_name)
            output_dir = os.path.join(
                cfg.OUTPUT_DIR, classification.inference_dir(cfg, dataset_name)
            )
            return ClassificationEvaluator(
                dataset.num_classes, len(dataset), with_loss=cfg.TEST.LOSS, output_dir=output_dir
            )
        output_dir = os.path.join(cfg.OUTPUT_DIR, folder, folder_name(dataset_name))
        kinds = evaluator_kinds(cfg, dataset_name)
        found = [
            cls._coco_evaluator(cfg, dataset_name, output_dir)
            if kind == "coco"
            else other_evaluator(kind, dataset_name, output_dir)
            for kind in kinds
        ]
        return found[0] if len(found) == 1 else DatasetEvaluators(found)

    @staticmethod
    def _coco_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str) -> FastCOCOEvaluator:
        return FastCOCOEvaluator(
            dataset_name,
            output_dir=output_dir,
            # For a dataset without a JSON file, Detectron2 writes one. A cached file from an
            # earlier run may describe different data.
            allow_cached_coco=False,
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
            # COCO metrics are defined for at most 100 detections per image.
            max_dets_per_image=max(cfg.TEST.DETECTIONS_PER_IMAGE, 100),
            diagnostics=cfg.TEST.DIAGNOSTICS,
        )

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> OrderedDict:
        """Evaluate a model on ``DATASETS.TEST``.

        A detector's losses are also computed if ``TEST.LOSS`` is set and ``evaluators`` is None.

        Args:
            cfg: The config.
            model: The model.
            evaluators: The evaluators for the datasets. If None, :meth:`build_evaluator` is used.

        Returns:
            Nested results in Detectron2's format.
        """
        results = super().test(cfg, model, evaluators)
        if evaluators is not None or not cfg.TEST.LOSS or is_classification(cfg):
            return results
        for name in cfg.DATASETS.TEST:
            losses = cls.validation_losses(cfg, model, name)
            if comm.is_main_process():
                text = ", ".join(f"{key} {value:.4f}" for key, value in losses.items())
                logger.info("Mean losses on %s: %s.", name, text)
                (results if len(cfg.DATASETS.TEST) == 1 else results[name])["validation"] = losses
        return results

    @classmethod
    def validation_losses(cls, cfg: CfgNode, model: nn.Module, name: str) -> dict[str, float]:
        """Return a detector's mean losses on a dataset, keyed by loss name.

        The model is not changed.
        """
        mapper = CheckedDatasetMapper(cfg, is_train=False)
        mapper.is_train = True  # Keep the annotations, but without augmentation.
        return validation_losses(model, detection.build_test_loader(cfg, name, mapper))

    @classmethod
    def evaluate(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """Evaluate on ``DATASETS.TEST``, and again with test-time augmentation if it is enabled.

        Returns:
            Nested results in Detectron2's format. The names of tasks evaluated with test-time
            augmentation end in ``_TTA``.
        """
        results = cls.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(cls._test_with_augmentation(cfg, model))
        return results

    @classmethod
    def _test_with_augmentation(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        logger.info("Evaluating with test-time augmentation ...")
        evaluators = [
            cls.build_evaluator(cfg, name, folder="inference_TTA") for name in cfg.DATASETS.TEST
        ]
        if isinstance(model, DistributedDataParallel):
            model = model.module
        results = cls.test(cfg, with_augmentation(cfg, model), evaluators)
        return OrderedDict((f"{key}_TTA", value) for key, value in results.items())

    def build_hooks(self) -> list[HookBase]:
        """Build Detectron2's hooks and the additional hooks enabled in the config."""
        cfg = self.cfg
        model = self.checkpointer.model
        if cfg.SOLVER.EMA.ENABLED:
            self.average = hooks.ModelEMA(model, cfg.SOLVER.EMA.DECAY, self._trainer.guard)
            self._trainer.use_average(self.average)
        theirs = super().build_hooks()
        self.periodic_writers = [hook for hook in theirs if isinstance(hook, PeriodicWriter)]
        replaced = (PeriodicWriter, PeriodicCheckpointer, EvalHook)
        first = [self.timer, *(hook for hook in theirs if not isinstance(hook, replaced))]
        saver: list[HookBase] = [
            hooks.CheckpointSaver(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
        ]
        last = [*self.periodic_writers, hooks.GracefulStop()]
        evaluation = [EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate_in_training)]
        if cfg.TEST.AUG.ENABLED:
            evaluate = EvalHook(0, lambda: self._test_with_augmentation(cfg, self.model))
            evaluation.append(evaluate)
        if isinstance(self.scheduler, solver.PlateauLR):
            evaluation.append(hooks.Plateau(cfg.TEST.EVAL_PERIOD, self.scheduler))
        if cfg.TEST.PATIENCE:
            period, metric = cfg.TEST.EVAL_PERIOD, cfg.TEST.BEST_METRIC
            self.early_stopping = hooks.EarlyStopping(period, metric, cfg.TEST.PATIENCE)
            saver.insert(0, self.early_stopping)
        if self.early_stopping or isinstance(self.scheduler, solver.PlateauLR):
            # A checkpoint must include the hooks' state after the evaluation at the same step.
            return [*first, *self._own_hooks(model), *evaluation, *self._savers(), *saver, *last]
        # As in Detectron2, the checkpoint is saved before the evaluation, which might fail.
        return [*first, *self._own_hooks(model), *saver, *evaluation, *self._savers(), *last]

    def build_writers(self) -> list[EventWriter]:
        """Remove an incomplete last line from metrics.json, and build all writers."""
        cfg = self.cfg
        history.drop_torn_line(Path(cfg.OUTPUT_DIR, "metrics.json"))
        trackers = build_tracking_writers(list(cfg.TRACKING), cfg.OUTPUT_DIR, cfg.dump())
        return [*super().build_writers(), *trackers]

    def _own_hooks(self, model: nn.Module) -> list[HookBase]:
        cfg, own = self.cfg, [self.step_seed, hooks.Resources(self._device), hooks.DataWaits()]
        if cfg.SOLVER.UNFREEZE_ITERS:
            own.append(GradualUnfreezing(model, cfg.SOLVER.UNFREEZE_ITERS, self._wrap_model))
        if cfg.SOLVER.FROZEN_BN_ITERS:
            own.append(hooks.FrozenStatistics(model, cfg.SOLVER.FROZEN_BN_ITERS))
        if self.average:
            own.append(self.average)
        return own

    def _wrap_model(self) -> None:
        """Wrap the model for distributed training again when its trainable parameters change."""
        self.model = self._trainer.guard.model = _distribute(self.checkpointer.model)

    def _savers(self) -> list[HookBase]:
        cfg, savers = self.cfg, []
        classes = cfg.DATASETS.CLASSES
        checkpointer = UntaggedCheckpointer(self.model, cfg.OUTPUT_DIR, classes=classes)
        if cfg.TEST.BEST_METRIC:
            period, metric = cfg.TEST.EVAL_PERIOD, cfg.TEST.BEST_METRIC
            savers.append(hooks.BestModel(period, metric, checkpointer, self.average))
        if self.average:
            savers.append(hooks.AverageSaver(self.average, checkpointer))
        return savers

    def _evaluate_in_training(self) -> OrderedDict:
        steps = min(self.iter + 1, self.max_iter)
        if steps == self._evaluated_after:  # Training has ended early after an evaluation.
            return self.results
        self._evaluated_after = steps
        with self.average.in_place() if self.average else contextlib.nullcontext():
            self.results = self.test(self.cfg, self.model)
        return self.results


def _reads_after(cfg: CfgNode, iteration: int) -> bool:
    """Return whether the host reads the losses after an iteration.

    The losses are read before they are logged, and before a checkpoint or an evaluation.
    """
    done = iteration + 1
    periods = (_WRITE_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)
    due = any(period > 0 and done % period == 0 for period in periods)
    return due or done == cfg.SOLVER.MAX_ITER


def _distribute(model: nn.Module) -> nn.Module:
    on_cpu = next(model.parameters()).device.type == "cpu"
    options = {"device_ids": None} if on_cpu else {}
    return create_ddp_model(model, broadcast_buffers=False, **options)
