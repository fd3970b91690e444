"""The notebooks: pairs of a script and its outputs, which run from a new kernel."""

import importlib.metadata
import importlib.util
import json
import re
import time
import tomllib
import types

import IPython
import jax
import jupytext
import nbformat
import pytest
from run_notebooks import ROOT, SCRIPTS, executed

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
SECONDS = 120 * 3  # two minutes on 2 cores; CI's may be slower, and the tests share them
WARNING = re.compile(r"Warning\b|WARNING|Traceback|^[WE]\d{4} ", re.M)
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
every_notebook = pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)


def contents(notebook):
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def stored(path):
    return nbformat.read(path.with_suffix(".ipynb"), as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def code(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def printed(output):
    """The text of an output, without pictures."""
    texts = [output.get("text", ""), *(text for kind, text in output.get("data", {}).items()
                                       if kind.startswith("text/"))]
    return "\n".join(texts)


def check_outputs(notebook):
    """No error, nothing on stderr, and no warning that was printed."""
    for output in outputs(notebook):
        assert output.output_type != "error", output.evalue
        assert output.get("name") != "stderr", output.text
        assert not WARNING.search(printed(output)), printed(output)


def test_each_notebook_has_a_script():
    folder = ROOT / "notebooks"
    assert SCRIPTS
    assert {path.stem for path in SCRIPTS} == {path.stem for path in folder.glob("*.ipynb")}


@each_script
def test_script_and_notebook_have_the_same_cells(script):
    assert contents(jupytext.read(script)) == contents(stored(script))
    formats = stored(script).metadata["jupytext"]["formats"]
    assert formats == jupytext.read(script).metadata["jupytext"]["formats"] == "ipynb,py:percent"


@every_notebook
def test_the_stored_outputs_are_of_one_run_without_warnings(path):
    notebook = stored(path)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    check_outputs(notebook)
    assert path.stat().st_size < 400_000


@every_notebook
def test_nothing_of_a_machine_is_stored(path):
    notebook = stored(path)
    assert set(notebook.metadata) == {"jupytext", "kernelspec", "language_info"}
    assert set(notebook.metadata["language_info"]) == {"name"}
    assert all(not cell.metadata for cell in notebook.cells)
    for text in [*(cell.source for cell in notebook.cells), *map(printed, outputs(notebook))]:
        assert not re.search(r"(?<![\w.:/])/(root|home|tmp|work|usr|Users|content)/", text), text
        assert not re.search(r" at 0x[0-9a-f]{6,}", text), text


@every_notebook
def test_addresses_are_of_the_repository(path):
    text = "\n".join(cell.source for cell in stored(path).cells)
    badge = f"{REPOSITORY.replace('https://github.com', 'github')}/blob/main/notebooks/{path.name}"
    assert f"(https://colab.research.google.com/{badge})" in stored(path).cells[0].source
    assert f'"lionax @ git+{REPOSITORY}"' in text
    for address in re.findall(r"https://github\.com/[^)\"\s]+", text):
        assert address.startswith(REPOSITORY), address
    for file in re.findall(rf"{REPOSITORY}/blob/main/([^)#\s]+)", text):
        assert (ROOT / file).exists(), file


def test_all_begin_with_the_same_cell():
    assert len({code(stored(path))[0] for path in SCRIPTS}) == 1


def test_that_cell_asks_for_what_the_project_requires():
    text = code(stored(SCRIPTS[0]))[0]
    needed = json.loads(re.search(r"NEEDED = ({.*?})", text, re.S)[1])
    required = {*PROJECT["dependencies"]}.union(*PROJECT["optional-dependencies"].values())
    assert {f"{name}>={least}" for name, least in needed.items()} <= required


@pytest.fixture
def installed(monkeypatch):
    """Runs the first cell; the commands that it gave to IPython. Versions are as in Colab."""
    commands, versions = [], {}
    shell = types.SimpleNamespace(run_line_magic=lambda *command: commands.append(command))
    known = importlib.metadata.version
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    monkeypatch.setattr(importlib.metadata, "version",
                        lambda name: versions.get(name) or known(name))

    def run(lionax_is_there=True, **old):
        versions.update(old)
        if not lionax_is_there:
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        exec(code(stored(SCRIPTS[0]))[0], {})
        return commands

    return run


def test_that_cell_installs_nothing_where_all_is_there(installed):
    assert installed() == []


def test_that_cell_installs_what_is_missing_or_too_old(installed):
    ((magic, arguments),) = installed(lionax_is_there=False, jax="0.7.2")
    assert magic == "pip"
    assert arguments == f'install -q "jax>=0.10.2" "lionax @ git+{REPOSITORY}"'


def test_that_cell_asks_for_a_restart_if_what_is_loaded_is_too_old(installed, monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.7.2")
    with pytest.raises(RuntimeError, match=r"jax 0\.7\.2 is loaded, 0\.10\.2 is needed\. Choose "
                                           r"Runtime > Restart session"):
        installed()


@pytest.mark.slow
@each_script
def test_it_runs_from_a_new_kernel(script):
    start = time.monotonic()
    check_outputs(executed(script))
    assert time.monotonic() - start < SECONDS
