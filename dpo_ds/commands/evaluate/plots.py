"""Pictures of an evaluation and of training, as PNG files; matplotlib without a display."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

COLOURS = ("#2f6fb0", "#d9702b", "#3a9a5c", "#b3415f", "#7a5ab5", "#8a6d3b", "#2aa3a8", "#c25fb0", "#6b7785", "#a3a52a")
INK, GREY = "#222831", "#8b939c"
GREYS = {"reference": INK, "baseline": GREY}
STYLE = {
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e9ec", "axes.axisbelow": True, "axes.prop_cycle": cycler(color=COLOURS),
    "font.size": 10.5, "axes.titlesize": 11.5, "xtick.color": INK, "ytick.color": INK, "text.color": INK,
    "text.parse_math": False, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
ROOT_TICKS = (0, 0.1, 0.3, 0.6, 1, 2, 3, 4, 6, 8, 10, 12, 15, 20, 30, 40, 60, 100)
CURVES = (  # title, keys of metrics.jsonl (several runs: the first alone), a grey line for orientation
    ("loss", ("loss",), None),
    ("implicit-reward accuracy", ("rewards/accuracies",), 0.5),
    ("implicit rewards", ("rewards/margins", "rewards/chosen", "rewards/rejected"), 0.0),
    ("log-prob of a completion", ("logps/chosen", "logps/rejected"), None),
)


def frontier_png(
    points: Sequence[Mapping[str, Any]], path: Path | str, reward: str = "mean reward", roots: bool = False
) -> None:
    """Reward against KL, with one standard error to each side, as figure 2 of arXiv 2305.18290.

    A point has `name`, `kl` and `reward`, and may have `kl_se` and `reward_se` (None: no bar), `beta` (written beside
    it) and `series`. Points of one series share a colour and a line in the order of KL; `dashed` names another series,
    whose colour it has with hollow points and a dashed line. Points without a series are joined by the frontier
    instead: those that no other point beats in both. roots: KL on a scale of square roots, which keeps points of little
    KL apart.
    """
    with _figure(path, width=10.4 if roots else 7.2, height=5.8 if roots else 4.9) as figure:
        axis = figure.subplots()
        if roots:
            axis.set_xscale("function", functions=(_root, _square))
        alone = [point for point in points if point.get("series") is None]
        series = list(dict.fromkeys(point["series"] for point in points if point.get("series") is not None))
        best = frontier(alone)
        if len(best) > 1:
            kls, rewards = zip(*((point["kl"], point["reward"]) for point in best), strict=True)
            axis.plot(kls, rewards, color=GREY, linewidth=1.2, linestyle="--", zorder=1)
        dashed = {point["series"]: point["dashed"] for point in points if point.get("dashed") is not None}
        colours = _colours([*(dashed.get(name, name) for name in series), *(point["name"] for point in alone)])
        for name in series:
            members = sorted((point for point in points if point.get("series") == name), key=lambda point: point["kl"])
            line = "" if len(members) == 1 else "--" if name in dashed else "-"
            _crosses(axis, members, colours[dashed.get(name, name)], label=name, line=line, hollow=name in dashed)
        for point in alone:
            _crosses(axis, [point], colours[point["name"]], label=point["name"])
        axis.margins(0.12)
        axis.set(xlabel="KL(π ‖ π_ref) a sequence, nats", ylabel=reward)
        if roots:
            low, high = axis.get_xlim()
            axis.set_xticks([kl for kl in ROOT_TICKS if low <= kl <= high])
            axis.xaxis.set_major_formatter("{x:g}")
        _legend_beside(figure, axis, len(series) + len(alone))


def _root(kl: np.ndarray) -> np.ndarray:
    return np.sign(kl) * np.sqrt(np.abs(kl))  # an estimate of a small KL may be negative


def _square(root: np.ndarray) -> np.ndarray:
    return np.sign(root) * np.square(root)


def frontier(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The points, in the order of KL, whose reward every point of less or equal KL falls short of."""
    best: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda point: (point["kl"], -point["reward"])):
        if not best or point["reward"] > best[-1]["reward"]:
            best.append(point)
    return best


def histogram_png(values: Mapping[str, np.ndarray], path: Path | str, label: str, zero: bool = False) -> None:
    """One outline a name over common bins, heights as shares of that name's values; `zero` marks 0."""
    arrays = {name: np.ravel(array) for name, array in values.items()}
    low, high = np.quantile(np.concatenate(list(arrays.values())), [0.002, 0.998])  # a few far ones would flatten all
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    fewest = min(len(array) for array in arrays.values())
    edges = np.linspace(low, high, 1 + int(np.clip(2.5 * fewest ** (1 / 3), 8, 40)))  # finer bins would show noise
    colours = _colours(arrays)
    with _figure(path, width=7.2, height=3.9) as figure:
        axis = figure.subplots()
        if zero:
            axis.axvline(0, color=GREY, linewidth=1, linestyle="--")
        for name, array in arrays.items():
            shares = np.histogram(np.clip(array, low, high), bins=edges)[0] / len(array)
            axis.stairs(shares, edges, fill=True, color=colours[name], alpha=0.35 / len(arrays))
            axis.stairs(shares, edges, color=colours[name], linewidth=1.6, label=name)
        axis.set(xlabel=label, ylabel="share")
        axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        _legend_beside(figure, axis, len(arrays))


def curves_png(runs: Mapping[str, Iterable[Mapping[str, float]]], path: Path | str) -> None:
    """The lines of metrics.jsonl over the steps; evaluations (keys eval_...) are dots.

    Panels that no run has numbers for are left out. One run shows all keys of a panel, several the first, a colour
    each.
    """
    lines = {name: list(run) for name, run in runs.items()}
    there = {key.removeprefix("eval_") for run in lines.values() for line in run for key in line}
    panels = [panel for panel in CURVES if there.intersection(panel[1])]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with _figure(path, width=4.9 * columns, height=3.1 * rows + 0.3) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (title, keys, level) in zip(axes, panels, strict=False):
            shown = keys if len(lines) == 1 else keys[:1]
            drawn = {name if len(lines) > 1 else key: (run, key) for name, run in lines.items() for key in shown}
            for name, colour in _colours(drawn).items():
                _curve(axis, *drawn[name], name if len(lines) > 1 else name.rpartition("/")[2], colour)
            if level is not None:
                axis.axhline(level, color=GREY, linewidth=1, linestyle=":")
            axis.set(title=title if len(shown) == len(keys) else f"{title}: {keys[0].partition('/')[2]}", xlabel="step")
            if len(shown) > 1:
                axis.legend(fontsize=8.5)
        for axis in axes[len(panels) :]:
            axis.remove()
        if len(lines) > 1:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)


def _colours(names: Iterable[str]) -> dict[str, str]:
    """Greys for what others are compared with, so that a policy has one colour in all pictures."""
    others = itertools.cycle(COLOURS)
    return {name: GREYS[name] if name in GREYS else next(others) for name in dict.fromkeys(names)}


def _curve(axis, run: list, key: str, label: str, colour: str) -> None:
    steps = [(line["step"], line[key]) for line in run if key in line]
    if steps:
        axis.plot(*zip(*steps, strict=True), color=colour, linewidth=1.3, label=label)
    evaluations = [(line["step"], line[f"eval_{key}"]) for line in run if f"eval_{key}" in line]
    if evaluations:
        axis.plot(*zip(*evaluations, strict=True), "o", color=colour, markersize=4.5)


def _crosses(
    axis, points: Sequence[Mapping[str, Any]], colour: str, label: str, line: str = "", hollow: bool = False
) -> None:
    def bars(key: str) -> list[float]:
        return [point.get(key) or 0.0 for point in points]

    axis.errorbar(
        [point["kl"] for point in points], [point["reward"] for point in points], xerr=bars("kl_se"),
        yerr=bars("reward_se"), fmt=f"o{line}", color=colour, markersize=6, linewidth=1.3, capsize=2.5, label=label,
        markerfacecolor="white" if hollow else colour, zorder=3,
    )  # fmt: skip
    for point in points:
        if point.get("beta") is not None:
            style = {"xytext": (6, -12), "textcoords": "offset points", "fontsize": 8.5, "color": colour, "zorder": 2.5}
            halo = [withStroke(linewidth=2.5, foreground="white")]
            axis.annotate(f"β {point['beta']:g}", (point["kl"], point["reward"]), path_effects=halo, **style)


def _legend_beside(figure, axis, names: int) -> None:
    if names > 1:  # inside the axes it would lie on points
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=9)


@contextmanager
def _figure(path: Path | str, width: float, height: float):
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure
        figure.savefig(path, dpi=130)
