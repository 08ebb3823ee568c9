"""The commands for a room of readers: site. As in ``cli``, each is a short function."""

import argparse
from pathlib import Path
from typing import Any

from glassbox_utils.cli_arguments import steps, text


def _site(args: argparse.Namespace) -> int:
    import sys

    from glassbox_utils.core import models
    from glassbox_utils.lab import site, site_features

    site.check_tools()
    site.check_modules(args.module)
    site.check_target(Path(args.out))
    runs = Path(args.runs) if args.runs else None
    lessons = site.lessons_of(runs)
    pages = {}
    if args.features and site.of_embedded(lessons):
        pages = site_features.pages(models.load_model(), args.features)
    first, warnings = site.build(Path(args.out), runs, args.module, pages)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    about = site.summary(first.parent)
    print(f"{about['pages']} pages, {about['megabytes']} MB. Open {first}")
    return 0


def add_to(commands: Any) -> None:
    """Register the sub-commands of this file."""
    p = commands.add_parser("site", help="the executed notebooks as one static site with search")
    p.add_argument("--runs", type=text, help="the --site of a `glassbox run`; without: the committed outputs")
    p.add_argument("--out", type=text, default="build/site", help="the folder to write, replaced as a whole")
    p.add_argument("--features", type=steps, metavar="N", help="pages of N features of each shipped SAE (minutes)")
    p.add_argument("--module", type=text, nargs="+", default=(), help="API pages of these only, such as core.text")
    p.set_defaults(function=_site)
