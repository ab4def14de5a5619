"""The whole graph on the demo's images, shortened to two steps and one variant: what `dvc repro` promises."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import psutil
import pytest
from conftest import DEMO, ROOT, Checkout

from pipeline.paper import label

pytestmark = pytest.mark.slow
PATIENCE_S = 600


@pytest.fixture(scope="module")
def finished(demo_outputs: Path) -> Checkout:
    """The checkout in which the shortened graph has run."""
    return Checkout.at(demo_outputs.parent / "graph")


def stale(checkout: Checkout) -> set[str]:
    """Names of the stages that `dvc repro` would run first or because they changed themselves."""
    return set(json.loads(checkout.run("dvc", "status", "--json").stdout or "{}"))


def test_tables_have_the_contract_columns(finished: Checkout) -> None:
    tables = {"table2_imagenet": ("poolformer_s12", 5), "table4_ade20k": ("poolformer_s12", 5)}
    tables |= {"table5_ablations": ("ppaa", 18)}
    for name, (model, rows) in tables.items():
        macs = [] if name == "table4_ade20k" else ["macs_g"]
        table = pd.read_csv(finished.folder / f"reports/{name}.csv")
        columns = ["model", "params_m", *macs, "paper", "released", "measured", "seeds", "difference", "verdict"]
        assert set(columns) <= set(table.columns)
        assert len(table) == rows
        row = table.set_index("model").loc[model]
        assert 0 <= row["measured"] <= 100
        assert row["seeds"] == 1
        assert "not comparable" in row["verdict"]
        assert "handwritten digits" in row["verdict"]
        for suffix in ("md", "html", "tex"):
            assert (finished.folder / f"reports/{name}.{suffix}").stat().st_size > 500
    assert "<svg" in (finished.folder / "reports/index.html").read_text()
    table2, table5 = (
        pd.read_csv(finished.folder / f"reports/{name}.csv").set_index("model") for name in list(tables)[::2]
    )
    baseline = table2.loc["poolformer_s12", "measured"]
    assert table5.loc["baseline", "measured"] == baseline
    assert table5.loc["ppaa", "effect"] == pytest.approx(table5.loc["ppaa", "measured"] - baseline, abs=1e-6)
    assert table5.loc["ppaa", "macs_g"] == pytest.approx(2.56, abs=0.05), "at 224 px, whatever it was trained on"


def test_trainings_run_side_by_side_below_a_bar_for_the_whole(finished: Checkout) -> None:
    first, second = (
        finished.folder / f"runs/{run}" for run in ("train_classifier/poolformer_s12-0", "train_ablation/ppaa-0")
    )
    assert json.loads((second / "job.json").read_text())["submitted"] < (first / "done").stat().st_mtime
    shown = re.findall(r"[━─]{30} (\d+) % of the graph", (finished.folder / "output.txt").read_text())
    assert len(shown) > 2
    assert shown == sorted(shown, key=int)
    assert int(shown[-1]) >= 60


def test_a_second_repro_runs_nothing(finished: Checkout) -> None:
    output = finished.run("dvc", "repro").stdout
    assert "Running stage" not in output
    assert "up to date" in output


def test_dvc_shows_metrics_and_plots(finished: Checkout) -> None:
    metrics = finished.run("dvc", "metrics", "show").stdout
    assert "top1" in metrics
    assert "miou" in metrics
    shown = finished.run("dvc", "plots", "show")
    assert "failed to load" not in shown.stdout + shown.stderr
    page = (finished.folder / "dvc_plots/index.html").read_text()
    for title in (
        "train_classifier poolformer_s12-0: loss",
        "train_segmenter poolformer_s12-0: loss",
        "IoU of each class",
    ):
        assert title in page


def test_one_target_runs_by_its_name(finished: Checkout) -> None:
    output = finished.run("dvc", "repro", "train_classifier@poolformer_s12-0").stdout
    assert "train_classifier@poolformer_s12-0' didn't change" in output


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        (
            [
                ("train/loop.py", "import logging", "import logging  # a comment"),
                ("variants.yaml", "\npoolformer_m48:", "\npoolformer_m60:"),  # that is not trained here
                ("ablations.yaml", "\npool9:", "\npool11:"),
            ],
            set(),
        ),
        (
            [
                ("comparisons/table2.py", '"Top-1, %"', '"Accuracy, %"'),
                ("ablations.yaml", "crop_fraction: 0.95}\npppf", "crop_fraction: 0.9}\npppf"),  # ppaa's
            ],
            {"train_ablation@ppaa-0", "evaluate_ablation@ppaa-0", "compare_with_paper"},
        ),
        (
            [("config.py", "return self.learning_rate_per_1024 *", "return 4 * self.learning_rate_per_1024 *")],
            {"train_classifier@poolformer_s12-0", "train_ablation@ppaa-0", "compare_with_paper"},
        ),
        (
            [("variants.yaml", "blocks: [2, 2, 6, 2]", "blocks: [2, 2, 6, 3]")],
            {
                f"{step}_{kind}@poolformer_s12-0"
                for step in ("train", "evaluate")
                for kind in ("classifier", "segmenter")
            }
            | {"train_ablation@ppaa-0", "evaluate_ablation@ppaa-0"},
        ),
    ],
    ids=["a comment and other models", "a heading and an ablation", "the learning rate", "this variant"],
)
def test_a_change_of_code_makes_stale_what_it_can_change(
    finished: Checkout, changes: list[tuple[str, str, str]], stages: set[str]
) -> None:
    paths = {file: finished.folder / "pipeline" / file for file, _, _ in changes}
    before = {file: path.read_text() for file, path in paths.items()}
    for file, old, new in changes:
        assert before[file].count(old) >= 1
        paths[file].write_text(before[file].replace(old, new))
    try:
        assert "code" in stale(finished)
        finished.run("dvc", "repro", "code")
        assert stale(finished) == stages
    finally:
        for file, path in paths.items():
            path.write_text(before[file])
        finished.run("dvc", "repro", "code")
    assert stale(finished) == set()


def test_an_equivalent_change_is_adopted_and_the_report_says_so(finished: Checkout) -> None:
    """The training is not run again; the evaluation's input is the same, so it is not either."""
    path = finished.folder / "pipeline/train/schedule.py"
    before, params = path.read_text(), (finished.folder / "params.yaml").read_text()
    run = ("train_classifier", "poolformer_s12", "0")
    log = finished.folder / "runs/train_classifier/poolformer_s12-0/log.txt"
    trained = log.resolve()
    refused = finished.pipeline("adopt", *run, "--because", "nothing differs", check=False)
    assert "is up to date" in refused.stderr
    try:
        path.write_text(before + "\n\ndef _half(x):\n    return x / 2\n")
        text = path.read_text()
        path.write_text(text.replace("math.pi", "2 * _half(math.pi)", 1))
        finished.run("dvc", "repro", "code")
        assert "pipeline.train.schedule:_half now used" in finished.pipeline("why", *run).stdout
        adopted = finished.pipeline("adopt", *run, "--because", "halving twice is the identity").stdout
        assert "cosine_by_epoch changed" in adopted
        segmenter = ("train_segmenter", "poolformer_s12", "0")
        assert "the run that it starts from" in finished.pipeline("why", *segmenter).stdout
        finished.pipeline("adopt", *segmenter, "--because", "its classifier is the same")
        finished.run("dvc", "repro")
        assert log.resolve() == trained
        assert "halving twice is the identity" in (finished.folder / "reports/index.html").read_text()
        assert "adopted on" in finished.pipeline("why", *run).stdout
    finally:
        path.write_text(before)
        (finished.folder / "params.yaml").write_text(params)
        finished.run("dvc", "repro", "code")
        for stage in ("train_classifier", "train_segmenter"):
            finished.pipeline("adopt", stage, *run[1:], "--because", "the change was taken back")
        finished.run("dvc", "repro")
    assert stale(finished) == set()


def test_a_change_of_one_recipe_makes_that_variant_stale(finished: Checkout) -> None:
    before = (finished.folder / "params.yaml").read_text()
    try:
        finished.pipeline("compose", *DEMO, "classification.variants.poolformer_m48.drop_path_rate=0.2")
        assert stale(finished) == {
            "compare_with_paper"
        }  # M48 is not trained here, but is part of what the report tells
        finished.pipeline("compose", *DEMO, "classification.variants.poolformer_s12.drop_path_rate=0.2")
        assert "train_classifier@poolformer_s12-0" in stale(finished)
    finally:
        (finished.folder / "params.yaml").write_text(before)


def test_mlflow_has_the_comparison_its_runs_and_models(finished: Checkout) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.folder}/mlflow.db")
    for title, metric, variant in (
        ("Table 2", "top1", "poolformer_s12"), ("Table 4", "miou", "poolformer_s12"), ("Table 5", "top1", "ppaa"),
    ):  # fmt: skip
        (experiment,) = [e for e in client.search_experiments() if e.name.startswith(title)]
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert set(runs) == {f"{title} · demo", f"{label(variant)} · seed 0"}
        training = runs[f"{label(variant)} · seed 0"]
        assert training.info.status == "FINISHED"
        assert training.data.metrics[metric] >= 0
        assert training.data.params["variant"] == variant
        assert training.data.tags["mlflow.parentRunId"] == runs[f"{title} · demo"].info.run_id
        assert "not comparable" in training.data.tags["verdict"]
        assert len(client.get_metric_history(training.info.run_id, "loss")) == 1
    for name in ("poolformer_s12-classifier-demo", "poolformer_s12-segmenter-demo", "ppaa-ablation-demo"):
        assert str(client.get_model_version_by_alias(name, "best").version) == "1"
    assert "MLflow has everything" in finished.pipeline("sync").stdout


def test_the_same_seed_gives_the_same_weights(demo_outputs: Path, tmp_path: Path) -> None:
    """Trained anew, from the same data, in another folder."""
    again = Checkout(tmp_path)
    again.pipeline("compose", *DEMO)
    shutil.copytree(demo_outputs.parent / "graph/data", again.folder / "data")
    for stage in ("train_classifier", "train_segmenter"):
        again.pipeline(stage, "poolformer_s12", "0")
    made = [path.relative_to(again.folder) for path in (again.folder / "models").rglob("poolformer_s12-0.pt")]
    assert len(made) == 2
    for path in made:
        assert (again.folder / path).read_bytes() == (demo_outputs / path).read_bytes(), path


def test_evaluation_is_the_same_under_any_ranks_and_batch(finished: Checkout) -> None:
    profile = "kind: local\nranks_per_node: 2\ncpus_per_task: 1\ngpus_per_node: 0\nmax_images_per_device: 7\n"
    (finished.folder / "slurm/two.yaml").write_text(profile)
    for stage in ("evaluate_classifier", "evaluate_segmenter"):
        result = finished.folder / f"results/{stage}/poolformer_s12-0.json"
        alone = json.loads(result.read_text())
        shutil.rmtree(finished.folder / f"runs/{stage}/poolformer_s12-0")
        finished.pipeline(stage, "poolformer_s12", "0", PIPELINE_CLUSTER="slurm/two.yaml")
        assert json.loads(result.read_text()) == pytest.approx(alone, rel=1e-3)
        assert json.loads(result.read_text())["images"] == alone["images"]
    finished.run("dvc", "repro")  # back to the files that DVC knows


def test_killed_training_goes_on_from_its_checkpoint(finished: Checkout) -> None:
    """kill -9 of the worker in the middle; the next repro resumes, and then runs nothing twice."""
    longer = [*DEMO, "classification.recipe.max_steps=60"]
    finished.pipeline("compose", *longer)
    (finished.folder / "slurm/often.yaml").write_text("kind: local\ngpus_per_node: 0\ncheckpoint_interval_s: 0.001\n")
    environment = {**finished.environment, "PIPELINE_CLUSTER": "slurm/often.yaml"}
    target = "train_classifier@poolformer_s12-0"
    folder = finished.folder / "runs/train_classifier/poolformer_s12-0"
    repro = subprocess.Popen(
        ["dvc", "repro", "-s", target], cwd=finished.folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    job = _kill_worker_after_checkpoint(folder)
    repro.communicate(timeout=PATIENCE_S)
    assert repro.returncode != 0
    assert not psutil.pid_exists(job) or psutil.Process(job).status() == psutil.STATUS_ZOMBIE
    assert _mlflow_status(finished, folder) in ("KILLED", "FAILED")

    finished.run("dvc", "repro", "-s", target, PIPELINE_CLUSTER="slurm/often.yaml")
    logs = "".join(path.read_text() for path in sorted((folder / "jobs").glob("*.out")))
    assert "going on from step" in logs
    results = finished.folder / "results/train_classifier"
    assert pd.read_csv(results / "poolformer_s12-0.csv")["step"].tolist() == [20, 40, 44, 60]
    (look,) = pd.read_csv(results / "poolformer_s12-0.validation.csv").to_dict("records")
    assert (look["step"], look["epoch"]) == (44, 1)
    assert 10 < look["top1"] < 100
    finished.run("dvc", "plots", "show")
    assert "train_classifier poolformer_s12-0: top-1" in (finished.folder / "dvc_plots/index.html").read_text()
    assert _mlflow_status(finished, folder) == "FINISHED"
    assert "Running stage" not in finished.run("dvc", "repro", "-s", target).stdout


def test_a_job_outlives_its_repro_and_is_attached_to_or_cancelled(finished: Checkout) -> None:
    longer = [*DEMO, "classification.recipe.max_steps=200"]
    finished.pipeline("compose", *longer)
    folder = finished.folder / "runs/train_classifier/poolformer_s12-0"
    command = [sys.executable, "-m", "pipeline", "train_classifier", "poolformer_s12", "0"]
    stage = subprocess.Popen(command, cwd=finished.folder, env=finished.environment, stdout=subprocess.DEVNULL)
    mark = None
    deadline = time.monotonic() + PATIENCE_S
    while mark is None:
        assert time.monotonic() < deadline
        work = folder / "work.json"
        if (folder / "job.json").exists() and work.exists() and '"max_steps": 200' in work.read_text():
            mark = json.loads((folder / "job.json").read_text())["job_id"]
        time.sleep(0.05)
    stage.kill()
    stage.wait()
    assert psutil.pid_exists(int(mark))

    second = subprocess.Popen(
        command, cwd=finished.folder, env=finished.environment, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert second.stdout is not None
    assert f"attached to local job {mark}" in second.stdout.readline()
    assert json.loads((folder / "job.json").read_text())["job_id"] == mark  # attached, not submitted again
    assert "ended job" in finished.pipeline("cancel", "train_classifier", "poolformer_s12-0").stdout
    second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 1
    none = finished.pipeline("cancel", "train_classifier", "poolformer_s12-0", check=False)
    assert "has no job" in none.stderr


def _mlflow_status(checkout: Checkout, folder: Path) -> str:
    from mlflow import MlflowClient

    (state,) = json.loads((folder / "mlflow.json").read_text()).values()
    run = MlflowClient(f"sqlite:///{checkout.folder}/mlflow.db").get_run(state["run_id"])
    return str(run.info.status)


def _kill_worker_after_checkpoint(folder: Path) -> int:
    """Wait for the first checkpoint, then kill -9 every process of the job; returns the controller's id."""
    deadline = time.monotonic() + PATIENCE_S
    while not list((folder / "checkpoints").glob("step-*.pt")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)
    job = int(json.loads((folder / "job.json").read_text())["job_id"])
    for process in psutil.Process(job).children(recursive=True):
        os.kill(process.pid, signal.SIGKILL)
    return job


@pytest.mark.parametrize("change", ["missing", "empty"])
def test_missing_and_empty_data_are_one_clear_line(checkout: Checkout, change: str) -> None:
    checkout.pipeline("compose", "scale=paper")
    if change == "empty":
        (checkout.folder / "data/imagenet/train").mkdir(parents=True)
    done = checkout.pipeline("prepare_imagenet", check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: data/imagenet/train")


def test_a_truncated_beton_is_refused_before_training(finished: Checkout, tmp_path: Path) -> None:
    beton = finished.folder / "data/beton/imagenet/val.beton"
    whole = beton.read_bytes()
    beton.unlink()  # it may be a link into DVC's cache
    beton.write_bytes(whole[:-10])
    try:
        shutil.rmtree(finished.folder / "runs/evaluate_classifier/poolformer_s12-0")
        done = finished.pipeline("evaluate_classifier", "poolformer_s12", "0", check=False)
    finally:
        beton.write_bytes(whole)
    assert done.returncode == 1
    assert "cut short" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_quick_and_wrong_words_are_clear(checkout: Checkout) -> None:
    done = checkout.run("python", "-X", "importtime", "-m", "pipeline", "--help")
    for slow in ("torch", "mlflow", "dvc", "hydra"):
        assert f"| {slow}" not in done.stderr
    wrong = checkout.pipeline("train_classifier", "poolformer_s13", "0", check=False)
    assert wrong.returncode == 1
    assert "did you mean" in wrong.stderr
    wrong = checkout.pipeline("train_clasifier", "poolformer_s12", "0", check=False)
    assert wrong.returncode == 2
    assert "train_classifier" in wrong.stderr


def test_doctor_says_whether_loading_keeps_up_with_a_gpu(finished: Checkout) -> None:
    (finished.folder / "slurm/gpu.yaml").write_text("kind: local\ngpus_per_node: 1\ncpus_per_task: 8\n")
    said = finished.pipeline("doctor", check=False, PIPELINE_CLUSTER="slurm/gpu.yaml").stdout
    planned = finished.pipeline("plan", PIPELINE_CLUSTER="slurm/gpu.yaml").stdout
    (finished.folder / "slurm/gpu.yaml").unlink()
    assert re.search(r"Loading: 8 cores per rank load about [\d,]+ images/s; a GPU trains ", planned)
    found = re.search(
        r"8 cores per rank load about ([\d,]+) images/s; a GPU trains ([\d,]+) \(", " ".join(said.split())
    )
    assert found is not None, said
    loaded, trained = (int(number.replace(",", "")) for number in found.groups())
    assert min(loaded, trained) > 0
    assert ("GPUs will wait" in said) == (loaded <= trained)


def test_doctor_finds_what_is_missing(checkout: Checkout) -> None:
    done = checkout.pipeline("doctor")
    assert "2.15" in done.stdout
    checkout.pipeline("compose", "scale=released")
    done = checkout.pipeline("doctor", check=False)
    assert done.returncode == 1
    assert "data/imagenet/val is missing" in " ".join(done.stdout.split())
    assert "poolformer_m48.pth.tar" in done.stdout


def test_doctor_finds_what_a_killed_dvc_left_and_who_can_write_to_its_state(checkout: Checkout) -> None:
    """`dvc` is killed while it holds its lock; its state is where it is by default, and then where set-up puts it."""

    def complaints() -> str:
        return " ".join(checkout.pipeline("doctor", check=False).stdout.split())

    assert "DVC" not in complaints()
    (checkout.folder / "dvc").write_text(
        "import os, signal, time\n"
        "from dvc.repo import Repo\n"
        "with Repo() as repo, repo.lock:\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(600)\n"
    )
    holding = subprocess.Popen(
        [sys.executable, "dvc"], cwd=checkout.folder, env=checkout.environment, stdout=subprocess.PIPE, text=True
    )
    assert holding.stdout is not None
    assert holding.stdout.readline() == "locked\n"
    assert "is held since" not in complaints()
    holding.kill()
    holding.wait()
    assert ".dvc/tmp/lock is held since" in complaints()
    assert checkout.run("dvc", "status", check=False).returncode != 0
    (checkout.folder / ".dvc/tmp/lock").unlink()
    assert "is held since" not in complaints()
    (checkout.folder / ".dvc/tmp/rwlock").write_text(
        json.dumps({"write": {"models": {"pid": os.getpid(), "cmd": "dvc repro"}}, "read": {}})
    )
    assert f"names process {os.getpid()}, which is no dvc" in complaints()
    (checkout.folder / ".dvc/tmp/rwlock").unlink()

    del checkout.environment["DVC_SITE_CACHE_DIR"]
    home = checkout.folder / "home"
    home.mkdir()
    checkout.environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    (checkout.folder / "open").mkdir(mode=0o700)
    (checkout.folder / "open").chmod(0o777)
    checkout.run("dvc", "config", "core.site_cache_dir", str(checkout.folder / "open"))
    assert "others can write to" in complaints()
    checkout.run(str(ROOT / ".ci/private-dvc-cache"))
    assert "others can write to" not in complaints()
    checkout.run("dvc", "status", check=False)
    assert (home / "cache/dvc-site/repo").exists()
    assert (home / "cache/dvc-site").stat().st_mode & 0o777 == 0o700


def test_dvc_exp_run_composes_the_same_parameters(checkout: Checkout) -> None:
    config = checkout.folder / ".dvc/config"
    config.write_text(config.read_text().replace("    no_scm = True\n", ""))
    (checkout.folder / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    for command in (
        ("git", "init", "-q"),
        ("git", "add", "-A"),
        ("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "start"),
    ):
        checkout.run(*command)
    override = "classification.recipe.epochs=8"
    checkout.run("dvc", "exp", "run", "-S", "scale=demo", "-S", override, "prepare_imagenet")
    by_dvc = (checkout.folder / "params.yaml").read_text()
    checkout.pipeline("compose", "scale=demo", override)
    assert (checkout.folder / "params.yaml").read_text() == by_dvc
    assert "epochs: 8" in by_dvc


def test_make_dashboard_serves_mlflow_on_loopback(finished: Checkout) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shutil.copy(ROOT / "Makefile", finished.folder)
    server = subprocess.Popen(
        ["make", "--old-file=setup", "dashboard", f"PORT={port}"],
        cwd=finished.folder,
        env=finished.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def test_show_prints_both_tables(finished: Checkout) -> None:
    shown = finished.pipeline("show").stdout
    assert "PoolFormer-S12" in shown
    assert "mIoU" in shown
