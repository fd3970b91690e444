"""Sphinx extension: links of the Markdown files, as a code host follows them, serve the site, too.

A link to a folder, or to a file outside of ``docs/``, goes to the repository. A link of a copied
page is relative to the file that was copied; it becomes relative to the copy.
"""

import os
import pathlib
import re
from typing import Any

from sphinx.application import Sphinx

__all__ = ["setup"]

LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)")


def rewrite(app: Sphinx, docname: str, source: list[str]) -> None:
    """Rewrites the relative links in the text of one page."""
    docs = pathlib.Path(app.srcdir)
    page = app.env.doc2path(docname)
    name = pathlib.Path(page).relative_to(docs).as_posix()
    copies = {origin.resolve(): docs / copy for copy, origin in app.config.source_origins.items()}
    folder = app.config.source_origins.get(name, pathlib.Path(page)).parent

    def target(link: re.Match[str]) -> str:
        path = pathlib.Path(os.path.normpath(folder / link[1]))
        path = copies.get(path.resolve(), path)
        if path.is_relative_to(docs) and not path.is_dir():
            return os.path.relpath(path, pathlib.Path(page).parent)
        kind = "tree" if path.is_dir() else "blob"
        return f"{app.config.repository}/{kind}/HEAD/{path.relative_to(docs.parent).as_posix()}"

    if name.endswith((".md", ".ipynb")):
        source[0] = LINK.sub(target, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_config_value("source_origins", {}, "env", dict)
    app.add_config_value("repository", "", "env", str)
    app.connect("source-read", rewrite)
    return {"parallel_read_safe": True}
