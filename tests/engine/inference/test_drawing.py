"""Tests for the visualisation of predictions: colours, labels, fonts and line widths."""

import itertools
import logging

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances, RotatedBoxes
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import FontProperties, findfont, fontManager
from PIL import ImageFont

from senet_transfer.engine.inference import fonts
from senet_transfer.engine.inference.drawing import (
    ClassNames,
    PredictionDrawing,
    class_colour,
    free_corner,
    text_colour,
)


def draw(boxes, classes, names, size=(480, 640), scores=None) -> PredictionDrawing:
    """Draw boxes on a black image and return the drawing."""
    found = Instances(size, pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
    found.pred_classes = torch.tensor(classes)
    found.scores = torch.tensor(scores or [0.5] * len(boxes))
    drawing = PredictionDrawing(np.zeros((*size, 3), np.uint8), ClassNames.of(names))
    drawing.draw_instances(found)
    return drawing


def test_every_object_of_a_class_has_the_same_colour_in_every_image():
    first = draw([[100, 100, 300, 300]], [3], list("abcd")).image
    boxes = [[50, 250, 150, 350], [300, 250, 500, 400]]
    second = draw(boxes, [3, 3], list("abcd")).image
    expected = np.array(class_colour(3)) / max(class_colour(3))
    for image, x, y in ((first, 200, 300), (second, 100, 350), (second, 400, 400)):
        # Antialiasing darkens the outer pixels of a line on black, but does not change their hue.
        pixel = image[y - 1 : y + 1, x].max(0)
        assert pixel.max() > 200
        np.testing.assert_allclose(pixel / pixel.max(), expected, atol=0.02)


def test_the_colours_of_the_first_classes_differ_and_their_labels_are_readable():
    colours = [class_colour(index) for index in range(20)]
    for one, other in itertools.combinations(colours, 2):
        assert np.linalg.norm(np.subtract(one, other)) > 0.15
    for colour in map(class_colour, range(200)):
        # WCAG 2 defines relative luminance and, for level AA, a text contrast of at least 4.5.
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        light = np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05
        contrast = light / 0.05 if text_colour(colour) == "black" else 1.05 / light
        assert contrast >= 4.5


@pytest.mark.parametrize("count", [30, 300])
@pytest.mark.long
def test_labels_do_not_cover_each_other_and_are_inside_the_image(count):
    random = np.random.default_rng(count)
    corner = random.uniform(0, [600, 440], (count, 2))
    boxes = np.concatenate([corner, corner + random.uniform(4, 40, (count, 2))], 1)
    drawing = draw(boxes.tolist(), [0] * count, ["platelet"])
    assert len(drawing.labels) > 25
    for (a0, b0, a1, b1), (c0, d0, c1, d1) in itertools.combinations(drawing.labels, 2):
        assert a1 <= c0 or c1 <= a0 or b1 <= d0 or d1 <= b0
    for x0, y0, x1, y1 in drawing.labels:
        assert 0 <= x0 < x1 <= 640
        assert 0 <= y0 < y1 <= 480


def test_the_label_of_a_rotated_box_touches_its_topmost_corner():
    found = Instances(
        (480, 640), pred_boxes=RotatedBoxes(torch.tensor([[300.0, 200, 200, 100, 30]]))
    )
    found.pred_classes, found.scores = torch.tensor([0]), torch.tensor([0.5])
    drawing = PredictionDrawing(np.zeros((480, 640, 3), np.uint8), ClassNames.of(["ship"]))
    drawing.draw_instances(found)
    # Rotate half the width (100, 0) and half the height (0, 50) counter-clockwise by 30 degrees.
    cos, sin = np.sqrt(3) / 2, 0.5
    corner = (300 + 100 * cos - 50 * sin, 200 - 100 * sin - 50 * cos)
    x0, _, _, y1 = drawing.labels[0]
    assert (x0, y1) == pytest.approx(corner, abs=0.01)


def test_a_label_without_a_free_place_near_its_object_is_omitted():
    rect, size, image = (10.0, 10.0, 20.0, 20.0), (40.0, 10.0), (200.0, 200.0)
    assert free_corner(rect, size, image, []) == (10, 0)
    assert free_corner(rect, size, image, [(0.0, 0.0, 200.0, 200.0)]) is None
    assert free_corner(rect, (300.0, 10.0), image, []) is None
    # The label is below the object, because both positions above its lower edge are taken.
    assert free_corner(rect, size, image, [(0.0, 0.0, 200.0, 20.0)]) == (10, 20)


@pytest.mark.parametrize("name", ["$100$ note", "a$b$c", "cost $ 5", r"$\frac{$", "_{x}^2", "50%"])
def test_dollar_signs_are_drawn_as_characters(name):
    # Rounding to pixels changes the width of large text only slightly.
    drawing = draw([[100, 200, 900, 900]], [0], [name], (1000, 1400))
    x0, _, x1, _ = drawing.labels[0]
    points = 0.021 * np.sqrt(1000 * 1400)
    font = ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans")), points)
    # Pillow does not interpret markup. The label has a margin of 0.15 text sizes on both sides.
    assert x1 - x0 == pytest.approx(font.getlength(f"{name} 50%") + 0.3 * points, rel=0.05)


@pytest.fixture
def chinese_font(tmp_path):
    """Register a font in which the character for "cat" is a filled square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares.ttf")
    before = list(fontManager.ttflist)
    fontManager.ttflist[:] = [entry for entry in before if entry.name.startswith("DejaVu")]
    fontManager.addfont(tmp_path / "squares.ttf")
    fonts.clear_cache()
    yield
    fontManager.ttflist[:] = before
    fonts.clear_cache()


def test_chinese_names_are_drawn_with_an_installed_font(chinese_font, caplog):
    drawing = draw([[100, 100, 300, 300]], [0], ["猫" * 8], scores=[1.0])
    assert not caplog.records
    x0, y0, x1, y1 = map(int, drawing.labels[0])
    label = drawing.image[y0:y1, x0:x1].astype(int)
    assert text_colour(class_colour(0)) == "black"
    # The label has eight squares with blurred edges. The side of each square equals the text size,
    # which is 0.021 of the image size.
    assert (label.sum(2) < 60).sum() > 8 * 10.5**2


def test_a_name_that_no_font_contains_becomes_its_index_with_a_warning(monkeypatch, caplog):
    only = [entry for entry in fontManager.ttflist if entry.name.startswith(("DejaVu", "Last"))]
    monkeypatch.setattr(fontManager, "ttflist", only)
    fonts.clear_cache()
    with caplog.at_level(logging.WARNING):
        names, families = fonts.drawable_names(["cat", "猫", "Käfer", "\n$"])
    fonts.clear_cache()
    assert names == ["cat", "class 1", "Käfer", " $"]
    assert families == ["DejaVu Sans"]
    assert "characters 猫" in caplog.text
    assert "class 1 (猫)" in caplog.text
    assert "Noto Sans CJK" in caplog.text


@pytest.mark.long
def test_lines_are_wider_in_larger_images():
    widths = []
    for size in ((480, 640), (1440, 1920)):
        height, width = size
        box = [width / 4, height / 4, width / 2, height / 2]
        image = draw([box], [0], ["a"], size).image
        row = image[3 * height // 8, : 3 * width // 8].astype(int)
        widths.append((np.abs(row - np.array(class_colour(0)) * 255).max(1) < 60).sum())
    assert widths[0] in (1, 2, 3)
    assert 2 * widths[0] <= widths[1] <= 4 * widths[0]


@pytest.mark.long
def test_an_image_of_extreme_shape_is_drawn_within_the_limits_of_jpeg():
    image = draw([[0, 0, 6, 1000]], [0], ["a"], (3000, 6)).image
    assert image.shape[0] <= 65_500
    image = draw([[0, 0, 1000, 6]], [0], ["a"], (6, 60_000)).image
    assert image.shape[:2] == (6, 60_000)
