"""The site: built without a warning, whole in its links, and looked at in a browser."""

from __future__ import annotations

import functools
import http.server
import inspect
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
import pytest
from chromium import find_chromium, screenshot
from PIL import Image

from tdmpc2_sb3 import TDMPC2

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted((REPOSITORY / "docs").rglob("*.md"))
INDIGO = (64, 81, 181)  # Material's header


class Page(HTMLParser):
    """The links of a page, what they can lead to, and the texts of its table cells."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.places = {""}
        self.cells: list[str] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.places.add(found.get("id") or "")
        for name in ("href", "src"):
            if found.get(name):
                self.links.append(found[name] or "")
        if tag == "td":
            self._cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.cells[-1] += data.strip()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason='the site needs pip install ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(site))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_lines_of_markdown_are_short_but_for_tables():
    # README.md is not among them: its results are generated, its rest is not of the site.
    for path in PAGES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100 or line.startswith("|"), f"{path.name}:{number}"


def test_the_algorithms_page_is_read_in_five_minutes():
    assert len((REPOSITORY / "docs" / "algorithm.md").read_text().split()) <= 900


def test_no_page_tells_of_commits_but_in_a_machines_line():
    for path in PAGES:
        for line in path.read_text().splitlines():
            assert line.startswith("Machine: ") or not re.search(r"\b[Cc]ommit\b", line), path.name


def test_every_page_is_in_the_navigation():
    text = (REPOSITORY / "mkdocs.yml").read_text()
    named = re.findall(r"^ +- .*: (\S+\.md)$", text, re.M)
    assert sorted(named) == [str(path.relative_to(REPOSITORY / "docs")) for path in PAGES]


def test_links_of_pages_beside_the_site_lead_somewhere():
    outside = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md"]
    checked = 0
    for path in [*outside, *(REPOSITORY / "benchmarks").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if urlsplit(link).scheme:
                continue
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), f"{path}: {link}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
                places = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor in places, f"{path}: {link}"
            checked += 1
    assert checked > 30


@pytest.mark.slow
def test_every_link_leads_somewhere(site: Path):
    pages = {
        path: Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"
    }
    checked = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(urljoin(f"http://site/{path.relative_to(site)}", link))
            if parts.netloc != "site":
                continue
            target = site / unquote(parts.path).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path}: {link}"
            if target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].places, f"{path}: {link}"
            checked += 1
    assert checked > 1000
    hosts = {urlsplit(link).netloc for page in pages.values() for link in page.links}
    assert not any("fonts.g" in host for host in hosts)


@pytest.mark.slow
def test_the_reference_is_made_of_the_docstrings(site: Path):
    text = (site / "api" / "algorithm" / "index.html").read_text()
    cells = Page(text).cells
    arguments = list(inspect.signature(TDMPC2.__init__).parameters)[1:]
    assert [cell for cell in cells if cell in arguments][: len(arguments)] == arguments
    assert cells[cells.index("num_elites") + 1 :][:2] == [
        "int",
        "best sequences that shape the next iteration",
    ]
    for path in (site / "api").rglob("*.html"):
        assert not re.search(
            r":(func|meth|class|mod|param|return|raises)\b[^<]*:", path.read_text()
        )


@pytest.mark.slow
def test_roles_become_links(site: Path):
    text = (site / "api" / "callbacks" / "index.html").read_text()
    assert re.search(
        r'<a [^>]*href="#tdmpc2_sb3\.\S*load_checkpoint"[^>]*><code>load_checkpoint</code></a>'
        r"\s+goes on exactly",
        text,
    )
    text = (site / "api" / "environments" / "index.html").read_text()
    assert "&gt;&gt;&gt;" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.S)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "pictures"), [("", True), ("train/", False)])
def test_a_page_in_a_browser(address: str, tmp_path: Path, page: str, pictures: bool):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("Chromium is not installed: apt install chromium")
    errors = screenshot(chromium, address + page, tmp_path / "page.png", (1280, 1600))
    assert errors == []
    with Image.open(tmp_path / "page.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (1600, 1280, 3)
    # The header lies over the whole width, and three columns below it: pages, text, contents.
    assert np.abs(pixels[5] - INDIGO).max() <= 2
    dark = pixels.sum(axis=2) < 500
    for left, right in ((16, 240), (266, 1013), (1050, 1270)):
        assert dark[80:1000, left:right].mean() > 0.003
    # Nothing overlaps: between the columns and at the edges the page is white.
    for left, right in ((0, 14), (245, 262), (1020, 1048)):
        assert not dark[80:, left:right].any()
    # The search box is there only once the page's own script has run.
    assert (np.abs(pixels[:45, 1050:1270] - INDIGO).max(axis=2) > 20).sum() > 500
    colours = len(np.unique(pixels[280:720, 266:1013].reshape(-1, 3), axis=0))
    assert (colours > 5000) == pictures
