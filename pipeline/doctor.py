"""`python -m pipeline doctor`: what is there, what is missing, what to do."""

import importlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from pipeline import cluster, paths, plan
from pipeline.catalogue import DATA_SETS, TASKS
from pipeline.config import Params, load_params
from pipeline.data.survey import is_listing_of, read_listing
from pipeline.errors import UserError
from pipeline.launch.check import try_job
from pipeline.launch.dvc_graph import RWLOCK
from pipeline.launch.scheduler import Finding, scheduler_of
from pipeline.stages.prepare import survey
from pipeline.tasks.classification.description import IMAGENET, TEST_SETS, classes_of
from pipeline.tasks.description import load

DVC = Path(".dvc")
SIGNS = {"ok": "[green]✓[/]", "note": "[yellow]·[/]", "fault": "[red]✗[/]"}
TESTED_PYTHONS = ("3.11", "3.12", "3.13")
PACKAGES = ("torch", "torchvision", "timm", "ffcv", "dvc", "mlflow", "submitit")


def examine(*, verify: bool = False, test_job: bool = False) -> int:
    """Print all findings; returns 1 if there is a fault, else 0.

    `verify` reads every sample of every .beton; `test_job` runs a small job where trainings run.
    """
    findings: list[Finding] = []
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        _dvc,
        _decoder,
        _processor,
        _cluster,
        _parameters,
    ]
    checks += [_betons] * verify + [_test_job] * test_job
    for examination in checks:
        try:
            findings.extend(examination())
        except UserError as error:
            findings.append(Finding("fault", examination.__name__.strip("_"), str(error)))
    table = Table(box=None, show_header=False)
    for finding in findings:
        table.add_row(SIGNS[finding.level], finding.subject, finding.text)
    Console(width=max(100, shutil.get_terminal_size().columns)).print(table)
    return int(any(finding.level == "fault" for finding in findings))


def _python() -> Iterator[Finding]:
    found = platform.python_version()
    good = found.rpartition(".")[0] in TESTED_PYTHONS
    advice = "" if good else f": the lock file is made and tested for {', '.join(TESTED_PYTHONS)}"
    yield Finding("ok" if good else "note", "Python", found + advice)


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding("ok", name, version(name))
        except PackageNotFoundError:
            yield Finding("fault", name, "not installed: run `make setup`")


def _dvc() -> Iterator[Finding]:
    """Locks that a killed `dvc` has left, and who else can write to its state."""
    for lock in (DVC / "tmp/lock", DVC / "tmp/rwlock.lock"):
        # A file, not a lock of the kernel: it outlives its process, and is valid for a year.
        if lock.exists() and not _dvc_runs_here():
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(lock.lstat().st_ctime))
            text = f"{lock} is held since {since}, and no dvc runs here: if none runs on another machine, delete it"
            yield Finding("fault", "DVC", text)
    for pid in sorted(_dvc_commands()):
        if psutil.pid_exists(pid) and "dvc" not in " ".join(psutil.Process(pid).cmdline()):
            text = f"{RWLOCK} names process {pid}, which is no dvc: delete it while no `dvc repro` runs, on any machine"
            yield Finding("fault", "DVC", text)
    place = _site_cache()
    if place.exists() and place.stat().st_mode & 0o022:
        text = f"others can write to {place}, from which DVC unpickles its state: type ./.ci/private-dvc-cache"
        yield Finding("fault", "DVC", text)


def _dvc_runs_here() -> bool:
    """Whether a `dvc` of this user works in this checkout, on this machine."""
    found = psutil.process_iter(["cmdline", "cwd"])
    return any(
        process.info["cwd"] == str(Path.cwd())
        and any(Path(word).name == "dvc" for word in (process.info["cmdline"] or [])[:3])
        for process in found
    )


def _dvc_commands() -> set[int]:
    """Processes that hold outputs or dependencies of stages, by DVC; it does not say on which machine."""
    try:
        held = json.loads(RWLOCK.read_text())
        return {entry["pid"] for entry in held["write"].values()} | {
            entry["pid"] for entries in held["read"].values() for entry in entries
        }
    except (FileNotFoundError, ValueError, KeyError):
        return set()


def _site_cache() -> Path:
    from dvc.config import Config
    from dvc.dirs import site_cache_dir

    return Path(site_cache_dir(Config(str(DVC.absolute()))["core"].get("site_cache_dir")))


def _decoder() -> Iterator[Finding]:
    try:
        importlib.import_module("pipeline.data.pixels")
        yield Finding("ok", "pixel library", "built")
    except (ImportError, OSError) as error:
        yield Finding("fault", "pixel library", f"{error}: run `make setup`")


def _processor() -> Iterator[Finding]:
    import torch

    from pipeline import device as ranks

    cores = cluster.cores_here()
    cpu = torch.device("cpu")
    yield Finding("ok", "CPU", f"{cores} cores, bf16 {'faster' if ranks.has_fast_bf16(cpu) else 'no faster'} than fp32")
    if not torch.cuda.is_available():
        driver = (
            "a driver is there, but torch cannot use it: see `nvidia-smi`" if shutil.which("nvidia-smi") else "none"
        )
        yield Finding("note", "GPU", f"{driver}; training runs on the CPU, which is enough for the demo alone")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"GPU {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")


def _cluster() -> Iterator[Finding]:
    path = paths.cluster_profile()
    profile = cluster.load_profile(path)
    yield Finding(
        "ok", "cluster profile", f"{path}: {profile.kind}, {profile.world_size} ranks, {profile.cpus} cores each"
    )
    yield from scheduler_of(profile.kind).check(profile, path)


def _test_job() -> Iterator[Finding]:
    profile = cluster.load_profile(paths.cluster_profile())
    yield from try_job(profile)


def _parameters() -> Iterator[Finding]:
    params = load_params(paths.PARAMS)
    yield Finding("ok", "params.yaml", f"scale {params.scale}, seeds {params.seeds}")
    yield from _disk(params)
    yield from _data(params)
    yield from _survey(params)
    yield from _test_sets(params)
    yield from _split(params)
    yield from _loading(params)
    yield from _released(params)
    yield from _start(params)


def _disk(params: Params) -> Iterator[Finding]:
    needed = plan.disk_bytes_to_come(params)
    free = shutil.disk_usage(".").free
    text = f"{free / 1e9:.0f} GB free, about {needed / 1e9:.1f} GB needed here (.beton, weights, checkpoints)"
    yield Finding("ok" if free > needed else "fault", "disk", text + ("" if free > needed else ": free some space"))


def _data(params: Params) -> Iterator[Finding]:
    for data in DATA_SETS.values():
        section = data.section(params)
        if not section.splits:
            yield Finding("note", data.title, f"not used: {data.name}.splits is empty")
            continue
        if data.is_made_here(params):
            yield Finding("ok", data.title, f"handwritten digits, written to {section.root} by the prepare stage")
            continue
        try:
            load(data.check)(section)
            yield Finding("ok", data.title, section.root)
        except UserError as error:
            tasks = [task for task in TASKS.values() if task.data is data]
            if any(task.variants(params) or task.released_names(params) for task in tasks):
                yield Finding("fault", data.title, str(error))
            else:
                yield Finding("note", data.title, f"{error}; `dvc repro compare_with_paper` does without it")


def _survey(params: Params) -> Iterator[Finding]:
    """What the prepare stages say of the images."""
    for data in DATA_SETS.values():
        section = data.section(params)
        if section.source != "folder" or data.training not in section.splits:
            continue
        try:
            if data.count:
                load(data.count)(params)
            if is_listing_of(Path(section.root), data.training, read_listing(data.name, data.training)):
                for sentence in survey(params, data):
                    yield Finding("note", data.title, sentence)
            elif Path(section.root).is_dir():
                text = f"not listed yet: `dvc repro prepare_{data.name}` lists them, and says what is odd about them"
                yield Finding("note", data.title, text)
        except UserError as error:
            yield Finding("fault", data.title, str(error))


def _test_sets(params: Params) -> Iterator[Finding]:
    for name in params.test_sets.names:
        folder, title = Path(params.test_sets.root) / name, TEST_SETS[name].title
        if not folder.is_dir():
            text = f"{folder} is missing: put the images there, or link them, or take {name} out of test_sets.names"
            yield Finding("fault", title, text)
            continue
        from pipeline.data.folders import class_names

        try:
            classes_of(class_names(folder), name, folder)
            yield Finding("ok", title, str(folder))
        except UserError as error:
            yield Finding("fault", title, str(error))


def _split(params: Params) -> Iterator[Finding]:
    profile = cluster.load_profile(paths.cluster_profile())
    for task in TASKS.values():
        batches = {
            (task.params(params).recipe_for(variant).global_batch_size, task.accumulates(variant)): variant
            for variant in task.variants(params)
        }
        for (batch, accumulates), variant in batches.items():
            try:
                nodes = cluster.usable_nodes(profile, batch, accumulates=accumulates)
            except UserError as error:
                yield Finding("fault", task.section, f"{variant}: {error}")
                continue
            ranks = nodes[-1] * profile.ranks_here
            split = cluster.split(batch, ranks, profile.max_images_per_device, accumulates=accumulates)
            text = f"batch {batch} = {ranks} ranks x {split.accumulation} x {split.micro_batch_size}"
            if isinstance(profile.nodes, str):
                text += f"; can be spread over {', '.join(map(str, nodes))} nodes of {profile.nodes}"
            yield Finding("ok", task.section, text)


def _loading(params: Params) -> Iterator[Finding]:
    """Whether a rank's cores load as fast as its GPU trains, and whether the .beton fits into the node's memory."""
    profile, beton = cluster.load_profile(paths.cluster_profile()), IMAGENET.beton(IMAGENET.training)
    loading = plan.loading(params, profile)
    if loading is None:
        return
    yield Finding("ok" if loading.suffices else "note", "loading", loading.text)
    if profile.memory_gb is not None and (size_gb := beton.stat().st_size / 1e9) > profile.memory_gb:
        yield Finding(
            "note",
            "loading",
            f"{beton} has {size_gb:.3g} GB, and a job {profile.memory_gb:g} of a node's memory: images come from disk "
            "again at each epoch; more memory_gb, local_copy on a fast disk, imagenet.storage: compact, or "
            "classification.recipe.order: quasi_random (docs/speed.md says what that changes)",
        )


def _released(params: Params) -> Iterator[Finding]:
    folder = Path(params.released.folder)
    for task in (task for task in TASKS.values() if task.released_names(params)):
        from pipeline.models.released_weights import find_released

        names = load(task.released)
        found = find_released(folder, names)
        for variant in task.released_names(params):
            there = variant in found
            text = "there" if there else f"not in {folder}: its row will say missing (see released/README.md)"
            yield Finding("ok" if there else "note", names.get(variant, variant), text)


def _start(params: Params) -> Iterator[Finding]:
    """The files that trainings start from."""
    for task in TASKS.values():
        for variant in task.variants(params):
            files = [] if (file := task.start(params, variant)) is None else [file]
            if task.starts_from is not None and task.upstream(params) is None:
                files = [task.backbone(params, variant, seed) for seed in params.seeds]
            for file in files:
                there = file.is_file()
                text = f"{task.training_stage} {variant} starts from {file}"
                yield Finding("ok" if there else "fault", "weights", text + ("" if there else ", which is missing"))


def _betons() -> Iterator[Finding]:
    from pipeline.data.manifest import verify_beton

    for path in sorted(paths.BETON.rglob("*.beton")):
        verify_beton(path)
        yield Finding("ok", str(path), "every sample has the SHA-256 of its manifest")
