import shutil
import tarfile
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from senet_transfer.data.classification.open import ImageDataset, ShardDataset, open_dataset
from senet_transfer.errors import UserError
from tests.data.drawn_places import CLASSES, jpeg, write_val


@pytest.fixture
def tree(tmp_path):
    """Write images of three classes in the layout of torchvision's ImageFolder."""
    for label, name in enumerate(("cat", "dog", "Zebra")):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for number in range(label + 2):
            data = jpeg(10 * label + number)
            (tmp_path / "tree" / name / f"{number}.jpg").write_bytes(data)
    return tmp_path / "tree"


@pytest.fixture
def train(tmp_path):
    """Write a Places365 train split with nested classes to the folder that torchvision uses."""
    root = write_val(tmp_path / "places", 4)
    lines = []
    for label, name in enumerate(CLASSES):
        (root / "data_256_standard" / name).mkdir(parents=True)
        for number in range(2):
            path = f"{name}/{number + 1:08d}.jpg"
            (root / "data_256_standard" / path).write_bytes(jpeg(100 * label + number))
            lines.append(f"/{path} {label}\n")
    (root / "places365_train_standard.txt").write_text("".join(lines))
    return root


def content(dataset):
    return sorted(
        (sample.label, sample.data)
        for unit in range(len(dataset.unit_sizes))
        for sample in dataset.read_unit(unit)
    )


def test_a_tree_has_the_classes_and_labels_of_torchvisions_image_folder(tree):
    dataset = open_dataset(tree)
    reference = ImageFolder(tree)
    assert dataset.classes == reference.classes
    assert (len(dataset), dataset.num_classes) == (9, 3)
    expected = sorted((label, Path(path).read_bytes()) for path, label in reference.samples)
    assert content(dataset) == expected


def test_a_tree_that_lacks_a_class_keeps_the_labels_of_the_classes_given(tree):
    classes = open_dataset(tree).classes
    shutil.rmtree(tree / "cat")
    dataset = open_dataset(tree, classes=classes)
    assert dataset.classes == classes
    assert sorted(set(dataset.labels().tolist())) == [0, 2]  # of Zebra and dog
    with pytest.raises(UserError, match="not among the 1 expected classes: dog"):
        open_dataset(tree, classes=["Zebra"])


def test_nested_folders_with_the_same_last_name_are_different_classes(tmp_path):
    for number, name in enumerate(CLASSES):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").write_bytes(jpeg(number))
    assert open_dataset(tmp_path).classes == CLASSES


def test_a_folder_next_to_the_list_archive_has_the_labels_of_the_lists(train):
    shutil.rmtree(train / "data_256_standard" / CLASSES[0])
    path = train / "places365_train_standard.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[2:]))
    with tarfile.open(train / "filelist_places365-standard.tar", "w") as tar:
        for name in (path.name, "categories_places365.txt"):
            tar.add(train / name, name)
            (train / name).unlink()
    dataset = open_dataset(train / "data_256_standard")
    assert dataset.classes == CLASSES
    assert dataset.labels().tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda tree: (tree / "1.jpg").write_bytes(jpeg(0)), "outside of class folders: 1.jpg"),
        (lambda tree: (tree / "empty").mkdir(), "contain no images: empty"),
        (
            lambda tree: (tree / "cat" / "0.jpg").write_bytes(b""),
            "empty or missing from .*: cat/0.jpg",
        ),
        (lambda tree: [shutil.rmtree(path) for path in tree.iterdir()], "No images found"),
    ],
)
def test_a_tree_with_ambiguous_labels_is_rejected(tree, spoil, complaint):
    spoil(tree)
    with pytest.raises(UserError, match=complaint):
        open_dataset(tree)


def test_hidden_files_and_folders_are_ignored(tree):
    (tree / ".cache").mkdir()
    (tree / ".cache" / "1.jpg").write_bytes(b"x")
    (tree / "cat" / "._0.jpg").write_bytes(b"x")
    assert len(open_dataset(tree)) == 9


@pytest.mark.parametrize("form", ["root", "folder", "plain_folder", "archive"])
def test_the_train_split_is_found_in_every_format_with_list_labels(train, form):
    expected = content(open_dataset(train, split="train_standard"))
    assert [label for label, _ in expected] == [0, 0, 1, 1, 2, 2, 3, 3]
    path = train / "data_256_standard"
    if form == "root":
        path = train
    elif form == "plain_folder":
        path = path.rename(train / "data_256")
    elif form == "archive":
        archive = train / "train_256_places365standard.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(path, "data_256")
        shutil.rmtree(path)
        path = archive
    dataset = open_dataset(path, split="train_standard")
    assert content(dataset) == expected
    assert dataset.classes == CLASSES


def test_an_ambiguous_train_split_is_an_error_that_names_both(train):
    path = (train / "data_256_standard").rename(train / "data_256")
    with pytest.raises(UserError, match="train_standard or train_challenge"):
        open_dataset(path)


def test_large_images_are_found_and_can_be_requested(val):
    shutil.copytree(val / "val_256", val / "val_large")
    assert open_dataset(val).origin.endswith("val_256")
    assert open_dataset(val, size="large").origin.endswith("val_large")
    shutil.rmtree(val / "val_256")
    assert open_dataset(val).origin.endswith("val_large")


def test_a_folder_of_validation_images_without_its_list_is_rejected(val, tmp_path):
    shutil.copytree(val / "val_256", tmp_path / "alone" / "val_256")
    with pytest.raises(UserError, match=r"list categories_places365.txt was not found in"):
        open_dataset(tmp_path / "alone" / "val_256")


def test_a_missing_and_an_unlisted_image_are_named(val):
    image = val / "val_256" / "Places365_val_00000005.jpg"
    data = image.read_bytes()
    image.unlink()
    with pytest.raises(UserError, match=r"1 of 24 listed images .*00000005\.jpg"):
        open_dataset(val)
    image.write_bytes(data)
    (val / "val_256" / "Places365_val_00000099.jpg").write_bytes(data)
    with pytest.raises(UserError, match=r"not in the list: Places365_val_00000099\.jpg"):
        open_dataset(val)


def test_categories_that_skip_a_label_are_rejected(val):
    path = val / "categories_places365.txt"
    path.write_text(path.read_text().replace(" 3", " 4"))
    with pytest.raises(UserError, match="4 classes; expected each label from 0 to 3"):
        open_dataset(val)


def test_dataset_kinds_are_distinguished(val, make_shards):
    shards = make_shards(6, 2)
    for path in (shards, shards / "manifest.json", shards / "val-000000.tar", f"file://{shards}"):
        assert isinstance(open_dataset(path), ShardDataset)
    for path in (val, val / "val_256"):
        assert isinstance(open_dataset(path), ImageDataset)


def test_mismatched_classes_are_rejected(make_shards):
    with pytest.raises(UserError, match="0: 'a/airfield' instead of 'x'"):
        open_dataset(make_shards(6, 1), classes=["x", *CLASSES[1:]])


@pytest.mark.parametrize("name", ["nothing", "foreign.tar"])
def test_unsupported_sources_are_rejected(tmp_path, name):
    if name.endswith(".tar"):
        tarfile.open(tmp_path / name, "w").close()
    with pytest.raises(UserError, match=name):
        open_dataset(tmp_path / name)
