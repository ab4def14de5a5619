"""The command line: `python -m pipeline <stage> [variant] [seed]`, and compose, plan, doctor, cancel, sync, show.

Heavy imports happen inside the commands, so that `--help` and a wrong word answer at once.
"""

import argparse
import errno
import importlib
import logging
import os
import sys

STAGES = {
    "code": (),
    "prepare_imagenet": (),
    "prepare_ade20k": (),
    "convert_imagenet": (),
    "convert_ade20k": (),
    "train_classifier": ("variant", "seed"),
    "evaluate_classifier": ("variant", "seed"),
    "train_segmenter": ("variant", "seed"),
    "evaluate_segmenter": ("variant", "seed"),
    "evaluate_released": ("variant",),
    "compare_with_paper": (),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Reproduce 'MetaFormer Is Actually What You Need for Vision'; `dvc repro` runs the stages.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for stage, arguments in STAGES.items():
        command = commands.add_parser(stage, help="a stage of dvc.yaml")
        for argument in arguments:
            command.add_argument(argument, type=int if argument == "seed" else str)
    compose = commands.add_parser("compose", help="write params.yaml from experiments/")
    compose.add_argument("overrides", nargs="*", help="Hydra overrides, as scale=paper or seeds=[0,1,2]")
    plan = commands.add_parser("plan", help="GPU-hours, disk and end time of every stage, before anything runs")
    plan.add_argument("--price", type=float, help="of one GPU-hour, in any currency: adds the cost")
    doctor = commands.add_parser("doctor", help="what is there, what is missing, what to do")
    doctor.add_argument("--verify", action="store_true", help="check each sample of each .beton against its manifest")
    doctor.add_argument("--test-job", action="store_true", help="submit a job of a minute that tries the cluster")
    commands.add_parser("jobs", help="the jobs that wait or run: state, node, progress, time left")
    cancel = commands.add_parser("cancel", help="end the jobs of one or more runs; their checkpoints stay")
    cancel.add_argument("stage", choices=[stage for stage, arguments in STAGES.items() if "seed" in arguments])
    cancel.add_argument("name", nargs="+", help="as poolformer_s12-0")
    for word, text in (
        ("why", "what differs between a run and the one that would be made now"),
        ("adopt", "state that a run is the result of what is here now, too"),
    ):
        command = commands.add_parser(word, help=text)
        command.add_argument("stage", choices=[stage for stage, arguments in STAGES.items() if "seed" in arguments])
        command.add_argument("name", nargs="+", metavar="variant seed", help="as poolformer_s12 0, or poolformer_s12-0")
        if word == "adopt":
            command.add_argument("--because", required=True, help="why the result is the same; the report says so")
    clean = commands.add_parser("clean", help="list runs put aside and unused copies of code, ask, delete")
    clean.add_argument("--yes", action="store_true", help="do not ask")
    commands.add_parser("sync", help="send MLflow what it lacks of runs/")
    views = commands.add_parser("views", help="addresses of the tables in MLflow's dashboard")
    views.add_argument("dashboard", help="as http://127.0.0.1:5000")
    commands.add_parser("show", help="print the tables of reports/")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. An error of the user's is one line without a traceback."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # as in a job: our FFCV operations call C; compiling takes seconds
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    from pipeline.errors import UserError

    try:
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'disk'}: {error.strerror}: free some space and start again", file=sys.stderr)
    return 1


def _run(options: argparse.Namespace) -> int:
    from pipeline import paths

    if options.command == "compose":
        from pipeline.experiments import compose

        compose(options.overrides)
        return 0
    if options.command == "plan":
        from rich.console import Console

        from pipeline import plan

        plan.show(Console(width=max(110, Console().width)), options.price)
        return 0
    if options.command == "doctor":
        from pipeline.doctor import examine

        return examine(verify=options.verify, test_job=options.test_job)
    if options.command == "jobs":
        from pipeline.launch.jobs import show_jobs

        show_jobs()
        return 0
    if options.command == "cancel":
        from pipeline.launch.submission import cancel

        for name in options.name:
            print(f"ended job {cancel(options.stage, name)} of {name}; `dvc repro` goes on from its last checkpoint")
        return 0
    if options.command in ("why", "adopt", "clean"):
        return _keep_up(options)
    if options.command == "sync":
        from pipeline.stages._sync import sync
        from pipeline.tracking.server import Server

        left = sync(Server())
        print(f"{left} run folders are not in MLflow yet" if left else "MLflow has everything in runs/")
        return 1 if left else 0
    if options.command == "views":
        from pipeline.tracking.comparison import views

        for name, path in views().items():
            print(f"{name}: {options.dashboard}/#{path}")
        return 0
    if options.command == "show":
        from rich.console import Console

        from pipeline.report import print_tables

        print_tables(paths.REPORTS, Console())
        return 0

    if options.command == "code":  # needs no parameters
        from pipeline.stages import code

        code.run()
        return 0
    from pipeline.config import check_variant, load_params

    if "variant" in options:
        check_variant(options.variant)
    params = load_params(paths.PARAMS)
    stage = importlib.import_module(f"pipeline.stages.{options.command}")
    stage.run(params, *(getattr(options, name) for name in STAGES[options.command]))
    return 0


def _keep_up(options: argparse.Namespace) -> int:
    from pipeline import paths, upkeep
    from pipeline.config import check_variant, load_params
    from pipeline.errors import UserError

    if options.command == "clean":
        return upkeep.clean(yes=options.yes)
    variant, _, seed = "-".join(options.name).rpartition("-")
    if not seed.isdigit():
        raise UserError(f"{' '.join(options.name)} is no variant and seed, as poolformer_s12 0")
    run = (load_params(paths.PARAMS), options.stage, check_variant(variant), int(seed))
    print(upkeep.why(*run) if options.command == "why" else upkeep.adopt(*run, options.because))
    return 0


if __name__ == "__main__":
    sys.exit(main())
