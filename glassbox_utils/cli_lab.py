"""The commands for a room of readers: workshop, reproduce, kit, compat. As in ``cli``, each is a short function."""

import argparse
from typing import Any

from glassbox_utils.cli_arguments import text


def _workshop(args: argparse.Namespace) -> int:
    from glassbox_utils.core.files import check_output
    from glassbox_utils.lab import workshop

    written = workshop.build(check_output(args.out, "--out", folder=True), args.notebook, not args.no_slides)
    print(f"{len(written)} files: {args.out}/students, {args.out}/instructor (a course for nbgrader)", end="")
    print("" if args.no_slides else f", {args.out}/slides")
    return 0


def add_to(commands: Any) -> None:
    """Register the sub-commands of this file."""
    p = commands.add_parser("workshop", help="student copies, an instructor's course folder and slides")
    p.add_argument("notebook", type=text, nargs="*", help="numbers or names; all without")
    p.add_argument("--out", type=text, default="build/workshop", help="the folder to write")
    p.add_argument("--no-slides", action="store_true", help="leave the slides out (reveal.js is fetched once)")
    p.set_defaults(function=_workshop)
