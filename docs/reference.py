"""Sphinx extension: the API reference out of lionax's docstrings.

``.. public:: MODULE ...`` documents what these modules export under a public name. An equation, in
a docstring an indented block of Unicode, becomes a block of its own, with indices set as such. A
public name in the text of a page becomes a link to its entry.
"""

import html
import importlib
import inspect
import itertools
import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

import lionax
from lionax.core import hyperparameters

__all__ = ["setup"]

SCALAR = " ".join(ModuleAnalyzer.for_module(hyperparameters.__name__).find_attr_docs()[
    "", "Scalar"]).strip()
CODE = re.compile(r"\s*(from|import|class|def|@)\b")


class Public(SphinxDirective):
    """Documents the public names that modules define, in the order of their ``__all__``."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        lines = []
        for module in map(importlib.import_module, self.arguments[0].split()):
            for home, name in itertools.product((lionax, lionax.compat), module.__all__):
                value = getattr(module, name)
                if name in home.__all__ and getattr(home, name) is value:
                    lines += [*directive(f"{home.__name__}.{name}", value), ""]
        return self.parse_text_to_nodes("\n".join(lines))


def directive(name: str, value: Any) -> list[str]:
    """The lines of reST that document one public object."""
    if name == "lionax.Scalar":
        return [".. py:data:: Scalar", "   :module: lionax", "", f"   {SCALAR}"]
    if not inspect.isclass(value):
        return [f".. autofunction:: {name}"]
    return [f".. autoclass:: {name}", "   :members:", "   :member-order: bysource"]


def set_equations(app: Sphinx, what: str, name: str, thing: Any, options: Any,
                  lines: list[str]) -> None:
    """Turns the indented blocks of a docstring into equations, or into code if they are code."""
    text = "\n".join(lines)
    # Napoleon takes what stands before a colon for a type.
    text = re.sub(r"(\nReturns:\n[^:\n]+): ", r"\1 – ", text)
    text = text.replace(": ", " – ", 1) if what in ("attribute", "property") else text
    text = text.partition("\nArgs:\n")
    blocks = re.split(r"((?:(?<=\n\n)|^)(?: {4,}\S.*\n?)+)", text[0])
    for i in range(1, len(blocks), 2):
        blocks[i] = code(blocks[i]) if CODE.match(blocks[i]) else equation(blocks[i])
    lines[:] = ("".join(blocks) + "".join(text[1:])).split("\n")


def code(block: str) -> str:
    """A block of Python."""
    return f".. code-block:: python\n\n{block}\n"


def equation(block: str) -> str:
    """A block in which ``m_{t-1}`` and ``b1^t`` have indices and exponents."""
    text = html.escape(inspect.cleandoc(block), quote=False)
    text = re.sub(r"(?<=[\s(])-|-(?=\d)", "−", text)
    for mark, tag in (("_", "sub"), (r"\^", "sup")):
        text = re.sub(rf"(?<=[\w)]){mark}(?:\{{([^}}]+)\}}|(\w))(?!\w)",
                      lambda m, tag=tag: f"<{tag}>{m[1] or m[2]}</{tag}>", text)
    shown = "\n".join(f"   {line}" for line in text.splitlines())
    return f".. raw:: html\n\n   <pre class=\"equation\">\n{shown}\n   </pre>\n\n"


class LinkNames(SphinxTransform):
    """Makes links of the literals ``lionax.lion``, ``lionax.scale(0.5)`` and ``scale_by_lion``."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            target = public_name(literal.astext())
            is_linked = isinstance(literal.parent, nodes.reference | nodes.title | pending_xref)
            if target and not is_linked:
                link = pending_xref("", refdomain="py", reftype="obj", reftarget=target,
                                    refdoc=self.env.docname)
                literal.replace_self(link)
                link += literal


def public_name(text: str) -> str | None:
    """The public object that a literal names. A bare name must have an underscore: not `scale`."""
    name = text.partition("(")[0]
    if "_" in name and name in lionax.__all__:
        return f"lionax.{name}"
    module, _, last = name.rpartition(".")
    home = {"lionax": lionax, "lionax.compat": lionax.compat}.get(module)
    if home is None and module.startswith(("lionax.compat.", "compat.")):
        home = getattr(lionax.compat, module.rpartition(".")[2], None)
    is_public = home is not None and last in home.__all__ and not inspect.ismodule(
        getattr(home, last))
    return f"{home.__name__}.{last}" if is_public else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("public", Public)
    app.add_transform(LinkNames)
    app.connect("autodoc-process-docstring", set_equations, priority=400)  # before napoleon
    return {"parallel_read_safe": True}
