"""What an evaluation is made of: passages, collections of them, and tasks (queries with judgements on a collection).

    Passage(id, text, title)      the text that is encoded is title, a line break, text
    Collection(name, source)      passages read anew at every pass, so that a collection need not fit in memory
    Task(dataset, language, ...)  queries and judgements of one language; tasks may share a collection

Judgements (qrels) are {query id: {passage id: relevance}}; a run is {query id: {passage id: score}}, best first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

__all__ = ["Collection", "Passage", "Qrels", "Run", "Task"]

Qrels = Mapping[str, Mapping[str, int]]
Run = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Passage:
    """A unit of retrieval.

    Attributes:
        id: unique in its collection.
        text, title: as the dataset has them; title is empty where there is none.
    """

    id: str
    text: str
    title: str = ""

    @property
    def contents(self) -> str:
        """The text that is encoded: title and text on two lines, as in the paper's evaluation of MIRACL."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True)
class Collection:
    """Passages under a name.

    Attributes:
        name: unique among all collections of a dataset, usable as a file name; results are cached under it.
        source: opens the passages; called once for every pass.
        parts: the collections that this one is put together from, if it is; their encodings are used again.
    """

    name: str
    source: Callable[[], Iterable[Passage]]
    parts: tuple[Collection, ...] = ()

    @staticmethod
    def union(name: str, parts: Iterable[Collection]) -> Collection:
        """The passages of all parts, one part after another; ids must be unique across them."""
        held = tuple(parts)
        return Collection(name, lambda: (passage for part in held for passage in part), held)

    def __iter__(self) -> Iterator[Passage]:
        return iter(self.source())


@dataclass(frozen=True)
class Task:
    """Queries of one language, the collection that they are asked on, and what counts as right.

    Attributes:
        dataset: such as "miracl".
        name: unique within the dataset; the language, or what else tells the tasks apart ("de", "de-en").
        collection: where to search.
        queries: {query id: text}.
        qrels: judgements; for a dataset that is judged by answers, empty.
        answers: {query id: accepted answer strings} where a passage is relevant if it holds one (MKQA).
        measures: names of ir-measures that the dataset is reported in, the leading one first.
        preset: name of the published hybrid weights, see m3model.retrieval.presets.
        group: tasks of a group are averaged together (XQuAD: "monolingual", "cross-lingual", "pool").
    """

    dataset: str
    name: str
    collection: Collection
    queries: Mapping[str, str]
    measures: tuple[str, ...]
    preset: str
    qrels: Qrels = field(default_factory=dict)
    answers: Mapping[str, tuple[str, ...]] | None = None
    group: str = "all"

    def __post_init__(self) -> None:
        if not self.queries:
            raise ValueError(f"{self.dataset} {self.name} has no queries")
        unknown = [query for query in self.qrels if query not in self.queries]
        if unknown:
            raise ValueError(
                f"{self.dataset} {self.name}: {len(unknown)} judged queries have no text, the first is {unknown[0]!r}"
            )
        if not self.qrels and self.answers is None:
            raise ValueError(f"{self.dataset} {self.name} has neither judgements nor answers")

    @property
    def judged(self) -> dict[str, str]:
        """The queries that are evaluated: those with a judgement or an answer."""
        kept = self.qrels if self.answers is None else self.answers
        return {query: text for query, text in self.queries.items() if query in kept}

    def sample(self, count: int) -> Task:
        """The task with at most `count` of its judged queries, evenly spread over their order.

        Raises:
            ValueError: count is below 1.
        """
        if count < 1:
            raise ValueError(f"count is {count}; accepted: at least 1")
        judged = list(self.judged)
        if len(judged) <= count:
            return self
        kept = [judged[number * len(judged) // count] for number in range(count)]
        return replace(
            self,
            queries={query: self.queries[query] for query in kept},
            qrels={query: self.qrels[query] for query in kept if query in self.qrels},
            answers=None if self.answers is None else {query: self.answers[query] for query in kept},
        )
