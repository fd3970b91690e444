"""The test files that Optax ships, with lionax's functions in place of Optax's."""

import os
import pathlib
import re
import subprocess
import sys

import optax
import pytest

OPTAX = pathlib.Path(optax.__file__).parent
FILES = sorted(path.relative_to(OPTAX).as_posix()
               for folder in ("_src", "transforms", "contrib", "schedules", "tree_utils")
               for path in (OPTAX / folder).glob("*_test.py"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_optax_s_own_tests_pass(file, tmp_path):
    """The exceptions, with their reasons, are in optax_replaced.py."""
    tests = pathlib.Path(__file__).parent
    paths = os.pathsep.join(map(str, (tests, tests.parent)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(OPTAX / file), "-q", "-p", "optax_replaced", "-p",
         "no:cacheprovider", "-o", "addopts=", "--rootdir", str(tmp_path), "--tb=short",
         "--import-mode=importlib"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\d+ (passed|skipped)", done.stdout), done.stdout[-500:]
