"""Tests for launching training processes on CPUs and GPUs."""

import os

import pytest
import torch

from senet_transfer.engine import launch


@pytest.fixture
def one_gpu(monkeypatch):
    """Simulate a machine with one GPU.

    Return a list that receives the value of ``$CUDA_VISIBLE_DEVICES`` for each launched job.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    jobs = []

    def launched(*args, **kwargs):
        jobs.append(os.environ.get("CUDA_VISIBLE_DEVICES"))

    monkeypatch.setattr(launch, "launch_processes", launched)
    return jobs


def test_two_processes_on_the_cpu_use_no_gpu(one_gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    launch.run(print, None, device=lambda: "cpu", num_gpus=2)
    assert one_gpu == [""]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_two_processes_on_one_gpu_are_rejected(one_gpu, capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.run(print, None, device=lambda: "cuda", num_gpus=2)
    assert stopped.value.code == 2
    assert "--num-gpus is 2, but this machine has 1 GPU." in capsys.readouterr().err
    assert one_gpu == []


def test_under_torchrun_a_cpu_process_uses_gloo(tmp_path, monkeypatch):
    backends = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")

    def main(_):
        backends.append(torch.distributed.get_backend())

    launch.run(main, None, device=lambda: "cpu")
    assert backends == ["gloo"]
