"""Tests for experiment tracking, with mocks of the wandb and mlflow packages."""

import json
import sys
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

from senet_transfer.errors import UserError
from senet_transfer.utils.tracking import build_tracking_writers, check_trackers


class Service:
    """Mock of the wandb and mlflow packages that records all calls."""

    def __init__(self):
        self.received, self.started, self.finished = [], [], 0

    def init(self, *, id, **options):  # noqa: A002  # the name in wandb
        self.started.append(id)
        return SimpleNamespace(
            id=id or "w1", log=lambda values, step: self.log_metrics(values, step=step),
            finish=self.end_run,
        )  # fmt: skip

    def start_run(self, *, run_id, run_name):
        self.started.append(run_id)
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "m1"))

    def log_text(self, text, name):
        self.text = (name, text)

    def log_metrics(self, values, *, step):
        self.received.append((step, values))

    def end_run(self):
        self.finished += 1


@pytest.mark.parametrize(("name", "first"), [("wandb", "w1"), ("mlflow", "m1")])
def test_a_tracker_gets_each_metric_once_with_its_step(name, first, tmp_path, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    check_trackers([name])
    (writer,) = build_tracking_writers([name], str(tmp_path), "SEED: 1\n")
    with EventStorage(0) as storage:
        for step in range(3):
            storage.put_scalar("total_loss", 3.0 - step, smoothing_hint=False)
            if step == 0:
                storage.put_scalar("bbox/AP-a(b)", 50.0, smoothing_hint=False)
            if step != 1:
                writer.write()
            storage.step()
        writer.write()
    writer.close()
    named = "bbox/AP-a_b_" if name == "mlflow" else "bbox/AP-a(b)"
    assert service.received == [(0, {"total_loss": 3.0, named: 50.0}), (2, {"total_loss": 1.0})]
    assert service.finished == 1
    # When a run is resumed, the tracker continues the same run.
    build_tracking_writers([name], str(tmp_path), "SEED: 1\n")
    assert service.started == [None, first]
    assert json.loads((tmp_path / "tracking.json").read_text()) == {name: first}


def test_an_unknown_or_missing_tracker_is_an_error_at_the_start(monkeypatch):
    with pytest.raises(UserError, match="TRACKING is 'comet'; expected one of: wandb, mlflow"):
        check_trackers(["comet"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        check_trackers(["wandb"])
