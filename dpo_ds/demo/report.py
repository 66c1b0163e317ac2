"""Shows how the demo ended, read from what `dpo-ds evaluate` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from dpo_ds.commands.evaluate.report import text_table

REFERENCE = "reference"


def table(evaluation: Path) -> str:
    """The models' implicit-reward accuracy, KL, reward and win rate over the SFT model, with standard errors."""
    measured = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    measured["reference"]["name"] = "SFT (reference)"
    return text_table(measured)


def before_and_after(evaluation: Path, count: int) -> str:
    """The reference's and the last policy's first completions of the first `count` prompts, with their rewards."""
    rows = pq.read_table(evaluation / "completions.parquet").to_pylist()
    policy = rows[-1]["model"]
    first = {(row["model"], row["row"]): row for row in rows if row["draw"] == 0}
    lines = []
    for prompt in range(count):
        before, after = first[REFERENCE, prompt], first[policy, prompt]
        lines.append("  " + before["prompt"].replace("\n", " "))
        for label, row in (("before", before), ("after", after)):
            lines.append(f"    {label:<7}{row['reward']:.2f} {row['completion']}")
        lines.append("")
    return "\n".join(lines)
