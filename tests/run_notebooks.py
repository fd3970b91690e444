"""Runs all or some notebooks and stores outputs: ``python tests/run_notebooks.py [NAME ...]``.

A notebook is a script in the percent format, which is what one edits, and an ``.ipynb`` of the same
name with the script's cells and what they put out.
"""

import asyncio
import os
import pathlib
import re
import sys

import jupytext
import nbclient
import nbformat

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))


def executed(script):
    """The notebook that a script makes in a new kernel."""
    notebook = jupytext.read(script)
    client = nbclient.NotebookClient(notebook, timeout=600, record_timing=False)
    asyncio.run(client.async_execute(env=environment()))
    return stable(notebook)


def environment():
    """A user's environment: this copy of lionax, and none of the flags that the tests set."""
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return own | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def stable(notebook):
    """The same without what differs from run to run and from machine to machine."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict({
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells, 1):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
        for output in cell.get("outputs", []):
            for kind, text in output.get("data", {}).items():
                if kind == "text/plain":  # the address of an object
                    output.data[kind] = re.sub(r" at 0x[0-9a-f]+", "", text)
    return notebook


def joined(outputs):
    """The outputs, in which what was printed in several pieces is one."""
    whole = []
    for output in outputs:
        if whole and output.output_type == "stream" and whole[-1].get("name") == output.name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


if __name__ == "__main__":
    for path in SCRIPTS:
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            nbformat.write(executed(path), path.with_suffix(".ipynb"))
            print(path.with_suffix(".ipynb").relative_to(ROOT))
