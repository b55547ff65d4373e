"""The page and the Markdown of a comparison: what they show and escape; nothing is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from compared import BUDGET, compared, info
from manylora.comparison.result import Comparison, RatePoint
from manylora.comparison.tables import markdown, table
from manylora.report.comparison import write_comparison_page
from manylora.report.comparison_plots import rate_plots
from test_report import EVIL, Outline

SECTIONS = ["answer", "methods", "overall", "differences", "tasks", "rates", "size", "how"]


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compared(infos={"ia3": {"at_edge": True, "best_lr": 8e-3 * 4}})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "comparison.html"


def page(found: Comparison, file: Path) -> str:
    assert write_comparison_page(found, file) == file
    return file.read_text(encoding="utf-8")


def part(text: str, section: str) -> str:
    return text.split(f'<section id="{section}">')[1].split("</section>")[0]


def plots(text: str) -> dict[str, str]:
    """The drawing of each plot of methods by its title."""
    return dict(re.findall(r'aria-label="(.*?) by method;(.*?)</svg>', text, re.DOTALL))


def tables(text: str) -> dict[str, list[str]]:
    """CSV links: header -> lines, the first with that header."""
    files: dict[str, list[str]] = {}
    for address in Outline(text).addresses:
        lines = unquote(address.split(",", 1)[1]).splitlines()
        files.setdefault(lines[0], lines[1:])
    return files


def test_page_is_well_formed_and_loads_nothing(found: Comparison, file: Path) -> None:
    text = page(found, file)
    outline = Outline(text)
    assert outline.ids == SECTIONS
    assert "default-src 'none'" in text
    assert outline.addresses and all(a.startswith("data:text/csv") for a in outline.addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "img", "iframe"} & set(outline.tags)


def test_the_verdict_stands_first_a_sentence_a_line(found: Comparison, file: Path) -> None:
    answer = part(page(found, file), "answer")
    assert "<h1>8 methods on 4 tasks, 3 seeds each, at the budget of lora:r=16</h1>" in answer
    lines = [unescaped(line) for line in re.findall(r"<p.*?>(.*?)</p>", answer)]
    assert lines == found.verdict.splitlines()
    assert f"{BUDGET:,} parameters" in answer and "NVIDIA H100 80GB HBM3" in answer


def unescaped(text: str) -> str:
    return text.replace("&#39;", "'").replace("&amp;", "&")


def test_text_from_the_data_is_escaped_everywhere(file: Path) -> None:
    text = page(
        compared(
            effects={"lora": 0.0, EVIL: 0.0},
            infos={EVIL: {"label": EVIL, "note": EVIL, "energy_kwh": {EVIL: 1.0}}},
            verdict=EVIL,
            command=EVIL,
            budget=EVIL,
            device=EVIL,
            settings={EVIL: EVIL},
        ),
        file,
    )
    assert "<script" not in text
    assert Outline(text).ids == SECTIONS
    for section in SECTIONS:
        assert "&lt;script&gt;alert(1)" in part(text, section), section


def test_methods_are_in_a_table_with_all_that_they_cost(found: Comparison, file: Path) -> None:
    methods = part(page(found, file), "methods")
    row = methods.split("<th>ia3<small>IA3</small></th>")[1].split("</tr>")[0]
    cells = re.findall(r"<td>(.*?)</td>", row)
    score = next(s for s in found.scores if s.method == "ia3")
    assert cells[:3] == ["193,536", "4 %", "0.032 (edge)"]
    assert cells[3] == f"{score.nll[0]:.3f}<small>{score.nll[1]:.3f}–{score.nll[2]:.3f}</small>"
    assert cells[4].startswith(f"{100 * score.correct[0]:.1f}<small>")
    assert cells[5:] == ["5 min 12 s", "0.0458", "0.0123", "0.0314", "0.0021", "5.00 GiB"]
    assert "0.04 of the budget: IA3 has no size" in methods


def test_what_was_not_measured_is_a_dash(file: Path) -> None:
    nothing = {"seconds": None, "energy_kwh": None, "peak_memory_bytes": None, "best_lr": None}
    text = page(compared(2, infos=dict.fromkeys(("lora", "lora_split"), nothing)), file)
    row = part(text, "methods").split("<th>lora<small>")[1].split("</tr>")[0]
    assert re.findall(r"<td>(–)</td>", row) == ["–"] * 3
    assert "kWh" not in text.split("<body>")[1]


def test_only_what_separates_is_coloured_and_zero_is_marked(found: Comparison, file: Path) -> None:
    drawn = plots(part(page(found, file), "differences"))
    assert list(drawn) == ["nll less that of lora", "correct less that of lora"]
    for metric, drawing in zip(("nll", "correct"), drawn.values(), strict=True):
        styles = dict(
            re.findall(r'<title>(\w+):.*?<circle class="(\w+)"', drawing, flags=re.DOTALL)
        )
        good = 1 if metric == "correct" else -1
        assert styles == {
            d.method: "soft" if not d.separates else "better" if good * d.value[0] > 0 else "worse"
            for d in found.differences
            if d.metric == metric
        }
    assert set(re.findall(r'circle class="(\w+)"', drawn["nll less that of lora"])) == {
        "better",
        "worse",
        "soft",
    }
    assert drawn["nll less that of lora"].count('class="choice"') == 1


def test_differences_are_in_a_table_with_signs(found: Comparison, file: Path) -> None:
    text = part(page(found, file), "differences")
    ia3 = next(d for d in found.differences if d.method == "ia3" and d.metric == "nll")
    mean, low, high = (f"{value:+.3f}" for value in ia3.value)
    assert f"<th>ia3</th><td>{mean} ({low} to {high})</td><td><b>yes</b></td>" in text


def test_the_reference_is_drawn_as_such_and_its_mean_is_the_dashed_line(
    found: Comparison, file: Path
) -> None:
    drawing = plots(part(page(found, file), "overall"))["nll"]
    circles = re.findall(r'<circle class="(\w+)".*? cx="([\d.]+)%"', drawing)
    assert [style for style, _ in circles] == ["before"] + ["after"] * 7
    (guide,) = re.findall(r'class="choice" x1="([\d.]+)%"', drawing)
    assert guide == circles[0][1]


def test_every_task_has_its_plot_and_its_row(found: Comparison, file: Path) -> None:
    text = part(page(found, file), "tasks")
    assert (
        re.findall(r'aria-label="(\w+) by method', text)
        == [t.task for t in found.scores[0].tasks] * 2
    )
    row = text.split("<th>gsm8k</th>")[1].split("</tr>")[0]
    assert row.count("<td>") == 1 + 8
    value = found.scores[6].tasks[1].nll
    assert f'<span class="worse">{value[0]:.3f} ▼</span><small>{value[1]:.3f}–' in row


def test_rates_mark_the_one_taken_and_cut_what_is_far_above(found: Comparison, file: Path) -> None:
    text = part(page(found, file), "rates")
    assert text.count("<polyline") == 8 * 8
    assert text.count("<title>best: ") == 8
    assert "<title>best: 0.001: 0.95</title>" in text
    assert "0.032, at the edge" in text
    assert "is drawn at the top edge" in text
    views = rate_plots(found.methods)
    assert views is not None
    assert all(mark.at[1] >= 0 for plot, _ in views.plots for mark in plot.marks)
    assert tables(page(found, file))["method,lr,nll,correct"][0] == "lora,0.00025,1.06,0.3"


def test_a_rate_that_diverged_is_counted_not_drawn(file: Path) -> None:
    points = [(1e-4, 1.0), (1e-3, 0.9), (1e-2, float("nan"))]
    rates = [RatePoint(lr=lr, nll=nll, correct=0.1) for lr, nll in points]
    text = page(compared(2, infos={"lora": {"rates": rates}}), file)
    assert "1 points that are not finite are left out" in part(text, "rates")
    assert "nan" not in re.sub(r'href="[^"]*"', "", text).lower()


def test_without_rates_there_is_no_section_of_them(file: Path) -> None:
    bare = {"rates": [], "best_lr": None}
    text = page(compared(2, infos=dict.fromkeys(("lora", "lora_split"), bare)), file)
    assert "rates" not in Outline(text).ids
    assert "rates tried" not in text


def test_12_methods_on_26_tasks_have_every_dot(file: Path) -> None:
    text = page(compared(12, 26, seeds=2, examples=5), file)
    tasks = part(text, "tasks")
    assert tasks.count("<circle") == 2 * 26 * 12
    assert tasks.count("<tr>") == 27
    assert len(text.encode()) < 500_000
    assert len(tables(text)[next(h for h in tables(text) if h.startswith("method,task,n"))]) == (
        12 * 27
    )


def test_before_the_first_score_the_page_shows_the_methods(file: Path) -> None:
    none = compared(2, scores=[], differences=[])
    text = page(none, file)
    assert Outline(text).ids == ["answer", "methods", "overall", "rates", "how"]
    assert "No method has a run on the held-out rows yet." in text
    assert "| lora |" in markdown(none)


def test_a_method_without_a_score_is_a_dash(file: Path) -> None:
    later = compared(2)
    later = later.model_copy(update={"methods": [*later.methods, info("dora")]})
    row = part(page(later, file), "methods").split("<th>dora<small>")[1].split("</tr>")[0]
    assert row.count("<td>–<small></small></td>") == 2


def test_how_it_was_done_has_settings_device_and_command(found: Comparison, file: Path) -> None:
    text = part(page(found, file), "how")
    assert f"<pre>{found.command}</pre>" in text
    assert '<th>max length</th><td class="text">512</td>' in text
    assert "Holm" in text and "Student" in text


def test_data_are_attached(found: Comparison, file: Path) -> None:
    data = tables(page(found, file))
    apart = data["method,reference,metric,task,mean,low,high,separates"]
    assert len(apart) == 2 * 7 * (1 + 4)
    methods = next(lines for head, lines in data.items() if head.startswith("method,label,params"))
    assert methods[
        0
    ] == f"lora,lora r=16,{BUDGET - 496},0.999898,0.001,False,312.4,5368709120,{{}}".format(
        "0.0123,0.0314,0.0021"
    )


def test_markdown_has_the_verdict_and_every_table(found: Comparison) -> None:
    text = markdown(found)
    assert text.startswith("# 8 methods on 4 tasks")
    assert "\n".join(f"- {line}" for line in found.verdict.splitlines()) in text
    ia3 = next(s for s in found.scores if s.method == "ia3")
    mean, low, high = (f"{value:.3f}" for value in ia3.nll)
    assert f"| ia3 | 193,536 | 4 % | 0.032 (edge) | {mean} ({low} to {high}) |" in text
    assert text.count("\n| cuad |") == 2 and text.count("\n| all tasks |") == 2
    assert found.command in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    widths = [{line.count("|") for line in lines} for lines in blocks]
    assert widths == [{10}, {6}, {10}, {10}, {3}]


def test_a_cell_of_markdown_cannot_end_its_table() -> None:
    assert table(["a", "b"], [["x|y\nz", "`*<b>"]]).splitlines()[2:] == [
        "| x\\|y z | \\`\\*\\<b\\> |"
    ]
