"""Question answering files in SQuAD's JSON as retrieval: which paragraph was the question written for?

    DIR/xquad.XX.json, DIR/NAME.json    {"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question"}]}]}]}

XQuAD (Artetxe et al. 2020, arXiv 1910.11856) is parallel: paragraph i is the same in all languages. Settings:

    monolingual     question and paragraphs in one language
    cross-lingual   question in a language, paragraphs in another one (English)
    pool            the paragraphs of all languages together; relevant is the one in the question's language
    pool-all        the same pool; every translation of the paragraph is relevant (LAReQA, arXiv 2004.05484)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3model.evaluation.files import choose, open_text
from m3model.evaluation.tasks import Collection, Passage, Task

__all__ = ["SETTINGS", "read_squad", "read_xquad"]

SETTINGS = ("monolingual", "cross-lingual", "pool", "pool-all")
_XQUAD = "https://github.com/google-deepmind/xquad"
_MEASURES = ("nDCG@10", "R@10", "R@100", "RR@10", "Success@1")


def read_xquad(
    folder: Path,
    languages: Iterable[str] | None = None,
    *,
    settings: Iterable[str] = SETTINGS,
    target: str = "en",
) -> list[Task]:
    """Tasks of parallel files xquad.XX.json: one for each language and setting.

    Args:
        folder: holds the files; its languages are those that it has files of.
        languages: of the questions; the pool always holds all languages of the folder.
        settings: of SETTINGS.
        target: language of the paragraphs in the cross-lingual setting.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: unknown language or setting, files that are not parallel or no SQuAD JSON.
    """
    found = sorted(path.name.split(".")[1] for path in folder.glob("xquad.*.json*"))
    if not found:
        raise FileNotFoundError(f"{folder} has no xquad.*.json: XQuAD's paragraphs and questions. From {_XQUAD}")
    chosen = choose("XQuAD here", languages, found)
    wanted = choose("XQuAD", settings, SETTINGS, "setting")
    if "cross-lingual" in wanted:
        choose("XQuAD here", [target], found)
    pooled = any(setting.startswith("pool") for setting in wanted)
    needed = found if pooled else sorted({*chosen, target} if "cross-lingual" in wanted else chosen)
    parsed = {language: _parse(_xquad_file(folder, language)) for language in needed}
    sizes = {language: len(content.paragraphs) for language, content in parsed.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the XQuAD files in {folder} are not parallel: numbers of paragraphs {sizes}")
    collections = {
        language: _collection(f"xquad-{language}", language, content) for language, content in parsed.items()
    }
    pool = Collection.union("xquad-pool", collections.values())
    tasks = []
    for setting in wanted:
        for language in chosen:
            if setting == "cross-lingual" and language == target:
                continue
            name, collection, relevant = {
                "monolingual": (language, collections[language], [language]),
                "cross-lingual": (f"{language}-{target}", collections.get(target), [target]),
                "pool": (f"{language}-pool", pool, [language]),
                "pool-all": (f"{language}-pool-all", pool, needed),
            }[setting]
            assert collection is not None
            task = _task("xquad", name, collection, parsed[language], relevant, setting)
            tasks.append(task)
    return tasks


def read_squad(folder: Path, languages: Iterable[str] | None = None) -> list[Task]:
    """One task for each JSON file of the folder, or of the names given (without .json).

    Raises:
        FileNotFoundError: the folder has no JSON file.
        ValueError: no file of that name, or no SQuAD JSON.
    """
    files = {path.name.split(".json")[0]: path for path in sorted(folder.glob("*.json*"))}
    if not files:
        raise FileNotFoundError(f"{folder} has no *.json: paragraphs and questions in SQuAD's format, such as {_XQUAD}")
    tasks = []
    for name in choose(f"{folder}", languages, list(files), "file"):
        content = _parse(files[name])
        tasks.append(_task("squad", name, _collection(f"squad-{name}", name, content), content, [name], "monolingual"))
    return tasks


@dataclass(frozen=True)
class _Content:
    """Distinct paragraphs of a file in its order, and (question id, question, number of its paragraph)."""

    paragraphs: list[str]
    questions: list[tuple[str, str, int]]


def _parse(path: Path) -> _Content:
    with open_text(path) as file:
        try:
            articles = json.load(file)["data"]
            rows = [
                (paragraph["context"], [(str(qa["id"]), qa["question"]) for qa in paragraph["qas"]])
                for article in articles
                for paragraph in article["paragraphs"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no SQuAD JSON: {type(error).__name__}: {error}") from error
    numbers: dict[str, int] = {}
    questions = []
    for context, asked in rows:
        number = numbers.setdefault(context, len(numbers))
        questions += [(identifier, question, number) for identifier, question in asked]
    return _Content(list(numbers), questions)


def _collection(name: str, prefix: str, content: _Content) -> Collection:
    passages = [Passage(f"{prefix}-{number}", text) for number, text in enumerate(content.paragraphs)]
    return Collection(name, lambda: passages)


def _task(
    dataset: str, name: str, collection: Collection, content: _Content, relevant: Sequence[str], setting: str
) -> Task:
    queries = {identifier: question for identifier, question, _ in content.questions}
    qrels: dict[str, dict[str, int]] = {
        identifier: {f"{prefix}-{number}": 1 for prefix in relevant} for identifier, _, number in content.questions
    }
    measures = ("AP", *_MEASURES) if setting == "pool-all" else _MEASURES
    return Task(dataset, name, collection, queries, measures, "miracl", qrels=qrels, group=setting)


def _xquad_file(folder: Path, language: str) -> Path:
    matches: list[Any] = sorted(folder.glob(f"xquad.{language}.json*"))
    return Path(matches[0])
