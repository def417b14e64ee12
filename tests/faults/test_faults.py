"""Tests that inject failures into training runs at pseudo-random points.

Runs are killed or receive signals, the disk is full, or checkpoints are damaged. After each
failure, the run is resumed. It must continue after its last intact checkpoint, leave no incomplete
files, and end with exactly the same checkpoint as an uninterrupted run.
"""

import functools
import os
import random
import re
import signal
import time

import pytest

from tests.faults import harms, runs

pytestmark = pytest.mark.faults

KINDS = ("folder", "shards", "detection", "memory")


def seeded(count: int) -> list[tuple[str, int]]:
    """Return (kind of training data, seed) pairs for the seeds from 0 to ``count - 1``.

    The pairs cycle through the kinds in ``KINDS``.
    """
    return [(KINDS[seed % len(KINDS)], seed) for seed in range(count)]


@pytest.mark.parametrize(("kind", "seed"), seeded(24))
def test_a_run_killed_at_any_time_loses_no_saved_state(work, straight, kind, seed):
    draw = random.Random(seed)
    unbroken, lasts = straight(kind)
    run = work(kind)
    for _ in range(1 + seed // 4 % 2):
        saved = run.last_iteration()
        flags = ["--resume"] if saved >= 0 else ["--overwrite"]
        count = run.output().count("Starting training") + 1
        process = run.start(*flags)
        run.wait_for("Starting training", process, count)
        process.join(draw.uniform(0, lasts))
        process.kill()
        assert runs.end_of(process) in (0, -9)
        assert run.last_iteration() >= saved
    run.go_on()
    run.assert_ends_as(unbroken)


@pytest.mark.parametrize(("kind", "seed"), seeded(12))
def test_a_run_killed_while_writing_leaves_no_partial_file(work, straight, kind, seed):
    draw = random.Random(seed)
    unbroken, _ = straight(kind)
    run = work(kind)
    if seed % 3 == 0 and kind != "memory":
        size = (unbroken.folder / "model_0000002.pth").stat().st_size
        harm = functools.partial(harms.die_at_byte, draw.randrange(size // 10, size))
    else:
        # Saving a checkpoint needs about ten of these calls.
        harm = functools.partial(harms.die_at_call, draw.randrange(3, 50))
    status = run.run(harm=harm)
    assert status in (0, -signal.SIGKILL, -signal.SIGXFSZ)
    for path in run.folder.glob("model_*.pth"):
        runs.load(path)
    run.go_on()
    run.assert_ends_as(unbroken)


@pytest.mark.parametrize(("kind", "seed"), seeded(8))
def test_a_run_stopped_by_a_signal_finishes_the_step_saves_and_logs_it(work, straight, kind, seed):
    draw = random.Random(seed)
    unbroken, lasts = straight(kind)
    run = work(kind)
    process = run.start()
    run.wait_for("Starting training", process)
    process.join(draw.uniform(0, lasts / 2))
    # Like a terminal or scheduler, also send the signal to the data loader's workers.
    os.killpg(process.pid, draw.choice([signal.SIGTERM, signal.SIGINT]))
    status = runs.end_of(process)
    if status == 75:
        stopped = re.findall(r"Stopped after iteration (\d+) and saved a checkpoint", run.output())
        assert run.last_iteration() == int(stopped[0])
    else:
        assert (status, run.last_iteration() + 1) == (0, runs.ITERATIONS)
    run.go_on()
    run.assert_ends_as(unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_a_run_immediately(work, straight, number):
    run = work("folder")
    process = run.start(harm=harms.slow_steps)
    run.wait_for("Starting training", process)
    os.kill(process.pid, number)
    run.wait_for("Send it again to stop immediately", process)
    time.sleep(1.2)
    os.kill(process.pid, number)
    assert runs.end_of(process, limit=10) == 128 + number
    run.go_on()
    run.assert_ends_as(straight("folder")[0])


def flipped(folder, draw):
    path = folder / "model_0000008.pth"
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def flipped_without_a_sum(folder, draw):
    # Flip a bit in a tensor's data, because damage to padding has no effect.
    path = folder / "model_0000008.pth"
    data = bytearray(path.read_bytes())
    start = data.index(b"model_0000008/data/1" if b"model_0000008/data/1" in data else b"data/1")
    data[start + 200 + draw.randrange(100)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    (folder / "model_0000008.pth.sha256").unlink()


def cut_off(folder, draw):
    path = folder / "model_0000008.pth"
    os.truncate(path, draw.randrange(path.stat().st_size))


def emptied(folder, draw):
    (folder / "model_0000008.pth").write_bytes(b"")


def deleted(folder, draw):
    (folder / "model_0000008.pth").unlink()


def no_sum(folder, draw):
    (folder / "model_0000008.pth.sha256").write_bytes(draw.randbytes(70))


def both_damaged(folder, draw):
    cut_off(folder, draw)
    os.truncate(folder / "model_0000005.pth", 1000)


def tag_emptied(folder, draw):
    (folder / "last_checkpoint").write_text("")


def tag_gone(folder, draw):
    (folder / "last_checkpoint").unlink()


def tag_of_noise(folder, draw):
    (folder / "last_checkpoint").write_bytes(draw.randbytes(30))


def tag_elsewhere(folder, draw):
    (folder / "last_checkpoint").write_text("../../model_0000008.pth")


@pytest.mark.parametrize(
    ("damage", "start"),
    [
        (flipped, 6),
        (flipped_without_a_sum, 6),
        (cut_off, 6),
        (emptied, 6),
        (deleted, 6),
        (no_sum, 6),
        (both_damaged, 3),
        (tag_emptied, 9),
        (tag_gone, 9),
        (tag_of_noise, 9),
        (tag_elsewhere, 9),
    ],
)
def test_if_the_newest_checkpoint_is_damaged_the_previous_one_is_used(
    half, straight, damage, start
):
    seed = len(damage.__name__)
    kind = ("folder", "shards", "unseeded")[seed % 3]
    run = half(kind)
    damage(run.folder, random.Random(seed))
    run.go_on()
    assert run.started_at() == start
    assert ("Falling back to the previous checkpoint" in run.output()) == (start < 9)
    run.assert_ends_as(straight(kind)[0])


def test_if_all_checkpoints_are_damaged_they_are_named_and_unchanged(half):
    run = half("folder")
    for number in (2, 5, 8):
        os.truncate(run.folder / f"model_{number:07d}.pth", 5)
    assert run.run("--resume") == 2
    assert "error: No checkpoint" in run.output()
    assert all((run.folder / f"model_{number:07d}.pth").stat().st_size == 5 for number in (2, 5, 8))


@pytest.mark.parametrize(("kind", "seed"), seeded(8))
def test_a_full_disk_stops_the_run_with_the_reason(half, work, straight, kind, seed):
    unbroken, _ = straight(kind)
    size = (unbroken.folder / "model_0000002.pth").stat().st_size
    room = functools.partial(harms.full_at_byte, random.Random(seed).randrange(size // 10, size))
    if resumed := seed % 4 < 2:
        run, flags, last = half(kind), ["--resume"], 8
    else:
        run, flags, last = work(kind), [], -1
    assert run.run(*flags, harm=room) == 2
    assert re.search(r"error: The checkpoint .* can't be written: .*File too large", run.output())
    assert run.last_iteration() == last, resumed
    assert not list(run.folder.glob(".*"))
    run.go_on()
    run.assert_ends_as(unbroken)


def test_a_folder_that_becomes_read_only_stops_the_run_with_the_reason(work, straight):
    run = work("folder")
    process = run.start(harm=harms.obey_permissions)
    run.wait_for("Starting training", process)
    run.folder.chmod(0o555)
    status = runs.end_of(process)
    run.folder.chmod(0o755)
    assert status == 2
    assert re.search(
        r"error: The checkpoint .* can't be written: .*Permission denied", run.output()
    )
    run.go_on()
    run.assert_ends_as(straight("folder")[0])


@pytest.mark.parametrize(("kind", "seed"), [("shards", 0), ("detection", 1), ("folder", 2)])
def test_a_process_that_dies_stops_the_job_and_nothing_is_lost(work, straight, kind, seed):
    draw = random.Random(seed)
    unbroken, lasts = straight(kind, ranks=2)
    run = work(kind)
    ranks = run.start_ranks()
    run.wait_for("Starting training", ranks[0])
    time.sleep(draw.uniform(0, lasts / 2))
    ranks.pop(draw.randrange(2)).kill()
    assert runs.end_of(ranks[0], limit=60) != 0
    run.go_on(ranks=2)
    run.assert_ends_as(unbroken)


@pytest.mark.parametrize(("kind", "seed"), [("shards", 0), ("detection", 1), ("folder", 2)])
def test_a_signal_to_one_of_two_processes_makes_both_save_and_stop(work, straight, kind, seed):
    draw = random.Random(seed)
    unbroken, lasts = straight(kind, ranks=2)
    run = work(kind)
    ranks = run.start_ranks()
    run.wait_for("Starting training", ranks[0])
    time.sleep(draw.uniform(0, lasts / 3))
    os.kill(ranks[seed % 2].pid, signal.SIGTERM)
    assert [runs.end_of(process) for process in ranks] in ([75, 75], [0, 0])
    run.go_on(ranks=2)
    run.assert_ends_as(unbroken)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("iteration", [0, 7])
def test_a_non_finite_loss_stops_all_processes_before_the_step(work, ranks, iteration):
    run = work("shards")
    harm = functools.partial(harms.poison, (iteration,), ranks - 1)
    processes = run.start_ranks(ranks=ranks, harm=harm) if ranks > 1 else [run.start(harm=harm)]
    assert [runs.end_of(process) for process in processes] == [1] * ranks
    assert f"error: Iteration {iteration}: loss_cls is nan" in run.output()
    assert run.last_iteration() == (iteration // runs.PERIOD) * runs.PERIOD - 1
    for rank in range(ranks):
        report = runs.read_json(run.folder / f"nonfinite_{iteration:07d}_rank{rank}.json")
        assert len(report["batch"]["key"]) == 4 // ranks
        assert report["torch_seed"] > 0


@pytest.mark.parametrize("iteration", [0, 1, 5])
def test_data_that_one_process_cannot_read_stops_all_processes(work, iteration):
    run = work("shards")
    harm = functools.partial(harms.no_batch, iteration, 1)
    ranks = run.start_ranks(harm=harm)
    assert [runs.end_of(process, limit=60) for process in ranks] == [2, 2]
    assert run.output().count("error: Another process stopped: the image x.jpg is broken") == 1


@pytest.mark.parametrize("harm", [harms.poison, harms.raise_in_the_model])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_allowed_number_of_non_finite_steps_is_skipped(work, ranks, harm):
    run = work("shards", "SOLVER.MAX_NONFINITE_STEPS", "3")
    harm = functools.partial(harm, (0, 1, 5), ranks - 1)
    processes = run.start_ranks(ranks=ranks, harm=harm) if ranks > 1 else [run.start(harm=harm)]
    assert [runs.end_of(process) for process in processes] == [0] * ranks
    final = runs.load(run.folder / "model_final.pth")
    assert final["trainer"]["_trainer"]["skipped"] == 3
    assert all(value.isfinite().all() for value in final["model"].values())
