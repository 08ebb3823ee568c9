"""Names of points in a plot: none over another, none outside of the axes."""

import itertools

import matplotlib.pyplot as plt
import numpy as np

from glassbox_utils.core.labels import name_points


def boxes(axis, texts):
    return [text.get_window_extent(axis.figure.canvas.get_renderer()) for text in texts]


def test_names_of_close_points_stand_apart_and_inside():
    figure, axis = plt.subplots(figsize=(4, 3), layout="constrained")
    points = [*np.random.default_rng(0).uniform(0, 1, (12, 2)), (0.5, 0.5), (0.5, 0.5), (0.51, 0.5), (1, 1), (0, 0)]
    axis.plot(*zip(*points, strict=True), ".")
    texts = name_points(axis, points, [f"{i}.{i}" for i in range(len(points))])
    assert [text.get_text() for text in texts] == [f"{i}.{i}" for i in range(len(points))]
    found = boxes(axis, texts)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(found, 2))
    frame = axis.get_window_extent()
    assert all(frame.contains(*corner) for box in found for corner in (box.min, box.max))
    assert len(axis.texts) == len(points)  # what was tried and not taken is gone
    plt.close(figure)


def test_no_points_and_large_markers():
    figure, axis = plt.subplots()
    assert name_points(axis, [], []) == []
    axis.plot([0, 1], [0, 1])
    near, far = name_points(axis, [(0.5, 0.5), (0.2, 0.2)], ["a", "b"], [1.0, 20.0])
    assert near.xyann == (3.0, 3.0) and far.xyann == (22.0, 22.0)
    plt.close(figure)


def test_names_keep_clear_of_markers_and_arrows():
    figure, axis = plt.subplots(figsize=(4, 3))
    axis.set(xlim=(0, 1), ylim=(0, 1))
    first = name_points(axis, [(0.5, 0.5)], ["a name"])[0].xyann
    stands = [text.xyann for text in name_points(axis, [(0.5, 0.5)], ["a name"], arrows=[((0.4, 0.53), (0.9, 0.53))])]
    assert stands[0] != first
    (text,) = name_points(axis, [(0.5, 0.5)], ["a name"], markers=[((0.55, 0.55), 12.0), ((0.45, 0.55), 12.0)])
    box, place = boxes(axis, [text])[0], axis.transData.transform
    assert not any(box.contains(*place(at)) for at in ((0.55, 0.55), (0.45, 0.55)))
    plt.close(figure)
