"""The page of a discovery: what it shows, its escaping, and that it loads nothing."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from discovered import TEXTS, discovered, one_cluster
from manylora.discovery.result import Agreement, Candidate, Central, Cluster, Criterion, Discovery
from manylora.report.discovery import LONGEST_EXAMPLE, write_discovery_page
from test_report import EVIL, Outline

SECTIONS = ["answer", "curve", "criteria", "clusters", "tasks", "heterogeneity", "how"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "discovery.html"


def page(found: Discovery, file: Path) -> str:
    assert write_discovery_page(found, file) == file
    return file.read_text(encoding="utf-8")


def plots(text: str) -> dict[str, str]:
    """The drawing of each plot by the first words of its label."""
    found = re.findall(r'aria-label="(\S+) over the number(.*?)</figure>', text, re.DOTALL)
    return dict(found)


def tables(text: str) -> dict[str, list[str]]:
    """CSV links: header -> lines."""
    every = [unquote(a.split(",", 1)[1]).splitlines() for a in Outline(text).addresses]
    return {lines[0]: lines[1:] for lines in every}


def test_page_is_well_formed_and_loads_nothing(file: Path) -> None:
    text = page(discovered(), file)
    outline = Outline(text)
    assert outline.ids == SECTIONS
    assert "default-src 'none'" in text
    assert outline.addresses and all(a.startswith("data:text/csv") for a in outline.addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "img", "iframe"} & set(outline.tags)
    assert text.lstrip().startswith("<!DOCTYPE html>")


def test_answer_stands_first(file: Path) -> None:
    answer = page(discovered(), file).split('id="curve"')[0]
    assert "<h1>4 clusters in 4,572 documents, 12 of them in none</h1>" in answer
    assert "Several branches are worth trying.</b> The clusters are 13 times as far" in answer
    assert "silhouette says 6 and HDBSCAN 7; the elbow was taken." in answer


def test_text_from_the_data_is_escaped_everywhere(file: Path) -> None:
    central = Central(source=EVIL, task=EVIL, text=EVIL)
    found = discovered(
        1,
        chosen_by=EVIL,
        disagreement=EVIL,
        criteria=[Criterion(name=EVIL, k=1, note=EVIL)],
        clusters=[Cluster(name=EVIL, size=3, terms=[EVIL], central=[central])],
        agreement=Agreement(rows={EVIL: [3, 1]}, ari=1.0, nmi=1.0),
        settings={EVIL: EVIL},
        seconds={EVIL: 1.0},
    )
    text = page(found, file)
    assert "<script" not in text
    assert Outline(text).ids == SECTIONS
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;"
    for section in SECTIONS[:5] + SECTIONS[6:]:
        assert escaped in text.split(f'id="{section}"')[1].split("</section>")[0], section


def test_each_plot_marks_the_chosen_k_and_that_of_its_criterion(file: Path) -> None:
    drawn = plots(page(discovered(), file))
    assert list(drawn) == ["SSE", "Silhouette", "Davies-Bouldin"]
    assert all("<title>chosen: K = 4, " in plot for plot in drawn.values())
    assert all('class="choice"' in plot for plot in drawn.values())
    assert "<title>elbow: K = 4, 4263</title>" in drawn["SSE"]
    assert "<title>silhouette: K = 6, 0.27</title>" in drawn["Silhouette"]
    assert "<title>davies_bouldin: K = 4, 1.6</title>" in drawn["Davies-Bouldin"]
    assert "K = 1:" in drawn["SSE"] and "K = 1:" not in drawn["Silhouette"]


def test_marks_lie_on_the_line_at_their_k(file: Path) -> None:
    curve = [Candidate(k=k, sse=sse) for k, sse in ((1, 10.0), (3, 4.0), (5, 0.0))]
    drawn = plots(page(discovered(3, curve=curve), file))["SSE"]
    assert '<circle class="after" cx="50.0%" cy="120.0" r="5">' in drawn
    assert 'points="0,0 500,600 1000,1000"' in drawn


def test_a_chosen_k_beyond_the_curve_is_said_not_drawn(file: Path) -> None:
    found = discovered(30, chosen_by="given", curve=discovered(4).curve)
    text = page(found, file)
    assert "K = 30, which was chosen (given), is not on the curve." in text
    assert 'class="choice"' not in text and 'class="after"' not in text


def test_curve_of_one_point_has_its_plot_and_no_other(file: Path) -> None:
    text = page(one_cluster(), file)
    drawn = plots(text)
    assert list(drawn) == ["SSE"]
    assert "<title>chosen: K = 1, 12.5</title>" in drawn["SSE"]
    assert "Silhouette and Davies-Bouldin need two clusters" in text
    assert "nan" not in text.split('id="curve"')[1]
    assert "Several branches are not worth trying.</b> One branch is enough." in text
    assert "<code>adapter.method: lora</code>" in text
    assert "variance; with" not in text


def test_no_curve_is_said(file: Path) -> None:
    text = page(discovered(2, curve=[]), file)
    assert "No curve was measured: K = 2 (elbow)." in text
    assert plots(text) == {}


def test_every_criterion_is_shown_and_the_one_that_chose_is_marked(file: Path) -> None:
    table = page(discovered(), file).split('id="criteria"')[1].split("</section>")[0]
    assert "<tr><th>elbow</th><td><b>4</b></td>" in table
    assert "<tr><th>silhouette</th><td>6</td>" in table
    assert "<tr><th>davies_bouldin</th><td>4</td>" in table
    assert '<th>dbscan</th><td>no answer</td><td class="text">no radius separates' in table
    assert '<th>hdbscan</th><td>7</td><td class="text">38 % of the documents in none' in table
    assert table.count("chosen") == 1


def test_clusters_show_their_terms_and_fold_their_central_documents(file: Path) -> None:
    part = page(discovered(), file).split('id="clusters"')[1].split("</section>")[0]
    assert part.count("<details>") == 4 and part.count("<pre") == 12
    assert "1-clause-contract-party <small>1,200 documents, 26 %" in part
    assert "card, transfer, payment, account" in part
    assert "legal_1.jsonl:407, legal" in part and TEXTS["legal"] in part


def test_a_long_document_is_clipped(file: Path) -> None:
    long = Central(source="a.jsonl:1", task="a", text="y" * (LONGEST_EXAMPLE + 500))
    text = page(discovered(1, clusters=[Cluster(name="1", size=3, terms=[], central=[long])]), file)
    assert f">{'y' * LONGEST_EXAMPLE} …</pre>" in text


def test_tasks_by_cluster_are_shares_of_the_task(file: Path) -> None:
    part = page(discovered(), file).split('id="tasks"')[1].split("</section>")[0]
    row = part.split("<th>banking_task_02</th>")[1].split("</tr>")[0]
    assert re.findall(r"<td[^>]*>(.*?)</td>", row) == ["", "", "90", "9", "1", "270"]
    assert 'title="banking_task_02, 3-card-transfer-payment: 244 of 270"' in row
    assert "0.871" in part and "0.912" in part


def test_a_column_for_none_is_there_only_if_a_document_is(file: Path) -> None:
    inside = Agreement(rows={"a": [3, 0, 0], "b": [0, 3, 0]}, ari=1.0, nmi=1.0)
    part = page(discovered(2, agreement=inside), file).split('id="tasks"')[1]
    assert "<th>documents</th>" in part and ">none</th>" not in part


def test_26_tasks_in_20_clusters_have_every_cell(file: Path) -> None:
    text = page(discovered(20, 26), file)
    part = text.split('id="tasks"')[1].split("</section>")[0]
    assert part.count("<tr>") == 27
    assert part.count("<td") == 26 * (20 + 2)
    assert len(text.encode()) < 200_000
    wide = next(lines for head, lines in tables(text).items() if head.startswith("task,"))
    assert len(wide) == 26 and all(line.count(",") == 21 for line in wide)


def test_without_named_tasks_there_is_no_section_of_them(file: Path) -> None:
    text = page(discovered(tasks=0), file)
    assert "tasks" not in Outline(text).ids
    assert "Rand" not in text


def test_heterogeneity_stands_beside_its_control(file: Path) -> None:
    part = page(discovered(), file).split('id="heterogeneity"')[1].split("</section>")[0]
    assert "<th>this corpus</th><td>41.2 %</td>" in part
    assert "<th>its terms shuffled</th><td>3.1 %</td>" in part
    assert "<code>adapter.num_branches: 4</code>" in part


def test_settings_and_seconds_are_shown(file: Path) -> None:
    settings = {"features": "tfidf", "stop_words": None, "sample": {"documents": 20000, "of": 1e6}}
    part = page(discovered(settings=settings), file).split('id="how"')[1]
    assert '<th>stop words</th><td class="text">none</td>' in part
    assert "documents: 20,000; of: 1e+06" in part
    assert "It took 24 s: features 3.2 s, curve 15 s" in part


def test_plots_and_clusters_carry_their_data(file: Path) -> None:
    data = tables(page(discovered(), file))
    curve = data["k,sse,silhouette,davies_bouldin"]
    assert len(curve) == 20 and curve[0] == "1,7105.2,," and curve[3] == "4,4263.12,0.31,1.6"
    assert data["cluster,documents,terms"][1].startswith("2-bash-command-directory,1160,bash comm")
    heads = ",".join(discovered().names)
    assert data[f"task,{heads},none"][0] == "legal_task_00,268,0,0,0,2"
