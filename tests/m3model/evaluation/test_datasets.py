"""Readers of benchmarks over small folders in the published layouts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from m3model.evaluation import Passage, read_tasks
from m3model.evaluation.datasets import read_xquad
from m3model.evaluation.datasets.mkqa import answer_tokens, judge_by_answers, uniform_text


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8")


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def miracl(folder: Path) -> None:
    write(folder / "miracl-v1.0-sw/topics/topics.miracl-v1.0-sw-dev.tsv", "2\tMto gani?\n11\tNi lini?\n")
    write(
        folder / "miracl-v1.0-sw/qrels/qrels.miracl-v1.0-sw-dev.tsv", "2\tQ0\t7#0\t1\n2\tQ0\t7#1\t0\n11\tQ0\t9#0\t1\n"
    )
    for part, ids in ((10, ["9#0"]), (2, ["7#0", "7#1"])):
        rows = [{"docid": name, "title": f"T{name}", "text": "Mto Nile"} for name in ids]
        write(folder / f"miracl-corpus-v1.0-sw/docs-{part}.jsonl.gz", lines(*rows))


def test_miracl_reads_topics_judgements_and_numbered_parts(tmp_path: Path) -> None:
    miracl(tmp_path)
    (task,) = read_tasks("miracl", tmp_path, ["sw"])
    assert task.queries == {"2": "Mto gani?", "11": "Ni lini?"}
    assert task.qrels == {"2": {"7#0": 1, "7#1": 0}, "11": {"9#0": 1}}
    assert [passage.id for passage in task.collection] == ["7#0", "7#1", "9#0"]
    assert next(iter(task.collection)).contents == "T7#0\nMto Nile"
    assert list(task.collection) == list(task.collection)


def test_miracl_errors_name_language_and_origin(tmp_path: Path) -> None:
    miracl(tmp_path)
    with pytest.raises(ValueError, match=r"MIRACL has no language xx; it has ar, bn"):
        read_tasks("miracl", tmp_path, ["sw", "xx"])
    with pytest.raises(FileNotFoundError, match=r"topics.*MIRACL's dev queries in yo.*huggingface.co/datasets/miracl"):
        read_tasks("miracl", tmp_path, ["yo"])
    write(tmp_path / "miracl-v1.0-sw/topics/topics.miracl-v1.0-sw-dev.tsv", "2 no tab\n")
    with pytest.raises(ValueError, match=r"sw-dev.tsv:1: expected 2 fields"):
        read_tasks("miracl", tmp_path, ["sw"])


def test_judged_query_without_text_is_an_error(tmp_path: Path) -> None:
    miracl(tmp_path)
    write(tmp_path / "miracl-v1.0-sw/topics/topics.miracl-v1.0-sw-dev.tsv", "2\tMto gani?\n")
    with pytest.raises(ValueError, match=r"1 judged queries have no text, the first is '11'"):
        read_tasks("miracl", tmp_path, ["sw"])


def test_mldr_counts_listed_negatives_as_irrelevant(tmp_path: Path) -> None:
    row = {
        "query_id": "q-th-1",
        "query": "?",
        "positive_passages": [{"docid": "d1", "text": ""}],
        "negative_passages": [{"docid": "d2", "text": ""}],
    }
    write(tmp_path / "mldr-v1.0-th/test.jsonl.gz", lines(row))
    write(tmp_path / "mldr-v1.0-th/corpus.jsonl.gz", lines({"docid": "d1", "text": "a"}, {"docid": "d2", "text": "b"}))
    (task,) = read_tasks("mldr", tmp_path, ["th"])
    assert task.qrels == {"q-th-1": {"d1": 1, "d2": 0}}
    assert list(task.collection) == [Passage("d1", "a"), Passage("d2", "b")]
    assert (task.measures[0], task.preset) == ("nDCG@10", "mldr")


def test_damaged_gzip_and_bad_json_name_file_and_line(tmp_path: Path) -> None:
    write(tmp_path / "corpus.jsonl", '{"_id": "a", "text": "x"}\n{"_id": \n')
    write(tmp_path / "queries.jsonl", lines({"_id": "q", "text": "?"}))
    write(tmp_path / "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\ta\t1\n")
    (task,) = read_tasks("beir", tmp_path)
    with pytest.raises(ValueError, match=r"corpus.jsonl:2: no JSON"):
        list(task.collection)
    (tmp_path / "corpus.jsonl").unlink()
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(b'{"_id": "a", "text": "x"}\n' * 1000)[:40])
    with pytest.raises(ValueError, match=r"corpus.jsonl.gz: damaged after line"):
        list(read_tasks("beir", tmp_path)[0].collection)


def test_beir_reads_a_folder_and_named_subfolders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name / "corpus.jsonl", lines({"_id": "a", "title": name, "text": "x"}))
        write(tmp_path / name / "queries.jsonl", lines({"_id": "q", "text": "?"}, {"_id": "unjudged", "text": "!"}))
        write(tmp_path / name / "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\ta\t2\n")
    (task,) = read_tasks("beir", tmp_path / "one")
    assert (task.name, task.qrels, task.judged) == ("one", {"q": {"a": 2}}, {"q": "?"})
    assert [task.name for task in read_tasks("beir", tmp_path, ["two", "one"])] == ["two", "one"]
    write(tmp_path / "one/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\ta\tyes\n")
    with pytest.raises(ValueError, match=r"test.tsv:2: relevance is 'yes'"):
        read_tasks("beir", tmp_path / "one")


def test_mkqa_keeps_short_answers_and_judges_runs_by_them(tmp_path: Path) -> None:
    def question(number: int, kind: str, text: str | None, aliases: list[str]) -> dict[str, object]:
        answer = {"type": kind, "text": text, "aliases": aliases}
        return {
            "example_id": number,
            "queries": {"de": f"F{number}?", "en": f"Q{number}?"},
            "answers": {"en": [answer]},
        }

    rows = [
        question(1, "entity", "Île-de-France", ["Paris Region"]),
        question(2, "binary", "yes", []),
        question(3, "unanswerable", None, []),
        question(4, "date", "1989-11-09", []),
    ]
    write(tmp_path / "mkqa.jsonl.gz", lines(*rows))
    passages = [
        ("p0", "", "the ÎLE-DE-FRANCE is"),
        ("p1", "", "region paris"),
        ("p2", "On 1989–11–09", "the wall fell"),
    ]
    write(tmp_path / "corpus.jsonl", lines(*({"_id": i, "title": t, "text": x} for i, t, x in passages)))
    german, english = read_tasks("mkqa", tmp_path, ["de", "en"])[::-1]
    assert german.queries == {"1": "F1?", "4": "F4?"} and english.judged == {"1": "Q1?", "4": "Q4?"}
    assert english.collection is german.collection
    run = {"1": {"p1": 2.0, "p0": 1.0}, "4": {"p2": 1.0}}
    assert judge_by_answers(run, german) == {"1": {"p1": 0, "p0": 1}, "4": {"p2": 1}}
    with pytest.raises(ValueError, match="1 passages that the collection lacks, such as 'p9'"):
        judge_by_answers({"1": {"p9": 1.0}}, german)
    with pytest.raises(ValueError, match="MKQA has no language zh"):
        read_tasks("mkqa", tmp_path, ["zh"])


def test_answers_match_whole_contiguous_tokens_only() -> None:
    passage = answer_tokens("He lived in New-York, 1989.")
    assert answer_tokens("new-york") in passage
    assert answer_tokens("New York") not in passage
    assert answer_tokens("York 1989") not in passage
    assert answer_tokens("198") not in passage
    assert answer_tokens("e\u0301te\u0301") == answer_tokens("ÉTÉ")
    assert uniform_text("a\u2010b \u201cc\u201d \u2026 x\xady\u2044z \u2033") == "a-b \"c\" ... xy/z ''"


def test_narrativeqa_reads_stories_of_the_split(tmp_path: Path) -> None:
    write(tmp_path / "documents.csv", "document_id,set,kind\nd1,test,gutenberg\nd2,train,movie\nd3,test,movie\n")
    write(tmp_path / "qaps.csv", 'document_id,set,question\nd2,train,Who?\nd3,test,"Why, then?"\n')
    for story in ("d1", "d3"):
        write(tmp_path / f"tmp/{story}.content", f"story {story}")
    (task,) = read_tasks("narrativeqa", tmp_path)
    assert task.queries == {"q1": "Why, then?"} and task.qrels == {"q1": {"d3": 1}}
    assert [(passage.id, passage.text) for passage in task.collection] == [("d1", "story d1"), ("d3", "story d3")]
    (tmp_path / "tmp/d1.content").unlink()
    with pytest.raises(FileNotFoundError, match=r"d1.content is missing.*download_stories.sh"):
        read_tasks("narrativeqa", tmp_path)


def squad(*articles: list[tuple[str, list[str]]]) -> str:
    data = [
        {
            "title": "t",
            "paragraphs": [{"context": c, "qas": [{"id": q, "question": f"{q}?"} for q in qs]} for c, qs in a],
        }
        for a in articles
    ]
    return json.dumps({"data": data})


def test_xquad_settings_share_collections_and_differ_in_what_is_relevant(tmp_path: Path) -> None:
    for language in ("de", "en", "th"):
        paragraphs = [(f"{language} zero", ["a", "b"]), (f"{language} one", ["c"])]
        write(tmp_path / f"xquad.{language}.json", squad(paragraphs[:1], paragraphs[1:]))
    tasks = {task.name: task for task in read_tasks("xquad", tmp_path, ["th", "en"])}
    assert list(tasks) == ["en", "th", "th-en", "en-pool", "th-pool", "en-pool-all", "th-pool-all"]
    assert tasks["th"].qrels == {"a": {"th-0": 1}, "b": {"th-0": 1}, "c": {"th-1": 1}}
    assert tasks["th-en"].qrels["c"] == {"en-1": 1} and tasks["th-en"].collection is tasks["en"].collection
    assert [passage.id for passage in tasks["th-pool"].collection] == ["de-0", "de-1", "en-0", "en-1", "th-0", "th-1"]
    assert tasks["th-pool"].qrels["c"] == {"th-1": 1}
    assert tasks["th-pool-all"].qrels["c"] == {"de-1": 1, "en-1": 1, "th-1": 1}
    assert tasks["th-pool-all"].measures[0] == "AP"
    assert tasks["th-pool"].collection.parts[1] is tasks["en"].collection
    with pytest.raises(ValueError, match="no language ro; it has de, en, th"):
        read_tasks("xquad", tmp_path, ["ro"])
    with pytest.raises(ValueError, match="no setting bilingual"):
        read_xquad(tmp_path, settings=["bilingual"])
    write(tmp_path / "xquad.de.json", squad([("nur einer", ["a"])]))
    with pytest.raises(ValueError, match="not parallel"):
        read_tasks("xquad", tmp_path)
    write(tmp_path / "xquad.de.json", '{"data": [{"paragraphs": 3}]}')
    with pytest.raises(ValueError, match=r"xquad.de.json is no SQuAD JSON"):
        read_tasks("xquad", tmp_path)


def test_squad_joins_repeated_paragraphs(tmp_path: Path) -> None:
    write(tmp_path / "dev.json", squad([("same", ["a"]), ("other", ["b"]), ("same", ["c"])]))
    (task,) = read_tasks("squad", tmp_path)
    assert task.qrels == {"a": {"dev-0": 1}, "b": {"dev-1": 1}, "c": {"dev-0": 1}}
    assert len(list(task.collection)) == 2


def test_unknown_dataset_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset is 'mteb'; accepted: miracl, mkqa"):
        read_tasks("mteb", tmp_path)
    with pytest.raises(FileNotFoundError, match="should hold the files of mldr"):
        read_tasks("mldr", tmp_path / "absent")
    for dataset in ("mldr", "mkqa", "narrativeqa", "beir", "squad", "xquad"):
        with pytest.raises(FileNotFoundError, match=r"(https://\S+)"):
            read_tasks(dataset, tmp_path)


def test_xquad_of_the_shared_data_is_complete() -> None:
    folder = next((p / "shared/data/test/xquad" for p in Path(__file__).parents if (p / "shared/data").is_dir()), None)
    if folder is None:
        pytest.skip("no ../shared/data beside the repository")
    tasks = read_xquad(folder, settings=["monolingual", "pool"])
    assert len(tasks) == 24
    assert {len(task.queries) for task in tasks} == {1190}
    assert len(list(tasks[-1].collection)) == 2880
