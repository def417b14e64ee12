"""Tests for label CSV files as training data, as evaluation data and as a source of shards."""

import csv
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from senet_transfer.cli.data import prepare
from senet_transfer.data.cifar.open import open_cifar
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.folders import choose_classes
from senet_transfer.errors import UserError
from tests.data.drawn_places import jpeg


@pytest.fixture
def tree(tmp_path):
    """Write five images of three classes in torchvision's ImageFolder layout."""
    for number, name in enumerate(("b/1", "b/2", "a é,x/1", "10/1", "10/2")):
        path = tmp_path / "tree" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, (32, 32)))
    return tmp_path / "tree"


@pytest.fixture
def labels(tree, tmp_path) -> Path:
    """Write a CSV file that lists the images in `tree` in reverse order, with relative paths."""
    reference = ImageFolder(tree)
    path = tmp_path / "lists" / "labels.csv"
    path.parent.mkdir()
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["note", "path", " label"])
        for name, label in reversed(reference.samples):
            name = Path(name).relative_to(tmp_path)
            writer.writerow(["", f"../{name}", reference.classes[label]])
        file.write("\r\n")
    return path


def content(dataset):
    return sorted(
        (dataset.classes[label], dataset.read_sample(index).data)
        for index, label in enumerate(dataset.labels().tolist())
    )


def test_a_csv_file_gives_the_data_of_image_folder_and_of_its_shards(tree, labels, tmp_path):
    reference = ImageFolder(tree)
    expected = sorted(
        (reference.classes[label], Path(name).read_bytes()) for name, label in reference.samples
    )
    dataset = open_dataset(labels)
    assert dataset.classes == reference.classes == ["10", "a é,x", "b"]
    assert content(dataset) == expected
    assert dataset.read_sample(0).label == 2  # samples keep the order of the CSV file
    whole = open_cifar(labels, split="train")
    assert (whole.classes, whole.labels.tolist()) == (reference.classes, [2, 2, 1, 0, 0])
    shards = tmp_path / "shards"
    prepare("folder", ["--source", str(labels), "--output", str(shards), "--quiet", "--verify",
                       "--workers", "1"])  # fmt: skip
    assert content(open_dataset(shards)) == expected


def test_given_classes_determine_the_labels_of_a_subset_too(labels, tmp_path):
    order = ["b", "unused", "a é,x", "10"]
    assert open_dataset(labels, classes=order).labels().tolist() == [0, 0, 2, 3, 3]
    with pytest.raises(UserError, match=r"line 4: the label of .* is a é,x; expected one of 2"):
        open_dataset(labels, classes=["b", "10"])
    (tmp_path / "numbers.csv").write_text("label,path\n10,tree/b/1.jpg\n9,tree/b/2.jpg\n")
    assert choose_classes("numeric", tmp_path / "numbers.csv") == ["9", "10"]
    with pytest.raises(UserError, match=r"classes in .*labels.csv are not numbers"):
        choose_classes("numeric", labels)


def test_backslashes_whitespace_and_repeated_lines_are_accepted(tree, caplog):
    path = tree / "labels.CSV"
    path.write_text("path,label\nb\\1.jpg, rose \n\n./b/2.jpg,rose\nb/2.jpg,rose\n")
    dataset = open_dataset(path)
    assert (dataset.classes, dataset.labels().tolist()) == (["rose"], [0, 0])
    assert "ignoring 1 lines that repeat" in caplog.text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "lists no images"),
        (b"path,label\n", "lists no images"),
        (b"file,label\nb/1.jpg,b\n", "line 1: the header has 0 columns named path: file,label"),
        (b"path;label\nb/1.jpg;b\n", "line 1: .* Separate the columns with commas"),
        (b"\npath,path,label\n", "line 2: the header has 2 columns named path"),
        (b"path,label\nb/1.jpg,b\nb/2.jpg,\n", "line 3: the label is empty"),
        (b'path,label\n"b\n1.jpg",b\n,b\n', "line 4: the path is empty"),
        (b"path,label\nb/1.jpg,b\nb/2.jpg,a,b\n", "line 3: found 3 values; expected 2"),
        (b"path,label\nb/1.jpg,b\n./b/1.jpg,c\n", "line 3: b/1.jpg has the label c, but in line 2"),
        (b"path,label\nb/1.jpg,b\nb/3.jpg,b\n", r"1 of 2 images do not exist: b/3.jpg \(line 3\)"),
        (b"path,label\nb/1.jpg,b\nb/2.jpg,caf\xe9\n", "line 3: the text is not UTF-8"),
        ("path,label\nb/1.jpg,b\n".encode("utf-16"), "line 1: the text is not UTF-8"),
        (b'path,label\nb/1.jpg,b\n"b/2.jpg,b\n', "line 3: unexpected end of data"),
        (b"path,label\nb/1\0.jpg,b\n", "line 2: the path is binary data"),
    ],
)
def test_an_invalid_file_is_rejected_with_its_name_and_line(tree, text, complaint):
    path = tree / "labels.csv"
    path.write_bytes(text)
    with pytest.raises(UserError, match=f"labels.csv.*{complaint}"):
        open_dataset(path)


def test_empty_images_are_rejected_or_skipped_with_missing_ones(tree, tmp_path, capsys):
    (tree / "b" / "1.jpg").write_bytes(b"")
    path = tree / "labels.csv"
    path.write_text("path,label\nb/1.jpg,b\nb/2.jpg,b\nb/3.jpg,b\n10/1.jpg,a\n")
    with pytest.raises(UserError, match=r"b/3\.jpg \(line 4\)"):
        open_dataset(path)
    arguments = ["--source", str(path), "--output", str(tmp_path / "out"), "--workers", "1"]
    prepare("folder", [*arguments, "--quiet", "--skip-broken", "2"])
    assert "skipped 2 unreadable images" in capsys.readouterr().out
    assert len(open_dataset(tmp_path / "out")) == 2
