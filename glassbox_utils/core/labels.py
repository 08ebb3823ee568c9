"""Names of points in a plot, placed so that they can be read."""

from collections.abc import Sequence
from typing import Any

SIDES = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
Point = tuple[float, float]
AROUND = [(far * x, far * y) for far in (1.0, 2.5) for x, y in SIDES]
"""where a name may stand, seen from its point"""


def name_points(
    axis: Any,
    points: Sequence[Point],
    names: Sequence[str],
    radii: float | Sequence[float] = 1.0,
    fontsize: float = 7.0,
    markers: Sequence[tuple[Point, float]] = (),
    arrows: Sequence[tuple[Point, Point]] = (),
) -> list[Any]:
    """A name beside each point, at the first place around it where it covers nothing; the texts.

    Call it when the axis' limits are final. ``radii``: of the points' markers, in points (1/72 inch). ``markers``
    (point and radius) and ``arrows`` (two ends) are what names keep clear of, besides one another.
    """
    axis.figure.draw_without_rendering()  # a layout moves axes when it is drawn
    renderer, texts = axis.figure.canvas.get_renderer(), list[Any]()
    taken = _obstacles(axis, markers, arrows)
    radii = [radii] * len(names) if isinstance(radii, int | float) else radii
    frame = axis.get_window_extent(renderer)
    for point, name, radius in zip(points, names, radii, strict=True):
        tried = []
        for x, y in AROUND:
            text = axis.annotate(
                name, (float(point[0]), float(point[1])), (x * (radius + 2), y * (radius + 2)),
                textcoords="offset points", fontsize=fontsize, zorder=4,
                ha="left" if x > 0 else "right" if x < 0 else "center",
                va="bottom" if y > 0 else "top" if y < 0 else "center",
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            tried.append((sum(_shared(box, other) for other in taken) + _outside(box, frame), text, box))
            text.set_visible(False)
            if not tried[-1][0]:
                break
        _, text, box = min(tried, key=lambda one: one[0])
        for _, other, _ in tried:
            if other is not text:
                other.remove()
        text.set_visible(True)
        taken.append(box)
        texts.append(text)
    return texts


def _obstacles(axis: Any, markers: Sequence[tuple[Point, float]], arrows: Sequence[tuple[Point, Point]]) -> list[Any]:
    """Boxes, in pixels, around markers and along arrows (a thin box at every twentieth of the way)."""
    from matplotlib.transforms import Bbox

    pixel = axis.figure.dpi / 72

    def around(at: Any, radius: float) -> Any:
        return Bbox([[at[0] - radius, at[1] - radius], [at[0] + radius, at[1] + radius]])

    place = axis.transData.transform
    found = [around(place(point), radius * pixel) for point, radius in markers]
    for a, b in arrows:
        (x0, y0), (x1, y1) = place(a), place(b)
        found += [around((x0 + t / 20 * (x1 - x0), y0 + t / 20 * (y1 - y0)), 1.5 * pixel) for t in range(21)]
    return found


def _shared(a: Any, b: Any) -> float:
    """The area in which two boxes lie over one another."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)


def _outside(box: Any, frame: Any) -> float:
    """The area of a box outside of a frame."""
    return max(0.0, box.width * box.height - _shared(box, frame))
