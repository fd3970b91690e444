"""How Sphinx builds the site: ``sphinx-build -b html docs build/docs``."""

import os
import pathlib
import shutil
import sys
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
# Each guide runs in a process of its own, which imports this copy of lionax, on the CPU.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["KERAS_BACKEND"] = "jax"

import lionax  # noqa: E402

DESCRIPTION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = DESCRIPTION["urls"]["Repository"]

# Pages that are kept elsewhere in the repository. Git ignores the copies.
COPIES = {"changelog.md": ROOT / "CHANGELOG.md", "contributing.md": ROOT / "CONTRIBUTING.md"}
COPIES |= {f"notebooks/{path.name}": path for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
for stale in ROOT.glob("docs/notebooks/*.ipynb"):
    stale.unlink()
for name, path in COPIES.items():
    shutil.copyfile(path, ROOT / "docs" / name)

project = "lionax"
author = "The lionax developers"
project_copyright = author
version = release = lionax.__version__

extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design",
    "reference", "repository_links",
]
exclude_patterns = ["_build"]
source_origins = COPIES
repository = REPOSITORY

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_excludepatterns = ["notebooks/*"]  # their outputs are stored
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 120
nb_merge_streams = True

autodoc_typehints = "none"  # most are Scalar or Mask: the text says what is accepted
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
default_role = "py:obj"
nitpick_ignore = [("py:obj", "jax.numpy")]
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = "lionax"
html_static_path = ["_static"]
html_css_files = ["lionax.css"]
html_show_sourcelink = False
html_theme_options = {
    "repository_url": REPOSITORY,
    "use_repository_button": True,
    "use_download_button": False,
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "secondary_sidebar_items": {"index": [], "**": ["page-toc"]},
    "navbar_persistent": [],  # the sidebar has a search field
}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
