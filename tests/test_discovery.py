"""What discovery finds in corpora whose answer is known, and what it does with odd ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from manylora.corpus import CorpusError
from manylora.discovery.discover import Documents, Found, discover
from manylora.discovery.options import DiscoveryOptions

# Three subjects, and for each of them several wordings of what is to be done.
WORDS = {
    "cooking": "onion garlic simmer oven butter flour whisk roast pepper saucepan recipe dough",
    "sailing": "harbour anchor mast rudder tide sailor deck compass knot keel lighthouse wind",
    "banking": "account transfer interest loan deposit cheque overdraft balance branch fee card",
}
WORDINGS = {
    "cooking": ["Turn this into a dish.", "What would you cook here?", "Suggest a meal for it."],
    "sailing": ["Plan the voyage below.", "Where should the boat go?", "Name the next port."],
    "banking": ["Help this customer.", "What does the client want?", "Answer the request below."],
}


def corpus(
    each: int = 60, *, wordings: int = 1, seed: int = 0, subjects: Sequence[str] = tuple(WORDS)
) -> tuple[list[str], list[str]]:
    """(texts, subjects): so many documents of each subject, with so many wordings."""
    draw = random.Random(seed)
    texts, tasks = [], []
    for subject in subjects:
        for number in range(each):
            wording = WORDINGS[subject][number % wordings]
            content = " ".join(draw.choices(WORDS[subject].split(), k=12))
            texts.append(f"{wording}\n{content}.")
            tasks.append(subject)
    return texts, tasks


def found(texts: Sequence[str], tasks: Sequence[str] | None = None, **options: object) -> Found:
    seed = int(str(options.pop("seed", 0)))
    known = ["data"] * len(texts) if tasks is None else list(tasks)
    sources = [f"data.jsonl:{number}" for number in range(1, len(texts) + 1)]
    wanted = DiscoveryOptions.model_validate({"max_clusters": 12, **options})
    return discover(Documents(texts, known, sources), wanted, seed)


@pytest.mark.parametrize(("each", "wordings"), [(60, 1), (300, 3)])
def test_three_subjects_are_three_clusters(each: int, wordings: int) -> None:
    texts, tasks = corpus(each, wordings=wordings)
    done = found(texts, tasks)
    assert done.discovery.k == 3
    assert adjusted_rand_score(tasks, done.labels) == 1
    assert done.discovery.agreement is not None
    assert done.discovery.agreement.ari == pytest.approx(1)
    assert done.discovery.heterogeneity.several
    assert done.discovery.branches == 3
    terms = {frozenset(cluster.terms) for cluster in done.discovery.clusters}
    assert all(any(set(words.split()) & own for own in terms) for words in WORDS.values())


def test_one_subject_is_worth_one_branch() -> None:
    done = found(corpus(200, subjects=["sailing"])[0])
    assert not done.discovery.heterogeneity.several
    assert done.discovery.branches == 1
    assert "one branch" in done.discovery.heterogeneity.advice


def test_the_same_seed_finds_the_same() -> None:
    texts, _ = corpus(wordings=3)
    one, two = found(texts, seed=3), found(texts, seed=3)
    without = {"seconds": {}}
    assert one.discovery.model_copy(update=without) == two.discovery.model_copy(update=without)
    assert np.array_equal(one.labels, two.labels)
    assert np.array_equal(one.similarity, two.similarity)


def test_seeds_agree_on_what_is_clear() -> None:
    texts, _ = corpus()
    one = found(texts, seed=0)
    for seed in (1, 2, 3):
        assert adjusted_rand_score(one.labels, found(texts, seed=seed).labels) == 1


def test_the_order_of_the_rows_does_not_matter_to_clear_groups() -> None:
    texts, _ = corpus()
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = found([texts[i] for i in order])
    assert adjusted_rand_score(found(texts).labels[order], shuffled.labels) == 1


def test_rows_beyond_the_sample_are_put_where_they_belong() -> None:
    texts, tasks = corpus(100)
    done = found(texts, sample=60)
    assert adjusted_rand_score(tasks, done.labels) == 1
    assert "60 of 300" in done.discovery.settings["learned from"]


def test_the_curve_never_rises() -> None:
    sse = [candidate.sse for candidate in found(corpus()[0]).discovery.curve]
    assert len(sse) == 12
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(sse))


def test_clusters_are_in_order_of_size_and_counted() -> None:
    texts = corpus(20, subjects=["cooking"])[0] + corpus(90, subjects=["sailing", "banking"])[0]
    done = found(texts)
    sizes = [cluster.size for cluster in done.discovery.clusters]
    assert sizes == sorted(sizes, reverse=True) == np.bincount(done.labels).tolist()
    assert [name.partition("-")[0] for name in done.discovery.names] == ["1", "2", "3"]


def test_the_criteria_that_say_otherwise_are_named() -> None:
    done = found(corpus()[0], clusters=5)
    assert done.discovery.k == 5 and done.discovery.chosen_by == "given"
    assert "5 is taken" in done.discovery.disagreement
    for criterion in done.discovery.criteria:
        if criterion.k not in (None, 5):
            assert f"{criterion.name} says {criterion.k}" in done.discovery.disagreement


def test_one_document_is_one_cluster() -> None:
    done = found(["Where is the harbour?"])
    assert done.discovery.k == done.discovery.branches == 1
    assert done.labels.tolist() == [0]


def test_two_documents_are_at_most_two_clusters() -> None:
    done = found(["Where is the harbour?", "Add the numbers 3 and 4."])
    assert done.discovery.k in (1, 2)
    assert done.discovery.branches == 1
    assert sorted(set(done.labels.tolist())) == list(range(done.discovery.k))


def test_equal_documents_are_one_cluster() -> None:
    done = found(["Where is the harbour?"] * 50)
    assert done.discovery.k == done.discovery.branches == 1
    assert set(done.labels.tolist()) == {0}


def test_documents_without_a_letter_are_in_no_cluster() -> None:
    texts, tasks = corpus(40)
    done = found(["", *texts, "  \n", "?!"], ["empty", *tasks, "empty", "empty"])
    assert done.discovery.apart == 3
    assert done.labels[[0, -2, -1]].tolist() == [-1, -1, -1]
    assert done.similarity[[0, -2, -1]].tolist() == [0, 0, 0]
    assert adjusted_rand_score(tasks, done.labels[1:-2]) == 1
    assert done.discovery.agreement is not None
    assert done.discovery.agreement.rows["empty"] == [0, 0, 0, 3]
    assert sum(cluster.size for cluster in done.discovery.clusters) == len(texts)


def test_nothing_but_empty_documents_is_an_error() -> None:
    with pytest.raises(CorpusError, match="none of the 3 prompts has a letter or a digit"):
        found(["", " ", "...\n"])


def test_more_clusters_than_different_documents_is_an_error() -> None:
    with pytest.raises(CorpusError, match=r"5 clusters are asked for.*at most 2"):
        found(["Where is the harbour?", "Add 3 and 4."] * 20, clusters=5)


def test_as_many_clusters_as_different_documents() -> None:
    texts = ["Where is the harbour?", "Add 3 and 4.", "Whisk the butter."] * 10
    done = found(texts, clusters=3)
    assert adjusted_rand_score([0, 1, 2] * 10, done.labels) == 1


def test_the_curve_may_be_wanted_further_than_there_are_documents() -> None:
    done = found(["Where is the harbour?", "Add 3 and 4.", "Whisk the butter."], max_clusters=500)
    assert [candidate.k for candidate in done.discovery.curve] == [1, 2, 3]


SCRIPTS = {
    "chinese": ("锅里放油炒青菜加盐和酱油煮米饭", "银行账户转账利息贷款存款支票余额手续费"),
    "arabic": ("طبخ بصل ثوم زبدة فرن طحين ملح فلفل", "حساب تحويل قرض فائدة إيداع رصيد رسوم بطاقة"),
    "cyrillic": (
        "лук чеснок масло духовка мука соль перец",
        "счёт перевод кредит вклад баланс карта",
    ),
    "thai": ("หัวหอมกระเทียมเนยเตาอบแป้งเกลือ", "บัญชีโอนเงินดอกเบี้ยเงินกู้เงินฝากบัตร"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_subjects_in_any_script_are_told_apart(script: str) -> None:
    draw = random.Random(0)
    texts, tasks = [], []
    for task, words in enumerate(SCRIPTS[script]):
        spaced = " " in words
        pool = words.split() if spaced else [words[i : i + 2] for i in range(len(words) - 1)]
        for _ in range(60):
            texts.append((" " if spaced else "").join(draw.choices(pool, k=10)))
            tasks.append(task)
    done = found(texts, clusters=2)
    assert adjusted_rand_score(tasks, done.labels) > 0.9


def test_emoji_alone_are_nothing_to_read() -> None:
    with pytest.raises(CorpusError, match="letter or a digit"):
        found(["😀😀🎉", "⛵⚓", "🍳🧄"])


def test_documents_of_one_word() -> None:
    done = found(["yes", "no", "maybe", "yes", "no"] * 8, clusters=3)
    assert adjusted_rand_score([0, 1, 2, 0, 1] * 8, done.labels) == 1


def test_a_document_of_ten_megabytes_is_one_among_others() -> None:
    texts, tasks = corpus(40)
    long = "Plan the voyage below.\n" + "anchor harbour tide sailor " * 400_000
    done = found([*texts, long])
    assert adjusted_rand_score(tasks, done.labels[:-1]) == 1
    assert done.labels[-1] == done.labels[tasks.index("sailing")]
    assert all(len(c.text) < 1000 for own in done.discovery.clusters for c in own.central)
