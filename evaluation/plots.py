"""The plots of a report, laid out as lines, dots and texts. The page draws them as SVG, and Pillow as PNG."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from evaluation.run_files import Losses, Point
from support.files import atomic_path

# The colours of a PNG, by the names of the variables in report.css; PNGs have no dark mode.
LIGHT = {
    "ink": "#211f1c",
    "muted": "#6f6a63",
    "rule": "#e6e2db",
    "page": "#ffffff",
    "model": "#0b6e69",
    "base": "#a1601f",
    "steps": "#968f84",
}
WIDE, NARROW, HALF = (860, 330), (340, 270), (420, 280)  # CSS pixels
DOTS_PER_PIXEL = 2  # resolution of a PNG
SMOOTH = 2  # oversampling factor of a PNG, because Pillow's lines are not antialiased
FONT_SIZE, DIGIT = 12, 7  # text height and digit width, in pixels
DASH, GAP = 6, 3  # lengths in pixels, as in report.html.jinja
MOST_POINTS = 600  # maximum number of points in a curve; neighbours are averaged in longer ones
MOST_DOTS = 60  # maximum number of points in a curve that is drawn with dots
MOST_TICKS = 12

PILLOW_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}

Places = list[tuple[float, float]]


class Series(NamedTuple):
    """One model's values along an axis, with the interval of each."""

    name: str
    colour: str
    values: list[float | None]
    intervals: list[tuple[float, float] | None]


class Curve(NamedTuple):
    """A line through points, with a dot at each of them and vertical `bars` (x, low, high)."""

    name: str
    colour: str
    points: Places
    width: float
    dashed: bool = False
    dots: bool = False
    bars: Sequence[tuple[float, float, float]] = ()


class Chart(NamedTuple):
    """The content of a plot.

    Attributes:
        margins: space at both ends of the horizontal and the vertical axis, as a fraction of the range of the values.
        ticks: labelled positions on the horizontal axis; None: integers.
        zero: whether to draw a line at zero.
        top: upper limit of the vertical axis.
        best: a point to mark, and the anchor of its text.
    """

    curves: list[Curve]
    x_label: str
    y_label: str
    margins: tuple[float, float]
    ticks: list[tuple[float, str]] | None = None
    zero: bool = False
    top: float = math.inf
    best: tuple[Point, str] | None = None


class Line(NamedTuple):
    points: Places
    colour: str
    width: float = 1
    dashed: bool = False

    @property
    def path(self) -> str:
        """The `d` attribute of an SVG path."""
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in self.points)


class Dot(NamedTuple):
    x: float
    y: float
    radius: float
    colour: str
    ring: bool = False


class Text(NamedTuple):
    """A text with its baseline at y; `anchor` is the part of the text at x: start, middle or end."""

    x: float
    y: float
    text: str
    anchor: str = "middle"
    colour: str = "muted"
    turned: bool = False  # by 90°, to read upwards


class Picture(NamedTuple):
    """A chart in pixels, drawn in this order."""

    width: int
    height: int
    lines: list[Line]
    dots: list[Dot]
    texts: list[Text]


def thin_out(points: Sequence[Point]) -> list[Point]:
    """Average neighbouring points, so that at most `MOST_POINTS` remain."""
    size = math.ceil(len(points) / MOST_POINTS) or 1
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [Point(group[-1].step, group[-1].epoch, sum(p.loss for p in group) / len(group)) for group in groups]


def highest_shown(losses: Losses) -> float:
    """The upper end of the loss axis if a few spikes would otherwise flatten the curves, else infinity."""
    steps = sorted(point.loss for point in thin_out(losses.train))
    spikes = math.ceil(len(steps) * 0.02)
    usual = max([point.loss for point in losses.val + losses.train_set] + steps[: len(steps) - spikes], default=0)
    return usual * 1.1 if steps and steps[-1] > 2 * usual > 0 else math.inf


def loss_chart(losses: Losses) -> Chart | None:
    """A chart of the loss of each step, and of both parts at each evaluation; marks the lowest validation loss.

    None if there are no losses.
    """
    curves = []
    for name, colour, width, points in (
        ("training steps", "steps", 1.2, thin_out(losses.train)),
        ("training part", "base", 1.6, losses.train_set),
        ("validation part", "model", 2.0, thin_out(losses.val)),
    ):
        if points:
            # A lone point makes no line, so it needs a dot.
            dots = len(points) == 1 or (colour != "steps" and len(points) <= MOST_DOTS)
            places = [(float(point.step), point.loss) for point in points]
            curves.append(Curve(name, colour, places, width, colour == "base", dots))
    if not curves:
        return None
    best = None
    if losses.best and len(losses.val) > 1:
        first, last = losses.val[0].step, losses.val[-1].step
        share = (losses.best.step - first) / max(1, last - first)
        best = losses.best, "start" if share < 0.15 else "end" if share > 0.85 else "middle"
    return Chart(curves, "step", "loss (nats per token)", (0.02, 0.16), top=highest_shown(losses), best=best)


def series_chart(
    series: Sequence[Series], places: Sequence[str], x_label: str, y_label: str, zero: bool
) -> Chart | None:
    """A chart with a line and intervals for each series, at named ticks; None without series. `zero`: see `Chart`."""
    if not series:
        return None
    curves = []
    for number, (name, colour, values, intervals) in enumerate(series):
        shift = 0.06 * (number - (len(series) - 1) / 2) if any(intervals) else 0  # keep the intervals apart
        known = [(place + shift, value) for place, value in enumerate(values) if value is not None]
        bars = [(place + shift, *interval) for place, interval in enumerate(intervals) if interval]
        curves.append(Curve(name, colour, known, 1.8, colour != "model", len(places) <= MOST_DOTS / 2, bars))
    every = math.ceil(len(places) / MOST_TICKS)
    ticks = [(float(place), places[place]) for place in range(0, len(places), every)]
    return Chart(curves, x_label, y_label, (0.06, 0.12), ticks, zero)


def widened(values: Sequence[float], margin: float) -> tuple[float, float]:
    """The range of `values`, with a margin at both ends."""
    low, high = min(values), max(values)
    span = max(high - low, 1e-6 * max(abs(low), abs(high)))
    reach = margin * span if high - low > span / 2 else span or 0.5
    return low - reach, high + reach


def round_numbers(low: float, high: float, most: float, whole: bool = False) -> list[tuple[float, str]]:
    """About `most` round numbers from `low` to `high`, each with its text; integers only if `whole`."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(factor * power for factor in factors if factor * power >= rough * 0.999)
    if whole:
        step = max(1, round(step))
    decimals = next(count for count in range(20) if math.isclose(round(step, count), step, rel_tol=1e-6))
    numbers = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(number, f"{number:.{decimals}f}".replace("-", "−")) for number in numbers]


def lay_out(chart: Chart, size: tuple[int, int], legend: bool = False) -> Picture:
    """Lay out a chart as lines, dots and texts in `size` pixels.

    Args:
        legend: whether to write the names of the curves above the plot; the page has a separate legend, which can wrap.
    """
    width, height = size
    points = [point for curve in chart.curves for point in curve.points]
    ends = [end for curve in chart.curves for _, *interval in curve.bars for end in interval]
    first, last = widened([x for x, _ in points], chart.margins[0])
    low, high = widened([y for _, y in points] + ends + [0.0] * chart.zero, chart.margins[1])
    high = min(high, chart.top)
    y_ticks = round_numbers(low, high, 6)
    left, right = 26 + DIGIT * max(len(text) for _, text in y_ticks), width - 4
    top, bottom = 26 if legend else 6, height - 42
    x_ticks = chart.ticks or round_numbers(first, last, (right - left) / 60, whole=True)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - first) / (last - first), (min(y, high) - low) / (high - low)
        return left + across * (right - left), bottom - up * (bottom - top)

    lines = [Line([(left, place(first, y)[1]), (right, place(first, y)[1])], "rule") for y, _ in y_ticks]
    dots, texts = [], [Text(left - 5, place(first, y)[1] + 4, text, "end") for y, text in y_ticks]
    if chart.zero:
        lines.append(Line([place(first, 0), place(last, 0)], "muted"))
    lines.append(Line([(left, bottom), (right, bottom)], "muted"))
    for x, text in x_ticks:
        lines.append(Line([(place(x, low)[0], bottom), (place(x, low)[0], bottom + 3)], "muted"))
        texts.append(Text(place(x, low)[0], bottom + 16, text))
    texts.append(Text((left + right) / 2, height - 6, chart.x_label))
    texts.append(Text(12, (top + bottom) / 2, chart.y_label, turned=True))
    for curve in chart.curves:
        lines.append(Line([place(*point) for point in curve.points], curve.colour, curve.width, curve.dashed))
        lines += [Line([place(x, start), place(x, end)], curve.colour, 1.2) for x, start, end in curve.bars]
        dots += [Dot(*place(*point), 2.4, curve.colour) for point in curve.points if curve.dots]
    if chart.best:
        (step, _, loss), anchor = chart.best
        x, y = place(step, loss)
        dots.append(Dot(x, y, 5, "ink", ring=True))
        texts.append(Text(x, y - 13, f"lowest: {loss:.3f}", anchor, "ink"))
    x = float(left)
    for curve in chart.curves if legend else ():
        lines.append(Line([(x, 10), (x + 16, 10)], curve.colour, curve.width, curve.dashed))
        texts.append(Text(x + 22, 14, curve.name, "start"))
        x += 40 + (DIGIT - 1) * len(curve.name)
    return Picture(width, height, lines, dots, texts)


def write_png(chart: Chart, size: tuple[int, int], path: Path) -> None:
    """Write a chart as a PNG on white, atomically; the same chart gives the same bytes.

    Raises:
        UserError: the file can't be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    picture, scale = lay_out(chart, size, legend=True), DOTS_PER_PIXEL * SMOOTH
    image = Image.new("RGB", (picture.width * scale, picture.height * scale), LIGHT["page"])
    draw = ImageDraw.Draw(image)
    for line in picture.lines:
        for points in dashes(line.points) if line.dashed else [line.points]:
            places = [(x * scale, y * scale) for x, y in points]
            draw.line(places, LIGHT[line.colour], round(line.width * scale), joint="curve")
    for x, y, radius, colour, ring in picture.dots:
        fill, outline = (None, LIGHT[colour]) if ring else (LIGHT[colour], None)
        draw.circle((x * scale, y * scale), radius * scale, fill, outline, scale)
    image = image.reduce(SMOOTH)
    font = ImageFont.load_default(FONT_SIZE * DOTS_PER_PIXEL)
    for x, y, text, anchor, colour, turned in picture.texts:
        text, at = text.replace("−", "-"), (x * DOTS_PER_PIXEL, y * DOTS_PER_PIXEL)  # the font has no minus sign
        if turned:
            image = image.rotate(-90, expand=True)  # the distance from the top becomes the distance from the right
            at = image.width - at[1], at[0]
        options = {"stroke_width": 3 * DOTS_PER_PIXEL, "stroke_fill": LIGHT["page"]} if colour == "ink" else {}
        ImageDraw.Draw(image).text(at, text, LIGHT[colour], font, PILLOW_ANCHORS[anchor], **options)
        if turned:
            image = image.rotate(90, expand=True)
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def dashes(points: Places) -> Iterator[Places]:
    """The dashes of a line through `points`."""
    done = 0.0  # pixels since the start of the last dash
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        length = math.dist((x, y), (next_x, next_y))
        start = -done
        while start < length:
            ends = max(start, 0) / length, min(start + DASH, length) / length
            if ends[0] < ends[1]:
                yield [(x + share * (next_x - x), y + share * (next_y - y)) for share in ends]
            start += DASH + GAP
        done = length - (start - DASH - GAP)
