"""MKQA (Longpre et al. 2021, arXiv 2007.15207): questions in 26 languages, answers looked for in English Wikipedia.

    DIR/mkqa.jsonl.gz                   {"example_id", "queries": {language: text}, "answers": {"en": [...]}}
    DIR/corpus.jsonl[.gz]               {"_id" or "id", "title", "text"}: the passages of BEIR's nq

Measured is the share of questions with an accepted English answer among the best k passages (Success@k, called
Recall@k in the paper). Questions are kept as in Izacard et al. 2022 (arXiv 2112.09118): those whose English answer is
unanswerable, yes or no, or long are left out, which leaves 6619. Passages are lower-cased and their punctuation is
made uniform (`uniform_text`). An answer counts if its tokens follow one another in the passage (`answer_tokens`), the
definition of Karpukhin et al. 2020 (DPR): NFD, lower case, runs of letters, digits and marks, or single symbols.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import regex

from m3model.evaluation.files import choose, existing, json_lines, required
from m3model.evaluation.tasks import Collection, Passage, Run, Task

__all__ = ["LANGUAGES", "answer_tokens", "judge_by_answers", "read_mkqa", "uniform_text"]

_CODES = "en ar fi ja ko ru es sv he th da de fr it nl pl pt hu vi ms km no tr zh_cn zh_hk zh_tw"
LANGUAGES = _CODES.split()
_QUESTIONS = "https://github.com/apple/ml-mkqa (dataset/mkqa.jsonl.gz)"
_CORPUS = "https://huggingface.co/datasets/BeIR/nq (corpus.jsonl.gz)"
_LEFT_OUT = {"unanswerable", "binary", "long_answer"}

_REMOVED = [chr(code) for code in (*range(1, 9), 14, 15, *range(17, 28))] + ["\xad"]
_UNIFORM = {
    " ": "\x0b\x0c\x85",
    "-": "‐‑⁃‒–—―−－⁻",
    '"': "“”„‟",
    "'": "’՚Ꞌꞌ＇‘‚‛`´′‵",
    "''": "″‶",
    "'''": "‴‷",
    "''''": "⁗",
    "...": "…",
    "/": "⁄∕",
}
_TRANSLATION = str.maketrans(
    {character: target for target, characters in _UNIFORM.items() for character in characters}
    | dict.fromkeys(_REMOVED, "")
)
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def read_mkqa(folder: Path, languages: Iterable[str] | None = None) -> list[Task]:
    """One task for each language; all share the collection of English passages.

    Raises:
        FileNotFoundError: questions or passages are missing.
        ValueError: no such language, or a damaged line.
    """
    chosen = choose("MKQA", languages, LANGUAGES)
    path = existing(folder, ["mkqa.jsonl", "dataset/mkqa.jsonl"], "MKQA's questions", _QUESTIONS)
    corpus = existing(folder, ["corpus.jsonl", "nq/corpus.jsonl"], "the passages of BEIR's nq", _CORPUS)
    queries: dict[str, dict[str, str]] = {language: {} for language in chosen}
    answers: dict[str, tuple[str, ...]] = {}
    for number, row in json_lines(path):
        accepted = _accepted(required(row, "answers", path, number).get("en", []))
        if not accepted:
            continue
        query = str(required(row, "example_id", path, number))
        answers[query] = accepted
        for language in chosen:
            queries[language][query] = required(required(row, "queries", path, number), language, path, number)
    collection = Collection("mkqa-nq", lambda: _passages(corpus))
    return [
        Task("mkqa", language, collection, queries[language], ("Success@100", "Success@20"), "mkqa", answers=answers)
        for language in chosen
    ]


def uniform_text(text: str) -> str:
    """`text` with dashes, quotes, slashes and ellipses in their ASCII forms and without control characters."""
    return text.translate(_TRANSLATION).replace(" . . . ", " ... ")


def answer_tokens(text: str) -> str:
    """The tokens that answers are compared in, with one space around each, so that `in` finds contiguous tokens."""
    tokens = _TOKEN.findall(unicodedata.normalize("NFD", text))
    return f" {' '.join(tokens).lower()} "


def judge_by_answers(run: Run, task: Task) -> dict[str, dict[str, int]]:
    """Judgements of the passages of a run: 1 where one of the question's answers stands in the passage, otherwise 0.

    Reads the collection once and keeps the passages that the run names.
    """
    if task.answers is None:
        raise ValueError(f"{task.dataset} {task.name} has no answers to judge by")
    named = {passage for ranking in run.values() for passage in ranking}
    tokens = {passage.id: answer_tokens(passage.contents) for passage in task.collection if passage.id in named}
    missing = named - tokens.keys()
    if missing:
        raise ValueError(f"the run names {len(missing)} passages that the collection lacks, such as {min(missing)!r}")
    judged: dict[str, dict[str, int]] = {}
    for query, answers in task.answers.items():
        sought = [form for form in map(answer_tokens, answers) if form.strip()]
        ranking: Mapping[str, float] = run.get(query, {})
        judged[query] = {passage: int(any(form in tokens[passage] for form in sought)) for passage in ranking}
    return judged


def _accepted(answers: list[dict[str, Any]]) -> tuple[str, ...]:
    """Answer strings of a question, none if it is left out; the last answer decides, as in the published script."""
    if not answers or answers[-1].get("type") in _LEFT_OUT:
        return ()
    kept = [answer for answer in answers if answer.get("type") not in _LEFT_OUT]
    strings = [text for answer in kept for text in (*answer.get("aliases", ()), answer.get("text"))]
    return tuple(text for text in strings if text)


def _passages(path: Path) -> Iterator[Passage]:
    for number, row in json_lines(path):
        identifier = str(row["_id"] if "_id" in row else required(row, "id", path, number))
        title, text = row.get("title") or "", required(row, "text", path, number)
        yield Passage(identifier, uniform_text(text).lower(), uniform_text(title).lower())
