"""Completions of an iteration, kept in the output folder for whoever wants to read what the numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo_ds.cluster.shared_files import write_whole
from dpo_ds.training.output_dir import as_line
from dpo_ds.training.rl.rollouts import Rollout
from dpo_ds.training.samples import Sample

SAMPLES = "samples"  # folder in output_dir
TO_SHOW = 4  # prompts of an iteration


def best_of(rollouts: Sequence[Rollout]) -> list[Sample]:
    """Returns the best completion of each of the first few prompts, for trackers."""
    found = []
    for rollout in rollouts[:TO_SHOW]:
        best = rollout.completions[int(rollout.scores.argmax())]
        found.append(Sample(rollout.prompt.text, best.text, best.finished, len(best.ids)))
    return found


def keep_samples(output_dir: Path, step: int, rollouts: Sequence[Rollout]) -> None:
    """Writes samples/step-N.jsonl, a line a completion, best of a prompt first. Rank 0 alone."""
    folder = output_dir / SAMPLES
    folder.mkdir(exist_ok=True)
    lines = []
    for rollout in rollouts:
        of_prompt = zip(rollout.completions, rollout.scores.tolist(), strict=True)
        for completion, score in sorted(of_prompt, key=lambda pair: -pair[1]):
            row = {"row": rollout.row, "prompt": rollout.prompt.text, "completion": completion.text, "score": score}
            row |= {"finished": completion.finished, "tokens": len(completion.ids)}
            lines.append(as_line(row))
    write_whole(folder / f"step-{step:08d}.jsonl", b"".join(lines))
