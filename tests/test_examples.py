"""The examples run as they are, and are short."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= (130 if path.stem == "cluster" else 80)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_without_a_warning(path):
    # Keras 3.15 reads its own variables in a way that NumPy 2.4 deprecates.
    warnings = ["-W", "error", "-W", "ignore:__array__ implementation:DeprecationWarning"]
    result = subprocess.run([sys.executable, *warnings, path], capture_output=True, text=True,
                            check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert result.stdout
