"""Scorers that compare the text of an answer with references: Rouge-L, exact match, contains."""

from __future__ import annotations

from dskd_eval.scorers import rouge
from dskd_eval.scorers.base import Answer, AnswerScorer
from dskd_eval.scorers.metrics import EXACT_MATCH, Judgement, Metric, Value


def _is_a_reference(answer: Answer) -> bool:
    return any(rouge.plain(answer.text) == rouge.plain(reference) for reference in answer.references)


class RougeL(AnswerScorer):
    """The longest common subsequence with the nearest reference."""

    name = "rouge_l"
    metrics = {
        "rouge_l": Metric(
            "Rouge-L", "F-measure of the longest common subsequence, Porter stemmer, best reference", graded=True
        ),
        "exact_match": EXACT_MATCH,
        "response_words": Metric("words", "mean number of words of an answer", "words"),
        "rouge_l_unicode": Metric(
            "Rouge-L, any script", "as Rouge-L, over the words or characters of any script", graded=True
        ),
    }
    modules = ("rouge_score", "nltk")

    def score_one(self, answer: Answer) -> Judgement:
        metrics: dict[str, Value] = {
            "rouge_l": max(rouge.rouge_l(answer.text, reference) for reference in answer.references),
            "exact_match": float(_is_a_reference(answer)),
            "response_words": float(len(answer.text.split())),
            "rouge_l_unicode": max(rouge.rouge_l_unicode(answer.text, reference) for reference in answer.references),
        }
        notes = [note for reference in answer.references if (note := rouge.unseen(reference))]
        return Judgement(metrics, {"unseen_by_rouge_l": notes[0]} if notes else {})


class ExactMatch(AnswerScorer):
    """The answer is a reference."""

    name = "exact_match"
    metrics = {"exact_match": EXACT_MATCH}

    def score_one(self, answer: Answer) -> Judgement:
        return Judgement({"exact_match": float(_is_a_reference(answer))})


class Contains(AnswerScorer):
    """A reference stands somewhere in the answer."""

    name = "contains"
    metrics = {
        "contains": Metric("contains", "a reference occurs in the answer, ignoring case"),
        "exact_match": EXACT_MATCH,
    }

    def score_one(self, answer: Answer) -> Judgement:
        text = rouge.plain(answer.text)
        inside = any(rouge.plain(reference) in text for reference in answer.references if reference.strip())
        return Judgement({"contains": float(inside), "exact_match": float(_is_a_reference(answer))})
