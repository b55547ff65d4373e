"""The pages of an inspection: what they show, their size, and how a real browser takes them."""

from __future__ import annotations

import base64
import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from browser import PROGRAM, Browser, chromium
from inspected import inspection
from manylora.findings import Finding
from manylora.inspect.frames import Inspection
from manylora.report.inspection import inspection_view, write_inspection_page
from test_report import EVIL, Outline

SECTIONS = ["findings", "spectra", "subspaces", "projection", "routing", "selector"]
SECTIONS += ["interference", "transfer", "training", "missing"]


def page(found: Inspection, folder: Path) -> str:
    path = write_inspection_page(found, folder / "inspect.html", [(r, "") for r in found.runs])
    return path.read_text(encoding="utf-8")


def part(text: str, section: str) -> str:
    return text.split(f'<section id="{section}">')[1].split("</section>")[0]


def tables(text: str) -> dict[str, list[str]]:
    """CSV links: header -> lines."""
    found = {}
    for address in Outline(text).addresses:
        if address.startswith("#"):
            continue
        kind, data = address.split(",", 1)
        packed = kind.startswith("data:application/gzip")
        lines = gzip.decompress(base64.b64decode(data)).decode() if packed else unquote(data)
        header, *rows = lines.splitlines()
        found[header] = rows
    return found


def without(*names: str, **size: Any) -> Inspection:
    found = inspection(**size)
    frames = {name: frame for name, frame in found.frames.items() if name not in names}
    return Inspection(found.runs, frames, found.missing, found.findings)


@pytest.mark.parametrize("runs", [("hydra",), ("hydra", "multi")])
def test_page_has_all_sections_and_a_link_to_each(runs: tuple[str, ...], tmp_path: Path) -> None:
    text = page(inspection(runs=runs), tmp_path)
    outline = Outline(text)
    assert outline.ids == SECTIONS
    assert [a.removeprefix("#") for a in outline.addresses if a.startswith("#")] == SECTIONS
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "img", "iframe"} & set(outline.tags)


@pytest.mark.parametrize(
    ("names", "section"),
    [
        (("spectra",), "spectra"),
        (("subspaces",), "subspaces"),
        (("projection", "likeness"), "projection"),
        (("usage", "entropy", "information", "tokens"), "routing"),
        (("confusion", "distances"), "selector"),
        (("interference",), "interference"),
        (("transfer",), "transfer"),
        (("training",), "training"),
    ],
)
def test_section_of_what_was_not_measured_is_absent(
    names: tuple[str, ...], section: str, tmp_path: Path
) -> None:
    outline = Outline(page(without(*names), tmp_path))
    assert outline.ids == [name for name in SECTIONS if name != section]
    assert f"#{section}" not in outline.addresses


def test_what_is_missing_is_said_with_what_gives_it_once_for_one_reason(tmp_path: Path) -> None:
    missing = {
        "interference": "ask for it",
        "spectra": "no weights",
        "singular_values": "no weights",
    }
    said = part(page(inspection(missing=missing), tmp_path), "missing")
    rows = re.findall(r"<tr><th>(.*?)</th><td.*?>(.*?)</td>", said)
    assert rows == [
        ("Gradients between tasks", "ask for it"),
        ("Spectra, singular values", "no weights"),
    ]


def test_findings_stand_first_with_what_to_change(tmp_path: Path) -> None:
    text = page(inspection(runs=("hydra", "multi")), tmp_path)
    assert text.index('id="findings"') < text.index('id="spectra"')
    assert "hydra: branch 2 is dead" in part(text, "findings")
    assert "train longer" in part(text, "findings")


def test_names_from_the_data_are_escaped_everywhere(tmp_path: Path) -> None:
    found = inspection(
        runs=(EVIL, "other"),
        tasks=(EVIL, "law"),
        findings={EVIL: [Finding(EVIL, "note", EVIL, EVIL)]},
        missing={"transfer": EVIL},
    )
    text = page(found, tmp_path)
    assert "<script" not in text
    assert Outline(text).ids == SECTIONS
    for section in SECTIONS:
        assert "&lt;script&gt;alert(1)" in part(text, section), section


def test_every_plot_has_its_numbers_beside_it(tmp_path: Path) -> None:
    found = tables(page(inspection(), tmp_path))
    spectra = "run,layer,module,depth,part,rank,frobenius,top1,top_quarter,entropy"
    assert len(found[f"{spectra},effective_rank,gini"]) == 28 * 7
    usage = found["run,layer,task,branch_0,branch_1,branch_2"]
    assert usage[0] == "hydra,model.layers.0.self_attn.q_proj,code,0.6,0.2,0.2"
    assert found["run,task,branch,rows"][0] == "hydra,code,0,8"
    assert "hydra,code,code,0.5,0.49,0.51" in found["run,left_out,task,nll,low,high"]
    assert "hydra,10,grad_norm,,0.6" in found["run,step,what,of,value"]
    phi = found["side,left,right,i,j,phi"]
    assert len(phi) == 2 * 3 * 16 and phi[0] == "input,hydra: branch 0,hydra: branch 1,1,1,0.2125"


def test_curves_fall_as_the_singular_values_do() -> None:
    """values exp(-0.3 (i - 1)) of the first part, 4 of them: on a log axis a straight line."""
    found = inspection(blocks=1)
    view = inspection_view(found)
    assert view.spectra is not None
    curve = view.spectra.curves[0].curves[0]
    downs = [int(point.split(",")[1]) for point in curve.points.split()]
    assert downs[0] == 0 and downs[-1] == 1000
    assert np.ptp(np.diff(downs)) <= 1


def test_the_spectra_are_said_in_a_sentence() -> None:
    values = np.exp(-0.3 * np.arange(4)) / np.exp(-0.3 * np.arange(4)).sum()
    directions = np.exp(-(values * np.log(values)).sum())
    view = inspection_view(inspection(blocks=1))
    assert view.spectra is not None
    assert view.spectra.said == [
        f"mean routing: the median layer spreads over {directions:.1f} of 4 directions, and the "
        f"strongest has {100 * values[0]:.0f} % of the sum."
    ]


def test_selector_table_shows_shares_of_a_tasks_rows(tmp_path: Path) -> None:
    found = inspection()
    rows = found.frames["confusion"]
    rows["rows"] = np.where(rows["task"] == rows["task"].iloc[0], [30, 10, 0] * 3, 5)
    view = inspection_view(found)
    assert view.selector is not None
    _, table, total = view.selector.confusion[0]
    assert [cell.text for cell in table.rows[0][1]] == ["75", "25", "0"]
    assert total == "70 rows"


def test_tasks_that_conflict_are_named_and_coloured() -> None:
    found = inspection(blocks=1, tasks=("code", "law"))
    frame = found.frames["interference"]
    frame["cosine"] = -0.5
    view = inspection_view(found)
    assert view.interference is not None
    assert view.interference.worst == ["code against law: -0.50"]
    table = view.interference.tables[0]
    assert [cell.style for cell in table.rows[0][1]] == ["plain", "down"]
    row = view.interference.parts[0]
    assert (row.cosine, row.conflict, row.below) == ("-0.500", "0.500", "100 %")


def test_branches_that_no_two_tasks_reach_are_said_to_be_apart() -> None:
    found = inspection(blocks=1, tasks=("code", "law"))
    frame = found.frames["interference"]
    frame.loc[frame["part"] == "branch 0", ["cosine", "norm"]] = [np.nan, 0.0]
    view = inspection_view(found)
    assert view.interference is not None
    assert {row.part: row.cosine for row in view.interference.parts}["branch 0"] == "apart"


def test_left_out_task_has_its_change_and_interval() -> None:
    view = inspection_view(inspection())
    assert view.transfer is not None
    ((name, cells),) = view.transfer.tables[0].rows
    assert name == "code"
    assert [(c.text, c.below, c.style) for c in cells][:2] == [
        ("0.500", "0.490 to 0.510", "up"),
        ("-0.020", "-0.030 to -0.010", "down"),
    ]


def test_tokens_have_the_colour_of_the_branch_that_they_use_most() -> None:
    view = inspection_view(inspection())
    assert view.routing is not None and view.routing.tokens is not None
    tokens = view.routing.tokens.examples[0].tokens
    assert [token.style for token in tokens[:4]] == ["k0", "k1", "k2", "k0"]
    assert tokens[0].label == "branch 0: 0.70, branch 1: 0.15, branch 2: 0.15"


def test_tokens_that_use_all_branches_alike_have_no_colour() -> None:
    found = inspection()
    found.frames["tokens"]["weight"] = 1 / 3
    view = inspection_view(found)
    assert view.routing is not None and view.routing.tokens is not None
    assert {token.strength for token in view.routing.tokens.examples[0].tokens} == {0}


def test_what_the_start_explains_is_in_the_table() -> None:
    view = inspection_view(inspection(runs=("a", "b")))
    assert view.projection is not None
    of_a, of_b = view.projection.start
    headings = view.projection.headings
    assert dict(zip(headings, of_a.cells, strict=True))["explained by the start"][0] == "90 %"
    assert dict(zip(headings, of_b.cells, strict=True))["at the start"] == ("–", "")


def test_losses_that_are_not_finite_are_not_drawn(tmp_path: Path) -> None:
    found = inspection()
    found.frames["training"].loc[::7, "value"] = np.nan
    found.frames["spectra"].loc[::5, "entropy"] = np.nan
    assert not re.search(r'(points|d|cx|x1)="[^"]*nan', page(found, tmp_path))


def test_a_table_without_its_columns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'spectra' lacks layer, .*; it has run"):
        Inspection(["a"], {"spectra": inspection().frames["spectra"][["run"]]})


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a 7B model's shape: 32 blocks of 7 layers, 8 branches, 26 tasks."""
    tasks = [f"a_task_with_a_long_name_{i:02}" for i in range(26)]
    found = inspection(runs=("hydra",), blocks=32, branches=8, tasks=tasks, rank=8)
    return write_inspection_page(
        found, tmp_path_factory.mktemp("large") / "p.html", [("hydra", "")]
    )


def test_page_of_a_7b_model_stays_under_five_megabytes(large: Path) -> None:
    assert large.stat().st_size < 5_000_000


needs_browser = pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@needs_browser
def test_the_browser_sees_what_a_page_does_wrong(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="missing.png"><p style="width: 900px">x</p><script>f()</script>')
    browser.open(bad, width=375)
    assert [url.rsplit("/", 1)[-1] for url in browser.requests] == ["bad.html", "missing.png"]
    assert any("f is not defined" in error for error in browser.errors)
    assert browser.value("document.documentElement.scrollWidth") > 375


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [375, 1100])
@pytest.mark.parametrize("runs", [1, 2, "large"])
def test_page_opens_from_disk_without_errors_or_requests_and_fits(
    browser: Browser, tmp_path: Path, large: Path, runs: int | str, width: int, dark: bool
) -> None:
    file = large
    if isinstance(runs, int):
        names = ["hydra", "a_run_with_quite_a_long_name"][:runs]
        page(inspection(runs=names, tasks=["intent_banking_a", "b", "c"]), tmp_path)
        file = tmp_path / "inspect.html"
    browser.open(file, width, dark)
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.errors == []
    assert browser.requests == [file.as_uri()]
    assert browser.value("document.documentElement.scrollWidth") <= width
    links = "[...document.querySelectorAll('a[href^=\"#\"]')]"
    assert browser.value(f"{links}.length") == len(SECTIONS)
    assert browser.value(f"{links}.every(a => document.querySelector(a.getAttribute('href')))")
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", paper)[:3])) < 60) == dark
