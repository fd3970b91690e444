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
@pytest.mark.promise("Contract", "Optax's own tests pass with lionax's functions in their place")
@pytest.mark.parametrize("file", FILES)
def test_optax_s_own_tests_pass(file, tmp_path, figure):
    """The exceptions, with their reasons, are in optax_replaced.py."""
    tests = pathlib.Path(__file__).parent
    paths = os.pathsep.join(map(str, (tests, tests.parent)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(OPTAX / file), "-q", "-p", "optax_replaced", "-p",
         "no:cacheprovider", "-o", "addopts=", "--rootdir", str(tmp_path), "--tb=short",
         "--import-mode=importlib"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed or "skipped" in done.stdout, done.stdout[-500:]
    figure("tests of Optax", int(passed[1]) if passed else 0)
