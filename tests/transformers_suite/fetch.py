"""Fetch the tests that the source distribution of the installed Transformers carries.

Run `python -m tests.transformers_suite.fetch` (or `make transformers-tests`). The files are another project's: they are
kept in an ignored folder of this checkout, one folder a version, and are never committed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import transformers

VERSION: str = transformers.__version__
CACHE = Path(__file__).parents[2] / ".cache" / "transformers-tests" / VERSION
TESTS = CACHE / "tests"
"""The folder that holds `test_modeling_common.py` and the files beside it."""
MISSING = (
    f"The tests of Transformers {VERSION} are not here: run `make transformers-tests` where pip reaches its index."
)


def fetched() -> bool:
    """Return whether the tests of the installed version are in the cache."""
    return (TESTS / "test_modeling_common.py").is_file()


def unpack(archive: Path, target: Path) -> list[str]:
    """Write the `tests/test_*.py` files of a source distribution into `target`.

    The folder appears complete or not at all: files are written beside it and renamed into place.

    Returns:
        The names of the files, sorted.

    Raises:
        ValueError: The archive holds no such file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as source, tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        names = []
        for member in source.getmembers():
            parts = PurePosixPath(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and parts[2].startswith("test_") and member.isfile():
                content = source.extractfile(member)
                if content is not None:
                    (Path(temporary) / parts[2]).write_bytes(content.read())
                    names.append(parts[2])
        if not names:
            raise ValueError(f"{archive.name}: holds no tests/test_*.py, expected those of Transformers {VERSION}")
        # Some of the tests look for the file that makes their folder a package, which the distribution leaves out.
        (Path(temporary) / "__init__.py").touch()
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(temporary, target)
    return sorted(names)


def fetch() -> None:
    """Download the installed version's source distribution and unpack its tests, unless they are here already.

    Raises:
        subprocess.CalledProcessError: pip could not download it.
    """
    if fetched():
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--dest", folder, f"transformers=={VERSION}"], check=True)
        (archive,) = Path(folder).glob("transformers-*.tar.gz")
        unpack(archive, TESTS)


if __name__ == "__main__":
    try:
        fetch()
    except subprocess.CalledProcessError as error:
        # Tests of this project go on without them, and say so.
        print(f"transformers-tests: pip ended with code {error.returncode}. {MISSING}", file=sys.stderr)
