"""The plots of a report: as pictures on white, and as SVG that takes its colours from the page."""

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from evaluation.run_files import Losses, Point
from support.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Axes"], None]

# What is drawn, and the variable of the page's style sheet that takes its place: no two may be the same.
INK, MUTED, RULE, PAPER = "#211f1c", "#6f6a63", "#e6e2db", "#ffffff"
MODEL, BASE, STEPS = "#0b6e69", "#a1601f", "#968f84"
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "page", MODEL: "model", BASE: "base", STEPS: "steps"}
WIDE, NARROW, HALF = (860, 330), (340, 270), (420, 280)  # pixels of the page
DOTS_PER_PIXEL = 2  # of a PNG
MOST_POINTS = 600  # of a curve; beyond it neighbours are drawn as their mean
MOST_TICKS = 12


class Series(NamedTuple):
    """One model's values at the places of an axis, with the interval of each."""

    name: str
    colour: str
    values: list[float | None]
    intervals: list[tuple[float, float] | None]


def thin_out(points: Sequence[Point]) -> list[Point]:
    """The means of neighbours, `MOST_POINTS` at most."""
    size = math.ceil(len(points) / MOST_POINTS) or 1
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [Point(group[-1].step, group[-1].epoch, sum(p.loss for p in group) / len(group)) for group in groups]


def highest_shown(losses: Losses) -> float:
    """Where the loss axis ends if a few spikes would otherwise press the curves flat; else infinity."""
    steps = sorted(point.loss for point in thin_out(losses.train))
    spikes = math.ceil(len(steps) * 0.02)
    usual = max([point.loss for point in losses.val + losses.train_set] + steps[: len(steps) - spikes], default=0)
    return usual * 1.1 if steps and steps[-1] > 2 * usual > 0 else math.inf


def loss_plot(losses: Losses) -> Draw:
    """The loss of each step, and of both parts at each evaluation; the lowest validation loss is marked."""

    def draw(axes: "Axes") -> None:
        train = thin_out(losses.train)
        curves = (
            ("training steps", STEPS, 1.2, "", train),
            ("training part", BASE, 1.6, "o", losses.train_set),
            ("validation part", MODEL, 2.0, "o", thin_out(losses.val)),
        )
        for name, colour, width, marker, points in curves:
            if points:
                # A lone point has no line: it needs its marker.
                shape = marker if len(points) <= 60 else ""
                axes.plot(
                    [point.step for point in points],
                    [point.loss for point in points],
                    color=colour,
                    linewidth=width,
                    marker=shape or ("o" if len(points) == 1 else ""),
                    markersize=4,
                    linestyle="--" if name == "training part" else "-",
                    label=name,
                )
        mark_best(axes, losses)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats a token)")
        axes.margins(x=0.02, y=0.16)
        axes.locator_params(axis="y", nbins=6)
        axes.locator_params(axis="x", integer=True)
        if math.isfinite(top := highest_shown(losses)):
            axes.set_ylim(top=top)

    return draw


def mark_best(axes: "Axes", losses: Losses) -> None:
    """A ring around the lowest validation loss, with its value below."""
    best = losses.best
    if best is None or len(losses.val) < 2:
        return
    axes.plot([best.step], [best.loss], "o", markersize=10, markerfacecolor="none", markeredgecolor=INK)
    place = (best.step - losses.val[0].step) / max(1, losses.val[-1].step - losses.val[0].step)
    axes.annotate(
        f"lowest: {best.loss:.3f}",
        (best.step, best.loss),
        xytext=(0, 11),
        textcoords="offset points",
        ha="left" if place < 0.15 else "right" if place > 0.85 else "center",
        va="bottom",
        color=INK,
        bbox={"boxstyle": "round,pad=0.25", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.85},
    )


def series_plot(series: Sequence[Series], places: Sequence[str], x_label: str, y_label: str, zero: bool) -> Draw:
    """Values at named places, a line and intervals for each series.

    Args:
        zero: whether a line at zero belongs to it.
    """

    def draw(axes: "Axes") -> None:
        if zero:
            axes.axhline(0, color=MUTED, linewidth=1)
        for number, (name, colour, values, intervals) in enumerate(series):
            shift = 0.06 * (number - (len(series) - 1) / 2) if any(intervals) else 0  # side by side
            known = [(place + shift, value) for place, value in enumerate(values) if value is not None]
            axes.plot(
                [x for x, _ in known],
                [y for _, y in known],
                color=colour,
                linewidth=1.8,
                linestyle="-" if colour == MODEL else "--",
                marker="o" if len(places) <= 30 else "",
                markersize=4.5,
                label=name,
            )
            for place, interval in enumerate(intervals):
                if interval:
                    axes.plot([place + shift] * 2, interval, color=colour, linewidth=1.2, solid_capstyle="butt")
        every = math.ceil(len(places) / MOST_TICKS)
        axes.set_xticks(range(0, len(places), every), places[::every])
        axes.margins(x=0.06, y=0.12)
        axes.locator_params(axis="y", nbins=6)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return draw


def add_legend(axes: "Axes") -> None:
    """A line of names above the plot; a page writes its own, which can wrap."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        frameon=False,
        borderaxespad=0,
        borderpad=0.2,
        handlelength=1.3,
        columnspacing=1.2,
        labelcolor=MUTED,
    )


@contextlib.contextmanager
def plain_style(salt: str) -> Iterator[None]:
    """The same drawing on every machine, whatever the user's matplotlibrc says; undone at the end.

    Args:
        salt: the identifiers inside an SVG are hashes of it and of what they name.
    """
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 12,
                "text.color": INK,
                "axes.labelcolor": MUTED,
                "axes.edgecolor": MUTED,
                "axes.spines.left": False,
                "axes.spines.right": False,
                "axes.spines.top": False,
                "axes.grid": True,
                "axes.grid.axis": "y",
                "axes.axisbelow": True,
                "grid.color": RULE,
                "grid.linewidth": 1,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "ytick.major.size": 0,
                "legend.fontsize": 12,
                "svg.fonttype": "none",  # text stays text, in the page's own font
                "svg.hashsalt": salt,
                "text.parse_math": False,
            }
        )
        yield


def make_figure(draw: Draw, size: tuple[int, int]) -> "Figure":
    """A figure of `size` pixels, at 72 to the inch so that a point is a pixel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
    draw(figure.add_subplot())
    return figure


def write_png(draw: Draw, path: Path) -> None:
    """Write the plot as a picture on white, atomically; the same plot gives the same bytes.

    Raises:
        UserError: the file can't be written.
    """
    with plain_style(path.stem), atomic_path(path) as temporary:
        figure = make_figure(draw, WIDE if path.stem == "loss" else HALF)
        add_legend(figure.axes[0])
        figure.savefig(temporary, format="png", dpi=72 * DOTS_PER_PIXEL, facecolor=PAPER, metadata={"Software": None})


def make_svg(draw: Draw, size: tuple[int, int], name: str) -> str:
    """The plot as an `<svg>` element to stand inside a page, its colours the page's variables.

    Args:
        name: of the plot on its page; keeps its identifiers apart from those of others.
    """
    with plain_style(name):
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        make_figure(draw, size).savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for pattern, replacement in (
        (r"<defs>\s*<style.*?</style>\s*</defs>", ""),  # it would hold for the whole page
        (r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" width="{size[0]}" aria-hidden="true">'),
        (r'<g id="[^"]*"(/?)>', r"<g\1>"),
        (r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-"),
        (r"xlink:href", "href"),
        (r"font-size: [\d.]+px; font-family: [^;\"]*; ", ""),  # the page's
        (r' transform="rotate\(-0 [^"]*"', ""),
        (r"<g/>", ""),
        (r"\s*\n\s*", "\n"),
    ):
        svg = re.sub(pattern, replacement, svg, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.strip()
