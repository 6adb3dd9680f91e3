"""Run what docs/residual.md shows and draw it: ``python docs/figures/draw.py`` (about four minutes on one core).

``residual.json`` beside this file keeps the numbers; ``--draw-only`` makes the pictures again from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from runs import FULL, RUNS, TINY, Values

HERE = Path(__file__).resolve().parent
BLUE, ORANGE, GREY = "#2a6fbb", "#d9730d", "#6b7280"
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.titlelocation": "left",
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "gradflow",
}


def main() -> None:
    """Read the options, run, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="Folder of the numbers and the pictures.")
    parser.add_argument(
        "--only", choices=list(RUNS), nargs="*", help="Run these; the others stay as they are."
    )
    parser.add_argument("--draw-only", action="store_true", help="Run nothing.")
    parser.add_argument("--tiny", action="store_true", help="Runs of a second, to see that they run.")
    parser.add_argument("--form", default="svg", help="svg, png ...")
    options = parser.parse_args()
    wanted = () if options.draw_only else options.only or tuple(RUNS)
    values = renewed(options.out / "residual.json", wanted, tiny=options.tiny)
    draw(values, options.out, options.form)


def renewed(path: Path, wanted: tuple[str, ...], *, tiny: bool) -> Values:
    """The numbers of the file, those of the wanted runs made anew and written back."""
    values: Values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in wanted:
        print(f"running {name}", flush=True)
        values[name] = _rounded(RUNS[name](TINY if tiny else FULL))
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return json.loads(json.dumps(values))  # keys as the file has them


def draw(values: Values, folder: Path, form: str = "svg") -> None:
    """One picture a run."""
    with mpl.rc_context(STYLE):
        for name, chart in CHARTS.items():
            figure = chart(values[name])
            metadata = {"Date": None} if form == "svg" else None
            figure.savefig(folder / f"{name}.{form}", metadata=metadata, dpi=110, facecolor="white")


def responses(values: Values) -> Figure:
    """A panel a depth: the size of each layer's response, plain and residual, at the start and after training."""
    depths = sorted({int(key.rpartition("-")[2]) for key in values})
    figure = Figure(figsize=(8.2, 3.0), layout="constrained")
    panels = figure.subplots(1, len(depths), squeeze=False)[0]
    for depth, axes in zip(depths, panels, strict=True):
        for kind, colour in (("plain", ORANGE), ("ResNet", BLUE)):
            found = values[f"{kind}-{depth}"]
            layers = range(1, len(found["trained"]["std"]) + 1)
            axes.plot(layers, found["trained"]["std"], color=colour, label=f"{kind}-{depth}, trained")
        axes.plot(layers, found["init"]["std"], color=GREY, linestyle=":", label="both, at the start")
        wide = max(values[f"plain-{depth}"]["trained"]["std"]) > 10
        axes.set(title=f"{depth} layers", xlabel="3×3 layer", yscale="log" if wide else "linear")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(loc="upper right" if wide else "upper center")
    panels[0].set_ylabel("std behind the batch norm")
    return figure


def norm_placement(values: Values) -> Figure:
    """The gradient of the last feed-forward weight by depth, every seed, the median, and 1 / sqrt(L)."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for placement, colour in (("post-norm", ORANGE), ("pre-norm", BLUE)):
        by_depth = {int(depth): sorted(found) for depth, found in values[placement].items()}
        medians = [found[len(found) // 2] for found in by_depth.values()]
        axes.plot(list(by_depth), medians, color=colour, marker="o", markersize=4)
        for depth, found in by_depth.items():
            axes.plot([depth] * len(found), found, color=colour, marker="_", linestyle="", alpha=0.5)
        axes.annotate(placement, (max(by_depth), medians[-1]), (8, 0), textcoords="offset points",
                      color=colour, va="center", weight="bold")  # fmt: skip
        if placement == "pre-norm":
            law = [medians[0] * (min(by_depth) / depth) ** 0.5 for depth in by_depth]
            axes.plot(list(by_depth), law, color=GREY, linestyle=":", label="1/√L through the first point")
    axes.set(
        title="Gradient of the last feed-forward weight, at the start", xlabel="layers L", ylabel="‖dL/dW‖"
    )
    axes.set(ylim=(0, None), xlim=(0, max(by_depth) * 1.25), xticks=list(by_depth))
    axes.legend(loc="upper left")
    return figure


def zero_gamma(values: Values) -> Figure:
    """rho of each block before and after."""
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.subplots()
    names = [site["name"].removeprefix("blocks.") for site in values["after"]]
    axes.bar(names, [site["rho"] for site in values["after"]], color=BLUE, width=0.6, label="trained")
    axes.plot(names, [site["rho"] for site in values["before"]], color=ORANGE, marker="o", linestyle="",
              markersize=5, label="at the start: exactly 0", clip_on=False, zorder=3)  # fmt: skip
    axes.set(
        title="What each zero-gamma block adds",
        xlabel="block",
        ylabel="ρ = ‖branch‖ / ‖skip‖",
        ylim=(0, None),
    )
    axes.legend(loc="upper right")
    return figure


def ranking(values: Values) -> Figure:
    """By depth, each branch's block influence, and beside it what the loss rises by without that branch."""
    figure = Figure(figsize=(8.2, 3.2), layout="constrained")
    cheap, costly = figure.subplots(1, 2)
    for index, (kind, colour, mark) in enumerate((("attention", BLUE, "o"), ("feed-forward", ORANGE, "s"))):
        sites = [site for site in values["sites"] if site["index"] == index]
        blocks = [int(site["name"].removeprefix("blocks.")) for site in sites]
        line = {"color": colour, "marker": mark, "markersize": 5, "label": kind}
        cheap.plot(blocks, [site["block_influence"] for site in sites], **line)
        rise = [site["loss_change"] for site in sites]
        far = [
            [site["loss_change"] - site["loss_change_low"] for site in sites],
            [site["loss_change_high"] - site["loss_change"] for site in sites],
        ]
        costly.errorbar(blocks, rise, yerr=far, elinewidth=0.9, capsize=2, **line)
    cheap.set(title="One forward: block influence", ylabel="block influence")
    costly.set(title="Ablation: the loss without the branch", ylabel="rise of the loss (nats)")
    for axes in (cheap, costly):
        axes.set(xlabel="block", yscale="log", xticks=blocks)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(loc="upper right")
    return figure


def _rounded(value: Any) -> Any:
    """Five digits: more would differ from one machine to the next."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


CHARTS: dict[str, Callable[[Values], Figure]] = {
    "responses": responses,
    "norm_placement": norm_placement,
    "zero_gamma": zero_gamma,
    "ranking": ranking,
}

if __name__ == "__main__":
    main()
