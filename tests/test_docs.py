"""The documentation: its links, and the site that Sphinx builds of it."""

import ast
import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import urllib.parse

import pytest
import run_reliability

import lionax

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
COPIES = ("changelog.md", "contributing.md")  # made by docs/conf.py
PAGES = [*(path for path in DOCS.rglob("*.md") if path.name not in COPIES),
         ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SYSTEMS = {"keras2": ("Lion", "SGD"), "keras3": ("Lion", "SGD", "Lamb"), "dtensor": ("SGD",),
           "tf_models": ("LAMB",)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_on_a_code_host(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_pitfall_is_a_row_named_as_its_test():
    rows = re.findall(r"^\| (?!case |---)(.*)", (DOCS / "differences.md").read_text(), re.M)
    links = [re.match(r"\[(.+?)\]\(\.\./tests/(\w+)\.py\)", row).groups() for row in rows]
    assert all(row.count(" | ") == 3 for row in rows)
    named = [re.sub(r"\W+", "_", case.lower().replace("`", "")) for case, file in links
             if file == "test_pitfalls"]
    tests = re.findall(r"^def test_(\w+)", (ROOT / "tests/test_pitfalls.py").read_text(), re.M)
    assert sorted(named) == sorted(tests)


def promises(tree):
    """The arguments of the marks of a module, of which constants may have names."""
    names = {ast.unparse(node.targets[0]): node.value for node in tree.body
             if isinstance(node, ast.Assign)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.promise":
            yield tuple(ast.literal_eval(names.get(ast.unparse(arg), arg)) for arg in node.args)


def test_the_report_is_of_the_promises_that_tests_name():
    """`python tests/run_reliability.py` makes it anew."""
    record = json.loads(run_reliability.RECORD.read_text())
    assert run_reliability.page(record) == run_reliability.PAGE.read_text()
    named = {promise for path in (ROOT / "tests").glob("test_*.py")
             for promise in promises(ast.parse(path.read_text()))}
    assert named == {(section, text) for section, kept in record.items() for text in kept}


class Page(html.parser.HTMLParser):
    """The links and anchors of one built page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links |= {attributes[name] for name in ("href", "src") if attributes.get(name)}
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}


def check_links(site):
    """Internal links lead to pages and anchors, those to the repository to its files."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    in_repository = re.compile(rf"{re.escape(urls['Repository'])}/(?:blob|tree)/HEAD/([^#]+)")
    found = set()
    for path, page in site.items():
        for link in page.links:
            if match := in_repository.match(link):
                found.add(match[1])
                assert (ROOT / match[1]).exists(), f"{path}: {link}"
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path.parent / urllib.parse.unquote(parts.path) if parts.path else path
            target = target.resolve()
            assert target.exists(), f"{path}: {link}"
            if parts.fragment and target in site:
                anchors = site[target].anchors | {"top"}
                assert urllib.parse.unquote(parts.fragment) in anchors, f"{path}: {link}"
    assert "tests/test_norms.py" in found


def check_nothing_is_loaded_from_elsewhere(site):
    # The badges of notebooks are pictures of Colab's.
    loads = re.compile(r"<(?:script|img(?! alt=\"Open in Colab)|link rel=\"stylesheet\")[^>]*"
                       r"(?:src|href)=\"http[^>]*>")
    for path in site:
        assert not loads.search(path.read_text()), path


def check_every_public_name_has_one_entry(site):
    names = [f"lionax.{name}" for name in lionax.__all__]
    names += [f"lionax.compat.{name}" for name in lionax.compat.__all__
              if name.endswith(("_optax", "_weights"))]
    names += [f"lionax.compat.{system}.{name}" for system, own in SYSTEMS.items() for name in own]
    for name in names:
        entries = [path.name for path, page in site.items() if name in page.anchors]
        assert len(entries) == 1, f"{name}: {entries}; the pages are in docs/api"


@pytest.mark.slow
def test_the_site(tmp_path):
    """One test, since one build serves all checks. What a guide's code raises fails the build."""
    pytest.importorskip("sphinx_book_theme", reason="the site needs the extra docs")
    out = tmp_path.resolve()
    build = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html",
         str(DOCS), str(out)], capture_output=True, text=True, check=False,
        env={**os.environ, "XLA_FLAGS": ""})
    assert build.returncode == 0, build.stderr
    site = {path: Page(path) for path in out.rglob("*.html") if "_static" not in path.parts}
    check_links(site)
    check_nothing_is_loaded_from_elsewhere(site)
    check_every_public_name_has_one_entry(site)
