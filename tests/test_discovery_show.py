"""A discovery in the terminal: the answer first, every criterion, tasks that fit the width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from discovered import discovered, one_cluster
from manylora.discovery.result import Agreement, Cluster, Discovery
from manylora.discovery.show import percent, print_discovery


def shown(found: Discovery, width: int = 100) -> str:
    out = io.StringIO()
    print_discovery(found, Console(file=out, width=width, highlight=False))
    return out.getvalue()


def line_of(text: str, start: str) -> str:
    return " ".join(
        next(line for line in text.splitlines() if line.strip().startswith(start)).split()
    )


def test_the_first_words_are_the_answer_and_its_reason() -> None:
    text = " ".join(shown(discovered()).split())
    assert text.startswith(
        "4 clusters in 4,572 documents, 12 of them in none (elbow); worth several branches: yes. "
        "The clusters are 13 times as far apart"
    )


def test_every_criterion_is_shown_and_the_one_that_chose_is_marked() -> None:
    text = shown(discovered())
    assert line_of(text, "elbow") == "elbow 4 chosen"
    assert line_of(text, "silhouette  ") == "silhouette 6"
    assert line_of(text, "davies_bouldin") == "davies_bouldin 4"
    assert line_of(text, "dbscan") == "dbscan no answer no radius separates the documents"
    assert line_of(text, "hdbscan") == "hdbscan 7 38 % of the documents in none"
    assert text.count("chosen") == 1


def test_a_given_number_stands_first_among_the_criteria() -> None:
    text = shown(discovered(chosen_by="given"))
    assert "(given)" in text
    assert line_of(text, "given") == "given 4 chosen"
    assert line_of(text, "elbow") == "elbow 4"


def test_disagreement_is_said_only_where_there_is_one() -> None:
    assert "silhouette says 6 and HDBSCAN 7; the elbow was taken." in shown(discovered())
    assert "says" not in shown(discovered(disagreement=""))


def test_clusters_have_name_size_share_and_terms() -> None:
    text = shown(discovered())
    start = "1-clause-contract-party 1,200 26 % clause, contract, party"
    assert line_of(text, "1-clause").startswith(start)
    assert line_of(text, "in none") == "in none 12 <1 %"
    assert "in none" not in shown(discovered(apart=0)).replace("documents in none", "")


def test_a_task_is_shown_with_the_clusters_that_it_is_in() -> None:
    text = shown(discovered())
    assert line_of(text, "banking_task_02") == "banking_task_02 270 3: 90 %, 4: 9 %, none: 1 %"
    assert "adjusted Rand index 0.87, normalised mutual information 0.91" in text


def test_a_task_that_is_everywhere_is_cut_to_its_fullest_clusters() -> None:
    spread = Agreement(rows={"all": [10, 20, 30, 5, 5, 5, 25, 0]}, ari=0.0, nmi=0.0)
    text = shown(discovered(7, agreement=spread))
    assert (
        line_of(text, "all") == "all 100 3: 30 %, 7: 25 %, 2: 20 %, 1: 10 %, 4: 5 %, 2 more: 10 %"
    )


def test_26_tasks_in_20_clusters_fit_100_columns_a_line_each() -> None:
    text = shown(discovered(20, 26))
    assert max(map(len, text.splitlines())) <= 100
    assert sum("_task_" in line and "none: 1 %" in line for line in text.splitlines()) == 26


def test_tasks_stand_in_the_order_of_their_clusters() -> None:
    text = shown(discovered(20, 26))
    homes = [line.split()[2] for line in text.splitlines() if "_task_" in line]
    assert [int(home.rstrip(":")) for home in homes] == sorted(int(h.rstrip(":")) for h in homes)


def test_without_named_tasks_nothing_is_said_of_them() -> None:
    text = shown(discovered(tasks=0))
    assert "Rand" not in text and "task" not in text


def test_one_cluster_is_an_answer() -> None:
    text = " ".join(shown(one_cluster()).split())
    assert text.startswith(
        "1 cluster in 1,212 documents, 12 of them in none (elbow); worth several"
    )
    assert "branches: no. One branch is enough." in text
    assert "variance" not in text


def test_how_it_was_found_is_said() -> None:
    text = " ".join(shown(discovered()).split())
    assert "features: tfidf; vocabulary: 32,768;" in text and "seed: 0" in text
    assert "It took 24 s: features 3.2 s, curve 15 s, density 6.0 s, describe 0.4 s" in text
    assert "41.2 % of the documents' variance" in text and "documents, 3.1 %." in text


def test_markup_and_escape_codes_from_the_data_are_only_text() -> None:
    evil = "[red]\x1b[31mx[/nope]"
    told = Agreement(rows={f"task {evil}": [3, 0]}, ari=1.0, nmi=1.0)
    cluster = Cluster(name=f"1-{evil}", size=3, terms=[evil], central=[])
    text = shown(discovered(1, clusters=[cluster], agreement=told, settings={"features": evil}))
    assert "\x1b" not in text
    assert text.count("[red] [31mx[/nope]") == 4


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [(0, 9, "0 %"), (9, 9, "100 %"), (1, 1000, "<1 %"), (999, 1000, ">99 %"), (1, 3, "33 %")],
)
def test_percent_is_exact_at_its_ends(part: int, whole: int, said: str) -> None:
    assert percent(part, whole) == said
