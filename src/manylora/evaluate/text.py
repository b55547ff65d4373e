"""How near a written answer is to the right one, example by example, 0 to 1.

    token_f1  overlap of white-space tokens, lower case (SQuAD's F1 without its article and
              punctuation rules)
    rouge_l   F1 of the longest common subsequence of words (Lin 2004, sentence level), by
              rouge-score, without stemming; words are its own for English, and letters of any
              other script count too, where rouge-score alone would find no word
    bleu      sentence BLEU-4 (Papineni et al. 2002) by sacrebleu, cased, tokenizer 13a (its and
              WMT's standard), exponential smoothing, effective order: an answer shorter than four
              words is not scored on four-grams it cannot have. Means of it over rows are not
              corpus BLEU.

A task's answers are text when half of its right answers have three white-space words or more:
below that ROUGE-L and BLEU say nothing that token F1 does not. Scripts without spaces between words
(Chinese, Japanese, Thai) thus keep token F1 alone; BLEU's 13a could not split them either.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from statistics import median

MIN_WORDS = 3


class _Words:
    """rouge-score's tokenizer, with letters and digits of every script."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def text_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Each metric's value for each answer; ROUGE-L and BLEU where the references are text."""
    pairs = list(zip(answers, references, strict=True))
    scores = {"token_f1": [token_f1(answer, reference) for answer, reference in pairs]}
    if is_text(references):
        scores["rouge_l"] = rouge_l(answers, references)
        scores["bleu"] = bleu(answers, references)
    return scores


def is_text(references: Sequence[str]) -> bool:
    """Whether right answers are several words long: their median is at least three."""
    return median(len(reference.split()) for reference in references) >= MIN_WORDS


def token_f1(answer: str, reference: str) -> float:
    """F1 of the white-space tokens of two texts, lower case; 1 when both are empty."""
    ours, theirs = answer.lower().split(), reference.lower().split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of each answer; 1 where both texts have no word."""
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk, which takes over a second

    words = _Words()
    scorer = RougeScorer(["rougeL"], tokenizer=words)
    return [
        float(scorer.score(reference, answer)["rougeL"].fmeasure)
        if words.tokenize(answer) or words.tokenize(reference)
        else 1.0
        for answer, reference in zip(answers, references, strict=True)
    ]


def bleu(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """Sentence BLEU of each answer, divided by 100; 1 where both texts are empty."""
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(effective_order=True, tokenize="13a", smooth_method="exp")
    return [
        min(1.0, scorer.sentence_score(answer, [reference]).score / 100)  # 100.00000000000004
        if answer.split() or reference.split()
        else 1.0
        for answer, reference in zip(answers, references, strict=True)
    ]
