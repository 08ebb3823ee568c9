"""What every refusal of bad input looks like."""

import time

import pytest

from glassbox_utils.core.errors import GlassboxError


def refused(call, seconds=3.0):
    """Call it: it must raise a GlassboxError of one paragraph, soon. Returns what was said."""
    start = time.perf_counter()
    with pytest.raises(GlassboxError) as error:
        call()
    said = str(error.value)
    assert time.perf_counter() - start < seconds
    assert "\n" not in said and 30 < len(said) < 900, said
    return said
