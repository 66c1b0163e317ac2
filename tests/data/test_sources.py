"""Every kind of source gives the same rows; every broken file gives one line that names the place."""

from __future__ import annotations

import gzip
import json
import os
import re
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ds.data import files, json_stream
from dpo_ds.data.rows import BadRow
from dpo_ds.data.sources import open_source
from dpo_ds.errors import DataError
from tests.data_helpers import pairs, write_lines

ROWS = [{"chosen": "naïve 世界", "n": 1}, {"chosen": "b", "n": 2}, {"chosen": 'c\n{["', "n": 3}]


def rows_of(path, split="train"):
    return list(open_source(str(path), split).rows())


def error_of(path, split="train") -> str:
    with pytest.raises(DataError) as caught:
        rows_of(path, split)
    assert not isinstance(caught.value, BadRow)  # cannot be skipped
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(tmp_path, name):
    path = tmp_path / name
    if name.startswith("array"):
        data = json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    elif name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        write_lines(path, ROWS)
    return path


@pytest.mark.parametrize(
    "name",
    ["array.json", "array.json.gz", "lines.json", "lines.jsonl", "lines.jsonl.gz", "LINES.JSONL", "rows.parquet"],
)
def test_kinds_of_file_give_the_same_rows(tmp_path, name):
    path = write(tmp_path, name)
    found = rows_of(path)
    assert [row for _, row in found] == ROWS
    assert [str(location) for location, _ in found] == [f"{path}:{n}" for n in (1, 2, 3)]


def test_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')  # no newline at the end
    assert [(location.row, row) for location, row in rows_of(path)] == [(1, {"a": 1}), (3, {"a": 2})]
    array = tmp_path / "windows.json"
    array.write_bytes(b'\xef\xbb\xbf\n [{"a": 1}]')
    assert [row for _, row in rows_of(array)] == [{"a": 1}]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_array_read_in_small_chunks(tmp_path, monkeypatch, chunk):
    """Tokens, escapes and characters of several bytes cut by the chunk's end."""
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    rows = [{"a": "é\\u00e9\\ud83d\\ude00世", "b": [1.5e3, True, None, {}]}, {"a": ""}, {"n": 12345678901234567890}]
    path = tmp_path / "x.json"
    path.write_text(
        " [ " + ",\n ".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n", encoding="utf-8"
    )
    assert [row for _, row in rows_of(path)] == rows


@pytest.mark.parametrize("name", ["array.json", "rows.jsonl", "rows.parquet"])
def test_memory_stays_flat(tmp_path, name):
    """20 MB of rows pass through a few MB of Python objects."""
    rows = [{"text": "x" * 20_000, "n": n} for n in range(1000)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist([{"text": f"{n}" + "x" * 200} for n in range(50_000)]), path)
    else:
        path.write_text(json.dumps(rows)) if name == "array.json" else write_lines(path, rows)
    tracemalloc.start()
    count = sum(1 for _ in open_source(str(path)).rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count >= 1000
    assert peak < 8e6


def test_folder_reads_the_files_of_its_split_in_order(tmp_path):
    for name, n in [("b-train.jsonl", 2), ("a-train.jsonl", 1), ("test.jsonl", 9), (".hidden.jsonl", 7)]:
        write_lines(tmp_path / name, [{"n": n}])
    (tmp_path / "README.md").write_text("no data")
    assert [row["n"] for _, row in rows_of(tmp_path)] == [1, 2]
    assert [row["n"] for _, row in rows_of(tmp_path, "eval")] == [9]
    assert [path.name for path in open_source(str(tmp_path)).left_out] == ["test.jsonl"]


def test_folder_without_split_names_is_read_whole(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"n": 1}])
    write_lines(tmp_path / "b.jsonl", [{"n": 2}])
    assert len(rows_of(tmp_path)) == len(rows_of(tmp_path, "eval")) == 2


def test_of_what_sample_leaves_the_pairs_are_read(tmp_path):
    for name in ("completions", "pairs"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "shard-000000.jsonl", [{"from": name}])
    (tmp_path / "MANIFEST.json").write_text('{\n "pairs": 1\n}\n')
    assert [row["from"] for _, row in rows_of(tmp_path)] == ["pairs"]


def test_folder_of_unnamed_files_and_a_test_file(tmp_path):
    write_lines(tmp_path / "pairs.jsonl", [{"n": 1}])
    write_lines(tmp_path / "pairs_test.jsonl", [{"n": 2}])
    assert [row["n"] for _, row in rows_of(tmp_path)] == [1]
    assert [row["n"] for _, row in rows_of(tmp_path, "eval")] == [2]


def test_folder_lacks_the_split(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"n": 1}])
    write_lines(tmp_path / "other.jsonl", [{"n": 2}])
    assert re.search(
        r"has no test or validation .* split but unnamed, train; name one of its files", error_of(tmp_path, "eval")
    )


def names_of(path, split="train"):
    return sorted(path.name for path in open_source(str(path), split).paths)


ULTRAFEEDBACK = [f"data/{name}-00000-of-00001.parquet" for name in (
    "train_prefs", "train_sft", "train_gen", "test_prefs", "test_sft", "test_gen"
)]  # fmt: skip


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_several_splits_are_an_error_that_lists_them(tmp_path):
    touch(tmp_path, *ULTRAFEEDBACK)
    several = "has several {} splits, {}; name one, as in {}:{}"
    names = "train_gen, train_prefs, train_sft"
    assert error_of(tmp_path) == f"{tmp_path}: " + several.format("train", names, tmp_path, "train_gen")
    names = "test_gen, test_prefs, test_sft"
    assert error_of(tmp_path, "eval") == f"{tmp_path}: " + several.format("eval", names, tmp_path, "test_gen")
    for split in ("train", "eval"):
        assert names_of(f"{tmp_path}:train_prefs", split) == ["train_prefs-00000-of-00001.parquet"]
    left_out = {f"data/{path.name}" for path in open_source(f"{tmp_path}:train_prefs").left_out}
    assert left_out == {*ULTRAFEEDBACK} - {"data/train_prefs-00000-of-00001.parquet"}
    assert error_of(f"{tmp_path}:trainprefs").startswith(
        f"{tmp_path}:trainprefs: {tmp_path} has no split 'trainprefs' "
    )


@pytest.mark.parametrize(
    ("files", "split", "chosen"),
    [
        (["train_prefs.jsonl", "train_sft.jsonl"], "train", None),
        (["train_prefs.jsonl", "test_prefs.jsonl"], "train", ["train_prefs.jsonl"]),
        (["train_prefs.jsonl", "test_prefs.jsonl"], "eval", ["test_prefs.jsonl"]),
        (["train-1.jsonl", "train-2.jsonl", "train.jsonl"], "train", ["train-1.jsonl", "train-2.jsonl", "train.jsonl"]),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "train_sft-00000-of-00001.parquet"], "train",
         ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]),
        (["train/a.jsonl", "validation/b.jsonl"], "train", ["a.jsonl"]),
        (["train/a.jsonl", "validation/b.jsonl"], "eval", ["b.jsonl"]),
        (["prefs-00000-of-00001.parquet", "pairs-00000-of-00001.parquet"], "train", None),
        (["train-00000-of-00001-5c2a.parquet", "dev-00000-of-00001-77aa.parquet"], "eval",
         ["dev-00000-of-00001-77aa.parquet"]),
    ],
)  # fmt: skip
def test_splits_in_names(tmp_path, files, split, chosen):
    touch(tmp_path, *files)
    if chosen is None:
        assert "name one" in error_of(tmp_path, split)
    else:
        assert names_of(tmp_path, split) == chosen


def test_a_split_of_what_has_none(tmp_path):
    import datasets

    path = write_lines(tmp_path / "x.jsonl", [{"n": 1}])
    assert error_of(f"{path}:train") == f"{path}:train: {path} is one file, without splits; leave out :train"
    datasets.Dataset.from_list([{"n": 1}]).save_to_disk(str(tmp_path / "one"))
    assert "one is one data set, without splits; leave out :train" in error_of(f"{tmp_path}/one:train")
    write_lines(tmp_path / "odd:name.jsonl", [{"n": 3}])
    assert rows_of(tmp_path / "odd:name.jsonl")[0][1] == {"n": 3}


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.csv.gz"])
def test_tables(tmp_path, name):
    """Quotes, a line break within a field, a byte order mark; a row's number is the line it begins on."""
    comma = "\t" if ".tsv" in name else ","
    text = comma.join(["prompt", "chosen"]) + "\r\n" + comma.join(["q", '"two\nlines, ""quoted"""']) + "\r\n\r\n"
    data = b"\xef\xbb\xbf" + (text + comma.join(["ü", ""]) + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    rows = [(location.row, row) for location, row in rows_of(tmp_path / name)]
    assert rows == [
        (2, {"prompt": "q", "chosen": 'two\nlines, "quoted"'}), (5, {"prompt": "ü", "chosen": ""})
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a,a\n1,2\n", r"x.csv:1: two columns are called 'a'; rename one"),
        (b'a,b\n1,"2\n', r"x.csv:2: not a table: unexpected end of data"),
        (b'a,b\n1,2\n1,"2"3\n', r"x.csv:3: not a table: ',' expected after '\"'"),
        (b"a,b\n1,caf\xe9\n", r"x.csv: not UTF-8 behind line \d \(0xe9\); save the file as UTF-8"),
    ],
)
def test_broken_tables(tmp_path, text, message):
    (tmp_path / "x.csv").write_bytes(text)
    assert re.search(message, error_of(tmp_path / "x.csv"))


def test_a_row_of_a_table_with_another_number_of_fields_can_be_skipped(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n1,2,3\n4,5\n")
    (_, first), (location, bad), (_, third) = rows_of(tmp_path / "x.csv")
    assert (first, location.row, third) == ({"a": "1", "b": "2"}, 3, {"a": "4", "b": "5"})
    assert (bad.reason, str(bad)) == (
        "wrong number of fields", "3 fields where the header names 2; quote text that holds ','",
    )  # fmt: skip


def test_a_field_longer_than_the_library_takes_by_itself(tmp_path):
    (tmp_path / "x.csv").write_text("a\n" + "x" * 200_000 + "\n")
    assert len(rows_of(tmp_path / "x.csv")[0][1]["a"]) == 200_000


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz", "x.csv.gz"])
def test_gzip_of_blank_lines_without_end(tmp_path, name):
    """Two million after the first row, from 4 kB; a billion would take a quarter of an hour."""
    first = b"a\n1\n" if "csv" in name else b'{"a": 1}\n'
    (tmp_path / name).write_bytes(gzip.compress(first + b"\n" * 2_000_000))
    assert "1,000,000 blank lines before it; this is no data" in error_of(tmp_path / name)


def test_white_space_without_end_in_an_array(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "MAX_BLANK", 1 << 21)
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b'[{"a": 1},' + b" \n" * (1 << 21)))
    assert re.search(r"x.json.gz:\d+: not JSON at column \d: \d MiB of white space; ", error_of(tmp_path / "x.json.gz"))
    (tmp_path / "y.json.gz").write_bytes(gzip.compress(b'[{"a": 1},' + b" \n" * (1 << 19) + b'{"a": 2}]'))
    assert len(rows_of(tmp_path / "y.json.gz")) == 2


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 1 << 20)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n{"a": "' + b"x" * (1 << 21)))
    assert error_of(tmp_path / "x.jsonl.gz").endswith("x.jsonl.gz:2: a line of more than 1 MiB; one object a line")


def test_datasets_folders(tmp_path):
    import datasets

    split = {name: datasets.Dataset.from_list([{"n": n}]) for n, name in enumerate(["train", "validation", "test"])}
    split["train"].save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(split).save_to_disk(str(tmp_path / "many"))
    assert rows_of(tmp_path / "one") == [((f"{tmp_path}/one", 1), {"n": 0})]
    assert rows_of(tmp_path / "many") == [((f"{tmp_path}/many:train", 1), {"n": 0})]
    assert rows_of(tmp_path / "many", "eval") == [((f"{tmp_path}/many:test", 1), {"n": 2})]
    assert rows_of(f"{tmp_path}/many:validation") == [((f"{tmp_path}/many:validation", 1), {"n": 1})]
    assert "many has no split 'dev' but test, train, validation" in error_of(f"{tmp_path}/many:dev")
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    assert "one: cannot be opened as a datasets folder" in error_of(tmp_path / "one")


def test_hub_id(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        data = {split: datasets.Dataset.from_list([{"n": split}]) for split in ["train", "test"]}
        return data[split] if split else datasets.DatasetDict(data)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert rows_of("some/set") == [(("some/set:train", 1), {"n": "train"})]
    assert rows_of("some/set", "eval")[0][1] == {"n": "test"}
    assert rows_of("some/set:test")[0][1] == {"n": "test"}
    assert asked == [("some/set", None), ("some/set", None), ("some/set", "test")]

    def unreachable(name, split):
        raise ConnectionError("Couldn't reach 'some/set' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = error_of("some/set")
    assert message.startswith(
        "some/set: there is no such file or folder, and it cannot be loaded from the Hugging Face Hub"
    )
    assert "Couldn't reach" in message and "give a local path" in message


def test_missing_file_names_the_nearest(tmp_path):
    write_lines(tmp_path / "pairs.jsonl", pairs(1))
    assert error_of(tmp_path / "pair.jsonl") == (
        f"{tmp_path}/pair.jsonl: no such file or folder; did you mean {tmp_path}/pairs.jsonl?"
    )
    assert error_of(tmp_path / "zzz").endswith(f"no such file or folder in {tmp_path}")
    assert error_of(tmp_path / "no" / "x.jsonl").endswith(f"the folder {tmp_path}/no does not exist")
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    assert error_of(tmp_path / "link.jsonl").endswith("it is a link to gone.jsonl, which does not exist")


def test_empty_folder_and_unknown_kind(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.xls").write_text("a,b")
    known = "known: .jsonl, .json, .csv, .tsv, .jsonl.gz, .json.gz, .csv.gz, .tsv.gz, .parquet"
    assert error_of(tmp_path / "empty") == f"{tmp_path}/empty: the folder holds no data file; {known}"
    assert error_of(tmp_path / "x.xls") == f"{tmp_path}/x.xls: not a file that can be read as data; {known}"


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"a": 1, "b" 2}', "not JSON", r"x.jsonl:2: the line is not JSON at column 14: Expecting ':' delimiter"),
        (b'{"a": "half', "not JSON", r"x.jsonl:2: the line is not JSON at column 7: Unterminated string"),
        (b'{"a": [', "unfinished object", r"x.jsonl:2: the object does not end on its line; write each object on one"),
        (b'{"a": ' + b"1" * 5000 + b"}", "number too long", r"x.jsonl:2: a whole number has more than 4300 digits"),
        (b'{"a": ' + b"[" * 100_000, "nested too deep", r"x.jsonl:2: lists and objects are nested too deep"),
        (b"[1, 2]", "not an object", r"x.jsonl:2: the row is list \[1, 2\]; it must be an object"),
        (b'{"a": "caf\xe9"}', "not UTF-8", r"x.jsonl:2: not UTF-8 at byte 10 of the line \(0xe9\)"),
    ],
)
def test_a_broken_line_can_be_skipped(tmp_path, line, reason, message):
    path = write_lines(tmp_path / "x.jsonl", [{"a": 1}, line, {"a": 3}])
    (_, first), (location, bad), (_, third) = rows_of(path)
    assert (first, third) == ({"a": 1}, {"a": 3})
    assert bad.reason == reason
    assert re.search(message + r".*drop such rows with --data.on_bad_row skip", str(bad.at(location)))


def test_an_array_element_that_is_no_object(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1}, 12, "s", {"a": 2}]')
    assert [row.reason if isinstance(row, BadRow) else row["a"] for _, row in rows_of(path)] == [
        1,
        "not an object",
        "not an object",
        2,
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'[{"a": 1},\n {"a": "b', r"x.json:2: the file ends at column 10, in the middle of the array; copy it again"),
        (b'[{"a": 1},\n', r"x.json:2: the file ends at column 1, in the middle"),
        (b'[{"a": 1}', r"x.json:1: the file ends at column 10, in the middle"),
        (
            b'[{"a": 1}\n{"a": 2}]',
            r"x.json:2: not JSON at column 1: expected , or \], found '{'; a .json file is an array",
        ),
        (b'[{"a": 1},\n\n {"a": bad}' + b" " * 99 + b"]", r"x.json:3: not JSON at column 8: Expecting value"),
        (b'[{"a": 1}] {"a": 2}', r"x.json:1: not JSON at column 12: text follows the array's end"),
        (b'[{"a": 1},\n]', r"x.json:2: not JSON at column 1: a comma stands before the closing \]; remove it"),
        (b'[{"a": 1},\n {"a": bad}]', r"x.json:2: not JSON at column 8: Expecting value"),
        (b'[{"a": "caf\xe9"}]', r"x.json: not UTF-8 at byte 11 \(0xe9\)"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_half_or_broken_array(tmp_path, monkeypatch, text, message, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_bytes(text)
    assert re.search(message, error_of(path))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_array_elements_that_python_cannot_hold(tmp_path, monkeypatch, chunk):
    """The element behind each is found by its brackets and strings; a string may hold brackets and quotes."""
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    deep, digits = "[" * 20_000 + "]" * 20_000, "1" * 5000
    path = tmp_path / "x.json"
    long = f'{{"b": "}}],\\"[", "a": {digits}, "c": "]}}"}}'
    path.write_text(f'[{{"a": 1}}, {long}, {{"a": 2}}, {digits}, {{"a": {deep}}},{{"a": 3}}]')
    found = [row.reason if isinstance(row, BadRow) else row["a"] for _, row in rows_of(path)]
    assert found == [1, "number too long", 2, "number too long", "nested too deep", 3]


def test_one_object_over_several_lines(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    message = "the object does not end on its line; write each object on one line, or wrap all objects in [ ], "
    assert error_of(path) == f"{path}:1: {message}with commas between them"


def test_broken_gzip(tmp_path):
    path = write_lines(tmp_path / "x.jsonl.gz", [{"n": n, "noise": str(hash((n, "noise")))} for n in range(3000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert re.search(
        r"x.jsonl.gz: broken or cut-short gzip file after row \d{3,4} .*; copy or download it again", error_of(path)
    )
    path.write_bytes(whole[:1000] + b"\0" * 50 + whole[1050:])
    assert "broken or cut-short gzip" in error_of(path)
    path.write_bytes(b'{"n": 1}\n')
    assert "after row 0" in error_of(path)


def test_broken_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{"n": n, "s": f"{n * n}"} for n in range(5000)]), path, row_group_size=1024)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert re.search(r"x.parquet: broken Parquet file after row 0 \(.*\); copy or download it again", error_of(path))
    half = len(whole) // 2
    path.write_bytes(whole[:half] + b"\xff" * 2000 + whole[half + 2000 :])
    assert "broken Parquet file after row" in error_of(path)


def strings(*values: bytes) -> pa.Array:
    """As they are, UTF-8 or not."""
    ends = [sum(map(len, values[:i])) for i in range(len(values) + 1)]
    offsets = b"".join(end.to_bytes(4, "little") for end in ends)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


def odd_table() -> pa.Table:
    """Row 2 of three holds a time and a text that Python cannot."""
    return pa.table(
        {
            "when": pa.array([0, 2**62, 0], pa.timestamp("us")),
            "chosen": pa.array(["a", "b", "c"]),
            "note": strings(b"x", b"caf\xe9", b"z"),
        }
    )


def save(table, path):
    import datasets

    if path.suffix:
        pq.write_table(table, path)
    else:
        datasets.Dataset(table).save_to_disk(str(path))


@pytest.mark.parametrize("name", ["x.parquet", "folder"])
def test_columns_nobody_asked_for_are_not_converted(tmp_path, name):
    save(odd_table(), tmp_path / name)
    source = open_source(str(tmp_path / name))
    rows = [row for _, row in source.rows({"chosen", "rejected"})]
    assert rows == [{"when": None, "chosen": text, "note": None} for text in "abc"]
    assert [row for _, row in source.rows({"rejected"})][0].keys() == {"when", "chosen", "note"}


@pytest.mark.parametrize("name", ["x.parquet", "folder"])
def test_a_row_that_cannot_be_converted_can_be_skipped(tmp_path, name):
    save(odd_table(), tmp_path / name)
    source = open_source(str(tmp_path / name))
    (_, first), (location, bad), (_, third) = source.rows({"note", "chosen"})
    assert (first["note"], third["note"], location.row, bad.reason) == ("x", "z", 2, "not UTF-8")
    assert str(bad) == r"not UTF-8 at byte 3 of b'caf\xe9'; save the text as UTF-8"
    _, (_, bad), _ = source.rows({"when"})
    assert bad.reason == "not readable" and "date value out of range" in str(bad)


def test_unreadable_file(tmp_path):
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "nowhere")
    assert "no such file" in error_of(tmp_path / "x.jsonl")


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="rows.jsonl: neither a file nor a folder"):
        open_source(str(tmp_path / "rows.jsonl"))
