"""The documentation: its links, and the site that Sphinx builds of it."""

import html.parser
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import urllib.parse

import pytest

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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages by path. Guides run in the build; what they raise fails it."""
    pytest.importorskip("sphinx", reason="the site needs the extra docs")
    out = tmp_path_factory.mktemp("site").resolve()
    environment = {**os.environ, "XLA_FLAGS": ""}
    build = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html",
         str(DOCS), str(out)], capture_output=True, text=True, check=False, env=environment)
    assert build.returncode == 0, build.stderr
    return {path: Page(path) for path in out.rglob("*.html") if "_static" not in path.parts}


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_internal_links_lead_to_pages_and_anchors(site):
    for path, page in site.items():
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else (path.parent / urllib.parse.unquote(parts.path))
            target = target.resolve()
            assert target.exists(), f"{path}: {link}"
            if parts.fragment and target in site:
                assert urllib.parse.unquote(parts.fragment) in site[target].anchors | {"top"}, (
                    f"{path}: {link}")


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_links_to_the_repository_lead_to_its_files(site):
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    links = set().union(*(page.links for page in site.values()))
    found = re.findall(rf"{re.escape(urls['Repository'])}/(?:blob|tree)/HEAD/(\S+)",
                       "\n".join(links))
    assert "tests/test_norms.py" in found
    for link in found:
        assert (ROOT / link).exists(), link


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_pages_load_nothing_from_elsewhere(site):
    for path in site:
        loaded = re.findall(r"<(?:script|img|link rel=\"stylesheet\")[^>]*(?:src|href)=\"(http[^\"]*)",
                            path.read_text())
        assert not loaded, f"{path}: {loaded}"


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_every_public_name_has_one_entry(site):
    names = [f"lionax.{name}" for name in lionax.__all__]
    names += [f"lionax.compat.{name}" for name in lionax.compat.__all__
              if name.endswith(("_optax", "_weights"))]
    names += [f"lionax.compat.{system}.{name}" for system, own in SYSTEMS.items() for name in own]
    for name in names:
        entries = [path.name for path, page in site.items() if name in page.anchors]
        assert len(entries) == 1, f"{name}: {entries}; the pages are in docs/api"
