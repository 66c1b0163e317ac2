"""An evaluation as a page to look at: report.html, which holds its pictures and needs no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from dpo_ds.commands.evaluate.plots import curves_png, frontier, frontier_png, histogram_png

__all__ = ["curves_png", "frontier", "frontier_png", "histogram_png", "summary_rows", "text_table", "write_html"]

PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Ubuntu, sans-serif; color: #222831;
  background: #fff; max-width: 1120px; margin: 2.2rem auto 4rem; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.12rem; margin: 2.2rem 0 .6rem; }
.quiet { color: #68717b; } p.quiet { margin: .2rem 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .8rem; text-align: right; border-bottom: 1px solid #e6e9ec; white-space: nowrap; }
th { font-weight: 600; color: #68717b; font-size: .86rem; border-bottom: 1.5px solid #b9c0c7; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.none { color: #b9c0c7; } td small { color: #68717b; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 1.2rem 1.6rem; }
@media (max-width: 560px) { .plots { grid-template-columns: 1fr; } }
figure { margin: 0; } figure img { width: 100%; } .curves { grid-column: 1 / -1; max-width: 900px; }
figcaption { font-weight: 600; margin-bottom: .3rem; } figcaption small { font-weight: 400; color: #68717b; }
.samples { table-layout: fixed; width: 100%; min-width: calc(15rem * {{ columns|length + 1 }}); }
.samples th, .samples td { text-align: left; white-space: normal; vertical-align: top; padding: .5rem .9rem .5rem 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15rem; overflow-y: auto; font-size: .88rem; }
.note { background: #fff7e6; border-left: 3px solid #e0a93b; padding: .4rem .8rem; margin: .5rem 0; }
details pre { background: #f5f6f7; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; }
</style></head><body>
<h1>{{ title }}</h1>
<p class="quiet">{{ subtitle }}</p>
{% for note in notes %}<p class="note">{{ note }}</p>
{% endfor -%}
<div class="wide"><table>
<tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for mean, error in row %}<td{% if not mean %} class="none"{% endif %}>{{ mean or "–" }}\
{% if error %} <small>{{ error }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<p class="quiet">{{ legend }}</p>
<div class="plots">
{% for name, caption, small, source in plots -%}
<figure class="{{ name }}"><figcaption>{{ caption }} <small>{{ small }}</small></figcaption>
<img alt="{{ caption }}" src="{{ source }}"></figure>
{% endfor %}</div>
{% if samples %}<h2>Completions</h2>
<div class="wide"><table class="samples">
<tr><th>prompt</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for prompt, cells in samples %}<tr><td><div class="text">{{ prompt.strip() }}</div></td>
{% for text, score in cells %}<td><div class="text">{{ text.strip() }}</div>\
{% if score is not none %}<small class="quiet">reward {{ "%.3g"|format(score) }}</small>{% endif %}</td>{% endfor %}
</tr>{% endfor %}</table></div>{% endif %}
<h2>Settings</h2>
<details><summary class="quiet">every key, versions</summary><pre>{{ settings }}</pre></details>
</body></html>
"""
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
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    text = page.render(
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
