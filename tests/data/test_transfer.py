"""Tests for transferring batches to a device, with a simulated CUDA stream or on a GPU."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from senet_transfer.data.transfer import Transfer

CPU = torch.device("cpu")


class Recorder:
    """Mock of a CUDA stream that records all calls.

    :meth:`copy` negates the values, so that tests can distinguish a copy from the original tensor.
    """

    def __init__(self):
        self.copied, self.joined = [], []

    def copy(self, tensor):
        assert not self.joined, "a copy was requested after join()"
        self.copied.append(tensor)
        return -tensor

    def join(self, copies):
        self.joined.append(copies)


def detection_batch():
    instances = Instances((4, 6), gt_boxes=Boxes(torch.tensor([[0.0, 1.0, 2.0, 3.0]])))
    return [
        {"image": torch.full((3, 4, 6), 1 + index), "image_id": index, "instances": instances}
        for index in range(2)
    ]


def test_on_a_cpu_the_batch_itself_is_returned():
    batch = {"image": torch.zeros(2)}
    assert Transfer(CPU)(batch) is batch


def test_all_tensors_of_a_classifiers_batch_are_copied_before_one_wait():
    stream = Recorder()
    batch = {"image": torch.ones(2, 3), "label": torch.tensor([1, 2]), "key": ["a", "b"]}
    moved = Transfer(CPU, stream)(batch)
    assert moved["image"].equal(-batch["image"])
    assert moved["label"].equal(-batch["label"])
    assert moved["key"] is batch["key"]
    assert list(batch) == ["image", "label", "key"]
    assert batch["label"].tolist() == [1, 2]  # unchanged, because reports use the original labels
    (joined,) = stream.joined
    assert [id(tensor) for tensor in joined] == [id(moved["image"]), id(moved["label"])]


def test_the_images_of_a_detection_batch_are_copied():
    stream, batch = Recorder(), detection_batch()
    moved = Transfer(CPU, stream)(batch)
    assert [image["image_id"] for image in moved] == [0, 1]
    assert [image["image"].unique().tolist() for image in moved] == [[-1], [-2]]
    assert all(new["instances"] is old["instances"] for new, old in zip(moved, batch, strict=True))
    assert [len(copies) for copies in stream.joined] == [2]


def test_tensors_on_a_device_are_not_copied():
    stream = Recorder()
    batch = {"image": torch.ones(2, device="meta"), "key": ["a"]}
    assert Transfer(torch.device("meta"), stream)(batch)["image"] is batch["image"]
    assert not stream.copied
    assert not stream.joined


@pytest.mark.gpu
def test_on_a_gpu_computations_wait_for_the_copies():
    """Check the values of batches that are transferred while the GPU is busy.

    Each batch is freed immediately, to detect whether the allocator reuses its memory too early.
    """
    device = torch.device("cuda")
    transfer = Transfer(device)
    large = torch.randn(2048, 2048, device=device)
    pinned = [torch.full((1 << 22,), float(n)).pin_memory() for n in range(8)]
    sums = []
    for images in pinned:
        for _ in range(3):
            large = large @ large / 2048
        moved = transfer({"image": images, "key": ["a"]})
        assert moved["image"].device.type == "cuda"
        sums.append((moved["image"] + 0 * large[0, 0].nan_to_num()).double().sum())
        del moved  # The allocator must not reuse this memory too early.
    found = [round(float(total) / (1 << 22), 6) for total in sums]
    assert found == [float(n) for n in range(8)]


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait():
    transfer = Transfer(torch.device("cuda"))
    batch = [{**image, "image": image["image"].pin_memory()} for image in detection_batch()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = transfer(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [image["image"].unique().tolist() for image in moved] == [[1], [2]]
