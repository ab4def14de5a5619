"""What runs inside a job: one process a rank."""

import contextlib
import errno
import importlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from pipeline import paths
from pipeline.cluster import Profile
from pipeline.errors import UserError

log = logging.getLogger(__name__)


class Worker:
    """The callable that submitit pickles; it names files and holds no state of its own."""

    def __init__(self, run_folder: Path, fingerprint: str) -> None:
        self.run_folder, self.fingerprint = run_folder, fingerprint

    def __call__(self) -> None:
        """Run this rank of the job and, on rank 0, move its outputs into place.

        A UserError ends the process with its line in `error.txt`, for whoever waits for the job.
        """
        import faulthandler

        import submitit

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
        faulthandler.enable()
        environment = submitit.JobEnvironment()
        rank, size = environment.global_rank, environment.num_tasks
        if size > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        with (self.run_folder / "work.json").open() as stream:
            work = json.load(stream)
        profile = Profile.model_validate_json(json.dumps(work["profile"]))
        os.environ.setdefault("OMP_NUM_THREADS", str(profile.cpus))
        # Threads that wait for one another sleep: spinning on a core that another process wants costs up to 10x.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Our FFCV operations call C; without this, importing ffcv alone compiles for seconds.
        os.environ["NUMBA_DISABLE_JIT"] = "1"
        try:
            module, function = work["call"].split(":")
            call = getattr(importlib.import_module(module), function)
            from pipeline import world as ranks

            with ranks.join(rank, size, environment.local_rank, profile.cpus) as world:
                finished = call(world, self.run_folder, profile, **work["arguments"])
        except UserError as error:
            self._give_up(str(error))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._give_up(f"{error}: free some space; `dvc repro` goes on from the last checkpoint")
        if finished and rank == 0:
            with paths.written_atomically(self.run_folder / "done") as temporary:
                temporary.write_text(self.fingerprint)
            shutil.rmtree(self.run_folder / "checkpoints", ignore_errors=True)

    def _give_up(self, message: str) -> NoReturn:
        log.error("%s", message)
        with contextlib.suppress(OSError):
            (self.run_folder / "error.txt").write_text(message)
        raise SystemExit(1) from None
