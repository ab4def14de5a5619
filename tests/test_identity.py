"""What a result is identified by, the copy of the code that its job runs, and what is kept of earlier runs."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import Checkout

from pipeline import paths, upkeep
from pipeline.cluster import Profile
from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.experiments import compose
from pipeline.launch import agreement, record, worker
from pipeline.launch.attempts import Attempt
from pipeline.launch.fingerprint import code_of, content_digest, identify, snapshot
from pipeline.launch.record import Job
from pipeline.launch.submission import Run, claim_folder, find_run
from pipeline.launch.works import training as training_work
from pipeline.tasks.classification.description import CLASSIFIER


@pytest.fixture
def run(in_checkout: Path) -> Run:
    """S12's training on data that is a manifest alone."""
    compose(["scale=demo"])
    manifest = paths.manifest(paths.beton("imagenet", "train"))
    manifest.parent.mkdir(parents=True)
    manifest.write_text("sample_id,sha256\n0,ab\n")
    return training(0.01)


def training(rate: float) -> Run:
    compose(["scale=demo", f"classification.recipe.learning_rate_per_1024={rate}"])
    work = training_work(load_params(paths.PARAMS), CLASSIFIER, "poolformer_s12", 0)
    assert work is not None
    return Run.of(work)


def write_work(run: Run) -> None:
    content = {
        "call": run.work.call,
        "code": run.identity.code,
        "inputs": run.identity.inputs,
        "betons": [],
        "snapshot": str(snapshot()),
    }
    (run.folder / "work.json").write_text(json.dumps(content))


def test_a_run_is_put_aside_whole_and_comes_back(run: Run) -> None:
    claim_folder(run)
    checkpoint = run.folder / "checkpoints/step-40-0123456789abcdef.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"steps of four days")
    other = training(0.02)
    assert other.fingerprint != run.fingerprint
    claim_folder(other)
    assert not (other.folder / "checkpoints").exists()
    aside = find_run(run)
    assert aside is not None
    assert aside.name == f"poolformer_s12-0.{run.fingerprint[:12]}"
    assert (aside / "checkpoints" / checkpoint.name).exists()
    claim_folder(run)
    assert checkpoint.read_bytes() == b"steps of four days"
    assert find_run(other) is not None


def test_why_names_parameters_data_and_definitions(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(paths.PARAMS)
    assert "holds no run yet" in upkeep.why(params, "train_classifier", "poolformer_s12", 0)
    claim_folder(run)
    changed = training(0.02)
    rows = "".join(f"{index},cd\n" for index in range(32))
    paths.manifest(paths.beton("imagenet", "train")).write_text(f"sample_id,sha256\n{rows}")
    said = upkeep.why(load_params(paths.PARAMS), "train_classifier", "poolformer_s12", 0)
    assert "parameter recipe.learning_rate_per_1024: 0.01 -> 0.02" in said
    assert "data data/beton/imagenet/train.beton.manifest.csv: " in said
    assert "parameter peak_learning_rate: 0.00015625 -> 0.0003125" in said
    assert "parameter total_steps: 0 -> 6" in said
    assert "code" not in said
    assert identify(changed.work).code == run.identity.code


def test_a_job_checks_code_and_data_before_it_touches_anything(run: Run) -> None:
    claim_folder(run)
    write_work(run)
    worker._check_identity(run.folder)
    manifest = paths.manifest(paths.beton("imagenet", "train"))
    before = manifest.read_text()
    manifest.write_text(before + "1,cd\n")
    with pytest.raises(UserError, match=r"train\.beton\.manifest\.csv has changed since this job was queued"):
        worker._check_identity(run.folder)
    manifest.write_text(before)
    orders = record.read_work(run.folder)
    (run.folder / "work.json").write_text(json.dumps({**orders, "code": "0" * 64}))
    with pytest.raises(UserError, match="is not what this job was queued with"):
        worker._check_identity(run.folder)


def test_software_is_recorded_at_each_attempt_and_another_version_is_said(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_folder(run)
    profile = Profile(kind="local", gpus_per_node=0)
    agreement.hold_to(run.folder, Attempt("7", 0), agreement.facts(profile, 0, {}))
    assert not caplog.records
    monkeypatch.setattr(agreement, "version", lambda name: "9.9" if name == "torch" else "1")
    agreement.hold_to(run.folder, Attempt("7", 1), agreement.facts(profile, 0, {}))
    first, second = record.software(run.folder)
    assert (first["attempt"], second["attempt"], second["torch"]) == ("7.0", "7.1", "9.9")
    assert f"torch is 9.9 now; the previous attempt ran {first['torch']}" in caplog.text
    assert len(first["pipeline.data._pixels"]) == 16


def test_the_copy_of_the_code_is_made_once_and_does_not_change(checkout: Checkout, tmp_path: Path) -> None:
    script = (
        "from pipeline.launch.fingerprint import code_of, snapshot;"
        "print(snapshot(), code_of('pipeline.tasks.classification.training:train').digest)"
    )

    def made() -> list[str]:
        return checkout.run("python", "-c", script).stdout.split()

    place, digest = made()
    assert made() == [place, digest]
    schedule = checkout.folder / "pipeline/train/schedule.py"
    schedule.write_text(schedule.read_text() + "\n# a comment\n")
    commented, same = made()
    assert commented != place
    assert same == digest
    assert "# a comment" not in (Path(place) / "pipeline/train/schedule.py").read_text()
    assert sorted(path.name for path in Path(place).parent.iterdir()) == sorted(
        [Path(place).name, Path(commented).name]
    )
    assert list((Path(place) / "pipeline").rglob("*.so"))


def test_clean_lists_asks_and_leaves_what_is_used(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claim_folder(run)
    write_work(run)
    used = Path(record.read_work(run.folder)["snapshot"])
    unused = used.with_name("0" * 16)
    shutil.copytree(used, unused)
    other = training(0.02)
    claim_folder(other)
    write_work(other)
    aside = find_run(run)
    assert aside is not None
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert upkeep.clean(yes=False) == 1
    said = capsys.readouterr().out
    assert "put aside, no checkpoint" in said
    assert "nothing was deleted" in said
    assert aside.exists()
    assert unused.exists()
    monkeypatch.setattr(upkeep, "attach", lambda folder: object() if folder == aside else None)
    assert upkeep.clean(yes=True) == 0
    assert aside.exists(), "a job uses it"
    assert not unused.exists()
    assert used.exists()
    monkeypatch.setattr(upkeep, "attach", lambda folder: None)
    assert upkeep.clean(yes=True) == 0
    assert not aside.exists()
    assert upkeep.clean(yes=True) == 0
    assert "nothing to delete" in capsys.readouterr().out


def test_a_job_leaves_a_folder_that_has_come_to_wait_for_another(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    claim_folder(run)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        stopping = worker._Stopping()
        stopping.watch(run.folder, "token-1")
        record.write_job(run.folder, Job("slurm", "token-1", str(tmp_path), {}, 0.0))
        monkeypatch.setattr(worker, "CLAIM_S", -1)
        assert not stopping()
        record.write_job(run.folder, Job("slurm", "token-2", str(tmp_path), {}, 0.0))
        assert stopping()
        assert stopping.is_replaced
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_fingerprint_does_not_depend_on_the_module_of_a_call(run: Run) -> None:
    assert run.identity.code == code_of("pipeline.tasks.classification.training:train").digest
    manifest = paths.manifest(paths.beton("imagenet", "train"))
    assert run.identity.inputs == {str(manifest): content_digest(manifest)}
    content: Any = json.dumps(run.identity.arguments)
    assert "classifier_training" not in content
