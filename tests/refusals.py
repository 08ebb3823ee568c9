"""What every refusal of bad input looks like."""

import time

import pytest

from glassbox_utils.core.errors import GlassboxError


def refused(call, seconds=3.0):
    """Call it: it must raise a GlassboxError of one paragraph, soon: within so many seconds of *processor* time, since
    the clock on the wall also counts what else a busy machine does. Returns what was said."""
    start = time.process_time()
    with pytest.raises(GlassboxError) as error:
        call()
    said = str(error.value)
    assert time.process_time() - start < seconds
    assert "\n" not in said and 30 < len(said) < 900, said
    return said
