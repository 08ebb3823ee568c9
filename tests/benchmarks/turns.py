"""Side by side: rivals take turns, so that a busy machine slows all of them alike."""

import time


def best_times(*functions, rounds):
    """Best time of each function in seconds over the rounds, after one round of warm-up."""
    best = [float("inf")] * len(functions)
    for turn in range(rounds + 1):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if turn:
                best[i] = min(best[i], time.perf_counter() - start)
    return best
