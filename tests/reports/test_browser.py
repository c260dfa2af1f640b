"""The pages in a real browser: no error, every picture there, nothing overlapping, at two widths.

Needs Chromium and its driver (Debian: chromium, chromium-driver); `.ci/run` installs them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from lrquant.reports.contents import run_contents
from lrquant.reports.page import run_page
from lrquant.reports.pictures import DEPTHS
from lrquant.reports.writing import write_comparison, write_report
from lrquant.runs.folder import RunFolder

PROGRAMS = ("chromium", "chromedriver")
WIDTHS = (390, 1400)
PICTURES = {
    "Error made in each block, and carried in",
    "Direction of the blocks' outputs",
    "Error that each linear adds",
    "Error of each linear's output",
    "Loss of each block while learning",
    "Learned scales",
    "Learned clipping",
    "Learned factors",
    "Weights of the model",
    "Codes of the quantised weights",
}
AUDIT = (Path(__file__).parent / "audit.js").read_text()


@pytest.fixture(scope="module")
def browser():
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        reason = f"{' and '.join(missing)} not installed (Debian: chromium, chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which(PROGRAMS[0])
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which(PROGRAMS[1])))
    yield driver
    driver.quit()


@pytest.fixture
def look(browser, tmp_path):
    """look(page, width, dark) -> what is wrong with it, its pictures' titles, what it logged."""

    def at(page, width, dark=False):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get_log("browser")
        browser.get(Path(page).as_uri())
        found = browser.execute_async_script(AUDIT)
        return found["problems"], found["pictures"], browser.get_log("browser")

    return at


@pytest.fixture(scope="module")
def comparison(full_run, older_run, make_run, tmp_path_factory):
    opt = make_run("opt", "opt", scheme="W3A16", ppl=("wikitext2",), report=True, let=True)
    output = tmp_path_factory.mktemp("pages") / "compare.html"
    paths = [run.folder.path for run in (full_run, opt, older_run, full_run)]
    return write_comparison(paths, output)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_a_run(full_run, look, width):
    problems, pictures, log = look(full_run.folder.path / "report.html", width)
    assert problems == [] and log == []
    reads = {title for title in pictures if title.startswith("What ")}
    assert set(pictures) == PICTURES | reads and len(pictures) == len(PICTURES) + 4
    assert {title.split()[1] for title in reads} == {"q_proj", "o_proj", "gate_proj", "down_proj"}


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_an_older_run(older_run, look, tmp_path, width):
    folder = shutil.copytree(older_run.folder.path, tmp_path / "run")
    problems, pictures, log = look(write_report(RunFolder.open(folder)), width)
    assert problems == [] and log == []
    assert set(pictures) == {
        *("Loss of each block while learning", "Learned scales", "Learned clipping")
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_a_comparison(comparison, look, width):
    problems, pictures, log = look(comparison, width)
    assert problems == [] and log == []
    assert pictures[0] == "Perplexity on wikitext2" and len(pictures) == 6
    assert [title.split(",")[0] for title in pictures[1:3]] == [
        *("Quality against size", "Quality against time")
    ]


def test_figures_are_read_on_a_phone(full_run, look, browser):
    look(full_run.folder.path / "report.html", 390)
    script = """return [...document.querySelectorAll("figure svg text")].map((label) => {
        const { a, b } = label.getScreenCTM();
        return parseFloat(getComputedStyle(label).fontSize) * Math.hypot(a, b); })"""
    assert min(browser.execute_script(script)) > 8.5


def test_curves_of_all_blocks_are_seen_on_white_and_on_black():
    for colour in (DEPTHS(share / 20)[:3] for share in range(21)):
        linear = [
            each / 12.92 if each < 0.04 else ((each + 0.055) / 1.055) ** 2.4 for each in colour
        ]
        light = sum(
            weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
        )
        assert 1.05 / (light + 0.05) > 2.5 and (light + 0.05) / 0.059 > 3


def test_a_long_table_is_closed_until_it_is_opened(copied, look, browser):
    records = run_contents(RunFolder.open(copied))
    records["blocks"] = [
        {**records["blocks"][0], "block": i, **({"figures": None} if i else {})} for i in range(20)
    ]
    page = copied / "long.html"
    page.write_text(run_page(records, RunFolder.open(copied)))
    assert look(page, 390)[0] == []
    names = "return [...document.querySelectorAll('details summary')].map(s => s.innerText)"
    assert browser.execute_script(names)[0].startswith("Blocks (20 rows)")
    links = (
        "return [...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))"
    )
    assert browser.execute_script(links)


def test_in_the_dark(full_run, look, browser):
    page = full_run.folder.path / "report.html"

    def lightness(dark):
        assert look(page, 1400, dark)[0] == []
        script = "return getComputedStyle(document.body).backgroundColor"
        paper = browser.execute_script(script)
        ink = browser.execute_script(
            "return getComputedStyle(document.querySelector('figure svg text')).fill"
        )
        return [sum(map(int, colour.strip("rgb()").split(","))) for colour in (paper, ink)]

    (paper, ink), (dark_paper, dark_ink) = lightness(False), lightness(True)
    assert paper > 600 > 200 > ink and dark_paper < 200 < 600 < dark_ink


def test_on_paper(full_run, look, browser):
    look(full_run.folder.path / "report.html", 1400)
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"]
    assert len(printed) > 50_000


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<footer", "<script>nothing.here()</script><footer", None),
        ("<footer", '<img src="http://127.0.0.1:9/x.png"><footer', None),
        ("</style>", ".note { margin-top: -3rem }</style>", "overlaps"),
        ("</style>", "pre { width: 1500px }</style>", "sideways"),
        ("</style>", "figure svg { display: none }</style>", "no size"),
        ("data:image/png;base64,", "data:image/png;base64,AAAA", "does not decode"),
        ('x="0"', 'x="-900"', None),
    ],
    ids=["script error", "network", "overlap", "sideways", "absent", "damaged", "nothing"],
)
def test_what_is_wrong_is_seen(copied, look, old, new, said):
    """Negative controls: each fault that the tests above look for, put into the page."""
    page = copied / "report.html"
    text = page.read_text()
    assert old in text or old == 'x="0"'
    page.write_text(text.replace(old, new))
    problems, _, log = look(page, 390)
    if said is None:
        assert bool(log) == (old == "<footer")
    else:
        assert any(said in problem for problem in problems), problems
