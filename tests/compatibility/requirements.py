"""The versions of the direct dependencies: the lowest that pyproject.toml allows, and the lock in constraints.txt.

python -m tests.compatibility.requirements lowest > FILE     # pins every direct dependency to its lowest version
python -m tests.compatibility.requirements lock [--torch V]  # writes constraints.txt from the newest versions
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "constraints.txt"
HEADER = "# What `make setup` installs on a fresh machine, as `make lock` writes it; it binds no user of the package.\n"


def direct_requirements(extra: str) -> dict[str, Requirement]:
    """Return the requirements of pyproject.toml with one extra, by canonical name.

    An extra that names other extras of the project (`optimum-mla[train,eval]`) stands for their requirements.

    Args:
        extra: A name under `[project.optional-dependencies]`, such as `dev` or `test`.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, Requirement] = {}
    waiting = [*project["dependencies"], *project["optional-dependencies"][extra]]
    for text in waiting:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            waiting += [line for name in requirement.extras for line in project["optional-dependencies"][name]]
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def lowest(requirement: Requirement) -> str:
    """Return the pin to the lowest version that a requirement allows, such as `torch==2.9` for `torch>=2.9`.

    Raises:
        ValueError: The requirement has no lower bound, or more than one.
    """
    bounds = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(
            f"{requirement}: got {len(bounds)} lower bounds, allowed: one `>=`. Give it one in pyproject.toml."
        )
    return f"{requirement.name}=={bounds[0]}"


def read_lock() -> dict[str, Version]:
    """Return the versions that constraints.txt pins, by canonical name."""
    pins = [Requirement(line) for line in LOCK.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version) for pin in pins}


def resolve(torch: str) -> dict[str, Version]:
    """Return the newest versions of all packages that pip finds together for the extra `dev`, by canonical name.

    Args:
        torch: The version of torch, which stays because other versions may be gigabytes of CUDA libraries.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, f"torch=={torch}", f"{ROOT}[dev]"], check=True
        )
        packages = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return {canonicalize_name(package["name"]): Version(package["version"]) for package in packages}


def write_lock(versions: dict[str, Version]) -> None:
    """Write constraints.txt with the version of every direct dependency, without the label of a local build."""
    pins = [f"{name}=={versions[name].public}\n" for name in sorted(direct_requirements("dev"))]
    LOCK.write_text(HEADER + "".join(pins), encoding="utf-8")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["lowest", "lock"])
    parser.add_argument("--torch", default="", help="version of torch in the lock; default: the one in constraints.txt")
    arguments = parser.parse_args()
    if arguments.what == "lowest":
        print("\n".join(lowest(requirement) for requirement in direct_requirements("test").values()))
    else:
        write_lock(resolve(arguments.torch or str(read_lock()["torch"])))


if __name__ == "__main__":
    main()
