"""What a user gets from the wheel, built here and unpacked beside nothing else."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def sources(folder: Path) -> set[str]:
    """The files under a folder that belong in a wheel, relative to it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix() for path in files if "__pycache__" not in path.parts
    }


def run(*command: str, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command of this Python with ``site`` first on its path."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder that holds the unpacked wheel."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("lora_jax", "train"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-c", BUILD, wheels], cwd=copy, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


@pytest.mark.parametrize(
    ("package", "folder"), [("lora_jax", "lora_jax"), ("lora_jax_train", "train")]
)
def test_wheel_holds_every_file(site, package, folder):
    assert sources(site / package) == sources(ROOT / folder)


def test_wheel_takes_no_name_but_ours(site):
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"lora_jax", "lora_jax_train"}


def test_installed_application_runs_outside_a_checkout(site, tmp_path):
    program = "import sys, lora_jax.cli; sys.exit(lora_jax.cli.main(['train', '--help']))"
    done = run("-c", program, site=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "CONFIG" in done.stdout.upper()


def test_no_module_named_train_outside_a_checkout(site, tmp_path):
    done = run("-c", "import train", site=site, cwd=tmp_path)
    assert "No module named 'train'" in done.stderr


def test_command_is_declared(site):
    (entries,) = site.glob("*.dist-info/entry_points.txt")
    assert "lora-jax = lora_jax.cli:main" in entries.read_text()


def test_lower_bounds_are_the_versions_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["train"], *extras["gguf"], *extras["scores"]]
    pinned = dict(
        re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(), re.M)
    )
    bounds = dict(requirement.split(">=") for requirement in requirements)
    assert bounds.items() <= pinned.items()
