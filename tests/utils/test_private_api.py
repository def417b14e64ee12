"""Tests that private APIs of other libraries still behave as this project expects."""

import argparse
import subprocess
import sys
from collections import OrderedDict
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer
from detectron2.engine.hooks import PeriodicWriter
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.modeling import FPN
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import ImageList
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from senet_transfer import create_backbone
from senet_transfer.utils import private_api


def test_importing_the_module_imports_no_library():
    code = (
        "import sys; sys.path.insert(0, 'senet_transfer/utils'); import private_api;"
        "assert not {'torch', 'detectron2', 'fvcore', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transforms_and_dispatch_modes_are_detected():
    seen = []

    def note(x):
        seen.append(private_api.intercepts_operators())
        return x.sum()

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    note(torch.ones(2))
    torch.func.grad(note)(torch.ones(2))
    torch.vmap(note)(torch.ones(2, 3))
    with Mode():
        note(torch.ones(2))
    note(torch.ones(2))
    assert seen == [False, True, True, True, False]


def test_images_of_an_fpn_are_padded_to_multiples_of_a_number():
    names = ["res2", "res3"]
    fpn = FPN(create_backbone("cifar_resnet8", out_features=names), names, 4)
    private_api.set_size_divisibility(fpn, 48)
    image = torch.zeros(3, 40, 50)
    padded = ImageList.from_tensors([image], fpn.size_divisibility)
    assert padded.tensor.shape == (1, 3, 48, 96)


@pytest.mark.long
def test_an_export_is_distinguished_from_a_compilation():
    seen = []

    class Doubled(nn.Module):
        def forward(self, x):
            return x * (2 if private_api.is_exporting() else 3)

    def backend(graph, _inputs):
        seen.append(graph)
        return graph.forward

    x = torch.ones(2)
    assert Doubled()(x)[0] == 3
    assert torch.compile(Doubled(), backend=backend, fullgraph=True)(x)[0] == 3
    assert seen
    for strict in (True, False):
        program = torch.export.export(Doubled(), (x,), strict=strict)
        assert program.module()(x)[0] == 2


@pytest.mark.parametrize(
    "register",
    [
        lambda module: module.register_forward_hook(print),
        lambda module: module.register_forward_pre_hook(print),
        lambda module: module.register_full_backward_hook(print),
        lambda module: module.register_full_backward_pre_hook(print),
    ],
)
def test_hooks_of_a_module_are_detected(register):
    module = nn.Linear(1, 1)
    assert not private_api.has_hooks(module)
    handle = register(module)
    assert private_api.has_hooks(module)
    handle.remove()
    assert not private_api.has_hooks(module)


def test_metadata_of_a_state_dict_are_saved_and_ignored_when_it_is_loaded(tmp_path):
    module = nn.BatchNorm2d(2)
    state = OrderedDict(module.state_dict())
    private_api.set_state_dict_metadata(state, {"made_by": {"version": 1}})
    torch.save(state, tmp_path / "state.pth")
    read = torch.load(tmp_path / "state.pth", weights_only=True)
    assert read._metadata == {"made_by": {"version": 1}}
    module.load_state_dict(read)
    # PyTorch uses the same attribute for its own metadata.
    assert module.state_dict()._metadata[""]["version"] == 2


def test_the_compilers_freezing_is_enabled_and_disabled():
    import torch._inductor.config as config

    assert not config.freezing
    with private_api.inductor_freezing():
        assert config.freezing
    assert not config.freezing


@pytest.mark.slow
def test_a_compiled_package_computes_the_same_and_keeps_its_metadata(tmp_path):
    model, x = torch.nn.Linear(3, 2).eval(), torch.randn(4, 3)
    path = str(tmp_path / "a.pt2")
    private_api.compile_program(torch.export.export(model, (x,)), path, {"k": "v"})
    loaded, metadata = private_api.open_compiled(path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
    assert metadata["k"] == "v"


def test_a_storage_keeps_a_limited_history():
    with EventStorage(0) as storage:
        private_api.limit_history(storage, 3)
        for value in range(5):
            storage.put_scalar("loss", value)
            storage.step()
    assert [value for value, _ in storage.history("loss").values()] == [2, 3, 4]


def test_the_period_of_a_writer_is_set():
    class Writer(EventWriter):
        written = 0

        def write(self):
            self.written += 1

    writer = Writer()
    hook = PeriodicWriter([writer], period=100)
    hook.trainer = SimpleNamespace(iter=0, max_iter=1000)
    private_api.set_write_period(hook, 2)
    with EventStorage(0):
        for hook.trainer.iter in range(6):
            hook.after_step()
    assert writer.written == 3


def test_a_load_is_allowed_after_one_that_failed(tmp_path):
    checkpointer = DetectionCheckpointer(nn.Linear(1, 1))
    torch.save({"model": nn.Linear(1, 1).state_dict()}, tmp_path / "good.pth")
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    with pytest.raises(Exception, match=r"load|invalid|magic|corrupt"):
        checkpointer.load(str(tmp_path / "bad.pth"))
    with pytest.raises(AssertionError):
        checkpointer.load(str(tmp_path / "good.pth"))
    private_api.end_failed_load(checkpointer)
    checkpointer.load(str(tmp_path / "good.pth"))


def test_a_module_being_imported_is_distinguished_from_an_imported_one(tmp_path, monkeypatch):
    (tmp_path / "half_imported.py").write_text(
        "import sys\nfrom senet_transfer.utils.private_api import is_initializing\n"
        "during = is_initializing(sys.modules[__name__])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import half_imported

    assert half_imported.during
    assert not private_api.is_initializing(half_imported)
    assert not private_api.is_initializing(ModuleType("made_by_hand"))


# Tests for private methods and attributes that this package's subclasses override or use. The base
# classes must still call or define them.


def test_the_checkpointer_calls_the_overridden_methods(tmp_path):
    called = []

    class Mine(DetectionCheckpointer):
        def _load_file(self, filename):
            called.append("file")
            return {"model": {}}

        def _load_model(self, checkpoint):
            called.append("model")

    (tmp_path / "any.pth").touch()
    Mine(nn.Linear(1, 1)).load(str(tmp_path / "any.pth"))
    assert called == ["file", "model"]


def test_the_mapper_has_the_called_method():
    mapper = DatasetMapper(True, augmentations=[], image_format="BGR")
    record = {"annotations": [{"bbox": [1, 2, 3, 4], "bbox_mode": 1, "category_id": 0}]}
    image = np.zeros((8, 8, 3), np.uint8)
    from detectron2.data import transforms as T

    mapper._transform_annotations(record, T.AugmentationList([])(T.AugInput(image)), (8, 8))
    assert record["instances"].gt_boxes.tensor.tolist() == [[1, 2, 4, 6]]


def test_the_coco_evaluator_calls_the_overridden_method(monkeypatch):
    called = []

    class Mine(COCOEvaluator):
        def _eval_predictions(self, predictions, img_ids=None):
            called.append((predictions, img_ids, self._coco_api.getImgIds()))

    truth = {"images": [{"id": 7}], "categories": [], "annotations": []}

    def read(api, path):
        api.dataset = truth
        api.createIndex()

    monkeypatch.setattr(coco_evaluation.COCO, "__init__", read)
    MetadataCatalog.get("private_api_test").set(json_file="none.json", thing_classes=[])
    try:
        evaluator = Mine("private_api_test", distributed=False)
        evaluator.reset()
        evaluator.process([{"image_id": 7}], [{"instances": _no_instances()}])
        evaluator.evaluate()
    finally:
        MetadataCatalog.pop("private_api_test")
    assert [(len(predictions), images) for predictions, _, images in called] == [(1, [7])]
    # Our evaluator replaces this class while it runs.
    assert isinstance(coco_evaluation.COCOeval, type)


def _no_instances():
    from detectron2.structures import Boxes, Instances

    instances = Instances((4, 4))
    instances.pred_boxes, instances.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
    instances.pred_classes = torch.zeros(0, dtype=torch.int64)
    return instances


def test_the_c4_head_calls_the_overridden_method():
    class BuiltError(Exception):
        pass

    class Mine(Res5ROIHeads):
        @classmethod
        def _build_res5_block(cls, cfg):
            raise BuiltError

    cfg = get_cfg()
    shape = {"res4": SimpleNamespace(channels=8, stride=16)}
    with pytest.raises(BuiltError):
        Mine(cfg, shape)


def test_the_default_trainer_runs_the_steps_of_the_replaced_trainer():
    class Noted(HookBase):
        steps = 0

        def after_step(self):
            self.steps += 1

    model = nn.Linear(1, 1)
    trainer = DefaultTrainer.__new__(DefaultTrainer)
    super(DefaultTrainer, trainer).__init__()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Model(nn.Module):
        def forward(self, batch):
            return {"loss": model(batch).sum()}

    trainer._trainer = SimpleTrainer(Model(), [torch.ones(1, 1)] * 3, optimizer)
    noted = Noted()
    trainer.register_hooks([noted])
    before = model.weight.item()
    super(DefaultTrainer, trainer).train(0, 2)
    assert noted.steps == 2
    assert model.weight.item() == pytest.approx(before - 0.2)


def test_multi_tensor_functions_equal_those_of_one_tensor():
    torch.manual_seed(0)
    targets = [torch.randn(3, 4), torch.randn(5), torch.randn(())]
    values, expected = [torch.randn_like(t) for t in targets], [t.clone() for t in targets]
    for order in (2, np.inf):
        assert private_api.norms_of(targets, order).tolist() == [t.norm(order) for t in targets]
    private_api.lerp_all(targets, values, 0.3)
    expected = [target.lerp(value, 0.3) for target, value in zip(expected, values, strict=True)]
    private_api.lerp_all(targets, values, 0.7, held=torch.zeros(()))
    expected = [target.lerp(value, 0.7) for target, value in zip(expected, values, strict=True)]
    private_api.lerp_all(targets, values, 0.7, held=torch.ones(()))
    private_api.multiply_all(targets, torch.tensor([0.5, 1.5, 3.0]))
    expected = [t * factor for t, factor in zip(expected, (0.5, 1.5, 3.0), strict=True)]
    assert all(map(torch.equal, targets, expected))
    private_api.copy_all(targets, values)
    assert all(map(torch.equal, targets, values))


def test_only_fused_optimizers_skip_a_step_on_the_device():
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        for fused in (True, False):
            parameter = nn.Parameter(torch.ones(3))
            optimizer = kind([parameter], lr=0.1, fused=fused)
            assert private_api.skips_on_device(optimizer) == fused
            if fused:
                parameter.grad = torch.full((3,), torch.nan)
                optimizer.found_inf = torch.ones(())
                optimizer.step()
                assert torch.equal(parameter, torch.ones(3))


def test_the_tensors_of_a_gradient_scaler_are_its_state():
    assert private_api.scaler_state(torch.amp.GradScaler("cpu", enabled=False)) == []
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for value in (1.0, torch.nan, 1.0, 1.0, 1.0):
        scaler.scale((parameter * value).sum()).backward()
        state = private_api.scaler_state(scaler)
        before = [tensor.clone() for tensor in state]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found = scaler.state_dict()
        assert [tensor.item() for tensor in state] == [found["scale"], found["_growth_tracker"]]
        assert [tensor.item() for tensor in before] != [tensor.item() for tensor in state]


def test_the_cpu_group_has_all_processes(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        group = private_api.cpu_group()
        assert torch.distributed.get_world_size(group) == 1
        assert torch.distributed.get_backend(group) == "gloo"
    finally:
        torch.distributed.destroy_process_group()
        comm._get_global_gloo_group.cache_clear()


def test_the_arguments_of_a_parser_are_listed_in_order():
    parser = argparse.ArgumentParser(add_help=False)
    added = [parser.add_argument("file"), parser.add_argument("--size", type=int)]
    assert private_api.parser_arguments(parser) == added


@pytest.mark.long
def test_a_missing_compiler_is_reported_as_a_missing_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch._inductor.cpp_builder, "get_cpp_compiler", _no_compiler)
    program = torch.export.export(nn.ReLU(), (torch.ones(2),))
    with pytest.raises(FileNotFoundError, match="no C\\+\\+ compiler"):
        private_api.compile_program(program, str(tmp_path / "relu.pt2"), {})


def _no_compiler() -> str:
    raise torch._inductor.exc.InvalidCxxCompiler
