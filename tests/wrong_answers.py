"""What every exercise is held to: the blank, the solution, and answers that people typically give."""

import re

from glassbox_utils.lab.exercises import BLANK, RIGHT


def held_to(module, name, wrong):
    """``wrong``: pairs of a function and a pattern that its refusal matches, in one line."""
    check, solve = getattr(module, f"check_{name}"), getattr(module, f"solve_{name}")
    assert check(lambda *_: None) == BLANK and check(lambda *_: ...) == BLANK
    assert check(solve) == RIGHT
    assert len(wrong) >= 3
    for function, words in wrong:
        said = check(function)
        assert re.search(words, said) and said.startswith("not yet: ") and "\n" not in said, said
