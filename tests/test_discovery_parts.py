"""The parts of discovery, each against an answer that is known beforehand."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from manylora.corpus.layouts import Message
from manylora.discovery import choice, describe
from manylora.discovery.curve import Curve, Tree, cluster, measure, some
from manylora.discovery.density import density
from manylora.discovery.documents import readable, text_of
from manylora.discovery.heterogeneity import explained, shuffled
from manylora.discovery.result import Candidate, Criterion
from manylora.discovery.segments import Segments, split
from manylora.discovery.space import Space, Tfidf, unit


def groups(k: int, each: int = 60, spread: float = 0.05, dimensions: int = 12) -> np.ndarray:
    """Unit rows around k axes."""
    noise = np.random.default_rng(0).normal(0, spread, (k * each, dimensions))
    return unit(np.repeat(np.eye(dimensions)[:k], each, axis=0) + noise)


def curve_of(rows: np.ndarray, most: int = 10) -> Curve:
    return measure(rows, most, 0, lambda k: None)


# Documents and sentences.


def test_a_document_is_everything_asked_and_no_answer() -> None:
    turns = [
        Message(role="system", content="Be brief."),
        Message(role="user", content="What is 1 + 1?"),
        Message(role="assistant", content="2"),
        Message(role="user", content="And 2 + 2?"),
        Message(role="assistant", content="4"),
    ]
    assert text_of(turns) == "Be brief.\nWhat is 1 + 1?\n2\nAnd 2 + 2?"
    assert text_of(turns[:-1]) == text_of(turns)


def test_letters_and_digits_of_any_script_can_be_read() -> None:
    texts = ["word", "7", "猫", "слово", "", "  \n", "?!…", "🙂"]
    assert list(readable(texts)) == [True, True, True, True, False, False, False, False]


def test_a_text_is_split_at_lines_ends_of_sentences_and_labels() -> None:
    text = "Answer yes or no. Question: is 3.5 more than 3?\n\nOptions:\n- yes\n- no"
    assert split(text) == [
        "Answer yes or no.",
        "Question:",
        "is 3.5 more than 3?",
        "Options:",
        "- yes",
        "- no",
    ]
    assert split("请回答问题。什么是猫？") == ["请回答问题。", "什么是猫？"]


def test_sentences_that_repeat_are_taken_out_of_the_content() -> None:
    texts = [f"Answer yes or no. Is number {n} even?" for n in range(4)]
    segments = Segments(texts)
    assert list(segments.places) == ["Answer yes or no."]
    assert segments.content(texts[2]) == "Is number 2 even?"
    assert Segments(texts[:3]).content(texts[2]) == "Answer yes or no.\nIs number 2 even?"


def test_a_text_of_nothing_but_repeated_sentences_keeps_them() -> None:
    assert Segments(["Say hello."] * 5).content("Say hello.") == "Say hello."


def test_a_long_text_keeps_its_two_ends() -> None:
    text = "begin " + "x" * 10_000_000 + " end"
    content = Segments(["a"]).content(text)
    assert len(content) < 1600 and content.startswith("begin") and content.endswith("end")


def test_shared_sentences_weigh_the_same_within_a_text() -> None:
    texts = ["One. Two. a", "One. Two. b", "One. c", "One. d", "Two. e", "Two. f", "g"]
    shared = Segments(texts).shared(texts).toarray()
    assert shared[0].tolist() == [0.5, 0.5]
    assert sorted(shared[2].tolist()) == [0.0, 1.0]
    assert shared[6].sum() == 0


# The space.

WORDINGS = {
    "sums": ["Work out the sum.", "How much is it together?", "Please add these numbers up."],
    "animals": ["Which sound does it make?", "Say how this one calls.", "Its noise, please."],
}


def worded() -> tuple[list[str], list[str], list[str]]:
    """Texts of two tasks in three wordings each; the tasks; the wordings."""
    rng = np.random.default_rng(0)
    texts, tasks, said = [], [], []
    contents = {
        "sums": lambda: f"{rng.integers(100)} + {rng.integers(100)} + {rng.integers(100)}",
        "animals": lambda: " ".join(rng.choice(["the", "cow", "dog", "duck", "cat", "owl"], 4)),
    }
    for task, content in contents.items():
        for number in range(90):
            wording = WORDINGS[task][number % 3]
            texts.append(f"{wording}\n{content()}")
            tasks.append(task)
            said.append(wording)
    return texts, tasks, said


def test_wordings_of_one_task_lie_together_and_tasks_apart() -> None:
    texts, tasks, said = worded()
    rows = Space(Tfidf(0)).fit(texts)
    middle = {w: rows[[s == w for s in said]].mean(0) for ws in WORDINGS.values() for w in ws}
    for task, wordings in WORDINGS.items():
        other = [w for name, ws in WORDINGS.items() if name != task for w in ws]
        near = max(np.linalg.norm(middle[a] - middle[b]) for a in wordings for b in wordings)
        far = min(np.linalg.norm(middle[a] - middle[b]) for a in wordings for b in other)
        assert far > 2 * near
    labels = cluster(rows, 2, 0, Tree.over(rows, 0)).labels_
    assert adjusted_rand_score(tasks, labels) == 1.0


def test_a_text_lies_where_the_same_text_lay_in_the_sample() -> None:
    texts, _, _ = worded()
    space = Space(Tfidf(0))
    rows = space.fit(texts)
    np.testing.assert_allclose(space.rows(texts[5:9]), rows[5:9], atol=1e-5)
    told: list[int] = []
    np.testing.assert_allclose(space.in_parts(texts, told.append), rows, atol=1e-5)
    assert told[-1] == len(texts)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


# The curve and its criteria.


def test_the_curve_starts_at_the_whole_variance_and_never_rises() -> None:
    rows = groups(4, spread=0.2)
    found = curve_of(rows)
    sse = [candidate.sse for candidate in found.candidates]
    assert sse[0] == pytest.approx(float(((rows - rows.mean(0)) ** 2).sum()))
    assert all(later <= earlier for earlier, later in pairwise(sse))
    assert found.candidates[0].silhouette is None


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_every_criterion_sees_groups_that_stand_apart(k: int) -> None:
    rows = groups(k)
    found = [*choice.criteria(curve_of(rows, 30)), *density(rows, 0)]
    assert {criterion.name: criterion.k for criterion in found} == dict.fromkeys(
        ("gap", "log_elbow", "elbow", "silhouette", "davies_bouldin", "dbscan", "hdbscan"), k
    )
    assert choice.disagreement(k, found) == ""
    assert choice.choose(found).name == "gap"


def test_gains_of_the_tree_are_what_each_cluster_saves() -> None:
    rows = np.array([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 3.0]], dtype=np.float32)
    gains = Tree.over(rows, 0).gains(10)
    assert gains == pytest.approx({2: 82.0, 3: 4.5, 4: 0.5})


def test_the_elbow_decides_where_gains_only_fade() -> None:
    rows = unit(np.random.default_rng(0).normal(size=(400, 12)))
    found = choice.criteria(curve_of(rows))
    assert found[0].k is None and "no drop" in found[0].note
    assert found[1].k is None and "below 0.5" in found[1].note
    assert choice.choose(found).name == "elbow"


def test_a_disagreement_names_who_says_otherwise() -> None:
    found = [
        Criterion(name="gap", k=4),
        Criterion(name="elbow", k=9),
        Criterion(name="dbscan", k=None),
        Criterion(name="hdbscan", k=14),
    ]
    assert choice.disagreement(4, found) == (
        "The criteria disagree: 4 is taken, but elbow says 9, hdbscan says 14."
    )


def test_one_different_row_is_one_cluster() -> None:
    found = Curve([Candidate(k=1, sse=0.0)], None)
    assert choice.choose(choice.criteria(found)).k == 1


def test_some_rows_are_different_rows_in_their_order() -> None:
    rows = np.arange(50, dtype=np.float32)[:, None]
    few = some(rows, 10, 3).ravel()
    assert len(few) == 10 and list(few) == sorted(set(few))
    assert some(rows, 50, 3) is rows


# Descriptions.


def test_the_terms_of_a_cluster_set_it_apart() -> None:
    texts = ["the court overruled the case"] * 5 + ["the dog chased the cat"] * 5
    terms = describe.top_terms(texts, np.repeat([0, 1], 5).astype(np.int32), 2)
    assert set(terms[0]) == {"court", "overruled", "case"}
    assert set(terms[1]) == {"dog", "chased", "cat"}


def test_a_cluster_without_words_has_no_terms_but_a_name() -> None:
    terms = describe.top_terms(["1 + 1", "2"], np.array([0, 1], dtype=np.int32), 2)
    assert terms == [[], []]
    assert describe.names_of(terms) == ["1", "2"]


def test_names_are_numbered_and_can_be_file_names() -> None:
    assert describe.names_of([["select", "from", "where", "x"], ["a/b", "../c"]]) == [
        "1-select-from-where",
        "2-ab-c",
    ]


def test_the_central_documents_are_the_nearest_each_text_once() -> None:
    texts = ["far", "near", "near", "nearest", "other"]
    closeness = np.array([0.1, 0.8, 0.7, 0.9, 1.0], dtype=np.float32)
    labels = np.array([0, 0, 0, 0, 1], dtype=np.int32)
    found = describe.central(texts, list("abcde"), ["t"] * 5, closeness, labels, 0)
    assert [(c.text, c.source) for c in found] == [("nearest", "d"), ("near", "b"), ("far", "a")]


def test_agreement_counts_and_measures_against_the_named_tasks() -> None:
    tasks = ["x", "x", "x", "y", "y", "y"]
    labels = np.array([0, 0, 1, 1, 1, -1], dtype=np.int32)
    found = describe.agreement(tasks, labels, 2)
    assert found is not None
    assert found.rows == {"x": [2, 1, 0], "y": [0, 2, 1]}
    assert found.ari == pytest.approx(adjusted_rand_score(tasks, labels))
    assert found.nmi == pytest.approx(normalized_mutual_info_score(tasks, labels))
    assert describe.agreement(["x"] * 6, labels, 2) is None


# Heterogeneity.


def test_the_control_has_the_same_words_and_lengths_in_another_order() -> None:
    texts = [f"word{n} " * (n % 5 + 1) for n in range(40)]
    control = shuffled(texts, 0)
    assert [len(t.split()) for t in control] == [len(t.split()) for t in texts]
    assert Counter(" ".join(control).split()) == Counter(" ".join(texts).split())
    assert control != [" ".join(t.split()) for t in texts]
    assert shuffled(texts, 0) == control != shuffled(texts, 1)


def test_the_share_between_clusters_is_one_for_points_and_small_for_noise() -> None:
    assert explained(np.repeat(np.eye(3), 20, axis=0), 3, 0) == pytest.approx(1.0)
    noise = unit(np.random.default_rng(0).normal(size=(500, 40)))
    assert explained(noise, 3, 0) < 0.1
    assert explained(np.ones((5, 3)), 2, 0) == 0.0
