"""nbval compares text exactly; a rank statistic that sits on a rounding boundary may then fail on another CPU.

In cells with the tag ``rank-statistic``, and in no others, a printed decimal may differ by one in its last digit: the
cell after them asserts the values that the prose stands on. Everything else (words, signs in front of a number that is
not zero, whole numbers, how many numbers there are and how many digits) must be equal.
"""

import copy
import re
from decimal import Decimal

import pytest

TAG = "rank-statistic"
NUMBER = re.compile(r"[+\-−]?\d+\.\d+")


def close(reference: str, test: str) -> bool:
    """Equal, or equal but for decimals that differ by at most one in the last printed digit."""
    a, b = NUMBER.findall(reference), NUMBER.findall(test)
    if NUMBER.sub("#", reference) != NUMBER.sub("#", test) or len(a) != len(b):
        return False
    pairs = [(Decimal(x.replace("−", "-")), Decimal(y.replace("−", "-"))) for x, y in zip(a, b, strict=True)]
    same_digits = all(x.as_tuple().exponent == y.as_tuple().exponent for x, y in pairs)
    return same_digits and all(abs(x - y) <= Decimal(1).scaleb(x.as_tuple().exponent) for x, y in pairs)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Let nbval's own comparison see the reference where the two are close, and what differs where they are not."""
    from nbval import plugin

    if not isinstance(item, plugin.IPyNbCell) or TAG not in item.cell.metadata.get("tags", []):
        return
    exact = item.compare_outputs

    def compare_outputs(test, ref, skip_compare=None):
        if len(test) == len(ref):
            test = [snapped(t, r, item.sanitize) for t, r in zip(test, ref, strict=True)]
        return exact(test, ref, skip_compare)

    item.compare_outputs = compare_outputs


def snapped(test, ref, sanitize):
    """The test output with every text that is close to the reference's replaced by the reference's."""
    result = copy.copy(test)
    for key, value in test.items():
        other = ref.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            result[key] = snapped(value, other, sanitize)
        elif isinstance(value, str) and isinstance(other, str) and close(sanitize(other), sanitize(value)):
            result[key] = other
    return result
