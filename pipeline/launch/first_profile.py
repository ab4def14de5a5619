"""`python -m pipeline doctor --profile FILE`: a first cluster profile, from what sinfo and sacctmgr say."""

import getpass
import math
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster import load_profile
from pipeline.errors import UserError
from pipeline.launch.slurm_status import UnreachableError, ask

CPUS_PER_GPU, DAY_MIN = 16, 1440
"""More cores per GPU are not needed (docs/speed.md); a day is long enough for a job that requeues itself."""
MEMORY_SHARE = 0.9
"""Of a node's memory; the rest is the system's."""
USABLE = "idle,mixed,allocated,completing"


@dataclass(frozen=True)
class Nodes:
    """Equal nodes of one partition."""

    partition: str
    is_default: bool
    limit_min: float
    cores: int
    memory_mb: int
    gpus: int
    gpu_type: str | None


def write(path: Path) -> str:
    """Write a profile for this cluster, one node per job, to `path`; a sentence for the user.

    Raises:
        UserError: there is a file, Slurm does not answer, or no node is up.
    """
    if path.exists():
        raise UserError(f"{path} is there already: name another file, or delete it")
    try:
        lines = ask(["sinfo", "--noheader", "--Node", f"--states={USABLE}", "--format=%P|%l|%c|%m|%G"], {}).splitlines()
        accounts = _accounts()
    except UnreachableError as error:
        raise UserError(f"Slurm does not answer: {error}") from None
    nodes = Counter(parse_node(line) for line in lines)
    if not nodes:
        raise UserError("sinfo lists no node that is up: `sinfo -N -l` says why")
    text = profile_text(nodes, accounts)
    path.write_text(text)
    load_profile(path)
    return f"wrote {path}; check it, then: export PIPELINE_CLUSTER={shlex.quote(str(path))}; python -m pipeline doctor"


def _accounts() -> list[str]:
    """`account|qos` of this user, the default account first; empty without accounting."""
    user = getpass.getuser()
    command = ["sacctmgr", "--noheader", "--parsable2", "show"]
    try:
        default = ask([*command, "user", user, "format=DefaultAccount"], {}).split()
        found = ask([*command, "association", f"user={user}", "format=Account,QOS"], {}).split()
    except (UnreachableError, UserError):
        return []
    return sorted(dict.fromkeys(found), key=lambda line: line.split("|")[0] not in default)


def parse_node(line: str) -> Nodes:
    """A line of sinfo's `%P|%l|%c|%m|%G`."""
    partition, limit, cores, memory, gres = line.split("|")
    types = {name for name, _ in gpus(gres) if name}
    return Nodes(
        partition.rstrip("*"),
        partition.endswith("*"),
        minutes(limit),
        int(cores.rstrip("+")),
        int(memory.rstrip("+")),
        sum(number for _, number in gpus(gres)),
        types.pop() if len(types) == 1 else None,
    )


def gpus(gres: str) -> list[tuple[str, int]]:
    """Type, empty where it has none, and number of the GPUs in a gres string such as `gpu:a100:8(S:0-1),ssd:1`."""
    return [(name, int(number)) for name, number in re.findall(r"gpu(?::([^:,()]+))?:(\d+)", gres)]


def minutes(limit: str) -> float:
    """Slurm's `days-hours:minutes:seconds` in minutes; infinity for no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if match is None:
        return math.inf
    days, hours, full_minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + full_minutes + seconds / 60


def profile_text(nodes: Counter[Nodes], accounts: list[str]) -> str:
    """The YAML, with the choices that were left as comments.

    Of all kinds of nodes it takes the one with most GPUs in all; without GPUs the largest of the default partition.
    """

    def worth(kind: Nodes) -> tuple[float, ...]:
        return (kind.gpus * nodes[kind], kind.gpus, kind.is_default, kind.cores * nodes[kind], kind.limit_min)

    chosen = max(nodes, key=worth)
    ranks = max(1, chosen.gpus)
    others = dict.fromkeys(kind.partition for kind in sorted(nodes, key=worth, reverse=True))
    values: list[tuple[str, object, str]] = [
        ("kind", "slurm", ""),
        ("partition", chosen.partition, f"of {', '.join(others)}"),
        ("nodes", 1, f"per job; {nodes[chosen]} of this kind are up"),
        ("gpus_per_node", chosen.gpus, ""),
    ]
    if chosen.gpu_type is not None and len({kind.gpu_type for kind in nodes if kind.gpus}) > 1:
        values.append(("gpu_type", chosen.gpu_type, "jobs on GPUs of different types are refused"))
    cpus = max(1, min(chosen.cores // ranks, CPUS_PER_GPU) if chosen.gpus else chosen.cores)
    values += [
        ("cpus_per_task", cpus, f"per rank; a node has {chosen.cores}"),
        ("memory_gb", max(1, int(chosen.memory_mb * MEMORY_SHARE / 1024)), f"per node, of {chosen.memory_mb} MB"),
        ("time_min", int(min(chosen.limit_min, DAY_MIN)), "a job that has not ended then puts itself back"),
    ]
    if accounts:
        account, _, qos = accounts[0].partition("|")
        values.append(("account", account, f"of {', '.join(dict.fromkeys(a.split('|')[0] for a in accounts))}"))
        if qos:
            values.append(("# qos", qos.split(",")[0], f"of {qos}; without it your default"))
    lines = ["# Written by `python -m pipeline doctor --profile`; slurm/README.md explains each line."]
    lines += [f"{f'{name}: {value}':<32}{f'# {remark}' if remark else ''}".rstrip() for name, value, remark in values]
    return "\n".join(lines) + "\n"
