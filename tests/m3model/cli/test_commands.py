"""Commands of `m3`: results on stdout, messages on stderr, exit status 2 for bad arguments and 1 for failures."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_folder
from messages import unwrapped
from typer.testing import CliRunner, Result

from m3kernels import self_check as checks
from m3model import M3Model
from m3model.cli.app import app
from m3model.retrieval import ExactIndex

DOCUMENTS = [
    {"id": "river", "text": "the river and the city", "lang": "en"},
    {"_id": 7, "title": "matrix", "text": "compute the eigenvalue of a symmetric matrix"},
    "a bridge north and south",
]


def m3(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def json_lines(result: Result) -> list[dict]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps(document) for document in DOCUMENTS) + "\n\n")
    return path


@pytest.fixture
def index(folder: Path, documents: Path, tmp_path: Path) -> Path:
    assert m3("index", "-m", folder, "-o", tmp_path / "index", documents).exit_code == 0
    return tmp_path / "index"


def test_a_real_process_searches_and_python_m_is_the_same_command(index: Path) -> None:
    command = [sys.executable, "-m", "m3model.cli", "search", str(index), "eigenvalue matrix", "--json", "-k", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["hits"][0]["id"] == "7"
    assert "Traceback" not in done.stderr


def test_help_comes_without_torch() -> None:
    program = "import sys; sys.argv = ['m3', '--help']\ntry:\n    from m3model.cli import main; main()\nfinally:\n"
    program += "    print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("[]"), done.stderr
    for command in ("encode", "index", "search", "score", "data", "mine", "doctor", "bench", "demo"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["encode", "index", "search", "score", "data", "mine", "doctor", "bench", "demo"])
def test_every_command_has_help(command: str) -> None:
    result = m3(command, "--help")
    assert result.exit_code == 0 and "Usage: " in result.stdout


def test_version() -> None:
    assert m3("--version").stdout.startswith("m3kernels ")


def test_encode_prints_what_the_model_computes(folder: Path, model: M3Model, documents: Path) -> None:
    rows = json_lines(m3("encode", "-m", folder, documents, "--json", "--multi-vector"))
    assert [row["id"] for row in rows] == ["river", "7", f"{documents}:3"]
    texts = [
        "the river and the city",
        "matrix\ncompute the eigenvalue of a symmetric matrix",
        "a bridge north and south",
    ]
    expected = model.encode(texts)
    np.testing.assert_allclose([row["dense"] for row in rows], expected.dense, atol=1e-6)
    assert [row["sparse"].keys() for row in rows] == [row.keys() for row in expected.sparse.to_flag_embedding()]
    rows_of_texts = torch.tensor([row for text in rows for row in text["multi_vector"]])
    torch.testing.assert_close(rows_of_texts, expected.multi_vector.rows, atol=1e-6, rtol=1e-5)


def test_encode_writes_arrays(folder: Path, model: M3Model, documents: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    result = m3("encode", "-m", folder, documents, "--out", out, "--multi-vector", "--role", "query")
    assert result.exit_code == 0 and result.stdout == "" and "3 texts" in result.stderr
    with np.load(out) as arrays:
        assert arrays["ids"].tolist() == ["river", "7", f"{documents}:3"]
        expected = model.encode(["the river and the city"], role="query")
        np.testing.assert_allclose(arrays["dense"][0], expected.dense[0], atol=1e-6)
        assert arrays["sparse_offsets"][-1] == len(arrays["sparse_token_ids"]) == len(arrays["sparse_weights"])
        assert arrays["multi_vector_offsets"][-1] == len(arrays["multi_vector_rows"])


def test_encode_writes_shards_and_index_takes_them(folder: Path, index: Path, documents: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "shards", tmp_path / "plain.txt.gz"
    plain.write_bytes(gzip.compress(b"open the file\n\nclose the file\n"))
    encode = ["encode", "-m", folder, "--out", out, "--multi-vector", "--shard-characters", "30", "--json", "--lines"]
    (report,) = json_lines(m3(*encode, documents, plain))
    assert report == {"folder": str(out), "rank": 0, "texts": 5, "shards": 3, "encoded": 3}
    again = m3(*encode[:-2], documents, plain, "--lines")
    assert "5 texts in 3 shards" in again.stderr and "(0 encoded now)" in again.stderr
    (report,) = json_lines(m3("index", "--encoded", out, "-o", tmp_path / "other", "--json"))
    assert (report["documents"], report["added"]) == (5, 5)
    (report,) = json_lines(m3("index", "--encoded", out, "-o", index, "--json"))
    assert (report["documents"], report["added"], report["known"]) == (5, 2, 3)
    for place in (index, tmp_path / "other"):
        (found,) = json_lines(m3("search", place, "close the file", "--json", "-k", "1"))
        assert found["hits"][0]["text"] == "close the file"
    damaged = out / "shard-00000001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    result = m3("index", "--encoded", out, "-o", tmp_path / "third")
    assert result.exit_code == 1 and "shard-00000001.safetensors is damaged" in result.stderr


def test_quantization_goes_from_the_command_into_shards_and_index_and_on_to_the_search(
    folder: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = M3Model.from_pretrained

    def watched(*arguments: object, **options: object) -> M3Model:
        loaded.append(options["quantize"])
        return load(*arguments, **options)

    monkeypatch.setattr(M3Model, "from_pretrained", watched)
    shards, first, second = tmp_path / "shards", tmp_path / "first", tmp_path / "second"
    for command in (
        ("encode", "-m", folder, "--out", shards, "--multi-vector", "--quantize", "int8", documents),
        ("index", "--encoded", shards, "-o", first),
        ("index", "-m", folder, "-o", second, "--quantize", "bf16", documents),
        ("search", first, "river"),
        ("search", second, "river"),
        ("search", second, "river", "--quantize", "int8"),
    ):
        assert m3(*command).exit_code == 0, command
    assert loaded == ["int8", "bf16", "int8", "bf16", "int8"]
    (line,) = json_lines(m3("encode", "-m", folder, "--quantize", "int8", "--json", stdin="the river"))
    exact = M3Model.from_pretrained(folder, quantize=None).encode(["the river"]).dense[0]
    assert line["dense"] != exact.tolist() and np.dot(line["dense"], exact) > 0.999
    result = m3("encode", "-m", folder, "--out", shards, "--multi-vector", documents)
    assert result.exit_code == 1 and "begun with quantization int8, now it is None" in result.stderr


def test_processes_of_torchrun_share_the_shards(
    folder: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    encode = ["encode", "-m", folder, "--out", tmp_path / "shards", "--shard-characters", "1", "--json", documents]
    for rank, encoded in ((0, 2), (1, 1)):
        monkeypatch.setenv("RANK", str(rank))
        (report,) = json_lines(m3(*encode))
        assert (report["rank"], report["shards"], report["encoded"]) == (rank, 3, encoded)
    assert m3("encode", "-m", folder, documents).exit_code == 2, "tables are printed by one process"
    monkeypatch.setenv("RANK", "first")
    assert m3(*encode).exit_code == 2


def test_encode_prints_a_table(folder: Path) -> None:
    result = m3("encode", "-m", folder, "--multi-vector", stdin="the river\n")
    assert "stdin:1" in result.stdout and "river" in result.stdout and "heaviest tokens" in result.stdout


@pytest.mark.parametrize(
    ("stdin", "ids"),
    [
        ("the river\n\n a matrix \n", ["stdin:1", "stdin:3"]),
        ('{"id": 1, "text": "x"}\n{"docid": "z", "contents": "y"}\n', ["1", "z"]),
        ("", []),
    ],
)
def test_texts_come_from_stdin(folder: Path, stdin: str, ids: list[str]) -> None:
    assert [
        row["id"] for row in json_lines(m3("encode", "-m", folder, "--json", "--no-dense", "-", stdin=stdin))
    ] == ids


def test_plain_and_compressed_files(folder: Path, tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.txt", tmp_path / "packed.jsonl.gz"
    plain.write_text("\ufeffthe river\na matrix\n")
    packed.write_bytes(gzip.compress(b'{"id": "p", "text": "sort"}\n'))
    rows = json_lines(m3("encode", "-m", folder, "--json", "--no-dense", plain, packed))
    assert [row["id"] for row in rows] == [str(plain), "p"]
    rows = json_lines(m3("encode", "-m", folder, "--json", "--no-dense", "--lines", plain, packed))
    assert [row["id"] for row in rows] == [f"{plain}:1", f"{plain}:2", "p"]


def test_index_adds_once_and_search_finds(folder: Path, index: Path, documents: Path) -> None:
    documents.write_text(documents.read_text() + json.dumps({"id": "new", "text": "close the file"}) + "\n")
    (report,) = json_lines(m3("index", "-m", folder, "-o", index, documents, "--json"))
    assert (report["documents"], report["added"], report["known"]) == (4, 1, 3)
    assert ExactIndex.load(index).document("river") == {"text": "the river and the city", "lang": "en"}
    found = json_lines(m3("search", index, "close the file", "the river", "--json", "-k", "2"))
    assert [row["query"] for row in found] == ["close the file", "the river"]
    assert found[0]["hits"][0]["id"] == "new" and found[1]["hits"][0]["lang"] == "en"
    for hit in found[0]["hits"]:
        weighted = (hit["dense"] + 0.3 * hit["sparse"] + hit["multi_vector"]) / 2.3
        assert hit["score"] == pytest.approx(weighted, rel=1e-5)


def test_a_changed_document_is_replaced_and_an_index_without_multi_vectors_reranks(
    folder: Path, index: Path, documents: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    assert m3("index", "-m", folder, "-o", small, documents, "--no-multi-vector").exit_code == 0
    (held,) = json_lines(m3("search", index, "the river", "--json"))
    made = m3("search", small, "the river", "--json")
    assert "the 200 best documents of each query are encoded now" in made.stderr
    for hit, expected in zip(json_lines(made)[0]["hits"], held["hits"], strict=True):
        assert hit["id"] == expected["id"] and hit["multi_vector"] == pytest.approx(expected["multi_vector"], abs=2e-3)
    lines = documents.read_text().splitlines()
    documents.write_text("\n".join([json.dumps({"id": "river", "text": "the sea"}), *lines[1:]]))
    (report,) = json_lines(m3("index", "-m", folder, "-o", small, documents, "--json", "--no-multi-vector"))
    assert (report["documents"], report["added"]) == (3, 0)
    (found,) = json_lines(m3("search", small, "the sea", "--json", "--head", "dense"))
    texts = [hit["text"] for hit in found["hits"]]
    assert "the sea" in texts and "the river and the city" not in texts


@pytest.mark.parametrize(("kept", "bits", "error"), [("int8", 8, 0.01), ("1bit", 1, 0.2)])
def test_multi_vectors_can_be_kept_as_codes(
    folder: Path, index: Path, documents: Path, tmp_path: Path, kept: str, bits: int, error: float
) -> None:
    small = tmp_path / "small"
    command = ["index", "-m", folder, "-o", small, documents, "--json"]
    (report,) = json_lines(m3(*command, "--row-dtype", kept))
    assert ExactIndex.load(small).row_bits == bits and report["bytes"] < ExactIndex.load(index).nbytes
    (exact,) = json_lines(m3("search", index, "the river", "--json"))
    (found,) = json_lines(m3("search", small, "the river", "--json"))
    score = {hit["id"]: hit["multi_vector"] for hit in exact["hits"]}
    assert {hit["id"]: hit["multi_vector"] for hit in found["hits"]} == pytest.approx(score, abs=error)
    assert json_lines(m3(*command, "--row-dtype", kept))[0]["added"] == 0
    result = m3(*command)
    assert result.exit_code == 2 and f"keeps multi-vectors as {kept}, not floats" in unwrapped(result)


@pytest.mark.parametrize("late", [[], ["--late"]])
def test_long_documents_are_cut_into_windows_and_found_as_documents(folder: Path, tmp_path: Path, late: list) -> None:
    long = " ".join(["the river and the city", "a bridge north", "compute the eigenvalue of a matrix"] * 3)
    rows = [{"id": "long", "text": long, "lang": "en"}, {"id": "short", "text": "close the file"}]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["index", "-m", folder, "-o", tmp_path / "index", tmp_path / "long.jsonl", "--json"]
    cut = ["--window", "12", "--overlap", "3", *late]
    (report,) = json_lines(m3(*command, *cut))
    assert report["windows"] > 4 and "documents" not in report
    assert json_lines(m3(*command, *cut))[0]["added"] == 0
    (found,) = json_lines(m3("search", tmp_path / "index", "eigenvalue", "--json"))
    assert sorted(hit["id"] for hit in found["hits"]) == ["long", "short"]
    hit = next(hit for hit in found["hits"] if hit["id"] == "long")
    assert hit["text"] == long and hit["lang"] == "en"
    assert long[hit["window"]["begin"] : hit["window"]["end"]] == hit["window"]["text"]
    assert "close the file" in m3("search", tmp_path / "index", "file").stdout
    for wrong, said in (([], "the index was made with --window 12"), (["--late"], "late chunking needs --window")):
        result = m3(*command, *wrong)
        assert result.exit_code == 2 and said in unwrapped(result)


def test_an_empty_collection_makes_an_empty_index(folder: Path, tmp_path: Path) -> None:
    assert m3("index", "-m", folder, "-o", tmp_path / "index", stdin="\n").exit_code == 0
    assert json_lines(m3("search", tmp_path / "index", "river", "--json")) == [{"query": "river", "hits": []}]


def test_one_id_with_two_texts_is_an_error(folder: Path, tmp_path: Path) -> None:
    rows = '{"id": 1, "text": "river"}\n{"id": 1, "text": "city"}\n'
    result = m3("index", "-m", folder, "-o", tmp_path / "index", stdin=rows)
    assert result.exit_code == 1 and "the id '1' comes twice" in result.stderr


@pytest.mark.parametrize(("head", "weights"), [("all", "0.15,0.5,0.35"), ("dense+sparse", "0.2,0.8,0")])
def test_published_weights_are_taken_by_their_name(index: Path, head: str, weights: str) -> None:
    command = ["search", index, "the river", "--json", "--head", head, "--weights"]
    assert json_lines(m3(*command, "mldr")) == json_lines(m3(*command, weights))
    wrong = m3(*command, "msmarco")
    assert wrong.exit_code == 2 and "or one of miracl, mkqa, mldr, beir" in unwrapped(wrong)


def test_search_and_score_agree(folder: Path, index: Path) -> None:
    (found,) = json_lines(m3("search", index, "the river", "--json", "--head", "all", "-k", "1", "--weights", "1,2,3"))
    hit = found["hits"][0]
    (row,) = json_lines(m3("score", "-m", folder, "the river", hit["text"], "--json", "--weights", "1,2,3"))
    # The index keeps multi-vector rows in float16.
    assert row["dense"] == pytest.approx(hit["dense"], abs=1e-5)
    assert row["multi_vector"] == pytest.approx(hit["multi_vector"], abs=2e-3)
    assert row["all"] == pytest.approx(hit["score"], abs=2e-3)


def test_search_reads_queries_and_prints_tables(index: Path, tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").write_text('{"query": "the river"}\n"matrix"\n')
    (tmp_path / "queries.txt").write_text("the river\n\nmatrix\n")
    for name in ("queries.jsonl", "queries.txt"):
        rows = json_lines(m3("search", index, "--queries", tmp_path / name, "--json"))
        assert [row["query"] for row in rows] == ["the river", "matrix"]
    result = m3("search", index, "--queries", "-", "--head", "sparse", stdin="the river\n")
    assert result.exit_code == 0 and "the river and the city" in result.stdout and "multi" in result.stdout


def test_index_without_multi_vectors_serves_the_other_heads(folder: Path, documents: Path, tmp_path: Path) -> None:
    assert m3("index", "-m", folder, "-o", tmp_path / "two", documents, "--no-multi-vector").exit_code == 0
    (row,) = json_lines(m3("search", tmp_path / "two", "river", "--head", "dense+sparse", "--json"))
    assert row["hits"][0]["multi_vector"] is None


def test_score_reads_pairs(folder: Path, model: M3Model, tmp_path: Path) -> None:
    pairs = [("the river", "a city"), ("a matrix", "the river"), ("the river", "the river")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"query": query, "passage": passage}) for query, passage in pairs))
    rows = json_lines(m3("score", "-m", folder, "--pairs", path, "--json"))
    for row, (query, passage) in zip(rows, pairs, strict=True):
        expected = {name: float(value) for name, value in model.score([query], [passage]).items()}
        assert row == {
            "query": query,
            "passage": passage,
            **{k: pytest.approx(v, abs=1e-5) for k, v in expected.items()},
        }
    assert "dense+sparse" in m3("score", "-m", folder, "the river", "a city").stdout


def test_a_cut_text_is_told_on_stderr(folder: Path) -> None:
    result = m3("encode", "-m", folder, "--json", "--max-length", "5", stdin="the river and the city and the bridge\n")
    assert len(json_lines(result)) == 1
    assert result.stderr.startswith("warning: 1 text is longer than 5 tokens and cut there")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "INDEX"], "give a query"),
        (["search", "nowhere", "q"], "does not exist"),
        (["search", "INDEX", "q", "-k", "0"], "-k"),
        (["search", "INDEX", "q", "--head", "colbert"], "colbert"),
        (["search", "INDEX", "q", "--weights", "1,2"], "three numbers"),
        (["search", "INDEX", "q", "--weights", "0,0,1"], "first two not both 0"),
        (["search", "INDEX", "q", "--device", "abacus"], "no device"),
        (["encode", "-m", "MODEL", "--no-dense", "--no-sparse"], "nothing is left"),
        (["encode", "-m", "MODEL", "nowhere.txt"], "there is no file 'nowhere.txt'"),
        (["search", "INDEX", "--queries", "nowhere.txt"], "there is no file 'nowhere.txt'"),
        (["encode", "-m", "MODEL", "--max-length", "2"], "max-length"),
        (["encode"], "Missing option"),
        (["encode", "-m", "MODEL", "-o", "shards"], "files, which can be read again"),
        (["encode", "-m", "MODEL", "-o", "shards", "-"], "files, which can be read again"),
        (["encode", "-m", "MODEL", "-o", "x.npz", "--row-dtype", "bfloat16"], "no bfloat16"),
        (["index", "-o", "other"], "give a model, or a folder of encoded texts"),
        (["index", "-o", "other", "--encoded", "x", "-"], "not both"),
        (["index", "-m", "MODEL"], "Missing option"),
        (["score", "-m", "MODEL", "only a query"], "at least one passage"),
        (["score", "-m", "MODEL"], "give a query"),
        (["demo", "--tokens", "5"], "tokens"),
        (["no-such-command"], "No such command"),
    ],
)
def test_bad_arguments_exit_with_2(arguments: list[str], message: str, folder: Path, index: Path) -> None:
    named = {"MODEL": folder, "INDEX": index}
    result = m3(*(named.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2 and result.stdout == ""
    assert message in unwrapped(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_a_bad_argument(folder: Path) -> None:
    result = m3("encode", "-m", folder, "--device", "cuda", stdin="text\n")
    assert result.exit_code == 2 and "torch sees no GPU" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "fine"}\n{"text": \n', ":2: not valid JSON"),
        (b'{"title": "no text"}\n', ":1: expected an object with 'text' or 'contents' or 'body'"),
        (b'{"text": 3}\n', ":1: expected an object"),
        (b'{"text": "fine"}\n\xff\n', ":2: 'utf-8' codec"),
    ],
)
def test_bad_input_is_named_by_file_and_line(folder: Path, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    result = m3("encode", "-m", folder, path)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith(f"error: {path}{message}")


def test_damaged_compressed_and_binary_files_are_errors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "sort"}\n' * 100)[:-12])
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"text": "sort"}\n')
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    for name in ("cut.jsonl.gz", "plain.jsonl.gz", "binary.txt"):
        result = m3("encode", "-m", folder, tmp_path / name)
        assert result.exit_code == 1 and result.stderr.startswith(f"error: {tmp_path / name}"), name


def test_failures_exit_with_1_and_one_line(folder: Path, index: Path, tmp_path: Path) -> None:
    result = m3("encode", "-m", tmp_path / "nowhere", stdin="text\n")
    assert result.exit_code == 1 and result.stderr.startswith("error: there is no folder")
    other = write_folder(tmp_path / "other", seed=3)
    result = m3("search", index, "river", "-m", other)
    assert result.exit_code == 1 and "not the one that made the index" in result.stderr
    result = m3("index", "-m", other, "-o", index, stdin="text\n")
    assert result.exit_code == 1 and "not the one that made the index" in result.stderr
    (index / "manifest.json").write_text("{}")
    result = m3("search", index, "river")
    assert result.exit_code == 1 and "no manifest of an index" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert isinstance(m3("--traceback", "search", index, "river").exception, ValueError)


def test_a_reader_that_stops_early_is_no_failure(index: Path) -> None:
    command = (
        f"{sys.executable} -m m3model.cli search {index} {'river ' * 400} --json | head -n 1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0" and done.stderr == ""


def test_doctor_shows_the_build_and_checks_every_op() -> None:
    (report,) = json_lines(m3("doctor", "--json"))
    assert report["versions"]["torch"] == torch.__version__
    assert report["build"]["cpu_library"] is None or report["build"]["cpu_library"].endswith(".so")
    assert all(check["passed"] for check in report["checks"])
    table = m3("doctor")
    assert table.exit_code == 0 and "CUDA architectures" in table.stdout and "maxsim_pairs" in table.stdout


def test_doctor_exits_with_1_when_an_op_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = checks.maxsim
    wrong = lambda *rows, **options: right(*rows, **options) * (1.001 if rows[0].dtype == torch.float32 else 1.0)  # noqa: E731
    monkeypatch.setattr(checks, "maxsim", wrong)
    monkeypatch.delattr(checks, "sparse_scores")
    result = m3("doctor", "--json")
    assert result.exit_code == 1
    failed = {check["op"]: check for check in json.loads(result.stdout)["checks"] if not check["passed"]}
    assert failed.keys() == {"maxsim", "sparse_scores"}
    assert (
        failed["maxsim"]["error"] == pytest.approx(0.001, rel=0.1) and "NameError" in failed["sparse_scores"]["reason"]
    )
    assert m3("doctor").exit_code == 1
