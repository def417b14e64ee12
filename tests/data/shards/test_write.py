import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from senet_transfer import UserError
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.folders import open_folder
from senet_transfer.data.shards import write as convert_module
from senet_transfer.data.shards.verify import verify
from senet_transfer.data.shards.write import convert
from senet_transfer.utils import folder_lock
from tests.data.drawn_places import CLASSES, command, jpeg, shard_bytes, write_val


@pytest.fixture
def prepare():
    """Return a function that runs `senet data places365` and returns its exit status."""
    main = command("prepare_places365")

    def call(source, output, *more, split="val"):
        arguments = ["--source", source, "--split", split, "--output", output, *more]
        return main([str(argument) for argument in arguments])

    return call


# Output.


def test_shards_contain_each_image_unchanged_with_its_label(val, tmp_path, prepare):
    assert prepare(val, tmp_path / "out", "--shard-mb", "0.02") == 0
    labels = dict(line.split() for line in (val / "places365_val.txt").read_text().splitlines())
    found = {}
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}
            assert all(member.mtime == 0 and member.uid == 0 for member in tar.getmembers())
        for name, data in content.items():
            key, _, extension = name.partition(".")
            if extension == "jpg":
                found[key.rpartition("_")[0] + ".jpg"] = (data, content[f"{key}.cls"].decode())
    expected = {
        name: ((val / "val_256" / name).read_bytes(), label) for name, label in labels.items()
    }
    assert found == expected


def test_the_manifest_describes_the_shards(val, tmp_path, prepare):
    assert prepare(val, tmp_path / "out", "--shard-mb", "0.02", "--seed", "3") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["classes"] == [f"{name}" for name in CLASSES]
    assert (manifest["samples"], manifest["split"], manifest["seed"]) == (24, "val", 3)
    assert len(manifest["shards"]) > 2
    for shard in manifest["shards"]:
        data = (tmp_path / "out" / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        with tarfile.open(tmp_path / "out" / shard["name"]) as tar:
            labels = [tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".cls")]
        assert shard["class_counts"] == Counter(labels)
        assert shard["samples"] == len(labels)


def test_images_are_shuffled_over_all_shards_by_the_seed(val, tmp_path, prepare):
    orders = []
    for seed in ("0", "1"):
        prepare(val, tmp_path / seed, "--seed", seed)
        with tarfile.open(tmp_path / seed / "val-000000.tar") as tar:
            orders.append([name for name in tar.getnames() if name.endswith(".jpg")])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) != orders[0]


@pytest.mark.parametrize("source", ["folder", "archive"])
@pytest.mark.long
def test_workers_and_source_kind_do_not_change_the_bytes(val, tmp_path, prepare, source):
    prepare(val, tmp_path / "one", "--shard-mb", "0.01", "--workers", "1")
    if source == "archive":
        with tarfile.open(val / "val_256.tar", "w") as tar:
            tar.add(val / "val_256", "./val_256")
        shutil.rmtree(val / "val_256")
    prepare(val, tmp_path / "many", "--shard-mb", "0.01", "--workers", "3")
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "many")


def test_keys_of_names_with_special_characters_stay_distinct(tmp_path):
    names = ["a/b_c.jpg", "a_b/c.jpg", "a.b/c.jpg", "a_b/c.x.jpg", "a_b/c.y.jpg", "ü/é.jpg"]
    names += ["a_b/" + "long" * 50 + "1.jpg", "a_b/" + "long" * 50 + "2.jpg", "-/_.jpg"]
    for number, name in enumerate(names):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(jpeg(number))
    images = open_folder(tmp_path / "tree")
    convert(images, tmp_path / "out", split="x")
    dataset = open_dataset(tmp_path / "out")
    found = {sample.data: images.classes[sample.label] for sample in dataset.read_unit(0)}
    expected = {
        jpeg(number): str(Path(name).parent.as_posix()) for number, name in enumerate(names)
    }
    assert found == expected


@pytest.mark.long
def test_real_images_convert_and_verify(shared_data, tmp_path, prepare, capsys):
    arguments = ("--shard-mb", "1", "--workers", "2", "--verify")
    assert prepare(shared_data / "mini_places365", tmp_path / "out", *arguments) == 0
    assert "298 images in 7 shards" in capsys.readouterr().out
    dataset = open_dataset(tmp_path / "out")
    assert (len(dataset), dataset.num_classes) == (298, 365)


# Interruption.


def run_and_kill(arguments, output, shards):
    """Prepare shards in a subprocess, and kill it after it has written ``shards`` shards."""
    before = len(list(output.glob("*.tar"))) if output.exists() else 0
    # Fork the process, because a new one would have to import all modules again.
    process = multiprocessing.get_context("fork").Process(
        target=command("prepare_places365"), args=(arguments,)
    )
    process.start()
    while process.is_alive():
        done = len(list(output.glob("*.tar"))) if output.exists() else 0
        if done >= before + shards:
            process.kill()
            break
        time.sleep(0.002)
    process.join()
    return process.exitcode


def killed_three_times(tmp_path, count, workers, shard_mb):
    source = write_val(tmp_path / "source", count)
    output = tmp_path / "killed"
    common = ["--source", str(source), "--split", "val", "--shard-mb", str(shard_mb)]
    common += ["--workers", str(workers)]
    for _ in range(3):
        code = run_and_kill([*common, "--output", str(output)], output, shards=4)
        assert code == -signal.SIGKILL
        assert not (output / "manifest.json").exists()
    main = command("prepare_places365")
    assert main([*common, "--output", str(output)]) == 0
    assert main([*common, "--output", str(tmp_path / "unbroken")]) == 0
    assert shard_bytes(output) == shard_bytes(tmp_path / "unbroken")
    assert verify(output) == count
    return output


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.long
def test_600_images_killed_three_times_give_identical_shards(tmp_path, workers):
    killed_three_times(tmp_path, 600, workers, shard_mb=0.015)


@pytest.mark.slow
def test_20000_images_killed_three_times_give_identical_shards(tmp_path):
    killed_three_times(tmp_path, 20_000, 2, shard_mb=0.5)


@pytest.mark.long
def test_repeating_a_finished_run_writes_nothing(val, tmp_path, prepare):
    prepare(val, tmp_path / "out", "--shard-mb", "0.02")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert prepare(val, tmp_path / "out", "--shard-mb", "0.02") == 0
    assert times == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}


@pytest.mark.parametrize("lost", ["val-000001.tar", "val-000001.json", "val-000001.index.npy"])
@pytest.mark.long
def test_a_missing_or_truncated_file_is_written_again(val, tmp_path, prepare, lost):
    prepare(val, tmp_path / "out", "--shard-mb", "0.02")
    before = shard_bytes(tmp_path / "out")
    if lost.endswith(".tar"):
        (tmp_path / "out" / lost).write_bytes(before[lost][:1000])
    else:
        (tmp_path / "out" / lost).unlink()
    (tmp_path / "out" / f".{lost}.abc.tmp").write_bytes(b"half")
    assert prepare(val, tmp_path / "out", "--shard-mb", "0.02") == 0
    assert shard_bytes(tmp_path / "out") == before


def test_shards_of_other_settings_are_not_mixed(val, tmp_path, prepare, capsys):
    prepare(val, tmp_path / "out")
    before = shard_bytes(tmp_path / "out")
    assert prepare(val, tmp_path / "out", "--seed", "1") == 2
    assert "different images or with different settings" in capsys.readouterr().err
    assert shard_bytes(tmp_path / "out") == before


def test_two_runs_cannot_write_to_one_folder(val, tmp_path, prepare, capsys, monkeypatch):
    monkeypatch.setattr(folder_lock, "_PAUSE", 0)
    (tmp_path / "out").mkdir()
    with folder_lock.only_writer(tmp_path / "out"):
        assert prepare(val, tmp_path / "out") == 2
    assert "Another run is writing" in capsys.readouterr().err


# Invalid input.


def offenders(message, *names):
    assert all(name in message for name in names), message


def test_a_missing_list_is_named(val, tmp_path, prepare, capsys):
    (val / "places365_val.txt").unlink()
    assert prepare(val, tmp_path / "out") == 2
    offenders(capsys.readouterr().err, "places365_val.txt", "filelist_places365-standard.tar")
    assert not (tmp_path / "out").exists()


def test_lists_are_found_in_their_archive(val, tmp_path, prepare):
    prepare(val, tmp_path / "plain")
    with tarfile.open(val / "filelist_places365-standard.tar", "w") as tar:
        for name in ("places365_val.txt", "categories_places365.txt"):
            tar.add(val / name, name)
            (val / name).unlink()
    assert prepare(val, tmp_path / "packed") == 0
    assert shard_bytes(tmp_path / "packed") == shard_bytes(tmp_path / "plain")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("Places365_val_00000003.jpg 4", "line 25: label 4 of Places365_val_00000003.jpg"),
        ("Places365_val_00000003.jpg 1", "line 25: Places365_val_00000003.jpg is listed twice"),
        ("Places365_val_00000003.jpg", "line 25: 'Places365_val_00000003.jpg' is not a path and"),
        ("../../etc/x.jpg 1", "line 25: ../../etc/x.jpg is outside of the image folder"),
        ("Places365_val_00000099.jpg 1", "1 of 25 listed images are empty or missing from"),
    ],
)
def test_a_bad_line_of_the_list_is_named(val, tmp_path, prepare, capsys, line, complaint):
    with (val / "places365_val.txt").open("a") as stream:
        stream.write(line + "\n")
    assert prepare(val, tmp_path / "out") == 2
    offenders(capsys.readouterr().err, complaint)


def test_all_bad_lines_are_listed_at_once(val, tmp_path, prepare, capsys):
    with (val / "places365_val.txt").open("a") as stream:
        stream.write("x.jpg 17\ny.jpg\n")
    assert prepare(val, tmp_path / "out") == 2
    offenders(capsys.readouterr().err, "2 invalid lines", "line 25", "line 26")


def test_an_image_missing_from_the_validation_list_is_rejected(val, tmp_path, prepare, capsys):
    (val / "val_256" / "Places365_val_00000077.jpg").write_bytes(jpeg(0))
    assert prepare(val, tmp_path / "out") == 2
    offenders(capsys.readouterr().err, "1 images that are not in the list", "00000077.jpg")


def test_a_truncated_archive_is_rejected(val, tmp_path, prepare, capsys):
    with tarfile.open(val / "val_256.tar", "w") as tar:
        tar.add(val / "val_256", "val_256")
    shutil.rmtree(val / "val_256")
    data = (val / "val_256.tar").read_bytes()
    for size in (len(data) // 2, len(data) // 2 // 512 * 512, 100):
        (val / "val_256.tar").write_bytes(data[:size])
        assert prepare(val, tmp_path / "out") == 2
        offenders(capsys.readouterr().err, "val_256.tar")


@pytest.fixture
def broken(val):
    """Damage a validation split: two images are truncated, one is missing and one is empty."""
    for number in (3, 9):
        path = val / "val_256" / f"Places365_val_{number:08d}.jpg"
        path.write_bytes(path.read_bytes()[:-50])
    (val / "val_256" / "Places365_val_00000012.jpg").unlink()
    (val / "val_256" / "Places365_val_00000015.jpg").write_bytes(b"")
    return val


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.long
def test_broken_images_are_all_named_and_fatal(broken, tmp_path, prepare, capsys, workers):
    arguments = ("--shard-mb", "0.01", "--workers", workers, "--skip-broken")
    assert prepare(broken, tmp_path / "out", *arguments, "0") == 2
    offenders(capsys.readouterr().err, "2 of 24 listed images", "00000012.jpg", "00000015.jpg")
    assert prepare(broken, tmp_path / "out", *arguments, "3") == 2
    message = capsys.readouterr().err
    offenders(message, "4 images in", "Expected at most 3", "--skip-broken 4", "broken.txt")
    offenders(message, *(f"Places365_val_{number:08d}.jpg" for number in (3, 9, 12, 15)))
    assert len((tmp_path / "out" / "broken.txt").read_text().splitlines()) == 4
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_broken_image_whose_name_is_not_utf_8_is_listed_as_on_disk(tmp_path):
    names = [b"caf\xe9.jpg", "\u8336.jpg".encode()]
    (tmp_path / "images" / "drink").mkdir(parents=True)
    for name in names:
        Path(tmp_path, "images", "drink", os.fsdecode(name)).write_bytes(b"broken")
    with pytest.raises(UserError, match="2 images in .* cannot be decoded"):
        convert(open_folder(tmp_path / "images"), tmp_path / "out", split="val")
    lines = (tmp_path / "out" / "broken.txt").read_bytes().splitlines()
    assert {line.split(b" (")[0] for line in lines} == {b"drink/" + name for name in names}


def test_tolerated_broken_images_are_left_out_and_recorded(broken, tmp_path, prepare, capsys):
    assert prepare(broken, tmp_path / "out", "--skip-broken", "4", "--verify") == 0
    assert "skipped 4 unreadable images" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["samples"] == 20
    recorded = {entry["name"]: entry["reason"] for entry in manifest["skipped"]}
    assert set(recorded) == {f"Places365_val_{number:08d}.jpg" for number in (3, 9, 12, 15)}
    assert "truncated" in recorded["Places365_val_00000003.jpg"]


@pytest.mark.long
def test_restoring_a_broken_image_rewrites_its_shard_and_no_other(val, tmp_path, prepare):
    prepare(val, tmp_path / "good", "--shard-mb", "0.01")
    path = val / "val_256" / "Places365_val_00000003.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    assert prepare(val, tmp_path / "out", "--shard-mb", "0.01") == 2
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    path.write_bytes(whole)
    assert prepare(val, tmp_path / "out", "--shard-mb", "0.01") == 0
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert sum(times[name] != after[name] for name in times) == 1
    content = shard_bytes(tmp_path / "out")
    del content["broken.txt"]
    assert content == shard_bytes(tmp_path / "good")


def test_a_full_disk_is_reported_and_the_next_run_continues(val, tmp_path, prepare, capsys):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        assert prepare(val, tmp_path / "out", "--shard-mb", "0.04", "--workers", "1") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert "Cannot write shards to" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.tar"))
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert prepare(val, tmp_path / "out", "--shard-mb", "0.04") == 0
    assert verify(tmp_path / "out") == 24


def test_too_little_disk_space_is_reported_before_writing(
    val, tmp_path, prepare, capsys, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda folder: usage)
    assert prepare(val, tmp_path / "out") == 2
    assert "0.0 GB of free space; expected" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write to read-only folders")
def test_an_unwritable_folder_is_reported(val, tmp_path, prepare, capsys):
    (tmp_path / "out").mkdir(mode=0o500)
    assert prepare(val, tmp_path / "out") == 2
    assert "Cannot write shards to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [("--seed", "-1"), ("--workers", "0"), ("--shard-mb", "0"), ("--skip-broken", "-1")],
)
def test_invalid_numbers_are_rejected(val, tmp_path, prepare, capsys, wrong):
    assert prepare(val, tmp_path / "out", *wrong) == 2
    assert wrong[0].strip("-") in capsys.readouterr().err


# Shards made from a folder with one subfolder per class.


def test_prepare_folder_uses_the_classes_of_other_shards(tmp_path, capsys):
    main = command("prepare_folder")
    for split, classes in (("train", "abc"), ("val", "ac")):
        for number, name in enumerate(classes):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.jpg").write_bytes(jpeg(number))
            (tmp_path / split / name / "2.png").write_bytes(jpeg(100 + number))
    arguments = ["--source", str(tmp_path / "train"), "--output", str(tmp_path / "t"), "--verify"]
    assert main(arguments) == 0
    arguments = ["--source", str(tmp_path / "val"), "--output", str(tmp_path / "v")]
    assert main([*arguments, "--classes-from", str(tmp_path / "t")]) == 0
    labels = open_dataset(tmp_path / "v").labels()
    assert np.unique(labels).tolist() == [0, 2]
    assert open_dataset(tmp_path / "v").classes == ["a", "b", "c"]
    (tmp_path / "val" / "d").mkdir()
    (tmp_path / "val" / "d" / "1.jpg").write_bytes(jpeg(0))
    assert main([*arguments, "--classes-from", str(tmp_path / "t")]) == 2
    assert "not among the 3 expected classes: d" in capsys.readouterr().err
