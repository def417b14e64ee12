"""The one train loop of this project, which is Detectron2's."""

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
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
)
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from senet_transfer.data.mapper import CheckedDatasetMapper
from senet_transfer.engine.amp import AutocastTrainer
from senet_transfer.engine.checkpoint import Checkpointer
from senet_transfer.engine.optimizer import build_optimizer
from senet_transfer.errors import UserError

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer with this project's loaders, checkpoints and precision.

    What differs: images are checked against their JSON entries, checkpoints are loaded strictly,
    mixed precision and several processes work on a CPU, and evaluation can add test-time
    augmentation.
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
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = _distribute(model)
        if cfg.SOLVER.AMP.ENABLED:
            self._trainer = AutocastTrainer(
                model, data_loader, optimizer, dtype=cfg.SOLVER.AMP.DTYPE
            )
        else:
            self._trainer = SimpleTrainer(model, data_loader, optimizer)
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
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """The config's optimizer."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        """Detectron2's loader, with images checked."""
        return build_detection_train_loader(cfg, mapper=CheckedDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Detectron2's loader, with images checked."""
        mapper = CheckedDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, folder: str = "inference"
    ) -> DatasetEvaluator:
        """COCO's metrics, the predictions written to ``OUTPUT_DIR/<folder>/<dataset_name>``.

        Raises:
            UserError: the data set is not evaluated by COCO's metrics.
        """
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
        """Detectron2's hooks, and test-time augmentation after training where it is on."""
        hooks = super().build_hooks()
        if self.cfg.TEST.AUG.ENABLED:
            after = EvalHook(0, lambda: self._test_with_augmentation(self.cfg, self.model))
            # Before the writer, which stands last and on the main process alone.
            hooks.insert(len(hooks) - comm.is_main_process(), after)
        return hooks


def _distribute(model: nn.Module) -> nn.Module:
    on_cpu = next(model.parameters()).device.type == "cpu"
    options = {"device_ids": None} if on_cpu else {}
    return create_ddp_model(model, broadcast_buffers=False, **options)
