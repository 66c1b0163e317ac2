"""What the demo shows at its end, read from the runs' metrics.jsonl: a table and a picture of the curves."""

from __future__ import annotations

import json
from pathlib import Path

ROWS = (  # label, key in metrics.jsonl, format
    ("accuracy", "rewards/accuracies", "{:.1%}"),
    ("margin", "rewards/margins", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
)


def read_metrics(output_dir: Path) -> tuple[list[dict], list[dict]]:
    """The lines of steps and the lines of evaluations, each in order."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


def table(sft_dir: Path, dpo_dir: Path) -> str:
    """SFT's loss and DPO's accuracy, margin and loss: of step 1, and of the last evaluation on held-out rows."""
    cells = [("", "before", "after")]
    for name, folder, rows in (("SFT", sft_dir, ROWS[-1:]), ("DPO", dpo_dir, ROWS)):
        steps, evaluations = read_metrics(folder)
        before, after = steps[0], evaluations[-1]
        for label, key, form in rows:
            cells.append((f"{name} {label}", form.format(before[key]), form.format(after[f"eval_{key}"])))
    ruled = [f"  {label:<14}{first:>10}{last:>10}" for label, first, last in cells]
    ruled.insert(1, "  " + "-" * 34)
    return "\n".join(ruled)


def draw(dpo_dir: Path, png: Path) -> None:
    """Loss, accuracy and rewards over the steps of a DPO run, held-out evaluations as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, evaluations = read_metrics(dpo_dir)
    panels = (
        ("DPO loss", ("loss",)),
        ("implicit-reward accuracy", ("rewards/accuracies",)),
        ("implicit rewards", ("rewards/margins", "rewards/chosen", "rewards/rejected")),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4.8), layout="constrained")
    for axis, (title, keys) in zip(axes, panels, strict=True):
        for key in keys:
            name = key.removeprefix("rewards/") if len(keys) > 1 else "training batch"
            (curve,) = axis.plot([s["step"] for s in steps], [s[key] for s in steps], linewidth=1.2, label=name)
            axis.plot(
                [e["step"] for e in evaluations],
                [e[f"eval_{key}"] for e in evaluations],
                "o",
                color=curve.get_color(),
                label="held-out rows" if key == keys[0] else None,
            )
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)
    axes[0].axhline(0.6931, color="grey", linestyle=":", linewidth=1)  # ln 2: policy equal to reference
    axes[1].set_ylim(-0.03, 1.03)
    axes[2].set_ylabel("β (log π − log π_ref)")
    figure.savefig(png, dpi=120)
    plt.close(figure)
