"""`python -m benchmarks.gpu`: all that only a GPU can show, in one command of at most nine minutes.

Runs `gpu_checks`, `data_behind_step` and `training_step` one after the other, each in a process of its own, so that one
that fails costs the others nothing. Results go to `benchmarks/results/gpu/`, each row with its date and device. Without
a GPU it runs at toy sizes and compiles nothing: to try it out before a machine is rented.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

LIMIT_S = 540
Parts = dict[str, tuple[int, list[str]]]
"""Module to its share of the limit in per cent, and its arguments. What comes last gets what the others left."""
ON_GPU: Parts = {
    "gpu_checks": (35, []),
    "data_behind_step": (15, ["--batch", "128", "--steps", "20", "--repeats", "1"]),
    "training_step": (100, ["--compiled", "--repeats", "2"]),
}
_TOY = ["--batch", "2", "--image-size", "64", "--repeats", "1"]
ON_CPU: Parts = {
    "gpu_checks": (100, []),
    "data_behind_step": (100, [*_TOY, "--steps", "3"]),
    "training_step": (100, [*_TOY, "--variants", "poolformer_s12", "--precisions", "bf16", "fp32"]),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; returns 1 if one failed or was cut off, or a check did not pass."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--limit-s", type=int, default=LIMIT_S, help="of all (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # as a job's worker has it
    end, failed = time.monotonic() + options.limit_s, []
    for module, (share, own) in (ON_GPU if torch.cuda.is_available() else ON_CPU).items():
        left = end - time.monotonic()
        limit = min(left, options.limit_s * share / 100)
        command = [sys.executable, "-m", f"benchmarks.{module}", *own, "--output", str(options.output)]
        if module == "training_step":  # each variant's rows are written when it is done
            command += ["--limit-s", str(limit * 2 / 3)]
        print(f"== {module}, at most {limit:.0f} s", flush=True)
        try:
            if code := subprocess.run(command, timeout=max(limit, 0), env=environment).returncode:
                failed.append(f"{module}: exit code {code}")
        except subprocess.TimeoutExpired:
            failed.append(f"{module}: cut off")
    print("; ".join(failed) or f"all done, results in {options.output}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
