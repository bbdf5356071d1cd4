"""Line plots as SVG, with a logarithmic horizontal axis.

A plot opened alone has its own colours; inside a page it takes those of the page.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Mapping

_WIDTH, _HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP = 64, 44, 24
_LINE = 20
_COLOURS = ("#3b82c4", "#d9730d", "#2f9e6e", "#a855c7")
_STEPS = 4
_STYLE = (
    ":root:is(svg){color:#222;background:#fff}"
    "@media(prefers-color-scheme:dark){:root:is(svg){color:#ddd;background:#131416}}"
    ".plot .grid{stroke:currentColor;stroke-opacity:.2}"
)


def plot(
    series: Mapping[str, Mapping[int, float]], *, across: str, upwards: str
) -> str:
    """Return the SVG of all *series*.

    *across* and *upwards* are the labels of the axes, and together the title.
    """
    bottom = _HEIGHT - 2 * _LINE
    xs = sorted({x for points in series.values() for x in points})
    top = _round_up(max(y for points in series.values() for y in points.values()))
    stretch = (_WIDTH - _LEFT - _RIGHT) / math.log(xs[-1] / xs[0])

    def at(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + stretch * math.log(x / xs[0])
        return round(right, 1), round(bottom - (bottom - _TOP) * y / top, 1)

    parts = [_text(_LEFT, 14, upwards), _text(_WIDTH - _RIGHT, bottom + 34, across, 1)]
    for step in range(_STEPS + 1):
        value = top * step / _STEPS
        _, height = at(xs[0], value)
        parts += [_grid(height), _text(_LEFT - 8, height + 4, f"{value:,.10g}", 1)]
    parts += [_text(at(x, 0)[0], bottom + 18, f"{x:,}", 0.5) for x in xs]
    for number, (name, points) in enumerate(series.items()):
        line = [at(x, y) for x, y in sorted(points.items())]
        parts += _series(name, line, _COLOURS[number % len(_COLOURS)], number)
    height = _HEIGHT + _LINE * len(series)
    return _document(height, f"{upwards}, by {across}", _spoken(series), parts)


def _spoken(series: Mapping[str, Mapping[int, float]]) -> str:
    """Return the figures as text, for screen readers."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{y:,.4g} at {x:,}" for x, y in sorted(points.items()))
        for name, points in series.items()
    )


def _round_up(value: float) -> float:
    unit = 10 ** math.floor(math.log10(value))
    return next(unit * n for n in (1, 2, 4, 6, 8, 10) if unit * n >= value)


def _series(
    name: str, line: list[tuple[float, float]], colour: str, number: int
) -> list[str]:
    points = " ".join(f"{x},{y}" for x, y in line)
    dots = [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in line]
    height = _HEIGHT + _LINE * number
    return [
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *dots,
        f'<rect x="{_LEFT}" y="{height}" width="14" height="3" fill="{colour}"/>',
        _text(_LEFT + 22, height + 6, name),
    ]


def _grid(height: float) -> str:
    return f'<path d="M{_LEFT} {height}H{_WIDTH - _RIGHT}" class="grid"/>'


def _text(x: float, y: float, text: str, share: float = 0) -> str:
    """Return *text* placed so that *share* of its width is left of *x*."""
    anchor = {0: "start", 0.5: "middle", 1: "end"}[share]
    return f'<text x="{x}" y="{y}" style="text-anchor:{anchor}">{escape(text)}</text>'


def _document(height: int, title: str, spoken: str, parts: list[str]) -> str:
    name = re.sub(r"\W+", "-", title)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="diagram plot" '
            f'viewBox="0 0 {_WIDTH} {height}" role="img" '
            f'aria-labelledby="{name}-title {name}-desc" '
            f'font-family="system-ui, sans-serif" font-size="13" fill="currentColor">',
            f'<title id="{name}-title">{escape(title)}</title>',
            f'<desc id="{name}-desc">{escape(spoken)}</desc>',
            f"<style>{_STYLE}</style>",
            *parts,
            "</svg>\n",
        ]
    )
