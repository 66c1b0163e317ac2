"""The cache's files: keys, shards, manifest, and the memory-mapped copy that rows are looked up in."""

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from dpo_ds.batch import Group, packed_batch, padded_batch
from dpo_ds.commands.precompute import Lacking, lacking, micro_batches
from dpo_ds.data import GroupDataset
from dpo_ds.data.dataset import GroupWriter
from dpo_ds.data.rows import Location
from dpo_ds.data.shard import DamagedShard, shard_name
from dpo_ds.demo.tiny import tiny_config
from dpo_ds.errors import ConfigError
from dpo_ds.reference.cache import (
    SHARDS,
    KeyIndex,
    Shard,
    check_shards,
    completion_keys,
    is_finished,
    pair_keys,
    read_manifest,
    sort_keys,
    write_manifest,
)
from dpo_ds.reference.cached import CachedRows
from dpo_ds.reference.store import VALUES, _array, data_rows, open_store
from dpo_ds.reference.verify import verify
from tests.tiny import random_pairs

IDENTITY = {"reference": "model", "weights": "w" * 64, "tokenizer": "t" * 64}
HEAD = {"format": 1, "weights": "w" * 64, "tokenizer": "t" * 64, "dtype": "float32"}
SETTINGS = {
    "dtype": "float32", "layout": "packed", "attention": "sdpa", "logprobs": "chunked", "device": "cpu", "threads": 1,
    "versions": {"torch": "2"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache_root(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_DS_CACHE", str(tmp_path / "derived"))


def dataset(folder, pairs) -> GroupDataset:
    folder.mkdir()
    with GroupWriter(folder) as writer:
        writer.write(pairs, [Location("a.jsonl", row) for row in range(len(pairs))])
    (folder / "census.json").write_text(json.dumps({"location_files": ["a.jsonl"], "source_ends": [len(pairs)]}))
    return GroupDataset(folder, [1.0])


def shard_of(pairs, keys) -> Shard:
    """Log-prob i of side s of pair p is -(100 p + 10 s) - i / 100."""
    logps = [[-(100 * p.index + 10 * s) - np.arange(len(getattr(p, side))) / 100 for p in pairs]
             for s, side in enumerate(("chosen", "rejected"))]  # fmt: skip
    lengths = np.array([[len(p.chosen), len(p.rejected)] for p in pairs])
    return Shard(keys, lengths, *(np.concatenate(side).astype(np.float32) for side in logps))


def filled(folder, data, pairs, builds=((0, 4), (4, 7))):
    """A cache of one shard a build."""
    folder.mkdir(exist_ok=True)
    keys, done = pair_keys(data), []
    for number, (start, stop) in enumerate(builds):
        SHARDS.write(folder / shard_name(number), shard_of(pairs[start:stop], keys[start:stop]), HEAD)
        done = [*done, {**SETTINGS, "shards": [{"file": shard_name(number)}]}]
        done = write_manifest(folder, IDENTITY, done).values["builds"]
    return read_manifest(folder)


def test_a_key_depends_on_every_token_and_on_where_the_parts_end(tmp_path):
    pair = random_pairs(3)[2]
    both = np.concatenate([pair.prompt, pair.chosen])
    moved = Group.pair(both[:-1], both[-1:], pair.rejected, np.ones(1, bool), pair.masks[1])
    changed = np.append(pair.rejected[:-1], pair.rejected[-1] + 1)
    other = replace(pair, completions=(pair.chosen, changed))
    masked = replace(pair, masks=(np.zeros(len(pair.chosen), bool), pair.masks[1]))
    swapped = replace(pair, completions=pair.completions[::-1], masks=pair.masks[::-1])
    data = dataset(tmp_path / "a", [pair, moved, other, swapped, masked])
    keys = pair_keys(data)
    assert len({tuple(key) for key in keys[:4].tolist()}) == 4
    assert keys[4].tolist() == keys[0].tolist(), "a mask is applied at lookup"
    of_pair, of_moved, of_other, of_swapped, of_masked = completion_keys(data).reshape(5, 2, 2).tolist()
    assert of_pair == of_swapped[::-1] == of_masked, "a completion's key depends on the prompt and itself alone"
    assert of_pair[0] == of_other[0] and of_pair[1] != of_other[1]
    assert not {*map(tuple, of_pair)} & {*map(tuple, of_moved)}


def test_the_index_finds_keys_with_equal_first_halves():
    keys = np.array([[5, 9], [1, 3], [5, 2], [2**64 - 1, 0], [5, 4]], dtype=np.uint64)
    order = sort_keys(keys)
    index = KeyIndex(keys[order].T)
    assert order[index.find(keys)].tolist() == [0, 1, 2, 3, 4]
    absent = np.array([[5, 3], [5, 10], [0, 0], [2**64 - 1, 1], [6, 0]], dtype=np.uint64)
    assert index.find(absent).tolist() == [-1] * 5


def test_what_a_cache_lacks_is_unique_and_in_order(tmp_path):
    pairs = random_pairs(4)
    both = dataset(tmp_path / "a", [pairs[1], replace(pairs[1], completions=pairs[1].completions[::-1]), pairs[2]])
    keys, firsts = completion_keys(both), both.first_completions
    lengths = [tuple(map(len, pairs[i].completions)) for i in (1, 2)]
    assert lacking([both], keys, firsts, None) == [
        (0, (0, 1), len(pairs[1].prompt), lengths[0]), (2, (0, 1), len(pairs[2].prompt), lengths[1]),
    ]  # fmt: skip
    of_pairs = filled(tmp_path / "cache", dataset(tmp_path / "b", pairs[2:]), pairs[2:], builds=[(0, 2)])
    assert [row.row for row in lacking([both], keys, firsts, of_pairs)] == [0]


def test_a_shard_comes_back_and_has_the_same_bytes_twice(tmp_path):
    pairs = random_pairs(5)
    keys = pair_keys(dataset(tmp_path / "a", pairs))
    shard = shard_of(pairs, keys)
    for name in ("one", "two"):
        SHARDS.write(tmp_path / name, shard, HEAD)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found, head = SHARDS.read(tmp_path / "one")
    assert all(np.array_equal(a, b) for a, b in zip(found, shard, strict=True))
    assert head["dtype"] == "float32"
    assert not list(tmp_path.glob("*.tmp"))


def test_only_the_same_pairs_under_the_same_head_are_finished(tmp_path):
    pairs = random_pairs(5)
    keys = pair_keys(dataset(tmp_path / "a", pairs))
    path = tmp_path / "shard"
    assert not is_finished(path, keys, HEAD)
    SHARDS.write(path, shard_of(pairs, keys), HEAD)
    assert is_finished(path, keys, HEAD)
    assert not is_finished(path, keys[::-1], HEAD)
    assert not is_finished(path, keys, {**HEAD, "dtype": "bfloat16"})
    content = path.read_bytes()
    values = content.find(shard_of(pairs, keys).chosen.tobytes())
    path.write_bytes(content[:values] + b"\x01" + content[values + 1 :])
    with pytest.raises(DamagedShard, match="shard: damaged, its rows do not have the digest"):
        SHARDS.read(path)
    for place in range(0, len(content), 61):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not is_finished(path, keys, HEAD), place
    path.write_bytes(content[:-20])
    assert not is_finished(path, keys, HEAD)


def test_every_flipped_byte_is_found(tmp_path, capsys):
    pairs = random_pairs(7)
    manifest = filled(tmp_path / "cache", dataset(tmp_path / "a", pairs), pairs)
    verify(tmp_path / "cache")
    said = capsys.readouterr().out
    assert manifest.id in said and "every hash is right" in said and "rows       7 in 2 shards" in said
    tokens = sum(len(ids) - (not len(pair.prompt)) for pair in pairs for ids in pair.completions)
    assert f"tokens     {tokens}, mean log-prob" in said
    for number in (0, 1):
        path = tmp_path / "cache" / shard_name(number)
        content = path.read_bytes()
        for place in range(0, len(content), 97):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(ConfigError, match=f"{shard_name(number)}: SHA-256"):
                check_shards(manifest)
        path.write_bytes(content[:-1])
        with pytest.raises(ConfigError, match="bytes, MANIFEST.json says"):
            check_shards(manifest)
        path.unlink()
        with pytest.raises(ConfigError, match="missing"):
            verify(tmp_path / "cache")
        path.write_bytes(content)


def test_a_manifest_that_was_edited_is_refused(tmp_path):
    pairs = random_pairs(7)
    filled(tmp_path / "cache", dataset(tmp_path / "a", pairs), pairs)
    path = tmp_path / "cache" / "MANIFEST.json"
    text = path.read_text()
    path.write_text(text.replace("w" * 64, "x" * 64))
    with pytest.raises(ConfigError, match="its id is not that of its content"):
        read_manifest(tmp_path / "cache")
    path.write_text(text[:-9])
    with pytest.raises(ConfigError, match="not JSON"):
        read_manifest(tmp_path / "cache")
    with pytest.raises(ConfigError, match="no MANIFEST.json"):
        verify(tmp_path)


def test_a_cache_that_grows_remembers_what_it_was(tmp_path):
    pairs = random_pairs(7)
    data = dataset(tmp_path / "a", pairs)
    small = filled(tmp_path / "cache", data, pairs, builds=[(0, 4)])
    grown = filled(tmp_path / "cache", data, pairs)
    assert grown.id != small.id
    assert grown.ids == [small.id, grown.id]


@pytest.mark.parametrize("layout", [packed_batch, padded_batch])
def test_rows_are_found_by_key_in_any_order_and_masks_apply(tmp_path, layout):
    pairs = random_pairs(7)
    manifest = filled(tmp_path / "cache", dataset(tmp_path / "a", pairs), pairs)
    subset = dataset(tmp_path / "b", [pairs[i] for i in (6, 0, 3)])
    store = open_store(manifest, build=True)
    cached = CachedRows(manifest, store, [subset], [data_rows(store, subset, build=True)])
    batch = layout([subset[1], subset[0]])
    wanted = []
    for pair in (pairs[0], pairs[6]):
        for s in range(2):
            wanted += [-(100 * pair.index + 10 * s) - i / 100 for i in pair.target_positions(s)]
    assert not pairs[6].masks[0].all() or not pairs[0].masks[0].all(), "one pair has an untrained turn"
    assert cached.token_logps(batch).tolist() == pytest.approx(wanted, abs=1e-4)
    sums = batch.pair_logps(cached.token_logps(batch))
    assert sums.chosen_tokens.tolist() == [pairs[0].masks[0].sum(), pairs[6].masks[0].sum()]
    assert cached.token_logps(layout([])).shape == (0,)


def test_evaluation_rows_are_told_from_training_rows(tmp_path):
    pairs = random_pairs(7)
    manifest = filled(tmp_path / "cache", dataset(tmp_path / "a", pairs), pairs)
    train, evaluation = dataset(tmp_path / "b", pairs[2:5]), dataset(tmp_path / "c", pairs[5:])
    evaluation.first_index = len(train)
    store = open_store(manifest, build=True)
    rows = [data_rows(store, data, build=True) for data in (train, evaluation)]
    cached = CachedRows(manifest, store, [train, evaluation], rows)
    first = [round(float(cached.token_logps(packed_batch([data[1]]))[0]) / -100) for data in (train, evaluation)]
    assert first == [3, 6]


def test_pairs_that_are_missing_have_no_row(tmp_path):
    pairs = random_pairs(9)
    manifest = filled(tmp_path / "cache", dataset(tmp_path / "a", pairs), pairs)
    store = open_store(manifest, build=True)
    lacks = data_rows(store, dataset(tmp_path / "b", pairs[5:]), build=True)[:, 0] < 0
    assert lacks.tolist() == [False] * 4 + [True] * 4


def test_micro_batches_are_full_and_a_long_pair_goes_alone():
    from dpo_ds.data.batching import Layout

    lengths = [(50, 40, 30), (20, 20, 20), (10, 20, 10), (10, 10, 10), (5, 5, 5)]
    rows = [Lacking(row, (0, 1), prompt, tuple(of)) for row, (prompt, *of) in enumerate(lengths)]
    packed = [[row.row for row in batch] for batch in micro_batches(rows, Layout("packed", 100, 8))]
    assert packed == [[0], [1, 2], [3, 4]]  # 120 | 60 + 40 | 30 + 15
    padded = [[row.row for row in batch] for batch in micro_batches(rows, Layout("padded", 170, 8))]
    assert padded == [[0], [1, 2], [3, 4]]  # 180 | 2 x 80 | 2 x 40, with a third pair 3 x 80


def test_a_weights_digest_sees_every_byte_and_no_file_boundaries(tmp_path):
    from transformers import AutoModelForCausalLM

    from dpo_ds.config import ModelSection
    from dpo_ds.errors import ModelError
    from dpo_ds.models.fingerprint import weights_digest

    one, split = tmp_path / "one", tmp_path / "split"
    model = AutoModelForCausalLM.from_config(tiny_config("qwen2", 300, hidden=32))
    model.save_pretrained(one)
    model.save_pretrained(split, max_shard_size="20KB")
    assert len(list(split.glob("*.safetensors"))) > 1

    def digest(folder) -> str:
        return weights_digest(ModelSection(path=str(folder)), str(folder))

    before = digest(one)
    assert digest(split) == before
    file = one / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert digest(one) != before
    file.write_bytes(content[:-1])
    with pytest.raises(ModelError, match="cut off"):
        digest(one)
    (one / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        digest(one)


def test_two_ranks_make_a_table_once(tmp_path):
    """The second comes while the first computes."""
    made, computes = [], []

    def compute():
        computes.append(1)
        time.sleep(0.3)
        return np.arange(3)

    ranks = [threading.Thread(target=lambda: made.append(_array("keys", compute, True).tolist())) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(20)
    assert (made, computes) == ([[0, 1, 2]] * 2, [1])


def test_a_damaged_copy_is_made_again_with_one_line(tmp_path, capsys):
    """2 % of the numbers changed, a file cut, and a table emptied: the right log-probs come back each time."""
    pairs = random_pairs(7)
    data = dataset(tmp_path / "a", pairs)
    manifest = filled(tmp_path / "cache", data, pairs)
    store = open_store(manifest, build=True)
    right, rows = np.array(store._values), data_rows(store, data, build=True).tolist()
    values, (table,) = store.folder / VALUES, store.folder.parent.glob("places-*/array.npy")
    changed = right.copy()
    changed[::50] -= 57
    for path, content in ((values, changed.tobytes()), (values, right.tobytes()[:-4]), (table, b"")):
        path.write_bytes(content)
        capsys.readouterr()
        store = open_store(manifest, build=True)
        assert np.array_equal(store._values, right, equal_nan=True)
        assert data_rows(store, data, build=True).tolist() == rows
        (line,) = capsys.readouterr().out.splitlines()
        assert f"{path.name} is not what was written; it is made again" in line
