"""Tests for inference on videos, streams, URLs and lists of images, and for output formats."""

import csv
import json
import math
import tracemalloc
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

import senet_transfer
from senet_transfer import UserError
from senet_transfer.cli.predict import FORMATS, main, parser
from senet_transfer.engine.predictor import files
from senet_transfer.engine.predictor.files import predict_files, predict_video
from senet_transfer.engine.predictor.inputs import find_photos, is_video
from senet_transfer.engine.predictor.video import Video
from tests.weights.web import serving

pytestmark = pytest.mark.long


def write_video(path, frames: int, size: tuple[int, int] = (80, 60)) -> None:
    """Write a video of a bright square that moves across a dark background."""
    out = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, size)
    for index in range(frames):
        frame = np.full((size[1], size[0], 3), 40, np.uint8)
        frame[20:40, index % 60 : index % 60 + 20] = (250, 200, index)
        out.write(frame)
    out.release()


@pytest.mark.parametrize(
    ("stated", "used"), [(10.0, 10), (0.0, 25), (-1.0, 25), (math.inf, 25), (math.nan, 25)]
)
def test_an_invalid_frame_rate_is_replaced(stated, used, monkeypatch):
    values = {cv2.CAP_PROP_FPS: stated, cv2.CAP_PROP_FRAME_COUNT: 0.0}
    opened = SimpleNamespace(isOpened=lambda: True, get=values.get)
    monkeypatch.setattr(cv2, "VideoCapture", lambda _: opened)
    assert Video("0").rate == used


@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_every_frame_of_a_video_has_the_detections_of_the_same_image(count, detector, tmp_path):
    predictor = senet_transfer.load(detector, threshold=0)
    write_video(tmp_path / "square.mp4", count)
    path, frames = predict_video(predictor, str(tmp_path / "square.mp4"), str(tmp_path / "out"))
    assert frames == count
    with open(path) as lines:
        rows = [json.loads(line) for line in lines]
    capture = cv2.VideoCapture(str(tmp_path / "square.mp4"))
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "square.mp4"))
    for index, row in enumerate(rows):
        assert (row["frame"], row["seconds"]) == (index, index / 10)
        cv2.imwrite(str(tmp_path / "frame.png"), capture.read()[1])
        expected = predictor(tmp_path / "frame.png").to_dict()
        assert {**row, "file_name": expected["file_name"]} == {
            "frame": index,
            "seconds": index / 10,
            **expected,
        }
        read, picture = drawn.read()
        assert read
        assert picture.shape == (240, 320, 3)
    assert len(rows) == count
    assert any(row["objects"] for row in rows)
    assert not drawn.read()[0]
    assert drawn.get(cv2.CAP_PROP_FPS) == 10


def test_memory_does_not_grow_with_the_length_of_a_video(classifier, tmp_path):
    """Check that peak memory is far below the 23 MB that all frames would occupy."""
    predictor = senet_transfer.load(classifier)
    write_video(tmp_path / "square.mp4", 100, (320, 240))
    count = 0
    results = predictor.stream(str(tmp_path / "square.mp4"), batch_size=4)
    next(results)
    tracemalloc.start()
    try:
        for _ in results:
            count += 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 99
    assert peak < 4e6


def test_images_and_streams_are_read_from_addresses(classifier, photos, tmp_path, capsys):
    write_video(tmp_path / "square.mp4", 3)
    output = tmp_path / "out"
    with serving() as site:
        photo = site.add("pictures/a.jpg", (photos / "a.jpg").read_bytes())
        stream = site.add("square.mp4", (tmp_path / "square.mp4").read_bytes())
        words = ["--weights", str(classifier), "--input", photo, stream, "--output", str(output)]
        main(parser().parse_args([*words, "--quiet", "--draw"]))
        with pytest.raises(UserError, match="missing.jpg can't be read as an image: HTTP.*404"):
            senet_transfer.load(classifier)(site.address("missing.jpg"))
    (entry,) = json.loads((output / "predictions.json").read_text())
    assert entry["file_name"] == photo
    expected = senet_transfer.load(classifier)(photos / "a.jpg")
    assert [row["probability"] for row in entry["top"]] == expected.scores
    lines = (output / "square.jsonl").read_text().splitlines()
    assert [json.loads(line)["frame"] for line in lines] == [0, 1, 2]
    assert {path.name for path in output.glob("*.*")} == {
        "a.jpg", "predictions.json", "square.jsonl", "square.mp4"
    }  # fmt: skip
    said = capsys.readouterr().out
    assert f"{stream}: 3 frames" in said
    assert f"{photo}: {expected.names[0]} {expected.scores[0]:.1%}" in said


def test_folders_keep_their_structure_and_lists_name_images(photos, tmp_path):
    names = ["a.jpg", "b.jpg", "c.jpg", "sub/a.jpg", "sub/d.jpg"]
    assert [photo.relative for photo in find_photos([str(photos)])] == names
    pattern = find_photos([str(photos / "**" / "*.jpg")])
    assert [photo.relative for photo in pattern] == names
    (tmp_path / "list.txt").write_text(f"{photos}/sub/a.jpg\n\n{photos}/b.jpg\n")
    listed = find_photos([str(tmp_path / "list.txt")])
    assert [photo.name for photo in listed] == [f"{photos}/b.jpg", f"{photos}/sub/a.jpg"]
    (photos / "relative.txt").write_text("sub/d.jpg\n")
    (photo,) = find_photos([str(photos / "relative.txt")])
    assert (photo.name, photo.relative) == (f"{photos}/sub/d.jpg", "sub/d.jpg")
    (tmp_path / "wrong.txt").write_text("no.jpg\n")
    with pytest.raises(UserError, match=r"wrong.txt lists no.jpg, which is not a file"):
        find_photos([str(tmp_path / "wrong.txt")])
    assert is_video("clip.MP4")
    assert is_video("0")
    assert is_video("rtsp://camera/1")
    assert not is_video("http://127.0.0.1/a.jpg")
    (tmp_path / "text.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"text.mp4 can't be opened as a video"):
        Video(str(tmp_path / "text.mp4"))


def test_results_are_written_in_every_format(detector, classifier, photos, tmp_path):
    predictor = senet_transfer.load(detector, threshold=0)
    results = predictor(photos)
    images = find_photos([str(photos)])
    paths = {
        form: predict_files(predictor, images, str(tmp_path / form), form=form, draw=form == "json")
        for form in files.FORMATS
    }
    assert FORMATS == files.FORMATS
    drawings = {str(p.relative_to(tmp_path / "json")) for p in (tmp_path / "json").rglob("*.jpg")}
    assert drawings == {photo.relative for photo in images}
    with open(paths["json"]) as file:
        assert json.load(file) == [result.to_dict() for result in results]
    coco = COCO(paths["coco"])
    with open(paths["csv"]) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(map(len, results)) > 0
    for index, (photo, result) in enumerate(zip(images, results, strict=True), start=1):
        assert coco.imgs[index]["file_name"] == photo.name
        boxes = np.array([a["bbox"] for a in coco.imgToAnns[index]]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, result.boxes, rtol=1e-5)
        own = [row for row in rows if row["file_name"] == photo.name]
        assert [row["class"] for row in own] == result.names
        found = [[float(row[key]) for key in ("x1", "y1", "x2", "y2")] for row in own]
        np.testing.assert_array_equal(np.float32(found).reshape(-1, 4), result.boxes)
        lines = (tmp_path / "yolo" / "labels" / photo.relative).with_suffix(".txt").read_text()
        height, width = result.instances.image_size
        for line, box in zip(lines.splitlines(), result.boxes, strict=True):
            label, x, y, w, h, _ = map(float, line.split())
            assert label in (0, 1, 2)
            yolo = [(x - w / 2) * width, (y - h / 2) * height]
            yolo += [(x + w / 2) * width, (y + h / 2) * height]
            np.testing.assert_allclose(yolo, box, atol=1e-3)
    table = predict_files(senet_transfer.load(classifier), images, str(tmp_path / "c"), form="csv")
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(images)
    with pytest.raises(UserError, match="expected one of the formats for this model: json, csv"):
        predict_files(senet_transfer.load(classifier), images, str(tmp_path / "c"), form="yolo")


def test_batches_and_workers_give_the_same_results_for_all_images(
    detector, classifier, photos, tmp_path
):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    images = [*find_photos([str(photos)]), str(broken)]
    for folder in (detector, classifier):
        predictor = senet_transfer.load(folder, threshold=0)
        # Use images of one size, so that batches need no padding.
        same = [path for path in images if path is not images[1] and path is not images[3]]
        problems: list[str] = []
        single = list(predictor.stream(same, broken=problems))
        batched = list(predictor.stream(same, batch_size=4, workers=2, broken=problems))
        assert [problem.count("broken.jpg can't be read") for problem in problems] == [1, 1]
        assert [result.photo.name for result in single] == [photo.name for photo in same[:-1]]
        assert len(single) == len(batched) == 3
        for one, other in zip(single, batched, strict=True):
            assert one.photo.name == other.photo.name
            assert one.names == other.names
            np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)
    with pytest.raises(UserError, match="batch_size is -1"):
        predictor(photos, batch_size=-1)
