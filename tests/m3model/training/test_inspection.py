"""m3 data check: what it counts, and the rows that it names."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from m3model import M3Model
from m3model.cli.app import app
from m3model.training.inspection import inspect_training_files, language_of, text_digest


def check(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "check", *(str(argument) for argument in arguments)])


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"query": "what is a river", "pos": ["water", "a  river"], "neg": ["city", "bridge", "city"], "lang": "en"},
    {"query": "what is a  river", "pos": ["stream"], "neg": ["water"], "pos_scores": [1], "neg_scores": [0]},
    {"query": "что такое река", "pos": ["вода"], "neg": ["вода", "мост"], "prompt": "find: "},
    {"query": "東京の川", "pos": ["東京の川"], "neg": []},
]


def test_counts_lengths_and_repeated_texts_of_two_files(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ROWS[:2]), write(tmp_path / "b.jsonl", ["\n", *ROWS[2:]])
    result = check(first, second, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["files"][0] == {
        "path": str(first),
        "rows": 2,
        "bad_rows": 0,
        "positives": 3,
        "negatives": 4,
        "without_negatives": 0,
        "with_scores": 1,
        "with_prompt": 0,
    }
    assert [report["files"][1][name] for name in ("rows", "without_negatives", "with_prompt")] == [2, 1, 1]
    lengths = {(one["language"], one["kind"]): one for one in report["lengths"]}
    full = ("en", "script Latin", "script Cyrillic")
    assert set(lengths) == {
        *((language, kind) for language in full for kind in ("query", "pos", "neg")),
        ("script Han and kana", "query"),
        ("script Han and kana", "pos"),
    }  # fmt: skip
    english = lengths["en", "neg"]
    assert (english["texts"], english["mean"], english["median"]) == (3, pytest.approx(14 / 3), 4)
    assert (english["percentile_99"], english["largest"]) == (6, 6)
    found = report["repeated"]
    assert {name: found[name] for name in ("distinct_queries", "distinct_passages")} == {
        "distinct_queries": 3,
        "distinct_passages": 8,
    }
    assert found["examples"] == {
        "repeated_queries": [f"{first}:2"],
        "repeated_passages": [f"{first}:1"],
        "leaked_positives": [f"{first}:2", f"{second}:2"],
        "query_as_passage": [f"{second}:3"],
    }
    assert [found[name] for name in found["examples"]] == [1, 2, 1, 1]


def test_bad_rows_are_named_and_make_the_status_1(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS[0], "{\n", ROWS[3], *[{"query": "q"}] * 5])
    empty = write(tmp_path / "empty.jsonl", [])
    result = check(path, empty, "--bad", "3", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["bad_rows"] == 7 and report["files"][0]["rows"] == 2 and report["files"][0]["bad_rows"] == 6
    lines = result.stderr.splitlines()
    assert (
        lines[0].startswith(f"error: {path}:2: not JSON")
        and lines[1] == f"error: {path}:4: no 'pos'; the row has 'query'"
    )
    assert lines[3] == "error: and 4 more bad rows"
    assert check(empty).exit_code == 1 and f"{empty}: the file has no rows" in check(empty).stderr


def test_a_file_that_breaks_off_is_reported_with_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    packed = gzip.compress(b"".join(json.dumps({**ROWS[0], "id": number}).encode() + b"\n" for number in range(99)))
    path.write_bytes(packed[:-6])
    result = check(path, "--json")
    assert result.exit_code == 1 and "damaged after line" in result.stderr
    assert json.loads(result.stdout)["files"][0]["rows"] == 99


def test_tables_and_lengths_in_tokens(tmp_path: Path, folder: Path, model: M3Model) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    result = check(path)
    assert result.exit_code == 0, result.stderr
    assert "lengths in characters" in result.stdout and "script Cyrillic" in result.stdout
    assert f"{path}:2" in result.stdout.replace("\n", "")
    report = json.loads(check(path, "--json", "--model", folder).stdout)
    assert report["unit"] == "tokens"
    _, offsets = model.tokenize([ROWS[0]["query"]])
    assert report["lengths"][0]["largest"] == int(offsets[1])


def test_languages() -> None:
    assert language_of({"lang": "de"}, "река") == "de" and language_of({"language": "sw", "lang": "x"}, "") == "sw"
    assert language_of({"lang": 3}, "река abc") == "script Cyrillic"
    assert language_of({}, "东京是城市") == "script Han" and language_of({}, "東京タワーは") == "script Han and kana"
    assert language_of({}, "ما هو النهر؟") == "script Arabic" and language_of({}, "123 !?") == "script unknown"
    assert language_of({}, "แม่น้ำ") == "script Thai" and language_of({}, "강은") == "script Hangul"


def test_digests_are_equal_up_to_white_space_alone() -> None:
    assert text_digest(" a\tb\n") == text_digest("a b") != text_digest("ab")
    assert text_digest("A") != text_digest("a") and 0 <= text_digest("\ud800") < 2**64


def test_a_missing_file_and_no_file_are_errors(tmp_path: Path) -> None:
    assert check(tmp_path / "absent.jsonl").exit_code == 2
    assert check().exit_code == 2
    with pytest.raises(ValueError, match="paths is empty"):
        inspect_training_files([])
