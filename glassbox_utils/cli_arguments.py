"""What may be typed after an option: argparse says in one line what is wrong."""

import argparse

LARGEST_SEED = 2**32 - 1
"""numpy's global generator takes no larger one"""


def text(value: str) -> str:
    """An argument that says something."""
    if not value.strip() or "\0" in value:
        raise argparse.ArgumentTypeError(f"{value!r} is empty or no text; leave it out, or give a value")
    return value


def minutes(value: str) -> float:
    """A number of minutes above 0."""
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e6:
        raise argparse.ArgumentTypeError(f"{value!r} is no number of minutes; allowed: a number above 0, such as 120")
    return found


def steps(value: str) -> int:
    """A whole number from 1 on."""
    found = int(value) if value.isascii() and value.isdigit() and len(value) < 7 else 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is no such number; allowed: a whole number from 1 to 999999")
    return found


def seed(value: str) -> int:
    """A seed that every generator takes."""
    try:
        found = int(value)
    except ValueError:
        found = -1
    if not 0 <= found <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{value!r} is no seed; allowed: a whole number from 0 to {LARGEST_SEED}")
    return found


def tokens(value: str) -> int:
    """A number of tokens."""
    found = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is no such number; allowed: a whole number from 1 to 999999999")
    return found


def port(value: str) -> int:
    """A port of this machine; 0 is any that is free."""
    found = int(value) if value.isascii() and value.isdigit() and len(value) < 6 else -1
    if not 0 <= found < 2**16:
        raise argparse.ArgumentTypeError(f"{value!r} is no port; allowed: a whole number from 0 to 65535")
    return found
