"""The set-up's quick parts; `make fresh-machine` runs the whole of it in bare systems."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import packaging
import pytest
import yaml
from conftest import ROOT

WHEELS = ROOT / ".ci/wheels.py"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def installer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel of packaging, by which a wheelhouse is read."""
    folder = tmp_path_factory.mktemp("installer")
    source = Path(packaging.__file__).parent
    with zipfile.ZipFile(folder / f"packaging-{packaging.__version__}-py3-none-any.whl", "w") as wheel:
        for path in sorted(source.rglob("*.py")):
            wheel.write(path, path.relative_to(source.parent))
    return folder


@pytest.fixture
def house(installer: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(installer, tmp_path / "house"))


def test_the_packages_are_listed_once_and_named_everywhere() -> None:
    packages = run("make", "--silent", "apt-list").stdout.strip()
    assert "build-essential" in packages
    assert packages in (ROOT / "docs/install.md").read_text()
    assert "make -s apt-list" in (ROOT / ".github/workflows/ci.yml").read_text()
    named = [path for path in (ROOT / ".ci").iterdir() if path.is_file() and "libturbojpeg0-dev" in path.read_text()]
    assert not named


def test_a_plain_user_gets_one_line_to_type(tmp_path: Path) -> None:
    """Of all that is missing: not another one after it was typed."""
    fakes = {"id": "echo 1000", "dpkg-query": "exit 1"}
    for name, script in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"packages": "a-dev b-dev", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = run(".ci/apt-install", **environment)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0].endswith("as root, type: apt-get install -y --no-install-recommends a-dev b-dev")
    assert (
        run(".ci/apt-install", "--optional", packages="a-dev", PATH=f"{tmp_path}:{os.environ['PATH']}").returncode == 0
    )


def test_a_folder_without_wheels_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / ".ci", copy / ".ci")
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-build.lock"):
        shutil.copy(ROOT / name, copy)
    done = run("make", "-C", copy, "setup", f"WHEELHOUSE={tmp_path}", f"PYTHON={sys.executable}")
    assert done.returncode != 0
    assert f"WHEELHOUSE={tmp_path} holds no wheels" in done.stderr
    assert "make wheelhouse" in done.stderr
    assert sorted(path.name for path in copy.iterdir() if path.is_dir()) == [".ci"]


def test_a_folder_that_lacks_wheels_is_refused_by_their_names(house: Path, tmp_path: Path) -> None:
    done = run(sys.executable, WHEELS, "lock", house, tmp_path / "lock")
    assert done.returncode == 1
    assert re.fullmatch(
        r"WHEELHOUSE=\S+ lacks wheels for Python 3\.\d+ .*: packaging==.* and \d+ more\. .*\n", done.stderr
    )
    assert not (tmp_path / "lock").exists()
    assert "pywin32" not in done.stderr  # of another system


def test_compiled_parts_of_other_sources_are_refused(house: Path) -> None:
    tag = f"cp3{sys.version_info[1]}-cp3{sys.version_info[1]}-manylinux_2_17_x86_64"
    (house / f"metaformer_reproduction-0.1.0-00123456789ab-{tag}.whl").write_bytes(b"")
    done = run(sys.executable, WHEELS, "compiled", house)
    assert done.returncode == 1
    assert "lacks the compiled parts of this checkout's C sources" in done.stderr


def test_what_was_built_is_known_by_its_hash(house: Path) -> None:
    """A wheel that no lock file has; of what another Python's call wrote, nothing is lost."""
    (house / "ffcv-1.0.2-py3-none-any.whl").write_bytes(b"built here")
    (house / "built.lock").write_text("ffcv==1.0.2 another\n")
    assert run(sys.executable, WHEELS, "seal", house).returncode == 0
    lines = (house / "built.lock").read_text().splitlines()
    assert "ffcv==1.0.2 another" in lines
    assert sum(line.startswith("ffcv==1.0.2 ") for line in lines) == 2


def test_both_image_files_take_the_same_files_and_run_the_same_script() -> None:
    container, apptainer = (ROOT / "Containerfile").read_text(), (ROOT / "apptainer.def").read_text()
    taken = re.findall(r"^    (\S+) /opt/metaformer/(\S+)$", apptainer, re.M)
    assert all(source == target for source, target in taken)
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert sorted(source for source, _ in taken) == sorted(allowed)
    assert all((ROOT / source).exists() for source in allowed)
    assert re.findall(r"^RUN (.*)$", container, re.M) == re.findall(r"%post\n    (.*)\n", apptainer)
    assert re.search(r"^ENV (\S+)$", container, re.M)[1] in apptainer
    assert re.search(r"debian:\S+", container)[0] in apptainer


def test_the_citation_names_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["preferred-citation"]["doi"]
