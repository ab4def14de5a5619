"""The command line: `python -m pipeline <stage> [variant] [seed]`, and the commands below.

Heavy imports (torch, MLflow, DVC, Hydra) happen inside the commands: `--help` and a wrong word take half a second.
"""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from pipeline import paths
from pipeline.catalogue import DATA_SETS, RELEASED_STAGES, TASKS, find_task
from pipeline.config import Params, check_variant, load_params
from pipeline.errors import UserError

Options = argparse.Namespace
RUN_STAGES = [stage for task in TASKS.values() for stage in (task.training_stage, task.evaluation_stage)]
"""Those with a run folder for each variant and seed."""
OTHER_RUNS = ("drive", *RELEASED_STAGES, "evaluate_test_set", "evaluate_released_test_set", "doctor")
"""Others that run jobs."""


def _code(_: Options) -> int:
    from pipeline.stages import code

    code.run()  # needs no parameters
    return 0


def _prepare(options: Options, data: str) -> int:
    from pipeline.stages import prepare

    prepare.run(load_params(paths.PARAMS), DATA_SETS[data])
    return 0


def _convert(options: Options, data: str) -> int:
    from pipeline.stages import convert

    convert.run(load_params(paths.PARAMS), DATA_SETS[data])
    return 0


def _train(options: Options, task: str) -> int:
    from pipeline.stages import train

    params = load_params(paths.PARAMS)
    train.run(params, TASKS[task], TASKS[task].check(params, options.variant), options.seed)
    return 0


def _evaluate(options: Options, task: str) -> int:
    from pipeline.stages import evaluate

    params = load_params(paths.PARAMS)
    evaluate.run(params, TASKS[task], TASKS[task].check(params, options.variant), options.seed)
    return 0


def _evaluate_released(options: Options, stage: str) -> int:
    from pipeline.stages import evaluate_released

    params = load_params(paths.PARAMS)
    evaluate_released.run(params, stage, RELEASED_STAGES[stage][0].check(params, options.variant))
    return 0


def _convert_test_set(options: Options) -> int:
    from pipeline.stages import convert_test_set

    convert_test_set.run(load_params(paths.PARAMS), options.name)
    return 0


def _evaluate_test_set(options: Options) -> int:
    from pipeline.stages import evaluate_test_set

    evaluate_test_set.run(load_params(paths.PARAMS), options.name, check_variant(options.variant), options.seed)
    return 0


def _evaluate_released_test_set(options: Options) -> int:
    from pipeline.stages import evaluate_released_test_set

    evaluate_released_test_set.run(load_params(paths.PARAMS), options.name, check_variant(options.variant))
    return 0


def _of_all(_: Options, stage: str) -> int:
    import_module(f"pipeline.stages.{stage}").run(load_params(paths.PARAMS))
    return 0


STAGES: dict[str, tuple[Callable[[Options], int], tuple[str, ...]]] = {
    "code": (_code, ()),
    **{f"prepare_{name}": (partial(_prepare, data=name), ()) for name in DATA_SETS},
    **{f"convert_{name}": (partial(_convert, data=name), ()) for name in DATA_SETS},
    "prepare_weights": (partial(_of_all, stage="prepare_weights"), ()),
    **{task.training_stage: (partial(_train, task=name), ("variant", "seed")) for name, task in TASKS.items()},
    **{task.evaluation_stage: (partial(_evaluate, task=name), ("variant", "seed")) for name, task in TASKS.items()},
    **{stage: (partial(_evaluate_released, stage=stage), ("variant",)) for stage in RELEASED_STAGES},
    "convert_test_set": (_convert_test_set, ("name",)),
    "evaluate_test_set": (_evaluate_test_set, ("name", "variant", "seed")),
    "evaluate_released_test_set": (_evaluate_released_test_set, ("name", "variant")),
    "compare_with_paper": (partial(_of_all, stage="compare_with_paper"), ()),
}
"""What each stage of dvc.yaml runs, and its arguments."""


def _compose(options: Options) -> int:
    from pipeline.experiments import compose

    compose(options.overrides)
    return 0


def _plan(options: Options) -> int:
    from rich.console import Console

    from pipeline import plan

    plan.show(Console(width=max(110, Console().width)), options.price)
    return 0


def _doctor(options: Options) -> int:
    if options.profile is not None:
        from pipeline.launch import first_profile

        print(first_profile.write(options.profile))
        return 0
    from pipeline.doctor import examine

    return examine(verify=options.verify, test_job=options.test_job)


def _submit(options: Options) -> int:
    from pipeline.cluster import load_profile
    from pipeline.launch.ahead import queue_stale

    works, left = queue_stale(load_params(paths.PARAMS), load_profile(paths.cluster_profile()), options.targets)
    if not works and not left:
        print("nothing to queue: no training is stale, or its data is still to be converted (`dvc status`)")
    for work in works:
        print(f"queued: {work.stage} {work.name}")
    for label, reason in left.items():
        print(f"not queued: {label.replace('/', ' ')}: {reason}")
    return 1 if left else 0


def _drive(options: Options) -> int:
    from pipeline.cluster import load_profile
    from pipeline.launch import drive

    load_params(paths.PARAMS)  # an error in them is better known now
    print(drive.submit(load_profile(paths.cluster_profile()), options.targets))
    return 0


def _jobs(_: Options) -> int:
    from pipeline.launch.jobs import show_jobs

    show_jobs()
    return 0


def _cancel(options: Options) -> int:
    from pipeline.launch import drive
    from pipeline.launch.submission import cancel

    if options.stage == drive.STAGE:
        print(f"ended job {drive.cancel()}; the jobs of trainings continue")
        return 0
    for name in options.name:
        print(f"ended job {cancel(options.stage, name)} of {name}; `dvc repro` goes on from its last checkpoint")
    return 0


def _variant_and_seed(params: Params, stage: str, words: list[str]) -> tuple[str, int]:
    variant, _, seed = "-".join(words).rpartition("-")
    if not seed.isdigit():
        raise UserError(f"{' '.join(words)} is no variant and seed, as poolformer_s12 0")
    return find_task(stage.partition("_")[2]).check(params, variant), int(seed)


def _why(options: Options) -> int:
    from pipeline import upkeep

    params = load_params(paths.PARAMS)
    print(upkeep.why(params, options.stage, *_variant_and_seed(params, options.stage, options.name)))
    return 0


def _adopt(options: Options) -> int:
    from pipeline import upkeep

    params = load_params(paths.PARAMS)
    run = _variant_and_seed(params, options.stage, options.name)
    print(upkeep.adopt(params, options.stage, *run, options.because))
    return 0


def _clean(options: Options) -> int:
    from pipeline import upkeep

    return upkeep.clean(yes=options.yes)


def _reference(options: Options) -> int:
    from pipeline.tracking import reference
    from pipeline.train import history

    params, task = load_params(paths.PARAMS), find_task("classifier")
    folders = reference.add(params, task, check_variant(options.variant), options.name, options.files)
    for folder in folders:
        print(f"{folder}: {len(history.read(folder / 'history.jsonl'))} epochs")
    return 0


def _sync(_: Options) -> int:
    from pipeline.tracking.server import Server
    from pipeline.tracking.sync import sync

    left = sync(Server())
    print(f"{left} run folders are not in MLflow yet" if left else "MLflow has everything in runs/")
    return 1 if left else 0


def _views(options: Options) -> int:
    from pipeline.tracking.comparison import views

    for name, path in views().items():
        print(f"{name}: {options.dashboard}/#{path}")
    return 0


def _show(_: Options) -> int:
    from rich.console import Console

    from pipeline.report import print_tables

    print_tables(paths.REPORTS, Console())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Reproduce 'MetaFormer Is Actually What You Need for Vision'; `dvc repro` runs the stages.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, run: Callable[[Options], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        return command

    for stage, (run, arguments) in STAGES.items():
        command = add(stage, run, "a stage of dvc.yaml")
        for argument in arguments:
            command.add_argument(argument, type=int if argument == "seed" else str)
    compose = add("compose", _compose, "write params.yaml from experiments/")
    compose.add_argument("overrides", nargs="*", help="Hydra overrides, as scale=paper or seeds=[0,1,2]")
    plan = add("plan", _plan, "GPU-hours, disk and end time of every stage, before anything runs")
    plan.add_argument("--price", type=float, help="of one GPU-hour, in any currency: adds the cost")
    doctor = add("doctor", _doctor, "what is there, what is missing, what to do")
    doctor.add_argument("--verify", action="store_true", help="check each sample of each .beton against its manifest")
    doctor.add_argument("--test-job", action="store_true", help="submit a job of a minute that tries the cluster")
    doctor.add_argument(
        "--profile", type=Path, metavar="FILE", help="write a first cluster profile, as slurm/mine.yaml"
    )
    submit = add("submit", _submit, "queue all trainings that are stale, and leave; `dvc repro` collects them")
    submit.add_argument("targets", nargs="*", help="as for `dvc repro`: only what these need")
    drive = add("drive", _drive, "run `dvc repro` as a one-core job that puts itself back until the graph ends")
    drive.add_argument("targets", nargs="*", help="as for `dvc repro`")
    add("jobs", _jobs, "the jobs that wait or run: state, node, progress, time left")
    cancel = add("cancel", _cancel, "end the jobs of one or more runs; their checkpoints stay")
    why = add("why", _why, "what differs between a run and the one that would be made now")
    adopt = add("adopt", _adopt, "state that a run is the result of what is here now, too")
    cancel.add_argument("stage", choices=[*RUN_STAGES, *OTHER_RUNS])
    cancel.add_argument("name", nargs="+", help="as poolformer_s12-0; the folder's in runs/")
    for command in (why, adopt):
        command.add_argument("stage", choices=RUN_STAGES)
    for command in (why, adopt):
        command.add_argument("name", nargs="+", metavar="variant seed", help="as poolformer_s12 0, or poolformer_s12-0")
    adopt.add_argument("--because", required=True, help="why the result is the same; the report says so")
    clean = add("clean", _clean, "list runs put aside and unused copies of code, ask, delete")
    clean.add_argument("--yes", action="store_true", help="do not ask")
    references = add("reference", _reference, "keep curves of other trainings, to hold running ones against")
    actions = references.add_subparsers(dest="action", required=True, metavar="add")
    adding = actions.add_parser("add", help="read timm's logs or summary.csv, or run folders: one for each seed")
    adding.add_argument("variant", help="as poolformer_s12")
    adding.add_argument("files", nargs="+", type=Path)
    adding.add_argument("--name", default="reference", help="whose they are, as authors")
    add("sync", _sync, "send MLflow what it lacks of runs/")
    views = add("views", _views, "addresses of the tables in MLflow's dashboard")
    views.add_argument("dashboard", help="as http://127.0.0.1:5000")
    add("show", _show, "print the tables of reports/")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. An error of the user's is one line without a traceback."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        return int(options.run(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'disk'}: {error.strerror}: free some space and start again", file=sys.stderr)
    return 1


if __name__ == "__main__":
    os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # as in a job: our FFCV operations call C; compiling takes seconds
    sys.exit(main())
