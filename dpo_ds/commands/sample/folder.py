"""Writes what `dpo-ds sample` leaves in a folder: Parquet, and MANIFEST.json, last, with every file's SHA-256.

    completions/shard-000000.parquet   a row a completion: prompt, completion, score, ... (COMPLETIONS)
    pairs/shard-000000.parquet         a row a pair, in the explicit format that train takes (PAIRS)

A shard is what prompts and settings make it: it appears whole, by one rename, and no time, rank or host is in it.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from dpo_ds.cluster.records import Count, Damaged, Record, Sha256, read_object, record_of
from dpo_ds.cluster.shared_files import leftovers, sha256, write_text, write_whole
from dpo_ds.commands.sample.ranking import Ranker
from dpo_ds.config import SampleSection
from dpo_ds.data.prompts import Prompt
from dpo_ds.data.shard import SHARD_NAME, DamagedShard, ShardKind, encode, head_of, shard_files, shard_name
from dpo_ds.errors import ConfigError
from dpo_ds.models.generation import Completion

MANIFEST = "MANIFEST.json"
COMPLETIONS_FOLDER = "completions"
SHARED = "--sample.to must be a folder that all nodes share"
# stop: the text of the token that ended it where that is not the tokenizer's EOS; tokens: as drawn, that one included.
COMPLETIONS = pa.schema(
    [
        ("row", pa.int64()),  # of the prompt
        ("draw", pa.int32()),  # which of its n
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("score", pa.float64()),
        ("finished", pa.bool_()),
        ("stop", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("seed", pa.int64()),
        ("location", pa.string()),
    ]
)
PAIRS = pa.schema(
    [
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("score_chosen", pa.float64()),
        ("score_rejected", pa.float64()),
        ("row", pa.int64()),
    ]
)


GROUPS = pa.schema(
    [
        ("prompt", pa.string()),
        ("completions", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float64())),
        ("row", pa.int64()),
    ]
)


def is_a_sample(folder: Path) -> bool:
    """Tells whether `dpo-ds sample` has begun or filled this folder: all that it holds is what that command makes."""
    inside = [path for part in ("completions", "pairs") for path in (folder / part).glob("*")]
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    only_ours = all(re.fullmatch(rf"{SHARD_NAME}(\.[0-9a-f]{{8}}\.tmp)?", path.name) for path in inside)
    return "completions" in names and names <= {"completions", "pairs", MANIFEST} and only_ours


class ScoreRecord(Record):
    mean: float
    std: float


class SampleRecord(Record):
    """Describes a complete folder: its MANIFEST.json."""

    settings: dict[str, Any]
    prompts: Count
    completions: Count
    finished: Count
    tokens: Count
    pairs: Count
    dropped: dict[str, Count]
    score: ScoreRecord | None
    files: dict[Annotated[str, Field(pattern=rf"^(completions|pairs)/{SHARD_NAME}$")], Sha256]


def begun_with(path: Path) -> dict[str, Any]:
    """Returns the settings of the completions that lie in sample.to; none where there are no completions yet."""
    heads = map(head_of, shard_files(path / COMPLETIONS_FOLDER))
    return next((head["settings"] for head in heads if head is not None), {})


@dataclass(frozen=True)
class Folder:
    """sample.to. settings: all that the completions and pairs depend on; shards: how many there will be."""

    path: Path
    settings: dict
    shards: int

    @property
    def pairs(self) -> Path:
        return self.path / "pairs"

    @property
    def completions(self) -> Path:
        return self.path / COMPLETIONS_FOLDER

    def check_settings(self) -> None:
        """Raises ConfigError for a folder that was begun with other settings."""
        found = begun_with(self.path)
        for key in {**self.settings, **found} if found else ():
            before, now = found.get(key), self.settings.get(key)
            if before != now:
                raise ConfigError(
                    f"--sample.to {self.path}: begun with {key} {before}, this run has {now}; choose another folder"
                )

    def unfinished(self) -> list[int]:
        """Shards that are not there whole yet; leftovers of a killed run are removed."""
        for folder in (self.completions, self.pairs):
            folder.mkdir(exist_ok=True)
            for path in leftovers(folder, SHARD_NAME):
                path.unlink()
        return [shard for shard in range(self.shards) if self.read(shard) is None]

    def check_shared(self) -> None:
        """On any rank, after rank 0's `unfinished`; raises ConfigError where the folder is another one here."""
        if not self.completions.is_dir():
            raise ConfigError(f"{self.completions}: rank 0 made it, {socket.gethostname()} does not see it; {SHARED}")

    def is_complete(self) -> bool:
        """Tells whether every file is what the manifest says."""
        try:
            manifest = self.manifest()
        except (FileNotFoundError, Damaged):  # the shards are there: the manifest is made anew of them
            return False
        paths = {name: self.path / name for name in manifest["files"]}
        return all(path.is_file() and sha256(path) == manifest["files"][name] for name, path in paths.items())

    def manifest(self) -> dict:
        """Returns the manifest; raises FileNotFoundError, or Damaged where it is not what was written."""
        values = read_object(self.path / MANIFEST)
        record_of(values, SampleRecord)
        return values

    def write(self, shard: int, rows: Sequence[dict]) -> None:
        SHARDS.write(self.completions / shard_name(shard), rows, {"settings": self.settings})

    def read(self, shard: int) -> list[dict] | None:
        """The completions of a shard; None where there is none or it is damaged."""
        try:
            return SHARDS.read(self.completions / shard_name(shard))[0]
        except DamagedShard:
            return None

    def finish(self, sample: SampleSection) -> dict:
        """Pairs of all shards and the manifest, which is returned.

        Raises:
            ConfigError: a shard that another rank wrote cannot be read here.
        """
        counts, dropped, scores = Counter(), Counter(), []
        for shard in range(self.shards):
            path, rows = self.completions / shard_name(shard), self.read(shard)
            if rows is None:
                raise ConfigError(f"{path}: written, but rank 0 cannot read it; {SHARED}")
            counts["completions"] += len(rows)
            counts["finished"] += sum(row["finished"] for row in rows)
            counts["tokens"] += sum(len(row["tokens"]) for row in rows)
            if sample.score is not None:
                scores += [row["score"] for row in rows]
                as_groups = sample.pairs == "groups"
                pairs = (groups_of if as_groups else pairs_of)(rows, sample, dropped)
                counts["pairs"] += len(pairs)
                table = pa.Table.from_pylist(pairs, schema=GROUPS if as_groups else PAIRS)
                write_whole(self.pairs / path.name, encode(table))
        files = [path for folder in (self.completions, self.pairs) for path in shard_files(folder)]
        manifest = {
            "settings": self.settings,
            "prompts": counts["completions"] // sample.n,
            **{name: counts[name] for name in ("completions", "finished", "tokens", "pairs")},
            "dropped": dict(sorted(dropped.items())),
            "score": {"mean": float(np.mean(scores)), "std": float(np.std(scores))} if scores else None,
            "files": {str(path.relative_to(self.path)): sha256(path) for path in files},
        }
        write_text(self.path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        return manifest


def completion_rows(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    scores: np.ndarray | None,
    first_row: int,
    seed: int,
    stop_texts: dict[int, str],
) -> list[dict]:
    """Rows of COMPLETIONS; scores [prompts x n]; stop_texts: of the stop tokens that are not the tokenizer's EOS."""
    rows = []
    for i, (prompt, drawn) in enumerate(zip(prompts, completions, strict=True)):
        for draw, completion in enumerate(drawn):
            rows.append(
                {
                    "row": first_row + i,
                    "draw": draw,
                    "prompt": prompt.text,
                    "completion": completion.text,
                    "score": None if scores is None else float(scores[len(rows)]),
                    "finished": completion.finished,
                    "stop": stop_texts.get(int(completion.ids[-1]), "") if completion.finished else "",
                    "tokens": completion.ids.tolist(),
                    "seed": seed,
                    "location": prompt.location,
                }
            )
    return rows


def pairs_of(rows: Sequence[dict], sample: SampleSection, dropped: Counter) -> list[dict]:
    """Rows of PAIRS from a shard's completions, n a prompt and in order; adds to `dropped`, by reason."""
    pairs, rank = [], Ranker(sample)
    for start in range(0, len(rows), sample.n):
        of_prompt = rows[start : start + sample.n]
        texts, finished, scores = ([row[key] for row in of_prompt] for key in ("completion", "finished", "score"))
        ranked, reason = rank(texts, finished, scores, of_prompt[0]["row"])
        if reason is not None:
            dropped[reason] += 1
        for chosen, rejected in ((of_prompt[a], of_prompt[b]) for a, b in ranked):
            pairs.append(
                {
                    "prompt": chosen["prompt"],
                    "chosen": chosen["completion"] + chosen["stop"],
                    "rejected": rejected["completion"] + rejected["stop"],
                    "score_chosen": chosen["score"],
                    "score_rejected": rejected["score"],
                    "row": chosen["row"],
                }
            )
    return pairs


def groups_of(rows: Sequence[dict], sample: SampleSection, dropped: Counter) -> list[dict]:
    """Rows of GROUPS, one a prompt with those of its n completions that may be in pairs, in order."""
    groups, rank = [], Ranker(sample)
    for start in range(0, len(rows), sample.n):
        of_prompt = rows[start : start + sample.n]
        texts, finished, scores = ([row[key] for row in of_prompt] for key in ("completion", "finished", "score"))
        usable, reason = rank.usable(texts, finished, scores)
        if reason is not None:
            dropped[reason] += 1
            continue
        groups.append(
            {
                "prompt": of_prompt[0]["prompt"],
                "completions": [of_prompt[i]["completion"] + of_prompt[i]["stop"] for i in usable],
                "scores": [scores[i] for i in usable],
                "row": of_prompt[0]["row"],
            }
        )
    return groups


def _digest(rows: Sequence[dict]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


SHARDS = ShardKind(lambda rows: pa.Table.from_pylist(rows, schema=COMPLETIONS), pa.Table.to_pylist, _digest)
