"""The commands for readers: site, workshop, reproduce, kit, compat, seeds. As in ``cli``, each is a short function."""

import argparse
import sys
from pathlib import Path
from typing import Any

from glassbox_utils.cli_arguments import port, seed, steps, text


def _site(args: argparse.Namespace) -> int:
    import shutil
    import sys
    import tempfile

    from glassbox_utils.core import models
    from glassbox_utils.lab import site, site_features

    site.check_tools()
    if args.ask:
        from glassbox_utils.lab import ask

        ask.check_tools()
    site.check_modules(args.module)
    site.check_target(Path(args.out))
    runs = Path(args.runs) if args.runs else None
    lessons = site.lessons_of(runs)
    pages = {}
    if args.features and site.of_embedded(lessons):
        pages = site_features.pages(models.load_model(), args.features)
    if args.ask:
        with tempfile.TemporaryDirectory() as made:
            pages["ask.md"] = _question(Path(made) / "ask", lessons, args.ask)
            first, warnings = site.build(Path(args.out), runs, args.module, pages)
            shutil.copytree(Path(made) / "ask", first.parent / ask.PLACE, dirs_exist_ok=True)
    else:
        first, warnings = site.build(Path(args.out), runs, args.module, pages)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    about = site.summary(first.parent)
    print(f"{about['pages']} pages, {about['megabytes']} MB. Open {first}")
    return 0


def _question(folder: Path, lessons: Any, weights: str) -> str:
    """Export what the page one can question reads, into a folder; the page's text with what the studies found."""
    import json

    from glassbox_utils.core.assets import DATA
    from glassbox_utils.core.models import load_model
    from glassbox_utils.decisions import loans, study
    from glassbox_utils.lab import ask
    from glassbox_utils.steering import load_vector
    from glassbox_utils.steering.vectors import ControlVector, parts_of

    base, officer = load_model(), loans.load_loan_model("deployed")
    edit = study.load_edit(officer)
    full = json.loads((DATA / "studies" / "steering_tone.json").read_text(encoding="utf-8"))["alpha"]
    adapter, tone = loans.LOANS / "deployed", ControlVector(parts_of(load_vector("tone")))
    size = ask.write(folder, base, officer, adapter, edit, (tone, full), ask.check_weights(weights))
    table = json.loads((DATA / "studies" / "loans_mitigation.json").read_text(encoding="utf-8"))
    found = {name: study.outcome(table, "gender", arm) for name, arm in ask.ARMS.items()}
    return ask.page(base, edit, ask.stated(found, lessons), round(size / 1e6), ask.check_weights(weights))


def _serve(args: argparse.Namespace) -> int:
    from glassbox_utils.lab import ask

    with ask.served(Path(args.folder), args.port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ for this machine alone; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def _workshop(args: argparse.Namespace) -> int:
    from glassbox_utils.core.files import check_output
    from glassbox_utils.lab import workshop

    written = workshop.build(check_output(args.out, "--out", folder=True), args.notebook, not args.no_slides)
    print(f"{len(written)} files: {args.out}/students, {args.out}/instructor (a course for nbgrader)", end="")
    print("" if args.no_slides else f", {args.out}/slides")
    return 0


def _officer() -> Any:
    """The card of the loan officers, for ``reproduce``: decisions on people whom no training saw, made again."""
    import re

    from glassbox_utils.core.assets import DATA
    from glassbox_utils.decisions import loans, study
    from glassbox_utils.lab.reproduce import ROUNDING, Number, Source

    card = (DATA / "loans" / "README.md").read_text(encoding="utf-8")
    stated = {
        "trained layouts": r"agrees with its history\s+on (\.\d+)",
        "unseen layouts": r"trained on, on (\.\d+)",
        "layouts in another manner": r"unseen ones and\s+on (\.\d+)",
    }
    found = {kind: match[1] for kind, pattern in stated.items() if (match := re.search(pattern, card))}
    # the decisions of two machines may differ where a score is nearly 0: one in a hundred of the cases
    numbers = tuple(Number("data/loans/README.md", f"agreement, {k}", float(v), ROUNDING) for k, v in found.items())

    def compute() -> dict[str, float]:
        model, now = loans.load_loan_model("deployed"), {}
        for kind in found:
            texts, history = study.held_out(kind)
            scores = loans.decide_texts(model, texts)
            agree = sum((s > 0) == h for s, h in zip(scores.tolist(), history, strict=True))
            now[f"agreement, {kind}"] = agree / len(texts)
        return now

    return Source("officer", numbers, compute)


def _reproduce(args: argparse.Namespace) -> int:
    from glassbox_utils.core.errors import GlassboxError
    from glassbox_utils.core.files import check_output
    from glassbox_utils.lab import reproduce

    out = Path(check_output(args.out, "--out", folder=True))
    known = reproduce.sources(_officer)
    if args.list:
        print("\n".join(f"{s.name:32} {len(s.numbers):4} numbers" for s in known))
        return 0
    chosen = reproduce.named(known, args.source) if args.source else known
    chosen = reproduce.a_tenth(chosen, args.seed) if args.quick else chosen
    rows = []
    for source in chosen:
        done = reproduce.kept(out / "rows.json", source) if args.go_on else None
        print(f"{source.name}: {len(source.numbers)} numbers{', kept from an earlier run' if done else ''}", flush=True)
        try:
            done = done or reproduce.compute(source)
            reproduce.keep(out / "rows.json", source, done)
        except GlassboxError as reason:  # its numbers count as outside; the other sources are computed all the same
            print(f"glassbox: {source.name} can't be computed here: {reason}", file=sys.stderr, flush=True)
            done = reproduce.missing(source)
        rows += done
        page, _ = reproduce.write(rows, out)
    print(reproduce.as_text(rows))
    left = reproduce.uncovered(reproduce.README.read_text(encoding="utf-8"), known)
    print(f"{left} other numbers of the README's prose (sizes, versions, dates, defaults) are not computed. {page}")
    return int(any(not row.inside and not row.number.machine for row in rows))


def _kit(args: argparse.Namespace) -> int:
    import tempfile
    import time

    from glassbox_utils.core.files import check_output
    from glassbox_utils.lab import kit, notebooks

    notebooks.find([args.notebook])
    target, start = Path(check_output(args.out, "--out")), time.perf_counter()
    if not (args.check_only and target.exists()):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = target.parent / "wheels"
        kit.build(target, Path(args.site), work)
        print(f"{target}: {target.stat().st_size / 1e9:.2f} GB, {(time.perf_counter() - start) / 60:.1f} minutes")
    if args.check or args.check_only:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            found = kit.check(target, Path(folder), args.notebook)
            print(f"without a network: installed in {found.install_minutes:.1f} minutes, notebook {args.notebook} in "
                  f"{found.run_minutes:.1f}, a page of {found.page_bytes / 1e6:.1f} MB", flush=True)  # fmt: skip
    return 0


def _compat(args: argparse.Namespace) -> int:
    import sys

    from glassbox_utils.lab import compat, notebooks

    notebooks.find(args.notebook)
    pythons = args.python or [sys.executable]
    for python in pythons:
        compat.version_of(python)  # all of them before the first installation
    bad, where = 0, [] if args.no_suite else args.tests
    for python in pythons:
        for versions in args.versions:
            row = compat.try_one(python, versions, args.notebook, where)
            compat.write(compat.merged(compat.read(), row))
            print(f"Python {row.python}, {versions}: {row.installed}; {row.suite}; {row.notebooks}", flush=True)
            bad += row.installed != "yes" or "failed" in row.suite or any(" s" not in x for x in row.notebooks.values())
    print(f"Table: {compat.PAGE}")
    return int(bad > 0)


def _seeds(args: argparse.Namespace) -> int:
    from glassbox_utils.lab import notebooks, seeds

    paths = notebooks.find(args.notebook)
    for path in paths:
        rows = seeds.merged(seeds.read(), seeds.committed(path))
        for other in seeds.missing(rows, path, args.seeds):
            row = seeds.try_one(path, other)
            rows = seeds.merged(seeds.merged(seeds.read(), seeds.committed(path)), row)
            seeds.write(rows)  # after each: a stopped call goes on where it was
            print(f"{path.stem}, SEED {other}: {row.stopped or f'{len(row.findings)} findings'}", flush=True)
        seeds.write(rows)
    print(f"Table: {seeds.PAGE}")
    return int(any(row.stopped for row in seeds.read()))


def add_to(commands: Any) -> None:
    """Register the sub-commands of this file."""
    p = commands.add_parser("site", help="the executed notebooks as one static site with search")
    p.add_argument("--runs", type=text, help="the --site of a `glassbox run`; without: the committed outputs")
    p.add_argument("--out", type=text, default="build/site", help="the folder to write, replaced as a whole")
    p.add_argument("--features", type=steps, metavar="N", help="pages of N features of each shipped SAE (minutes)")
    p.add_argument("--module", type=text, nargs="+", default=(), help="API pages of these only, such as core.text")
    words = "add the page one can question (needs the extra web; 0.3 GB), with weights in float16 (default) or int8"
    p.add_argument("--ask", nargs="?", const="float16", choices=("float16", "int8"), metavar="WEIGHTS", help=words)
    p.set_defaults(function=_site)

    p = commands.add_parser("serve", help="serve a site to this machine's browser, as its page with the model needs")
    p.add_argument("folder", type=text, nargs="?", default="build/site", help="what `glassbox site` wrote")
    p.add_argument("--port", type=port, default=8000, help="0 takes any that is free")
    p.set_defaults(function=_serve)

    p = commands.add_parser("workshop", help="student copies, an instructor's course folder and slides")
    p.add_argument("notebook", type=text, nargs="*", help="numbers or names; all without")
    p.add_argument("--out", type=text, default="build/workshop", help="the folder to write")
    p.add_argument("--no-slides", action="store_true", help="leave the slides out (reveal.js is fetched once)")
    p.set_defaults(function=_workshop)

    p = commands.add_parser("reproduce", help="compute what README, cards and results page state again, beside it")
    p.add_argument("source", type=text, nargs="*", help="readme, officer, notebook:NN, sae:NAME, notebook: for all")
    p.add_argument("--quick", action="store_true", help="a random tenth of the numbers, by whole sources")
    p.add_argument("--seed", type=seed, default=0, help="which tenth")
    p.add_argument("--go-on", action="store_true", help="keep what an earlier run of --out finished")
    p.add_argument("--list", action="store_true", help="name the sources, compute nothing")
    p.add_argument("--out", type=text, default="build/reproduce", help="the folder of the table (.md, .csv)")
    p.set_defaults(function=_reproduce)

    p = commands.add_parser("kit", help="one archive from which a machine without a network installs and runs")
    p.add_argument("--out", type=text, default="build/kit/glassbox-kit.zip", help="the archive to write")
    p.add_argument("--site", type=text, default="build/site", help="a built site, which goes in if it is there")
    p.add_argument("--check", action="store_true", help="install it and run a notebook where no network is (Linux)")
    p.add_argument("--check-only", action="store_true", help="the same with an archive that is there already")
    p.add_argument("--notebook", type=text, default="01", help="which notebook the check runs")
    p.set_defaults(function=_kit)

    p = commands.add_parser("compat", help="install and test on other Pythons and newest versions; writes a table")
    p.add_argument("--python", type=text, nargs="+", help="interpreters (python3.13, or a path); without: this one")
    p.add_argument("--versions", nargs="+", choices=("lock", "newest"), default=["lock", "newest"], help="which sets")
    p.add_argument("--notebook", type=text, nargs="+", default=["01", "02", "04"], help="which notebooks run")
    p.add_argument("--tests", type=text, nargs="+", default=["tests"], help="paths of the unit suite")
    p.add_argument("--no-suite", action="store_true", help="notebooks only")
    p.set_defaults(function=_compat)

    p = commands.add_parser("seeds", help="run notebooks with other seeds; writes which findings keep their verdict")
    p.add_argument("notebook", type=text, nargs="*", help="numbers or beginnings of names; without: all")
    p.add_argument("--seeds", type=seed, nargs="+", default=[1, 2, 3, 4], help="values of SEED (default: 1 2 3 4)")
    p.set_defaults(function=_seeds)
