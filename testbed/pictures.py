"""A comparison's pictures: SVG for the page, in its colours by day and by night, and one PNG for elsewhere.

At most `HIGHLIGHTED` methods have a colour and a dash pattern of their own, the others are grey lines behind them; the small pictures
then show every method alone before all. So nothing has to be told by colour only, however many methods there are.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean

from testbed.comparison import Curve, Outcomes, Row, baseline_of

HIGHLIGHTED = 7
# Okabe and Ito's colours, which differ for colour-blind readers too, without the yellow that white swallows; the last is the text's own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "currentColor")
DASHES = ("", "7 3", "2 2", "9 3 2 3", "4 2", "12 4", "1 3")
GREY = "#8888"
_LEFT, _TOP, _WIDTH, _HEIGHT, _BOTTOM = 52, 10, 560, 300, 40
_PANEL_WIDTH, _PANEL_HEIGHT, _PANELS_WIDTH = 176, 110, 880
_BAR, _BARS_WIDTH = 22, 520
_LETTER = 6.5  # at most, of the names' font

Pairs = tuple[Sequence[float], Sequence[float]]


def highlighted(rows: Mapping[str, Row], reference: str, outcomes: Outcomes) -> list[str]:
    """The reference, FedAsync and the best of the others by final accuracy, in this order."""
    first = [name for name in dict.fromkeys((reference, baseline_of(outcomes) or reference)) if name in rows]
    others = sorted((name for name in rows if name not in first), key=lambda name: -rows[name].final_mean)
    return [*first, *others][:HIGHLIGHTED]


def line_chart(lines: Mapping[str, Pairs], chosen: Sequence[str], x_label: str, y_label: str, level: float | None = None) -> str:
    """Curves over one axis, with a legend of the highlighted ones; `level` is a dotted line across."""
    x_of, x_ticks = _scale([x for xs, _ in lines.values() for x in xs], _LEFT, _WIDTH)
    y_of, y_ticks = _scale([*(y for _, ys in lines.values() for y in ys), *([] if level is None else [level])], _TOP + _HEIGHT, -_HEIGHT)
    parts = [_axes(x_of, x_ticks, y_of, y_ticks, x_label, y_label)]
    parts += [_path(lines[name], x_of, y_of, GREY, "", 1) for name in lines if name not in chosen]
    if level is not None:
        parts.append(f'<path d="M{_LEFT} {y_of(level):.1f}h{_WIDTH}" stroke="currentColor" stroke-dasharray="1 4" fill="none"/>')
    for number, name in reversed(list(enumerate(chosen))):
        parts.append(_path(lines[name], x_of, y_of, COLOURS[number], DASHES[number], 2))
    entries = [(name, COLOURS[number], DASHES[number]) for number, name in enumerate(chosen)]
    if len(lines) > len(chosen):
        entries.append((f"{len(lines) - len(chosen)} others", GREY, ""))
    for number, (name, colour, dash) in enumerate(entries):
        y = _TOP + 10 + 20 * number
        swatch = f'<path d="M{_LEFT + _WIDTH + 14} {y}h34" stroke="{colour}" stroke-dasharray="{dash}" stroke-width="2" fill="none"/>'
        parts.append(swatch + _text(_LEFT + _WIDTH + 54, y + 4, name))
    return _svg(_LEFT + _WIDTH + 60 + _widest(chosen, 20), _TOP + _HEIGHT + _BOTTOM, f"{y_label} over {x_label}", parts)


def small_multiples(lines: Mapping[str, Pairs], x_label: str, y_label: str, key: str) -> str:
    """One small picture a method: its curve before those of all, on the same axes. `key` sets this picture's ids apart on the page."""
    wide = max(_PANEL_WIDTH, _widest(lines) + 16)
    columns = _PANELS_WIDTH // wide or 1
    x_of, x_ticks = _scale([x for xs, _ in lines.values() for x in xs], 0, wide - 16)
    y_of, y_ticks = _scale([y for _, ys in lines.values() for y in ys], _PANEL_HEIGHT, -_PANEL_HEIGHT)
    grid = "".join(f'<path d="M0 {y_of(y):.1f}h{wide - 16}" class="grid"/>' for y in y_ticks)
    behind = "".join(_path(pairs, x_of, y_of, GREY, "", 0.7) for pairs in lines.values())
    parts = [f'<defs><g id="{key}">{grid}{behind}</g></defs>']
    for number, (name, pairs) in enumerate(lines.items()):
        left, top = 30 + (number % columns) * wide, 22 + (number // columns) * (_PANEL_HEIGHT + 34)
        panel = f'<use href="#{key}"/>{_path(pairs, x_of, y_of, COLOURS[0], "", 2.2)}{_text(0, -6, name)}'
        if number % columns == 0:
            panel += "".join(_text(-4, y_of(y) + 4, _tick(y), "end") for y in y_ticks[:: max(len(y_ticks) // 3, 1)])
        parts.append(f'<g transform="translate({left} {top})">{panel}</g>')
    height = math.ceil(len(lines) / columns) * (_PANEL_HEIGHT + 34) + 30
    parts.append(_text(30, height - 10, f"{y_label} over {x_label}, 0 to {_tick(x_ticks[-1])}"))
    return _svg(30 + columns * wide, height, f"{y_label} over {x_label}, one picture a method", parts)


def final_bars(rows: Mapping[str, Row]) -> str:
    """Final accuracies, the best first, with 95 % intervals over seeds."""
    ordered = sorted(rows.items(), key=lambda item: -item[1].final_mean)
    left = _widest(rows) + 10
    x_of, ticks = _scale([0.0, *(min(row.final_mean + (row.final_interval or 0.0), 1.0) for row in rows.values())], left, _BARS_WIDTH)
    height = _BAR * len(ordered)
    parts = [_columns(x_of, ticks, height)]
    for number, (name, row) in enumerate(ordered):
        middle, end = _BAR * number + _BAR / 2, x_of(row.final_mean)
        size = f'width="{end - x_of(0):.1f}" height="14"'
        parts.append(f'<rect x="{x_of(0):.1f}" y="{middle - 7}" {size} fill="{COLOURS[0]}" opacity=".55"/>')
        if row.final_interval is not None:
            low, high = x_of(max(row.final_mean - row.final_interval, 0.0)), x_of(min(row.final_mean + row.final_interval, 1.0))
            ends = "".join(f"M{x:.1f} {middle - 4}v8" for x in (low, high))
            parts.append(f'<path d="M{low:.1f} {middle}H{high:.1f}{ends}" stroke="currentColor" fill="none"/>')
        parts.append(_text(left - 6, middle + 4, name, "end") + _text(x_of(ticks[-1]) + 12, middle + 4, f"{row.final_mean:.4f}"))
    return _svg(left + _BARS_WIDTH + 70, height + 26, "final accuracy of each method, with 95 % intervals", parts)


def update_strips(outcomes: Outcomes) -> str:
    """Updates of every device, mean over seeds: a dot a device, on a logarithmic axis (of 1 + updates)."""
    counts = {
        method: sorted(mean(run.updates.get(name, 0) for run in runs) for name in dict.fromkeys(n for run in runs for n in run.updates))
        for method, runs in outcomes.items()
    }
    most = max((max(each, default=0.0) for each in counts.values()), default=0.0)
    ticks = [0.0, *(10.0**power for power in range(max(math.ceil(math.log10(most + 1)), 1) + 1))]

    left = _widest(counts) + 10

    def x_of(value: float) -> float:
        return left + _BARS_WIDTH * math.log10(1 + value) / math.log10(1 + ticks[-1])

    height = _BAR * len(counts)
    parts = [_columns(x_of, ticks, height)]
    for number, (method, each) in enumerate(counts.items()):
        y = _BAR * number + _BAR / 2
        dots = "".join(f'<circle cx="{x_of(count):.1f}" cy="{y}" r="4" fill="{COLOURS[0]}" opacity=".5"/>' for count in each)
        parts.append(dots + _text(left - 6, y + 4, method, "end"))
    return _svg(left + _BARS_WIDTH + 30, height + 26, "updates of each device by method", parts)


def png(curves: Mapping[str, Curve], chosen: Sequence[str], target: float) -> bytes:
    """Accuracy over time and over bytes, density and coverage over time: the mean over seeds, and its range for the highlighted."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(15, 10), layout="constrained")
    x_labels = {"seconds": "seconds of virtual time", "megabytes": "MB sent, up and down"}
    y_labels = {
        "accuracy": "accuracy on test data, mean and range over seeds",
        "density": "mean density",
        "coverage": "least coverage of a coordinate",
    }
    panels = [("seconds", "accuracy"), ("megabytes", "accuracy"), ("seconds", "density"), ("seconds", "coverage")]
    for axis, (x, y) in zip(axes.flat, panels, strict=True):
        for name, curve in curves.items():
            if name not in chosen:
                axis.plot(getattr(curve, x), getattr(curve, y), color="0.75", lw=0.8)
        for number, name in reversed(list(enumerate(chosen))):
            colour = "black" if COLOURS[number] == "currentColor" else COLOURS[number]
            dashes = tuple(float(part) / 2 for part in DASHES[number].split())
            xs = getattr(curves[name], x)
            axis.plot(xs, getattr(curves[name], y), color=colour, ls=(0, dashes) if dashes else "-", label=name)
            if y == "accuracy":
                axis.fill_between(xs, curves[name].lowest, curves[name].highest, color=colour, alpha=0.12, lw=0)
        if y == "accuracy":
            axis.axhline(target, color="black", lw=0.8, ls=":")
        axis.set_xlabel(x_labels[x])
        axis.set_ylabel(y_labels[y])
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


# ---- pieces ------------------------------------------------------------------------------------------------------------------------


def _scale(values: Sequence[float], start: float, length: float) -> tuple[Callable[[float], float], list[float]]:
    """An axis from 0 to a round number at or above all values: its positions and its ticks."""
    top = max([value for value in values if math.isfinite(value)], default=0.0) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(top))
    step = next(part * magnitude for part in (0.1, 0.2, 0.5, 1.0, 2.0) if top <= 6 * part * magnitude * (1 + 1e-9))
    count = math.ceil(top / step - 1e-9)
    return lambda value: start + length * value / (count * step), [step * number for number in range(count + 1)]


def _path(pairs: Pairs, x_of: Callable[[float], float], y_of: Callable[[float], float], colour: str, dash: str, width: float) -> str:
    points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in zip(*pairs, strict=True))
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"/>'


def _axes(
    x_of: Callable[[float], float],
    x_ticks: Sequence[float],
    y_of: Callable[[float], float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
) -> str:
    bottom = _TOP + _HEIGHT
    lines = "".join(f'<path d="M{_LEFT} {y_of(y):.1f}h{_WIDTH}" class="grid"/>' for y in y_ticks)
    lines += "".join(_text(_LEFT - 6, y_of(y) + 4, _tick(y), "end") for y in y_ticks)
    lines += "".join(_text(x_of(x), bottom + 16, _tick(x), "middle") for x in x_ticks)
    middle = _TOP + _HEIGHT / 2
    turned = f'<g transform="rotate(-90 12 {middle})">{_text(12, middle, y_label, "middle")}</g>'
    return lines + _text(_LEFT + _WIDTH / 2, bottom + 34, x_label, "middle") + turned


def _columns(x_of: Callable[[float], float], ticks: Sequence[float], height: float) -> str:
    return "".join(f'<path d="M{x_of(x):.1f} 0v{height}" class="grid"/>' + _text(x_of(x), height + 16, _tick(x), "middle") for x in ticks)


def _widest(names: Iterable[str], at_least: int = 0) -> int:
    """Pixels that hold the longest of the names."""
    return math.ceil(_LETTER * max(at_least, *map(len, names)))


def _tick(value: float) -> str:
    return f"{value:.10g}"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    name = html.escape(label, quote=True)
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{name}">{"".join(parts)}</svg>\n'
