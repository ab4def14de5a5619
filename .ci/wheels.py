"""What a wheelhouse has to hold, by the lock files: for .ci/setup, before anything is installed, and .ci/wheelhouse.

lock HOUSE FILE   check that no wheel is missing; write requirements.lock, with the hashes of what was built for HOUSE
compiled HOUSE    put this project's compiled parts, if they are of this checkout's C sources, into the checkout
seal HOUSE        write the hashes of the wheels built for HOUSE, which no lock file has, to HOUSE/built.lock
digest            what the compiled parts are made from: C sources and compiler flags
about HOUSE       one line on what is in HOUSE
"""

import hashlib
import re
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
INSTALLER, LOCK = ROOT / "requirements-build.lock", ROOT / "requirements.lock"
PROJECT = "metaformer-reproduction"
PYTHON = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
REMEDY = f"`make wheelhouse` of this checkout, with {PYTHON}, makes a whole one (docs/install.md)"


def main(command: str, house: str = ".", file: str = "") -> None:
    if command == "digest":
        print(digest())
        return
    folder = Path(house).absolute()
    if not (packaging := sorted(folder.glob("packaging-*.whl"))):
        sys.exit(f"WHEELHOUSE={folder} holds no wheels of this project's: {REMEDY}")
    sys.path.insert(0, str(packaging[-1]))
    if command == "lock":
        lock = checked_lock(folder)
        Path(file).write_text(lock)
    else:
        {"compiled": compiled, "seal": seal, "about": about}[command](folder)


def requirements(lock: Path) -> list[tuple[str, str, str, set[str]]]:
    """Name, version, line and SHA-256 hashes of each requirement that is one on this system and for this Python."""
    from packaging.requirements import Requirement

    found = []
    for line in lock.read_text().replace("\\\n", "").splitlines():
        if line and not line.lstrip().startswith("#"):
            text, *hashes = line.split("--hash=sha256:")
            marker = Requirement(text).marker
            if marker is None or marker.evaluate():
                name, version = text.split(";")[0].strip().split("==")
                found.append((name, version, text, {word.strip() for word in hashes}))
    return found


def wheels(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """By name and version: the wheels that this Python can use, with this system's glibc."""
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename

    usable, found = frozenset(sys_tags()), {}
    for path in sorted(folder.glob("*.whl")):
        name, version, _, tags = parse_wheel_filename(path.name)
        if tags & usable:
            found.setdefault((str(name), str(version)), []).append(path)
    return found


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checked_lock(folder: Path) -> str:
    """requirements.lock for `folder`. uv compares its hashes; those of the installer are compared here."""
    here = wheels(folder)
    built_lock = folder / "built.lock"
    built = [line.split() for line in built_lock.read_text().splitlines()] if built_lock.exists() else []
    missing, lines = [], []
    for name, version, _, hashes in requirements(INSTALLER):
        if not any(sha256(path) in hashes for path in here.get((name, version), [])):
            missing.append(f"{name}=={version}")
    for name, version, text, hashes in requirements(LOCK):
        if (name, version) not in here:
            missing.append(f"{name}=={version}")
        hashes |= {digest for requirement, digest in built if requirement == f"{name}=={version}"}
        lines.append(f"{text} {' '.join(f'--hash=sha256:{digest}' for digest in sorted(hashes))}\n")
    if missing:
        named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        sys.exit(f"WHEELHOUSE={folder} lacks wheels for {PYTHON} and this system's glibc: {named}. {REMEDY}")
    return "".join(lines)


def seal(folder: Path) -> None:
    known = {digest for lock in (INSTALLER, LOCK) for *_, hashes in requirements(lock) for digest in hashes}
    built = [
        f"{name}=={version} {digest}\n"
        for (name, version), paths in wheels(folder).items()
        for digest in map(sha256, paths)
        if digest not in known and name != PROJECT
    ]
    path = folder / "built.lock"
    others = path.read_text().splitlines(keepends=True) if path.exists() else []  # of other Pythons
    path.write_text("".join(sorted({*others, *built})))


def digest() -> str:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    sources = sorted((ROOT / "pipeline").glob("*/native/*"))
    return hashlib.sha256(repr(settings).encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def compiled(folder: Path) -> None:
    """By renaming: processes may be using older ones."""
    made = [path for (name, _), paths in wheels(folder).items() if name == PROJECT for path in paths]
    if not (fitting := [path for path in made if path.name.split("-")[2] == f"0{digest()}"]):
        sys.exit(f"WHEELHOUSE={folder} lacks the compiled parts of this checkout's C sources for {PYTHON}: {REMEDY}")
    with zipfile.ZipFile(fitting[0]) as archive:
        for name in archive.namelist():
            if re.search(r"\.so(\.[0-9.]+)?$", name):
                making = ROOT / f"{name}.making"
                making.write_bytes(archive.read(name))
                making.replace(ROOT / name)


def about(folder: Path) -> None:
    files = list(folder.glob("*.whl"))
    # The platforms of one wheel are alternatives.
    glibc = [min(map(int, found)) for path in files if (found := re.findall(r"manylinux_2_(\d+)_", path.name))]
    gb = sum(path.stat().st_size for path in files) / 1e9
    print(f"{len(files)} wheels, {gb:.1f} GB, for glibc 2.{max(glibc)} or newer. There: make setup WHEELHOUSE={folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
