"""The one train loop of this project, which is Detectron2's."""

import contextlib
import logging
import os
import weakref
from collections import OrderedDict

from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PeriodicWriter
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from senet_transfer.classification import from_config as classification
from senet_transfer.classification.evaluator import ClassificationEvaluator
from senet_transfer.data.loader import ClassificationLoader
from senet_transfer.data.mapper import CheckedDatasetMapper
from senet_transfer.engine import hooks, schedule
from senet_transfer.engine.checkpoint import Checkpointer, UntaggedCheckpointer
from senet_transfer.engine.optimizer import build_optimizer
from senet_transfer.engine.step import StepTrainer
from senet_transfer.errors import UserError

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer for detection and, where the config is of one, for a classifier.

    What differs: images are checked against their JSON entries, checkpoints are loaded strictly,
    mixed precision and several processes work on a CPU, evaluation can add test-time
    augmentation, and the solver has the options of ``senet_transfer/config.py``.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: as of :func:`senet_transfer.engine.setup.setup`.
        """
        # DefaultTrainer's own constructor is not called: it fixes the checkpointer, CUDA for
        # mixed precision, and a GPU for every process.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        if classification.is_classification(cfg):
            images = len(classification.open_train_dataset(cfg))
            cfg = schedule.epochs_to_iterations(cfg, images)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = _distribute(model)
        self._trainer = StepTrainer(
            model,
            data_loader,
            optimizer,
            dtype=cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else None,
            micro_batches=cfg.SOLVER.MICRO_BATCHES,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            family=cfg.MODEL.WEIGHTS_FAMILY,
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.average: hooks.WeightAverage | None = None
        self.clock = hooks.Clock()
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; a classifier's data goes on at the batch that comes next."""
        super().resume_or_load(resume=resume)
        if self.start_iter and classification.is_classification(self.cfg):
            self._trainer.reset_data_loader(
                lambda: self.build_train_loader(self.cfg, start_iter=self.start_iter)
            )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """The config's optimizer."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        """Detectron2's schedules, and "WarmupPlateauLR"."""
        return schedule.build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(
        cls, cfg: CfgNode, start_iter: int = 0
    ) -> DataLoader | ClassificationLoader:
        """Detectron2's loader, with images checked; a classifier's, from an iteration on."""
        if classification.is_classification(cfg):
            return classification.train_loader(cfg, start_iter)
        return build_detection_train_loader(cfg, mapper=CheckedDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(
        cls, cfg: CfgNode, dataset_name: str
    ) -> DataLoader | ClassificationLoader:
        """Detectron2's loader, with images checked; a classifier's."""
        if classification.is_classification(cfg):
            return classification.test_loader(cfg, dataset_name)
        mapper = CheckedDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, folder: str = "inference"
    ) -> DatasetEvaluator:
        """COCO's metrics, the predictions written to ``OUTPUT_DIR/<folder>/<dataset_name>``.

        A classifier's are top-1 and top-5 error, and its predictions go to a folder there, too.

        Raises:
            UserError: the data set is not evaluated by COCO's metrics.
        """
        if classification.is_classification(cfg):
            dataset = classification.open_test_dataset(cfg, dataset_name)
            output_dir = os.path.join(
                cfg.OUTPUT_DIR, classification.inference_dir(cfg, dataset_name)
            )
            return ClassificationEvaluator(dataset.num_classes, len(dataset), output_dir=output_dir)
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
        if kind != "coco":
            raise UserError(
                f"The data set {dataset_name} is evaluated by {kind!r} in Detectron2, and this "
                "project evaluates detection by COCO's metrics. Register it in COCO's format."
            )
        return COCOEvaluator(
            dataset_name,
            output_dir=os.path.join(cfg.OUTPUT_DIR, folder, dataset_name),
            use_fast_impl=False,
            # A data set without a JSON is converted to one; a file left by an earlier run may be
            # of other data.
            allow_cached_coco=False,
        )

    @classmethod
    def evaluate(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """Evaluates on ``DATASETS.TEST``, with test-time augmentation beside it where it is on.

        Returns:
            Detectron2's nested results; those with augmentation have ``_TTA`` in the name.
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
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{key}_TTA", value) for key, value in results.items())

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, and those that the config asks for."""
        cfg = self.cfg
        model = self.checkpointer.model
        if cfg.SOLVER.EMA.ENABLED:
            self.average = hooks.WeightAverage(model, cfg.SOLVER.EMA.DECAY)
        theirs = super().build_hooks()
        writer = [hook for hook in theirs if isinstance(hook, PeriodicWriter)]
        saver = [hook for hook in theirs if isinstance(hook, PeriodicCheckpointer)]
        first = [self.clock, *(hook for hook in theirs if hook not in (*writer, *saver))]
        first = [hook for hook in first if not isinstance(hook, EvalHook)]
        evaluation = [EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate_in_training)]
        if cfg.TEST.AUG.ENABLED:
            evaluate = EvalHook(0, lambda: self._test_with_augmentation(cfg, self.model))
            evaluation.append(evaluate)
        if isinstance(self.scheduler, schedule.PlateauLR):
            evaluation.append(hooks.Plateau(cfg.TEST.EVAL_PERIOD, self.scheduler))
            # A checkpoint has to know of the evaluation that was made at the same step.
            return [*first, *self._own_hooks(model), *evaluation, *self._savers(), *saver, *writer]
        # As in Detectron2, an evaluation that fails leaves a checkpoint.
        return [*first, *self._own_hooks(model), *saver, *evaluation, *self._savers(), *writer]

    def _own_hooks(self, model: nn.Module) -> list[HookBase]:
        cfg, own = self.cfg, [hooks.Resources()]
        if classification.is_classification(cfg) and cfg.SEED >= 0:
            own.append(hooks.StepSeed(cfg.SEED))
        if cfg.SOLVER.FROZEN_BN_ITERS:
            own.append(hooks.FrozenStatistics(model, cfg.SOLVER.FROZEN_BN_ITERS))
        if self.average:
            own.append(self.average)
        return own

    def _savers(self) -> list[HookBase]:
        cfg, savers = self.cfg, []
        checkpointer = UntaggedCheckpointer(self.model, cfg.OUTPUT_DIR)
        if cfg.TEST.BEST_METRIC:
            period, metric = cfg.TEST.EVAL_PERIOD, cfg.TEST.BEST_METRIC
            savers.append(hooks.BestModel(period, metric, checkpointer, self.average))
        if self.average:
            savers.append(hooks.AverageSaver(self.average, checkpointer))
        return savers

    def _evaluate_in_training(self) -> OrderedDict:
        with self.average.in_place() if self.average else contextlib.nullcontext():
            self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results


def _distribute(model: nn.Module) -> nn.Module:
    on_cpu = next(model.parameters()).device.type == "cpu"
    options = {"device_ids": None} if on_cpu else {}
    return create_ddp_model(model, broadcast_buffers=False, **options)
