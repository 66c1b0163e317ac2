"""From files to the cache on disk and back: contents, census, one build for many readers, real files."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ds.batch import CHOSEN_ONLY
from dpo_ds.cluster import derived
from dpo_ds.data import dataset, format_census, prepare, reading
from dpo_ds.data import prepare as prepare_function
from dpo_ds.data import tokenize as tokenize_module
from dpo_ds.data.census import Census
from dpo_ds.data.rows import Location
from dpo_ds.errors import ConfigError, DataError
from tests.data_helpers import BOS, EOS, options, pairs, tokenizer, write_lines

prepare_module = sys.modules[prepare_function.__module__]
REAL = Path(os.environ.get("DPO_DS_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL} (set DPO_DS_DATA)")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_DS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenized"


@pytest.fixture
def no_reading(monkeypatch):
    """Call it: from then on, reading a row or tokenising fails the test."""

    def forbid():
        monkeypatch.setattr(prepare_module, "_build", lambda *_: pytest.fail("read the source again"))

    return forbid


def test_long_rows_are_tokenised_in_small_batches(tmp_path, monkeypatch):
    """By their letters; the data is the same."""
    rows = pairs(7)
    rows[2]["prompt"] = "x" * 90
    path = write_lines(tmp_path / "x.jsonl", rows)
    whole = prepare(str(path), options=options(max_length=300), tokenizer=tokenizer())
    sizes, own = [], tokenize_module.GroupTokenizer.__call__
    monkeypatch.setattr(reading, "LETTERS", 60)
    monkeypatch.setenv("DPO_DS_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(tokenize_module.GroupTokenizer, "__call__", lambda s, c: sizes.append(len(c)) or own(s, c))
    cut = prepare(str(path), options=options(max_length=300), tokenizer=tokenizer())
    assert sum(sizes) == 7 and 1 < len(sizes) and sizes[0] == 3, "two short ones, and the long one ends the batch"
    for i in range(7):
        parts = zip((whole[i].prompt, *whole[i].completions), (cut[i].prompt, *cut[i].completions), strict=True)
        assert all(np.array_equal(*both) for both in parts)


def test_pairs_come_back_as_tokenised(tmp_path, monkeypatch):
    """7 rows in batches of 3, one of them bad: rows, indices, masks, lengths and places survive the disk."""
    monkeypatch.setattr(reading, "BATCH", 3)
    rows = pairs(7)
    rows[4]["rejected"] = ""
    rows[5] = {"prompt": "long" * 20, "chosen": "c" * 80, "rejected": "r"}
    path = write_lines(tmp_path / "x.jsonl", rows)
    tok = tokenizer(bos=True)
    data = prepare(str(path), options=options(on_bad_row="skip"), tokenizer=tok)
    assert len(data) == 6
    first = data[0]
    assert [tok.decode(part) for part in (first.prompt, first.chosen, first.rejected)] == [
        f"{BOS}q0:",
        f" good 0{EOS}",
        f" bad 0{EOS}",
    ]
    assert first.prompt.dtype == first.rejected.dtype == np.int64 and first.masks[0].dtype == bool
    assert [data[i].index for i in range(6)] == [0, 1, 2, 3, 4, 5]
    assert [data.location(i) for i in range(6)] == [f"{path}:{n}" for n in (1, 2, 3, 4, 6, 7)]
    assert data.prompt_lengths.tolist() == [4, 4, 4, 4, 32, 4]
    assert data.completion_lengths[:, 0].tolist() == [8, 8, 8, 8, 32, 8]
    assert data.completion_lengths[:, 1].tolist() == [7, 7, 7, 7, 2, 7]
    assert tok.decode(data[4].prompt) == BOS + ("long" * 20)[-31:]
    assert data.sources == [(0, 6, 1.0)]
    with pytest.raises(IndexError):
        data[6]

    census = data.census
    assert census["rows_read"] == 7 and census["rows_kept"] == 6 and census["rows_dropped"] == 1
    assert (census["rows_cut"], census["prompts_cut"], census["completions_cut"]) == (1, 1, 1)
    assert census["dropped"] == {"empty rejected": 1}
    assert census["bad_rows"] == [
        {"location": f"{path}:5", "reason": "'rejected' is empty (''); a completion needs text"}
    ]
    assert census["tokens"]["prompt"] == {
        "p50": 4.0,
        "p90": 18.0,
        "p99": pytest.approx(30.6),
        "max": 32,
        "mean": pytest.approx(52 / 6),
    }
    assert census["longest"] == 64  # of 4 + 8, ..., and the row that was cut to 32 + 32
    assert (census["format"], census["files"]) == ("explicit", [str(path)])
    assert json.loads(json.dumps(census)) == census
    assert "location_files" not in census


def test_masks_survive_the_disk(tmp_path):
    """Bits that are no whole bytes, more than one row."""
    chat = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "b"},
    ]
    row = {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": chat,
        "rejected": [{"role": "assistant", "content": "c"}],
    }
    tok = tokenizer()
    data = prepare(str(write_lines(tmp_path / "x.jsonl", [row] * 3)), options=options(), tokenizer=tok)
    for i in range(3):
        assert tok.decode(data[i].chosen[data[i].masks[0]]) == "a</s>b</s>"
        assert len(data[i].masks[0]) == len(data[i].chosen) > len("a</s>b</s>") - 6
        assert data[i].masks[1].all()


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_the_largest_token_of_any_part(tmp_path, part):
    """The space's is the largest of these; EOS and letters are below it."""
    row = {"prompt": "ab", "chosen": "cd", "rejected": "ef", part: "g hi"}
    tok = tokenizer()
    census = prepare(str(write_lines(tmp_path / "x.jsonl", [row])), options=options(), tokenizer=tok).census
    assert census["largest_token"] == tok.convert_tokens_to_ids("Ġ")
    assert census["longest"] == {"prompt": 4 + 3, "chosen": 2 + 5, "rejected": 2 + 5}[part]


def test_a_bad_row_is_an_error_unless_skipped(tmp_path, cache):
    path = write_lines(tmp_path / "x.jsonl", [*pairs(1), {"prompt": "p", "chosen": "a"}, b"{", *pairs(1)])
    with pytest.raises(DataError) as caught:
        prepare(str(path), options=options(), tokenizer=tokenizer())
    assert str(caught.value) == (
        f"{path}:2: lacks 'rejected'; it has 'prompt', 'chosen' (rename columns with data.columns) "
        "(drop such rows with --data.on_bad_row skip)"
    )
    assert [p.name for p in cache.iterdir() if p.is_dir()] == []
    data = prepare(str(path), options=options(on_bad_row="skip"), tokenizer=tokenizer())
    assert len(data) == 2 and data.census["dropped"] == {"no rejected": 1, "unfinished object": 1}


def test_a_refused_template_is_a_bad_row(tmp_path):
    refuses = "{{ raise_exception('not today') }}"
    row = {"instruction": "i", "chosen": "a", "rejected": "b"}
    path = write_lines(tmp_path / "x.jsonl", [row, row])
    with pytest.raises(
        DataError, match="x.jsonl:1: the chat template refuses the conversation: not today .*on_bad_row skip"
    ):
        prepare(str(path), options=options(), tokenizer=tokenizer(template=refuses))
    with pytest.raises(
        DataError, match=r"none of 2 rows can be used \(refused by the chat template 2\); the first is .*:1: "
    ):
        prepare(str(path), options=options(on_bad_row="skip"), tokenizer=tokenizer(template=refuses))


def test_broken_files_cannot_be_skipped(tmp_path):
    path = write_lines(tmp_path / "x.jsonl.gz", pairs(500))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="broken or cut-short gzip file"):
        prepare(str(path), options=options(on_bad_row="skip"), tokenizer=tokenizer())


def test_a_pair_whose_cut_leaves_nothing_to_train_on_is_dropped(tmp_path):
    def chat(first, answer):
        return [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]

    rows = [
        {"chosen": chat("q" * 80, "a"), "rejected": chat("r", "b")},
        {"chosen": chat("q", "a"), "rejected": chat("q", "b")},
    ]
    path = write_lines(tmp_path / "x.jsonl", rows)
    data = prepare(str(path), options=options(), tokenizer=tokenizer())
    assert len(data) == 1
    assert data.census["dropped"] == {"no trained token left after the cut": 1}
    assert data.census["bad_rows"][0]["location"] == f"{path}:1"
    assert data.census["prompts_differ"] == 0  # of the rows kept


def test_a_pair_that_is_equal_after_the_cut_is_dropped(tmp_path):
    """Room for 3 tokens: "abcd" and "abce" both become "abc"."""
    rows = [{"prompt": "p", "chosen": chosen, "rejected": "abce"} for chosen in ("abcd", "abxd")]
    path = write_lines(tmp_path / "x.jsonl", rows)
    data = prepare(str(path), options=options(max_length=4, max_prompt_length=2), tokenizer=tokenizer())
    assert data.location(0) == f"{path}:2" and data.census["dropped"] == {"equal after the cut": 1}
    assert data.census["bad_rows"] == [{"location": f"{path}:1", "reason": "equal after the cut"}]
    assert (len(data), data.census["longest"], data.census["rows_cut"]) == (1, 4, 1)


def test_completions_behind_nothing_are_told(tmp_path):
    """Here the tokenizer puts no BOS before a text."""
    path = write_lines(tmp_path / "x.jsonl", [{"prompt": "", "chosen": "ab", "rejected": "cd"}, *pairs(1)])
    data = prepare(str(path), options=options(), tokenizer=tokenizer())
    told = [line for line in format_census(data.census).splitlines() if "no log-prob" in line]
    assert data.census["empty_prompts"] == len(told) == 1 and told[0].startswith("        1 of these: nothing stands")


def test_rows_that_python_cannot_hold_are_skipped(tmp_path):
    """Nested so deep that JSON reads it but what follows does not, or so deep that JSON does not."""
    rows = []
    for depth in (sys.getrecursionlimit() - 100, 100_000):
        deep = "[" * depth + "]" * depth
        rows.append(f'{{"prompt": [], "chosen": [], "rejected": [], "tools": [{{"a": {deep}}}]}}'.encode())
    path = write_lines(tmp_path / "x.jsonl", [*pairs(1), *rows])
    data = prepare(str(path), options=options(on_bad_row="skip"), tokenizer=tokenizer())
    assert len(data) == 1 and data.census["dropped"] == {"nested too deep": 2}


def test_odd_columns_beside_the_pair(tmp_path):
    """Parquet: a time beyond Python's in a column that no format reads; the message still names all columns."""
    when = pa.array([2**62], pa.timestamp("us"))
    path = tmp_path / "x.parquet"
    table = {"q": ["p"], "chosen": ["a"], "rejected": ["b"], "when": when}
    pq.write_table(pa.table(table), path)
    columns = {"prompt": "q"}
    assert len(prepare(str(path), options=options(columns=columns), tokenizer=tokenizer())) == 1
    pq.write_table(pa.table({"q": ["p"], "chosen": ["a"], "bad": ["b"], "when": when}), path)
    with pytest.raises(DataError, match="lacks 'rejected'; it has 'q', 'chosen', 'bad', 'when'"):
        prepare(str(path), options=options(columns=columns), tokenizer=tokenizer())


def census_of(tmp_path, row, **changes):
    path = write_lines(tmp_path / "x.jsonl", [row])
    return prepare(str(path), options=options(**changes), tokenizer=tokenizer()).census


PAIR_ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("system", "be brief"), ("images", ["a.png"]), ("history", [["q", "a"]]), ("tools", "[{}]"),
     ("rejected_score", 7.5)],
)  # fmt: skip
def test_a_column_that_carries_meaning_is_a_mistake_unless_ignored(tmp_path, name, value):
    row = PAIR_ROW | {name: value}
    with pytest.raises(
        DataError, match=rf"x.jsonl:1: '{name}' is .*leave it out with --data.ignore_columns '\[{name}\]'"
    ):
        census_of(tmp_path, row)
    with pytest.raises(DataError, match=r"none of 1 rows can be used \(meaning not used 1\)"):
        census_of(tmp_path, row, on_bad_row="skip")
    census = census_of(tmp_path, row, ignore_columns=[name])
    assert (census["rows_kept"], census["columns_not_used"]) == (1, [name])
    assert census_of(tmp_path, PAIR_ROW | {name: type(value)()})["columns_not_used"] == [name]  # says nothing


def test_columns_that_are_not_used_are_named(tmp_path):
    census = census_of(tmp_path, PAIR_ROW | {"id": 7, "score_chosen": 2.0, "a\nb": 1})
    assert census["columns_not_used"] == ["a\nb", "id", "score_chosen"]
    assert "          columns not used: 'a\\nb', id, score_chosen" in format_census(census).splitlines()
    assert "columns not used" not in format_census(census_of(tmp_path, PAIR_ROW))


def test_columns_in_parquet_carry_meaning_too(tmp_path):
    """Only what is wanted is read from such a file."""
    table = {"prompt": ["p", "q"], "chosen": ["a", "c"], "rejected": ["b", "d"], "system": [None, "be brief"]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="x.parquet:2: 'system' is 'be brief', which nothing here can use"):
        prepared(tmp_path / "x.parquet")


def test_files_left_out_are_named_each_time(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", pairs(2))
    write_lines(folder / "test.jsonl", pairs(2))
    for _ in range(2):  # the second time from the cache
        assert f"not read: {folder}/test.jsonl" in format_census(prepared(folder).census)
    write_lines(folder / "test-2.jsonl", pairs(2))
    assert prepared(folder).census["files_left_out"] == [f"{folder}/test-2.jsonl", f"{folder}/test.jsonl"]


def test_names_that_are_no_unicode(tmp_path):
    """In a column, where a line for the terminal escapes it, and in a message, where the template would write it."""
    census = census_of(tmp_path, PAIR_ROW | {"\ud800": 1})
    assert r"columns not used: '\ud800'" in format_census(census)
    turns = [{"role": "user", "content": "q", "name": "\ud800"}]
    row = {"prompt": turns, "chosen": "a", "rejected": "b"}
    template = "{% for m in messages %}{{ m.name or '' }}{{ m.content }}</s>{% endfor %}"
    path = write_lines(tmp_path / "x.jsonl", [row])
    with pytest.raises(
        DataError, match=r"x.jsonl:1: \"the chat template's text\" holds half a surrogate pair, '.ud800'"
    ):
        prepare(str(path), options=options(), tokenizer=tokenizer(template=template))


def test_a_prompt_that_contradicts_can_be_left_out(tmp_path):
    def chat(answer):
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]

    row = {"prompt": "its id is 12", "chosen": chat("a"), "rejected": chat("b")}
    with pytest.raises(DataError, match="'prompt' is 'its id is 12', but 'chosen' begins with 'q'"):
        census_of(tmp_path, row)
    assert census_of(tmp_path, row, ignore_columns=["prompt"])["format"] == "implicit"


def test_a_renamed_column_that_no_row_has(tmp_path):
    with pytest.raises(ConfigError, match="takes 'chosen' from 'beter', a column that no row has, though 'chosen'"):
        census_of(tmp_path, PAIR_ROW | {"better": "c"}, columns={"chosen": "beter"})
    assert census_of(tmp_path, PAIR_ROW, columns={"system": "rules"})["rows_kept"] == 1


def test_empty_data(tmp_path):
    path = tmp_path / "x.jsonl"
    for content in ["", "\n\n"]:
        path.write_text(content)
        with pytest.raises(DataError, match="x.jsonl: holds no row; a data set needs at least one"):
            prepare(str(path), options=options(), tokenizer=tokenizer())
    (tmp_path / "y.json").write_text("[]")
    with pytest.raises(DataError, match="y.json: holds no row"):
        prepare(str(tmp_path / "y.json"), options=options(), tokenizer=tokenizer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"chosne": "x"}}, "data.columns takes 'chosne' .* did you mean 'chosen'?"),
        ({"format": "hhh"}, "data.format is 'hhh': did you mean 'hh'?"),
    ],
)
def test_wrong_options(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare(str(tmp_path / "unread.jsonl"), options=options(**changes), tokenizer=tokenizer())


def test_mixtures_keep_their_rows_apart(tmp_path, no_reading):
    hello = "\n\nHuman: hi\n\nAssistant:"
    a = write_lines(tmp_path / "a.jsonl", pairs(3))
    b = write_lines(
        tmp_path / "b.jsonl", [{"chosen": hello + " x", "rejected": hello + " y"}, {"chosen": 1, "rejected": ""}]
    )
    source = [{"path": str(a), "weight": 0.5}, str(b)]
    data = prepare(source, options=options(on_bad_row="skip"), tokenizer=tokenizer())
    assert data.sources == [(0, 3, 0.5), (3, 4, 1.0)]
    assert data.census["format"] == "explicit, hh"
    assert data.location(3) == f"{b}:1"
    no_reading()  # other weights, same tokens
    again = prepare([str(a), {"path": str(b), "weight": 3}], options=options(on_bad_row="skip"), tokenizer=tokenizer())
    assert again.sources == [(0, 3, 1.0), (3, 4, 3.0)] and again.digest == data.digest


def test_limit_counts_rows_read_before_dropping(tmp_path):
    rows = pairs(5)
    rows[1]["chosen"] = ""
    a = write_lines(tmp_path / "a.jsonl", rows)
    b = write_lines(tmp_path / "b.jsonl", pairs(5))
    data = prepare(str(a), options=options(limit=3, on_bad_row="skip"), tokenizer=tokenizer())
    assert (data.census["rows_read"], len(data)) == (3, 2)
    data = prepare([str(a), str(b)], options=options(limit=7, on_bad_row="skip"), tokenizer=tokenizer())
    assert data.sources == [(0, 4, 1.0), (4, 6, 1.0)]
    data = prepare([str(a), str(b)], options=options(limit=5, on_bad_row="skip"), tokenizer=tokenizer())
    assert data.sources == [(0, 4, 1.0), (4, 4, 1.0)]


def test_supervised(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"prompt": "p", "completion": "abc"}])
    data = prepare(str(path), options=options(), tokenizer=tokenizer(), sides=CHOSEN_ONLY)
    assert tokenizer().decode(data[0].chosen) == "abc" + EOS
    assert len(data[0].completions) == 1 and data.completions.tolist() == [1]
    assert list(data.census["tokens"]) == ["prompt", "chosen"]


def test_a_second_run_reads_nothing(tmp_path, no_reading):
    path = write_lines(tmp_path / "x.jsonl", pairs(2))
    first = prepare(str(path), options=options(), tokenizer=tokenizer())
    no_reading()
    second = prepare(str(path), options=options(), tokenizer=tokenizer())
    assert second.digest == first.digest and second.census == first.census


def prepared(path) -> dataset.GroupDataset:
    return prepare(str(path), options=options(), tokenizer=tokenizer())


def remembered(monkeypatch, cache):
    """From now on digests are remembered at once, as they are of files that have not changed for two seconds."""
    monkeypatch.setattr(derived, "SETTLED_SECONDS", -9)


def test_other_content_of_the_same_size_and_time_is_tokenised_anew(tmp_path, cache, monkeypatch):
    """As rsync --times, or cp --preserve over the old file, leave it; also where the file is the same inode."""
    remembered(monkeypatch, cache)
    path = write_lines(tmp_path / "x.jsonl", pairs(2))
    before, first = path.stat(), prepared(path)
    other = write_lines(tmp_path / "y.jsonl", [*pairs(1), {"prompt": "q1:", "chosen": " gold 1", "rejected": " bad 1"}])
    assert other.stat().st_size == before.st_size
    other_bytes, tok = other.read_bytes(), tokenizer()
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)  # a new inode
    second = prepared(path)
    assert [tok.decode(data[1].chosen) for data in (first, second)] == [" good 1</s>", " gold 1</s>"]
    path.write_bytes(other_bytes.replace(b"gold", b"god "))  # a new change time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert tok.decode(prepared(path)[1].chosen) == " god  1</s>"


def test_a_file_that_changed_just_now_is_read_again(tmp_path, cache):
    """Its clock ticks some hundred times a second: two changes within a tick look alike."""
    prepared(write_lines(tmp_path / "x.jsonl", pairs(2)))
    assert not (cache.parent / "digests").exists()


def test_digests_are_remembered(tmp_path, cache, monkeypatch):
    remembered(monkeypatch, cache)
    path = write_lines(tmp_path / "x.jsonl", pairs(2))
    prepared(path)
    prepared(path)  # the first to read what was written
    monkeypatch.setattr(derived, "sha256", lambda path: pytest.fail(f"read {path} again"))
    prepared(path)


def test_a_file_that_changes_while_it_is_read_is_a_mistake(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "x.jsonl", pairs(2))
    build = prepare_module._build
    monkeypatch.setattr(prepare_module, "_build", lambda *args: (build(*args), write_lines(path, pairs(3))))
    with pytest.raises(DataError, match="x.jsonl: changed while it was read; start again"):
        prepared(path)
    monkeypatch.setattr(prepare_module, "_build", build)
    assert len(prepared(path)) == 3


def damaged_copies(folder: Path):
    """What was done, and the file that it leaves bad."""
    arrow = (folder / dataset.ARROW).read_bytes()
    middle = len(arrow) // 2
    yield "flipped", dataset.ARROW, arrow[:middle] + bytes([arrow[middle] ^ 1]) + arrow[middle + 1 :]
    yield "cut", dataset.ARROW, arrow[:-10]
    yield "emptied", dataset.ARROW, b""
    yield "census emptied", "census.json", b""
    yield "census gone", "census.json", None
    yield "sums gone", derived.SUMS, None
    yield "sums emptied", derived.SUMS, b""
    yield "sums that are not", derived.SUMS, b"\xff\x00 junk"


def test_damaged_tokenised_data_is_made_again_with_one_line(tmp_path, monkeypatch, cache, capsys):
    remembered(monkeypatch, cache)
    path = write_lines(tmp_path / "x.jsonl", pairs(20))
    first = prepared(path)
    rows = [first[i].chosen.tolist() for i in range(20)]
    folder = cache / first.digest
    for done, name, content in damaged_copies(folder):
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        capsys.readouterr()
        again = prepared(path)
        assert [again[i].chosen.tolist() for i in range(20)] == rows, done
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"dpo-ds: the tokenised data in {folder}: ") and line.endswith("it is made again"), done
        assert prepared(path).census == first.census and capsys.readouterr().out == ""


def test_ranks_that_do_not_build_wait_for_the_mended_data(tmp_path, monkeypatch):
    monkeypatch.setattr(derived, "POLL_SECONDS", 0.01)
    path = write_lines(tmp_path / "x.jsonl", pairs(20))
    folder = tmp_path / "cache" / "tokenized" / prepared(path).digest
    (folder / dataset.ARROW).write_bytes(b"no Arrow")
    found = []

    def wait():
        found.append(len(prepare(str(path), options=options(), tokenizer=tokenizer(), build=False)))

    waiter = threading.Thread(target=wait)
    waiter.start()
    waiter.join(0.3)
    assert not found
    prepared(path)
    waiter.join(10)
    assert found == [20]


def test_what_changes_the_tokens_changes_the_digest(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", pairs(2))
    (tmp_path / "copy").mkdir()
    write_lines(tmp_path / "copy" / "x.jsonl", pairs(2))
    base = {"options": options(), "tokenizer": tokenizer()}
    digests = [
        prepare(str(source), **{**base, **changes}).digest
        for source, changes in [
            (path, {}),
            (tmp_path / "copy" / "x.jsonl", {}),
            (path, {"options": options(max_length=63)}),
            (path, {"options": options(max_prompt_length=31)}),
            (path, {"options": options(limit=1)}),
            (path, {"options": options(columns={"chosen": "rejected", "rejected": "chosen"})}),
            (path, {"tokenizer": tokenizer(bos=True)}),
            (path, {"sides": CHOSEN_ONLY}),
        ]
    ]
    write_lines(path, pairs(3))
    digests.append(prepare(str(path), **base).digest)
    assert len(set(digests)) == len(digests)


def test_waiters_get_what_the_builder_makes(tmp_path, monkeypatch):
    """Three threads wait before anything is there; one builds; only it reads."""
    monkeypatch.setattr(derived, "POLL_SECONDS", 0.01)
    path = write_lines(tmp_path / "x.jsonl", pairs(20))
    builds, results = [], []
    build = prepare_module._build
    monkeypatch.setattr(prepare_module, "_build", lambda *args: (builds.append(1), build(*args)))

    def run(build):
        results.append(prepare(str(path), options=options(), tokenizer=tokenizer(), build=build))

    waiters = [threading.Thread(target=run, args=(False,)) for _ in range(3)]
    for thread in waiters:
        thread.start()
    assert not results
    run(True)
    for thread in waiters:
        thread.join(10)
    assert len(results) == 4 and builds == [1]
    assert {len(result) for result in results} == {20}


def test_two_builders_build_once(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "x.jsonl", pairs(20))
    builds = []
    build = prepare_module._build
    monkeypatch.setattr(prepare_module, "_build", lambda *args: (builds.append(1), build(*args)))
    threads = [
        threading.Thread(target=prepare, args=(str(path),), kwargs={"options": options(), "tokenizer": tokenizer()})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert builds == [1]


def test_a_waiter_ends_when_nobody_builds(tmp_path, monkeypatch):
    """The builder fails on a bad row; two that wait see its lock free for ABANDONED_SECONDS in a row."""
    monkeypatch.setattr(derived, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(derived, "ABANDONED_SECONDS", 0.1)
    path = write_lines(tmp_path / "x.jsonl", [{"prompt": "p"}])
    problems = []

    def run(build):
        with pytest.raises(DataError) as caught:
            prepare(str(path), options=options(), tokenizer=tokenizer(), build=build)
        problems.append(str(caught.value))

    waiters = [threading.Thread(target=run, args=(False,)) for _ in range(2)]
    for thread in waiters:
        thread.start()
    for thread in waiters:
        thread.join(10)
    run(True)
    assert [("the rank that makes it ended without it" in problem) for problem in problems] == [1, 1, 0]


def test_a_waiter_stays_while_somebody_builds(tmp_path, monkeypatch):
    """The build goes on until the waiter has found its lock taken 20 times: far longer than ABANDONED_SECONDS."""
    monkeypatch.setattr(derived, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(derived, "ABANDONED_SECONDS", 0.05)
    path = write_lines(tmp_path / "x.jsonl", pairs(2))
    started, seen, looks = threading.Event(), threading.Event(), []
    build, is_held = prepare_module._build, derived._is_held

    def slow_build(*args):
        started.set()
        assert seen.wait(30)
        build(*args)

    def counting(lock):
        looks.append(is_held(lock))
        if len(looks) == 20:
            seen.set()
        return looks[-1]

    monkeypatch.setattr(prepare_module, "_build", slow_build)
    monkeypatch.setattr(derived, "_is_held", counting)
    given = {"options": options(), "tokenizer": tokenizer()}
    builder = threading.Thread(target=prepare, args=(str(path),), kwargs=given)
    builder.start()
    assert started.wait(30)
    assert len(prepare(str(path), **given, build=False)) == 2
    builder.join(10)
    assert looks[:20] == [True] * 20


def test_a_waiter_gives_up_at_last(tmp_path, monkeypatch):
    monkeypatch.setattr(derived, "WAIT_SECONDS", 0)
    path = write_lines(tmp_path / "x.jsonl", pairs(1))
    with pytest.raises(TimeoutError, match="did not appear within 0 s"):
        prepare(str(path), options=options(), tokenizer=tokenizer(), build=False)


def test_a_cache_that_cannot_be_made_or_written(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "x.jsonl", pairs(2))
    given = {"options": options(), "tokenizer": tokenizer()}
    monkeypatch.setenv("DPO_DS_CACHE", str(path))  # a file
    for build in (True, False):
        with pytest.raises(ConfigError, match=f"data cache {path}/tokenized cannot be made or written .*DPO_DS_CACHE"):
            prepare(str(path), **given, build=build)
    monkeypatch.setenv("DPO_DS_CACHE", str(tmp_path / "full"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset.GroupWriter, "write", full)
    with pytest.raises(ConfigError, match=r"full/tokenized cannot be made or written \(No space left on device\)"):
        prepare(str(path), **given)


def test_a_killed_build_leaves_no_trace(tmp_path, cache):
    """A process that dies (os._exit) in the middle of writing; the next build clears what it left and is whole."""
    path = write_lines(tmp_path / "x.jsonl", pairs(30))
    code = f"""
import os
from dpo_ds.data import dataset, prepare, reading
from tests.data_helpers import options, tokenizer
import sys
reading.BATCH = 10
write = dataset.GroupWriter.write
def die(self, *given):
    write(self, *given)
    if self.rows == 20:
        os._exit(9)
dataset.GroupWriter.write = die
prepare({str(path)!r}, options=options(), tokenizer=tokenizer())
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True)
    assert killed.returncode == 9, killed.stderr.decode()
    (left,) = [p for p in cache.iterdir() if p.is_dir()]
    assert left.suffix == ".tmp" and (left / dataset.ARROW).exists()
    assert len(prepare(str(path), options=options(), tokenizer=tokenizer())) == 30
    assert [p.suffix for p in cache.iterdir() if p.is_dir()] == [""]


def test_no_pandas_and_no_deepspeed(tmp_path):
    """Both take seconds to import; a JSON file needs neither."""
    path = write_lines(tmp_path / "x.jsonl", pairs(2))
    code = f"""
import sys
from dpo_ds.data import prepare
from tests.data_helpers import options, tokenizer
data = prepare({str(path)!r}, options=options(), tokenizer=tokenizer())
data[1], data.location(1)
print([name for name in ("pandas", "deepspeed", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_census_lists_so_many_bad_rows_and_says_how_many_more():
    census = Census(rows_read=1000)
    for row in range(999):
        census.drop(Location("f", row), "empty chosen", "'chosen' is empty")
    summary = census.summary({"prompt": np.array([3])})
    assert (len(summary["bad_rows"]), summary["bad_rows_not_listed"]) == (300, 699)
    assert summary["rows_kept"] == 1


def test_census_for_the_terminal():
    tokens = {"p50": 94.0, "p90": 256.0, "p99": 1256.4, "max": 2048, "mean": 110.6}
    census = {
        "rows_read": 1800,
        "rows_kept": 1796,
        "rows_cut": 218,
        "prompts_cut": 213,
        "completions_cut": 1,
        "rows_dropped": 4,
        "dropped": {"empty chosen": 3, "not JSON": 1},
        "bad_rows": [{"location": "hh.jsonl.gz:87", "reason": "..."}],
        "prompts_differ": 2,
        "tokens": {"prompt": tokens, "chosen": tokens},
        "format": "hh",
        "files": ["hh.jsonl.gz"],
    }
    assert format_census(census).splitlines() == [
        "    1,800 rows read from hh.jsonl.gz, format hh",
        "    1,796 kept",
        "        2 of these differ before the last turn",
        "      218 of these cut to the maximum length (213 prompts, 1 completion)",
        "        4 dropped: empty chosen 3, not JSON 1 (first: hh.jsonl.gz:87)",
        "   tokens       p50     p90     p99     max    mean",
        "   prompt        94     256   1,256   2,048     111",
        "   chosen        94     256   1,256   2,048     111",
    ]


@needs_real_data
def test_real_hh_rows():
    source = str(REAL / "hh_harmless_train.jsonl.gz")
    tok = tokenizer()  # a token per character
    with pytest.raises(DataError, match=r"hh_harmless_train.jsonl.gz:87: 'chosen' is empty after its last"):
        prepare(source, options=options(), tokenizer=tok)
    data = prepare(source, options=options(on_bad_row="skip", max_length=9000, max_prompt_length=8000), tokenizer=tok)
    assert (data.census["rows_read"], data.census["rows_kept"], data.census["prompts_differ"]) == (1800, 1796, 2)
    assert data.census["dropped"] == {"empty chosen": 4}
    assert [bad["location"].rsplit(":")[-1] for bad in data.census["bad_rows"]] == ["87", "517", "926", "1104"]
    for i in range(0, len(data), 100):
        text = tok.decode(data[i].prompt)
        assert text.startswith("\n\nHuman: ") and text.endswith("\n\nAssistant:")
        assert tok.decode(data[i].chosen).startswith(" ") and tok.decode(data[i].chosen).endswith(EOS)


@needs_real_data
def test_real_sharegpt_rows():
    tok = tokenizer()
    wide = options(max_length=40_000, max_prompt_length=30_000)
    data = prepare(str(REAL / "sharegpt_dpo_en.json"), options=wide, tokenizer=tok)
    assert (len(data), data.census["format"], data.census["rows_cut"]) == (300, "sharegpt", 0)
    raw = json.loads((REAL / "sharegpt_dpo_en.json").read_text())
    for i in (0, 150, 299):
        assert tok.decode(data[i].prompt).endswith(raw[i]["conversations"][-1]["value"] + "\n<|assistant|>\n")
        assert tok.decode(data[i].chosen) == raw[i]["chosen"]["value"] + EOS
        assert tok.decode(data[i].rejected[data[i].masks[1]]) == raw[i]["rejected"]["value"] + EOS
