"""An evaluation as a page to look at: report.html, which holds its pictures and needs no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE = "report.html.jinja"  # beside this file
LEGEND = (
    "± is one standard error (completions of one prompt count as one observation), brackets are 95 % bootstrap "
    "intervals over prompts. Accuracy, margin: β (log π − log π_ref) of chosen against rejected on the evaluation "
    "pairs. KL: log π − log π_ref summed over a completion's tokens, on the policy's own samples, in nats. Win rate: "
    "ties count half. Finished: the share of completions that end by themselves."
)
CAPTIONS = {  # file -> caption, small print
    "frontier.png": ("Reward against KL", "± one standard error; dashed: no point beats these in both"),
    "margins.png": ("Implicit-reward margins", "share of the evaluation pairs; the outermost bars hold what is beyond"),
    "rewards.png": ("Rewards", "share of completions; the outermost bars hold what is beyond"),
    "curves.png": ("Training", "lines: training batches; dots: evaluations on held-out pairs"),
}


def summary_rows(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """The header, and a row for the reference, the baseline and each policy: (value, error) as text, "" for none.

    Columns that no row has a value for are left out.
    """
    header = ["", "accuracy", "margin", "KL, nats", "reward", "win rate", "ties", "tokens", "finished"]
    rows = []
    for model in [evaluation["reference"], evaluation["baseline"], *evaluation["policies"]]:
        if model is None:
            continue
        pairs, samples = model.get("pairs") or {}, model.get("samples") or {}
        rate = samples.get("win_rate") or {}
        rows.append(
            [
                (model["name"], ""),
                _cell(pairs.get("rewards/accuracies"), "{:.1%}"),
                _cell(pairs.get("rewards/margins"), "{:.3f}"),
                _cell(samples.get("kl"), "{:.3f}"),
                _cell(samples.get("reward"), "{:.3f}"),
                ("{:.1%}".format(rate["win_rate"]), "[{:.1%}, {:.1%}]".format(*rate["interval"])) if rate else ("", ""),
                ("{:.1%}".format(rate["ties"]), "") if rate else ("", ""),
                ("{:.1f}".format(samples["tokens"]), "") if "tokens" in samples else ("", ""),
                ("{:.1%}".format(samples["finished"]), "") if "finished" in samples else ("", ""),
            ]
        )
    used = [i for i in range(len(header)) if i == 0 or any(row[i][0] for row in rows)]
    return [header[i] for i in used], [[row[i] for i in used] for row in rows]


def text_table(evaluation: Mapping[str, Any]) -> str:
    """`summary_rows` for a terminal."""
    header, rows = summary_rows(evaluation)
    cells = [header, *([" ".join(filter(None, cell)) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join(["", row[0].ljust(widths[0]), *padded[1:]]))
    lines.insert(1, "  " + "-" * (len(max(lines, key=len)) - 2))
    return "\n".join(lines)


def write_html(
    evaluation: Mapping[str, Any], folder: Path, columns: Sequence[str],
    samples: Sequence[tuple[str, Sequence[tuple[str, float | None]]]],
) -> None:  # fmt: skip
    """folder/report.html, with the pictures of CAPTIONS that lie in `folder`.

    columns: names; samples: (prompt, (completion, score) of each column) a row of the table of completions.
    """
    header, rows = summary_rows(evaluation)
    plots = [
        (
            file.removesuffix(".png"),
            *words,
            "data:image/png;base64," + base64.b64encode((folder / file).read_bytes()).decode(),
        )
        for file, words in CAPTIONS.items()
        if (folder / file).is_file()
    ]
    names = ", ".join(model["name"] for model in evaluation["policies"])
    settings = {key: evaluation[key] for key in ("config", "versions", "ranks")}
    beside = jinja2.FileSystemLoader(Path(__file__).parent)
    text = jinja2.Environment(loader=beside, autoescape=True).get_template(TEMPLATE).render(
        title=f"Evaluation of {names}", subtitle=evaluation["summary"], notes=evaluation["notes"], header=header,
        rows=rows, legend=LEGEND, plots=plots, columns=columns, samples=samples,
        settings=json.dumps(settings, indent=1, ensure_ascii=False),
    )  # fmt: skip
    (folder / "report.html").write_text(text, encoding="utf-8")


def _cell(estimate: Mapping[str, float | None] | None, form: str) -> tuple[str, str]:
    if estimate is None:
        return "", ""
    error = estimate["standard_error"]
    return form.format(estimate["mean"]), "" if error is None else f"± {form.format(error)}"
