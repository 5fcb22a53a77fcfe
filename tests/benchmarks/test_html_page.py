"""Pages of benchmarks: rendering of Markdown, escaping of user text, and layout in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_examples import Page, make_report, make_rows
from test_comparison import BASIS, HOSTILE

from ev3_distill import benchmarks
from ev3_distill.benchmarks import comparison, html_page, results_folder, statistics
from ev3_distill.benchmarks.provenance import seeds_text
from ev3_distill.monitor import report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ALONE = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
]
PAPER = 672  # px across A4 without its margins of 16 mm


def test_blocks_of_markdown_agree_with_hand_written_ones():
    text = "A `b|c` and\n**d** <e>.\n\n## F `g`\n\n- one\n  two\n- three\n\n| h | i |\n| --- | ---: |\n| j\\|k | 1 |\n| l |\n"
    paragraph, heading, items, table = html_page.blocks(text)
    assert paragraph.texts == [[("", "A "), ("code", "b|c"), ("", " and "), ("strong", "d"), ("", " <e>.")]]
    assert (heading.kind, heading.texts) == ("heading", [[("", "F "), ("code", "g")]])
    assert (items.kind, items.texts) == ("list", [[("", "one two")], [("", "three")]])
    assert (table.kind, table.right) == ("table", [False, True])
    assert table.rows == [[[("", "h")], [("", "i")]], [[("", "j|k")], [("", "1")]], [[("", "l")], []]]


@pytest.mark.parametrize("text", ["", "|", "| a |\nno rule", "** a", "` `` b", "- ", "##", "| a |\n| --- |"])
def test_malformed_markdown_is_parsed_without_error(text):
    html_page.blocks(text)


def test_pipes_and_newlines_in_cells_are_escaped():
    (table,) = html_page.blocks(statistics.markdown(["a", "b"], [["x | y\nz", "1"]]))
    assert table.rows[1] == [[("", "x | y z")], [("", "1")]]


def of(suite):
    """The page of a suite's committed results."""
    results = results_folder.read(RESULTS / suite, benchmarks.SUITES)
    return results_folder.html(results, results.suite.table(results.rows))


@pytest.mark.parametrize("suite", ["growth", "safety"])
def test_page_is_complete_and_self_contained(suite):
    html = of(suite)
    page, results = Page(html), results_folder.read(RESULTS / suite, benchmarks.SUITES)
    assert page.tags.count("h1") == 1 and ("lang", "en") in page.attributes
    assert page.tags.count("svg") == hasattr(results.suite, "plot") == (("role", "img") in page.attributes)
    assert not {"script", "link", "iframe", "object", "base", "img", "a"} & set(page.tags)
    assert not re.search(r"https?:|wss?:|//\w|@import|url\((?!#)", html)
    assert "default-src 'none'" in html
    assert html.count("<th ") == html.count('<th scope="') and "<th>" not in html
    for shown in (
        results.header["command"], results.header["code"], f"{len(results.rows):,}", seeds_text(results.header),
        results.header["machine"]["cpu"], f"jax {results.header['versions']['jax']}", "How to reproduce",
    ):  # fmt: skip
        assert shown in page.text
    cells = [cell.strip().replace("`", "") for cell in results.suite.table(results.rows).split("|") if "\n" not in cell]
    assert all(" ".join(cell.split()) in page.text for cell in cells if not re.fullmatch(r"[\s:-]*", cell))
    assert html == of(suite)


def test_user_text_is_escaped():
    """In tables, headings, plots and the metadata of results."""
    results = results_folder.read(RESULTS / "growth", benchmarks.SUITES)
    rows = [{**row, "data": HOSTILE} for row in results.rows]
    basis = {**results.header, "command": HOSTILE, "code": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    basis["machine"] = {"cpu": HOSTILE, "cores": HOSTILE, "accelerator": HOSTILE}
    suite = results.suite
    html = html_page.of_results(HOSTILE, suite.table(rows), suite.plot(rows), basis, len(rows))
    # title; heading and plot; machine, versions, code; command twice
    assert "<script" not in html and html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 10
    assert "script" not in Page(html).tags
    html = html_page.of_comparison(
        HOSTILE, comparison.table(*[results._replace(rows=rows)] * 2, (HOSTILE, "`<b>`")), HOSTILE
    )
    assert "<script" not in html and "<b>" not in html and not {"script", "b"} & set(Page(html).tags)


def test_render_reproduces_committed_tables(tmp_path, cli):
    """Committed tables are generated from their rows, and rendering writes no other files than table, plot and page."""
    for path in RESULTS.iterdir():
        results = results_folder.read(path, benchmarks.SUITES)
        assert results_folder.table_text(results) == (path / "table.md").read_text(), path.name
    shutil.copytree(RESULTS / "growth", tmp_path / "growth")
    for name in ("table.md", "plot.svg"):
        (tmp_path / "growth" / name).unlink()
    answer = cli("bench", "--render", tmp_path / "growth")
    assert answer.code == 0 and answer.out.strip() == (RESULTS / "growth" / "table.md").read_text().strip()
    assert (tmp_path / "growth" / "table.md").read_bytes() == (RESULTS / "growth" / "table.md").read_bytes()
    assert "<svg" in (tmp_path / "growth" / "plot.svg").read_text()
    assert (tmp_path / "growth" / "report.html").read_text() == of("growth")
    assert {path.name for path in (tmp_path / "growth").iterdir()} == {
        "about.md",
        "rows.jsonl",
        "table.md",
        "plot.svg",
        "report.html",
    }


def test_render_rejects_rows_with_missing_fields(tmp_path, cli):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(BASIS | {"suite": "guards"}) + '\n{"seed": 0, "contender": "EV3"}\n'
    )
    answer = cli("bench", "--render", tmp_path)
    assert answer.code == 2 and "rows have every field that their suite shows" in answer.err
    assert "Traceback" not in answer.err and [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# A real browser.


def chromium(place, *options):
    """Runs Chromium without network access; returns its standard output."""
    command = [
        CHROMIUM,
        *ALONE,
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={place / 'profile'}",
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


FRAMES = """<!DOCTYPE html><body><script>
const results = [];
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const paper = frame.name.startsWith("paper "), page = frame.contentDocument;
    const out = [...page.querySelectorAll("main *")].filter(box => (paper || !box.closest(".scroll")) &&
      !box.closest("svg *") && box.getBoundingClientRect().right > frame.width);
    results.push({name: frame.name, width: +frame.width, inside: frame.contentWindow.innerWidth,
      scroll: page.documentElement.scrollWidth, out: out.map(box => box.outerHTML.slice(0, 80)),
      requests: frame.contentWindow.performance.getEntriesByType("resource").length});
  }
  document.body.innerHTML = "<pre id=results>" +
    JSON.stringify(results).replaceAll("&", "&amp;").replaceAll("<", "&lt;") + "</pre>";
});
</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder with pages of committed results, of a comparison and of a run."""
    place = tmp_path_factory.mktemp("pages")
    texts = {suite: of(suite) for suite in ("growth", "safety", "search")}
    results = results_folder.read(RESULTS / "growth", benchmarks.SUITES)
    moved = [{**row, "accuracy": row["accuracy"] + 0.01 * row["seed"] * (row["width"] == 8)} for row in results.rows]
    comparison_text = comparison.table(
        results, results._replace(rows=moved[5:]), ("results/growth", "a/folder/with/quite/a/long/name" * 3)
    )
    texts["compared"] = html_page.of_comparison("growth", comparison_text, "ev3-distill bench --compare one other")
    ledger = make_rows()
    texts["run"] = report.render(make_report(ledger), ledger)
    for name, text in texts.items():
        (place / f"{name}.html").write_text(text)
    return place


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_pages_fit_the_window_in_a_browser(pages):
    """At 375 and 1280 px only elements in scrollable boxes exceed the page; in print no element does."""
    names = sorted(path.stem for path in pages.glob("*.html"))
    for name in names:  # print layout: print rules on, screen rules off
        printed = (pages / f"{name}.html").read_text().replace("@media print", "@media all")
        (pages / f"paper {name}.htm").write_text(printed.replace("@media screen", "@media not all"))
    shown = [(f"{name}.html", width) for name in names for width in (375, 1280)]
    shown += [(f"paper {name}.htm", PAPER) for name in names]
    frames = (
        f'<iframe name="{name}" width="{width}" height="900" style="border: 0" src="{name}"></iframe>'
        for name, width in shown
    )
    (pages / "frames.htm").write_text(FRAMES + "".join(frames))
    address = (pages / "frames.htm").as_uri()
    dom = chromium(pages, "--allow-file-access-from-files", "--dump-dom", "--virtual-time-budget=20000", address)
    text = re.search(r'<pre id="results">(.*?)</pre>', dom, re.S)[1].replace("&lt;", "<").replace("&amp;", "&")
    results = json.loads(text)
    assert [(result["name"], result["width"]) for result in results] == shown
    for result in results:
        assert result["inside"] == result["width"] >= result["scroll"], result
        assert (result["out"], result["requests"]) == ([], 0), result


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("name", ["growth", "run"])
def test_browser_renders_and_prints_pages(pages, name):
    """Screenshots and a PDF stay in the temporary folder of pytest for inspection."""
    address = (pages / f"{name}.html").as_uri()
    for width, height in ((375, 2600), (1280, 1800)):
        shot = pages / f"{name}-{width}.png"
        chromium(pages, f"--screenshot={shot}", f"--window-size={width},{height}", address)
        assert shot.stat().st_size > 20_000
    paper = pages / f"{name}.pdf"
    chromium(pages, "--no-pdf-header-footer", f"--print-to-pdf={paper}", address)
    assert paper.read_bytes()[:5] == b"%PDF-"
