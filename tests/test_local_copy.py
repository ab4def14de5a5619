"""Copies of the data on a node's own disk: made once, shared, kept as long as they are needed, never half."""

import logging
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
from conftest import Checkout
from slurm_cluster import wait_until

from pipeline import paths
from pipeline.launch import local_copy
from pipeline.launch.local_copy import LocalCopies
from pipeline.launch.usage import efficiency
from pipeline.train import history

SPAWN = multiprocessing.get_context("spawn")
SIZE_BYTES = 3 * local_copy.CHUNK_BYTES + 5


def never() -> bool:
    return False


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    """What a job would read, and its manifest; no copy looks inside."""
    path = tmp_path / "shared/train.beton"
    path.parent.mkdir()
    path.write_bytes(os.urandom(SIZE_BYTES))
    paths.manifest(path).write_text("index,path\n0,a\n")
    return path


def copies_below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.beton"))


def test_arguments_name_the_copy_and_it_goes_with_the_last_job_that_has_finished(beton: Path, tmp_path: Path) -> None:
    arguments = {"beton": str(beton), "validation": {"beton": str(beton), "image_size": 224}, "variant": "train.beton"}
    with LocalCopies([beton], str(tmp_path / "disk"), never) as first:
        local = first.localised(arguments)
        copy = Path(local["beton"])
        assert tmp_path / "disk" in copy.parents
        assert local == arguments | {"beton": str(copy), "validation": {"beton": str(copy), "image_size": 224}}
        assert copy.read_bytes() == beton.read_bytes()
        assert paths.manifest(copy).read_bytes() == paths.manifest(beton).read_bytes()
        assert copy.parent.stat().st_mode & 0o077 == 0
        made = copy.stat().st_mtime_ns
        with LocalCopies([beton], str(tmp_path / "disk"), never) as second:
            second.finished = True
        assert copy.stat().st_mtime_ns == made  # the first still uses it
    assert copy.exists()  # it has not finished: the next attempt finds it
    with LocalCopies([beton], str(tmp_path / "disk"), never) as third:
        assert copy.stat().st_mtime_ns == made
        third.finished = True
    assert not copies_below(tmp_path / "disk")


def test_other_data_of_the_same_name_is_another_copy(beton: Path, tmp_path: Path) -> None:
    with LocalCopies([beton], str(tmp_path / "disk"), never):
        pass
    beton.write_bytes(b"other" * 100)
    paths.manifest(beton).write_text("index,path\n0,b\n")
    with LocalCopies([beton], str(tmp_path / "disk"), never) as copies:
        assert Path(copies.localised(str(beton))).read_bytes() == beton.read_bytes()
    assert len(copies_below(tmp_path / "disk")) == 2


def test_what_a_killed_job_left_is_never_taken_for_whole(beton: Path, tmp_path: Path) -> None:
    with LocalCopies([beton], str(tmp_path / "disk"), never):
        (copy,) = copies_below(tmp_path / "disk")
    paths.manifest(copy).unlink()  # written last
    copy.write_bytes(bytes(SIZE_BYTES))
    with LocalCopies([beton], str(tmp_path / "disk"), never) as copies:
        assert Path(copies.localised(str(beton))).read_bytes() == beton.read_bytes()


def use(beton: Path, folder: Path, number: int) -> None:
    """A rank: says by a file that it has the copy, and keeps it until there is a file `leave`."""
    logging.basicConfig(level=logging.INFO, filename=folder / f"log-{number}.txt")
    with LocalCopies([beton], str(folder), never) as copies:
        assert Path(copies.localised(str(beton))).read_bytes() == beton.read_bytes()
        (folder / f"entered-{number}").touch()
        wait_until((folder / "leave").exists, "the end")
        copies.finished = True


@pytest.mark.slow
def test_ranks_of_a_node_make_one_copy_and_a_killed_one_holds_nobody_up(beton: Path, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    ranks = [SPAWN.Process(target=use, args=(beton, folder, number)) for number in range(4)]
    for rank in ranks:
        rank.start()
    wait_until(lambda: len(list(folder.glob("entered-*"))) == len(ranks), "all ranks")
    assert sum("copied" in path.read_text() for path in folder.glob("log-*.txt")) == 1
    ranks[0].kill()
    (folder / "leave").touch()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [-signal.SIGKILL, 0, 0, 0]
    assert not copies_below(folder)


def test_a_copy_that_cannot_be_made_is_a_warning_and_leaves_nothing(
    beton: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder, reason in (
        (str(file), "File exists|Not a directory"),
        ("$NOT_SET_HERE/x", "a variable that is not set"),
    ):
        with LocalCopies([beton], folder, never) as copies:
            assert copies.localised({"beton": str(beton)}) == {"beton": str(beton)}
        assert caplog.messages[-1].startswith(f"no local copy of {beton}")
        assert any(part in caplog.messages[-1] for part in reason.split("|"))


def test_a_disk_that_fills_up_leaves_no_part(beton: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (local_copy.CHUNK_BYTES, limits[1]))
    try:
        with LocalCopies([beton], str(tmp_path / "disk"), never) as copies:
            assert copies.localised(str(beton)) == str(beton)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in caplog.messages[-1]
    assert not copies_below(tmp_path / "disk")


def test_too_little_room_is_seen_before_anything_is_written(
    beton: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(beton, 2**43)  # a hole: more than this disk has
    with LocalCopies([beton], str(tmp_path / "disk"), never) as copies:
        assert copies.localised(str(beton)) == str(beton)
    assert "8796.1 GB needed" in caplog.messages[-1]


def test_a_job_that_has_to_stop_does_not_go_on_copying(
    beton: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = iter((False, True))
    with LocalCopies([beton], str(tmp_path / "disk"), lambda: next(asked)) as copies:
        assert copies.localised(str(beton)) == str(beton)
    assert "has to stop" in caplog.messages[-1]
    assert not copies_below(tmp_path / "disk")


@pytest.mark.slow
def test_a_training_reads_the_copy_and_has_the_same_identity(checkout: Checkout, tmp_path: Path) -> None:
    """One of two ranks copies, and the last one removes."""
    profile = "kind: local\ngpus_per_node: 0\nranks_per_node: 2\ncpus_per_task: 1\nvalidations: 0\n"
    (checkout.folder / "slurm/copying.yaml").write_text(profile + "local_copy: $PLACE/betons\n")
    checkout.environment |= {"PIPELINE_CLUSTER": "slurm/copying.yaml", "PLACE": str(tmp_path / "disk")}
    checkout.pipeline("compose", "scale=demo", "classification.recipe.max_steps=2")
    checkout.pipeline("prepare_imagenet")
    checkout.pipeline("convert_imagenet")
    checkout.pipeline("train_classifier", "poolformer_s12", "0")
    run = checkout.folder / "runs/train_classifier/poolformer_s12-0"
    log = (run / "log.txt").read_text()
    both = "".join(path.read_text() for path in (run / "log.txt").resolve().parent.glob("*_log.out"))
    for split in ("train", "val"):
        assert both.count(f"copying {checkout.folder.absolute()}/data/beton/imagenet/{split}.beton") == 1
        assert f"removing {tmp_path / 'disk'}/betons" in both
    assert not copies_below(tmp_path / "disk")
    (line,) = history.read(run / "usage.jsonl")
    assert (line["cpus"], line["memory_asked_gb"]) == (1, None)
    assert efficiency(run)["cpu_used"] > 0
    fingerprint = (run / "fingerprint").read_text()
    checkout.environment["PIPELINE_CLUSTER"] = "slurm/local.yaml"
    assert checkout.pipeline("train_classifier", "poolformer_s12", "0") is not None
    assert (run / "fingerprint").read_text() == fingerprint
    assert (run / "log.txt").read_text() == log  # nothing was trained again
