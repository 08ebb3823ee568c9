"""The ``glassbox`` command. Each sub-command is a short function; the work is done in the modules.

A command checks all that was typed before it loads a model, and what it will write before it computes. Exit codes: 0;
1 for damage that was found or an unexpected error; 2 for what the user can mend; 130 after Ctrl-C.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from glassbox_utils import cli_decisions, cli_lab
from glassbox_utils.cli_arguments import minutes, seed, text, tokens
from glassbox_utils.core.errors import GlassboxError


def _assets(args: argparse.Namespace) -> int:
    from glassbox_utils.core import assets, files
    from glassbox_utils.core.embedded import embedded_folder, embedded_path, mended

    if args.fetch:
        for path in mended():
            print(f"made again: {path}")
        print(f"embedded model: {embedded_folder()}")
    rows = assets.states(verify=args.verify)
    print(f"cache: {assets.cache_dir()}  (set {assets.CACHE_VARIABLE} to move it)")
    for row in rows:
        p = row.package
        state = {None: "cached" if row.cached else "not fetched", True: "intact", False: "DAMAGED"}[row.intact]
        print(f"{state:12} {p.size / 1e6:7.1f} MB  {p.name}=={p.version} ({p.registry})  {p.licence}  {p.holds}")
    damaged = [f"{row.package.filename}: another sha256 than the pinned one" for row in rows if row.intact is False]
    for path in [*assets.extracted(), embedded_path()]:
        if not path.exists():
            continue
        wrong = files.damage(path, full=True) if args.verify else []
        known = files.is_recorded(path)
        state = "DAMAGED" if wrong and known else "not checked" if not known else "intact" if args.verify else "made"
        size = sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())
        print(f"{state:12} {size / 1e6:7.1f} MB  {path.relative_to(assets.cache_dir())}, made of a package above")
        damaged += [f"{path}: {'; '.join(wrong)}"] if wrong and known else []
    for line in damaged:
        print(line)
    if damaged:
        print("Damaged pieces are refused when they are used. `glassbox assets --fetch` makes them again.")
    return 1 if damaged else 0


def _run(args: argparse.Namespace) -> int:
    from glassbox_utils.core.files import check_output
    from glassbox_utils.lab import notebooks

    notebooks.find(args.notebook)
    notebooks.runs_of(check_output(args.site, "--site", folder=True))
    parameters = {"MODEL": args.model} if args.model else None
    try:
        notebooks.build_site(Path(args.site), args.notebook, parameters, args.cell_minutes)
    except notebooks.SomeStoppedError as error:  # not 2: there are pages, of which a site can be built
        print(f"glassbox: {error}", file=sys.stderr)
        return 1
    print(f"Open {Path(args.site) / 'index.html'}")
    return 0


def _execute(args: argparse.Namespace) -> int:
    from glassbox_utils.core.files import check_output
    from glassbox_utils.lab import notebooks

    for path in [check_output(p, "the notebook") for p in notebooks.find(args.notebook)]:
        seconds, peak = notebooks.execute_in_place(path)
        print(f"{path.name}: {seconds:.0f} s, {peak:.1f} GiB")
    return 0


def _corpus(args: argparse.Namespace) -> int:
    from glassbox_utils.core import contents, corpora
    from glassbox_utils.core.models import EMBEDDED, load_model

    if args.model and not args.tokens:
        raise GlassboxError(f"--model is {args.model!r}, but tokens are not counted. Add --tokens, or leave it out.")
    corpora.check_corpus(args.name)  # before a model is loaded
    contents.print_corpus(args.name, load_model(args.model or EMBEDDED) if args.tokens else None)
    return 0


def _write_text(args: argparse.Namespace) -> int:
    from glassbox_utils.core import own_writing

    given = {"tokens": args.tokens, "model": args.model, "seed": args.seed}
    config = own_writing.Writing(args.name, **{k: v for k, v in given.items() if v is not None})
    folder = own_writing.write(config)
    counts = own_writing.counted(folder)
    print(f"{folder}: " + ", ".join(f"{n:,} tokens {kind}" for kind, n in sorted(counts.items())))
    print(f"as a corpus: own:{args.name}, or a share of one: 50 % mix + 50 % own:{args.name}")
    return 0


def _harvest(args: argparse.Namespace) -> int:
    from glassbox_utils.core import distributed
    from glassbox_utils.core.files import check_output
    from glassbox_utils.saes.config import read_config
    from glassbox_utils.saes.harvest import harvest, shards
    from glassbox_utils.saes.training import model_of

    with distributed.ranks():
        config = read_config(args.config)
        check_output(config.harvest.folder, "the folder of the shards", folder=True)
        folder = harvest(config.harvest, model_of(config))
        if distributed.is_main():
            print(f"{len(shards(folder))} shards in {folder}")
    return 0


def _train_sae(args: argparse.Namespace) -> int:
    from glassbox_utils.core import assets, blends, distributed
    from glassbox_utils.core.files import check_output
    from glassbox_utils.core.models import load_model
    from glassbox_utils.saes import detection
    from glassbox_utils.saes.config import check_training, read_config
    from glassbox_utils.saes.training import train_from_config

    with distributed.ranks():
        config, target = read_config(args.config), Path(args.config)
        check_training(config)  # before half an hour of harvest
        check_output(target if target.is_dir() else target.parent, "the folder of the SAE", folder=True)
        check_output(assets.cache_dir(), "the cache", folder=True)
        if not config.stream:
            check_output(config.harvest.folder, "the folder of the shards", folder=True)
        folder = train_from_config(args.config)
        if not distributed.is_main():
            return 0
        if blends.has(config.corpus, "mix"):  # only the mix holds passages about the bridge and about what is not it
            detection.add_golden_gate(load_model(config.model), folder)
        print((folder / "README.md").read_text(encoding="utf-8"))
    return 0


def _evaluate_sae(args: argparse.Namespace) -> int:
    from glassbox_utils.saes.quality import evaluate_again
    from glassbox_utils.saes.store import load_sae

    for name in args.name:
        load_sae(name)  # all names before the first measurement
    worst = 0.0
    for name in dict.fromkeys(args.name):
        for kind, metrics in evaluate_again(name).items():
            print(f"{name}: {kind}")
            for metric, (card, now) in metrics.items():
                print(f"  {metric:24s} card {card:12.3f}   now {now:12.3f}")
            asserted = ("explained_variance", "recovered_mean", "recovered_zero") if kind == "sae" else ()
            worst = max([worst, *(abs(metrics[m][0] - metrics[m][1]) for m in asserted)])
    print(f"largest difference from the cards, explained variance and cross-entropy recovered: {worst:.3f}")
    return int(worst > 0.01)


def _study(args: argparse.Namespace) -> int:
    from glassbox_utils.core import distributed, prepared
    from glassbox_utils.core.files import check_output

    known, names = every_study(), list(dict.fromkeys(args.name))
    for name in names:
        if name not in known:
            raise GlassboxError(f"There is no study {name!r}. Allowed: {', '.join(sorted(known))}.")
    check_output(prepared.path("studies"), "the folder of the tables", folder=True)
    with distributed.ranks():
        mine = names[distributed.rank() :: distributed.world()]
        if not mine:
            print(f"rank {distributed.rank()}: {len(names)} studies for {distributed.world()} ranks, waiting")
        for name in mine:  # each writes its own table
            print(known[name]())
        distributed.barrier()
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from glassbox_utils.lab import prepare

    out = Path(args.out) if args.out else None
    corpus = args.text or ("sampled" if args.sampled else args.corpus)
    folder = prepare.prepare(args.model, studies(), args.budget, out, corpus)
    print(f"prepared: {folder}. `make run MODEL={args.model}` runs the notebooks on it.")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from glassbox_utils.core.files import check_output
    from glassbox_utils.lab import compare

    check_output(args.out, "--out")
    rows = compare.write_page(Path(args.first), Path(args.second), Path(args.out))
    both = sum(row.outcome == "both" for row in rows)
    print(f"{len(rows)} claims, {both} held on both models. Open {args.out}")
    return 0


def studies() -> dict[str, Callable[[], Path]]:
    """The long runs behind the notebooks: name -> function that computes all and returns the table's path."""
    # imported here: no other command should wait for torch
    from glassbox_utils.attention.looking_study import STUDIES_OF_LOOKING
    from glassbox_utils.attention.outcomes_study import STUDIES_OF_HEADS
    from glassbox_utils.decisions.cause_study import STUDIES_OF_LOANS
    from glassbox_utils.decisions.fidelity_study import STUDIES_OF_ANSWERS
    from glassbox_utils.decisions.reality_study import STUDIES_OF_REALITY
    from glassbox_utils.decisions.safety_study import STUDIES_OF_SAFETY
    from glassbox_utils.saes.clamping_report_study import STUDIES_OF_CLAMPING
    from glassbox_utils.saes.meaning_study import STUDIES_OF_MEANING
    from glassbox_utils.saes.study import STUDIES_OF_SAES
    from glassbox_utils.steering.report_study import STUDIES_OF_STEERING

    heads = {**STUDIES_OF_LOOKING, **STUDIES_OF_HEADS}
    features = {**STUDIES_OF_SAES, **STUDIES_OF_MEANING, **STUDIES_OF_CLAMPING}
    loans = {**STUDIES_OF_LOANS, **STUDIES_OF_REALITY, **STUDIES_OF_ANSWERS}
    return {**heads, **features, **STUDIES_OF_STEERING, **loans, **STUDIES_OF_SAFETY}


def every_study() -> dict[str, Callable[[], Path]]:
    """Those, and the long runs that ``prepare`` does not repeat on another model."""
    from glassbox_utils.attention.forming_study import STUDIES_OF_FORMING
    from glassbox_utils.decisions.locate_study import STUDIES_OF_LOCATE
    from glassbox_utils.decisions.planted_study import STUDIES_OF_PLANTED
    from glassbox_utils.decisions.power_study import STUDIES_OF_AUDITS
    from glassbox_utils.saes.meaning_study import STUDIES_OF_ARCHITECTURES
    from glassbox_utils.steering.layer_study import STUDIES_OF_LAYERS
    from glassbox_utils.steering.order_study import STUDIES_OF_ORDER

    audits = {**STUDIES_OF_AUDITS, **STUDIES_OF_PLANTED}
    techniques = {**STUDIES_OF_FORMING, **STUDIES_OF_ARCHITECTURES, **STUDIES_OF_LAYERS, **STUDIES_OF_ORDER}
    return {**studies(), **techniques, **audits, **STUDIES_OF_LOCATE}


def parser() -> argparse.ArgumentParser:
    """All sub-commands; each has ``function``, which takes the parsed arguments and returns an exit code."""
    top = argparse.ArgumentParser(prog="glassbox", description="From black box to glass box, with controls.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("assets", help="list the pinned downloads, their size, licence and source")
    p.add_argument("--verify", action="store_true", help="hash all that was fetched and made of it again")
    p.add_argument("--fetch", action="store_true", help="fetch the embedded model, make damaged pieces again")
    p.set_defaults(function=_assets)

    p = commands.add_parser("run", help="execute notebooks into web pages")
    p.add_argument("notebook", type=text, nargs="*", help="numbers or names; all without")
    p.add_argument("--model", type=text, help="a model's name or folder instead of the embedded one")
    p.add_argument("--site", type=text, default="build/site", help="folder of the pages")
    p.add_argument("--cell-minutes", type=minutes, help="give a cell up after so many minutes; without: never")
    p.set_defaults(function=_run)

    p = commands.add_parser("execute", help="execute notebooks in place, in the form that is committed")
    p.add_argument("notebook", type=text, nargs="*", help="numbers or names; all without")
    p.set_defaults(function=_execute)

    p = commands.add_parser("corpus", help="print what is in a corpus: documents, licences, splits")
    p.add_argument("name", type=text, nargs="?", default="mix", help="a registered corpus, or a data set on the hub")
    p.add_argument("--tokens", action="store_true", help="count tokens too")
    p.add_argument("--model", type=text, help="whose tokenizer counts them; without: the embedded model's")
    p.set_defaults(function=_corpus)

    p = commands.add_parser("write-text", help="let the model write a text, as a corpus for SAEs; resumable")
    p.add_argument("name", type=text, help="what it is to be called: own:NAME is the corpus")
    p.add_argument("--tokens", type=tokens, help="how many at least; without: 2,100,000")
    p.add_argument("--model", type=text, help="a model's name or folder instead of the embedded one")
    p.add_argument("--seed", type=seed, help="without: 0")
    p.set_defaults(function=_write_text)

    p = commands.add_parser("harvest", help="write the activations that a training configuration asks for (torchrun)")
    p.add_argument("config", type=text, help="a config.yaml in data/saes, or its folder")
    p.set_defaults(function=_harvest)

    p = commands.add_parser("train-sae", help="harvest, train, evaluate and save one SAE (torchrun)")
    p.add_argument("config", type=text, help="a config.yaml in data/saes, or its folder")
    p.set_defaults(function=_train_sae)

    p = commands.add_parser("evaluate-sae", help="measure a shipped SAE and its baselines again, beside its card")
    p.add_argument("name", type=text, nargs="+", help="a folder in data/saes")
    p.set_defaults(function=_evaluate_sae)

    cli_decisions.add_to(commands)
    cli_lab.add_to(commands)

    p = commands.add_parser("study", help="compute a long run that a notebook draws; resumable, writes data/studies/")
    p.add_argument("name", type=text, nargs="+", help="which, in order; a wrong name lists all")
    p.set_defaults(function=_study)
    p = commands.add_parser("prepare", help="make all that the notebooks read for another model; resumable")
    p.add_argument("model", type=text, help="a name or folder that `load_model` takes")
    p.add_argument("--budget", type=minutes, help="minutes; without: everything at full size (hours)")
    p.add_argument("--out", type=text, help="the folder to make; without: one of that name in your data folder")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--corpus", type=text, default="mix", help="what the SAEs learn from: `mix`, or a hub data set")
    source.add_argument("--text", type=text, nargs="+", help="your own text files (.txt, .md, .jsonl), or folders")
    source.add_argument("--sampled", action="store_true", help="text that the model itself writes")
    p.set_defaults(function=_prepare)

    p = commands.add_parser("compare", help="the same claims on two models: a page from two folders of `run`")
    p.add_argument("first", type=text, help="the --site folder of a run")
    p.add_argument("second", type=text, help="that of a run on another model")
    p.add_argument("--out", type=text, default="compare.html", help="the page to write: .html or .md")
    p.set_defaults(function=_compare)
    for command in commands.choices.values():
        device = "cuda, mps or cpu; without: GLASSBOX_DEVICE, or the fastest"
        number = (
            "float32, bfloat16 or float16, the type models are loaded in; without: GLASSBOX_MODEL_DTYPE, or float32"
        )
        command.add_argument("--device", type=text, help=device)
        command.add_argument("--dtype", type=text, help=number)
        command.add_argument("--prepared", type=text, help="the prepared folder to work with, instead of data/")
        command.add_argument("--debug", action="store_true", help="show where in the code an error arose")
    return top


@contextmanager
def _chosen(args: argparse.Namespace) -> Iterator[None]:
    """Device, number type and prepared folder in the environment, for this process and notebooks' kernels."""
    wanted = {"GLASSBOX_DEVICE": args.device, "GLASSBOX_MODEL_DTYPE": args.dtype, "GLASSBOX_PREPARED": args.prepared}
    before = {name: os.environ.get(name) for name in wanted}
    if args.device:
        from glassbox_utils.core import devices

        devices.choose(args.device)  # a wrong name fails here
    if args.dtype:
        from glassbox_utils.core.models import dtype_of

        dtype_of(args.dtype)
    if args.prepared:
        from glassbox_utils.core import prepared

        wanted["GLASSBOX_PREPARED"] = str(Path(args.prepared).absolute())
        prepared.card(Path(args.prepared))
    try:
        os.environ.update({name: value for name, value in wanted.items() if value})
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def main(argv: list[str] | None = None) -> int:
    """Entry point. What went wrong is one paragraph on stderr; ``--debug`` adds the traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has not all letters ends no command
    args = parser().parse_args(argv)
    try:
        with _chosen(args):
            code = args.function(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _failed("stopped. Nothing half-written was left; the same command goes on or begins again.", 130, args)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except GlassboxError as error:
        return _failed(str(error), 2, args)
    except OSError as error:
        from glassbox_utils.core.files import CANNOT

        if error.errno in CANNOT and error.filename:
            name = str(error.filename)
            name = name if len(name) <= 200 else f"{name[:197]}..."
            return _failed(f"{name} can't be read or written ({error.strerror}). Give another path.", 2, args)
        return _unexpected(error, args)
    except Exception as error:
        return _unexpected(error, args)


def _unexpected(error: Exception, args: argparse.Namespace) -> int:
    words = " ".join(str(error).split())[:500]
    advice = "This was not foreseen" + ("" if args.debug else "; run again with --debug to see where it arose")
    return _failed(f"{type(error).__name__}{': ' if words else ''}{words.rstrip('.')}. {advice}.", 1, args)


def _failed(message: str, code: int, args: argparse.Namespace) -> int:
    if args.debug:
        traceback.print_exc()
    print(f"glassbox: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
