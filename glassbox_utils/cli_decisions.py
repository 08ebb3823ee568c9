"""The commands about decisions, as in ``cli`` each a short function: new-decision, audit, explain, train-*."""

import argparse
from pathlib import Path
from typing import Any

from glassbox_utils.cli_arguments import seed, steps, text
from glassbox_utils.core.errors import GlassboxError


def _audit(args: argparse.Namespace) -> int:
    from glassbox_utils.core import files, models, schema
    from glassbox_utils.decisions import reading, search

    decision, out = reading.load_decision(args.decision), files.check_output(args.out, "--out") if args.out else None
    if args.adapter:  # before a model is loaded
        schema.read_mapping(Path(args.adapter) / "adapter_config.json", search.DecisionError, "what peft writes")
    found = search.audit(models.load_model(args.model or models.EMBEDDED, args.adapter), decision, args.n, args.seed)
    print(found.as_text())
    if out is not None:
        with files.atomic_path(out) as path:
            path.write_text(found.as_json(), encoding="utf-8")
    return 0


def _locate(args: argparse.Namespace, mend: bool = False) -> int:
    import json
    import shlex

    from glassbox_utils.core import files, models, prepared, schema
    from glassbox_utils.decisions import locate_figures, locate_study, locate_tables, reading

    decision, out = reading.load_decision(args.decision), files.check_output(args.out, "--out") if args.out else None
    if args.adapter:  # before a model is loaded
        schema.read_mapping(Path(args.adapter) / "adapter_config.json", reading.DecisionError, "what peft writes")
    model = models.load_model(args.model or models.EMBEDDED, args.adapter)
    differs = locate_study.asked_for(model, decision, args.attribute, args.own, args.donor)
    saes = [] if args.model else list(dict.fromkeys(prepared.card().saes.values()))
    table = locate_study.found_by_command(model, decision, differs, saes, mend)
    lines = locate_figures.mended_lines(table) if mend else locate_figures.located_lines(table)
    print("\n".join(lines))
    if mend:
        where = {"--decision": decision.name, "--model": Path(args.model or models.EMBEDDED).name,
                 "--attribute": args.attribute, "--own": args.own, "--donor": args.donor}  # fmt: skip
        command = " ".join(["glassbox mitigate", *(f"{k} {shlex.quote(v)}" for k, v in where.items() if v)])
        table = locate_tables.as_mitigation(table, decision.title, command)
        print(f"Preferred on the cases that chose: {table['description']}")
    if out is not None:
        with files.atomic_path(out) as path:
            path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _mitigate(args: argparse.Namespace) -> int:
    return _locate(args, mend=True)


def _explain(args: argparse.Namespace) -> int:
    if args.decision is None and args.applicant is None:
        raise GlassboxError(
            "There is nothing to explain. Allowed: --decision FOLDER with a CASE (an id, or a file with its fields), "
            "or --applicant FILE for the loan officer of notebook 06."
        )
    return _explain_application(args) if args.decision is None else _explain_case(args)


def _explain_case(args: argparse.Namespace) -> int:
    import shlex
    import warnings

    from glassbox_utils.core import files, models, schema
    from glassbox_utils.decisions import answer, answer_page, reading

    for option, value in (("--applicant", args.applicant), ("--layout", args.layout)):
        if value is not None:
            raise GlassboxError(f"{option} is {value[:60]!r}, but it belongs to the loan officer's own form. With "
                                "--decision give a CASE, and --template for the wording.")  # fmt: skip
    if args.case is None:
        raise GlassboxError("CASE is missing. Give the id of a case of the decision, or a file with its fields.")
    page = args.out or "answer.html"
    files.check_output(page, "--out")
    for path in answer_page.outputs(page):
        files.check_output(path, "--out")
    decision = reading.load_decision(args.decision)
    case = answer.of_case(decision, args.case)
    decision.template(args.template)
    mitigated = answer_page.read_mitigation(args.mitigation) if args.mitigation else None
    adapter = Path(args.adapter) if args.adapter else None
    if adapter is not None:  # before a model is loaded
        schema.read_mapping(adapter / "adapter_config.json", reading.DecisionError, "what peft writes")
    warnings.simplefilter("ignore", FutureWarning)  # of libraries among themselves: nothing a reader should see
    model = models.load_model(args.model or models.EMBEDDED, adapter)
    found = answer.explain(model, decision, case, args.template, seed=args.seed)
    folder = reading.folder_of(args.decision)
    where = {"--decision": folder.name, "--model": Path(args.model or models.EMBEDDED).name,
             "--adapter": adapter and adapter.resolve().name, "--template": args.template,
             "--seed": str(args.seed), "--mitigation": args.mitigation and Path(args.mitigation).name}  # fmt: skip
    options = " ".join(f"{k} {shlex.quote(v)}" for k, v in where.items() if v)
    shown = args.case if case in decision.cases else Path(args.case).name
    command = f"glassbox explain {options} {shlex.quote(shown)}"
    facts = answer_page.provenance(model, found, folder, adapter)
    page, data, letter = answer_page.write_answer(found, decision, page, facts, command, mitigated)
    print(f"{found.answer} ({found.score:+.2f}). Open {page}; {letter} is the letter, {data} the same for machines.")
    return 0


def _explain_application(args: argparse.Namespace) -> int:
    import warnings

    from glassbox_utils.core.files import check_output

    for option in ("case", "adapter", "template", "mitigation"):
        if (value := getattr(args, option)) is not None:
            raise GlassboxError(
                f"{option} is {value[:60]!r}, which needs --decision FOLDER. Give that, or leave it out."
            )
    out, name = args.out or "report.html", args.model or "deployed"
    check_output(out, "--out")
    from glassbox_utils.core import prepared, schema
    from glassbox_utils.core.models import load_model
    from glassbox_utils.decisions import loans, report, study

    applicant = loans.parse_applicant(args.applicant)  # before the model is loaded: wrong input fails at once
    layout = args.layout or "line"
    loans.as_text(applicant, layout)
    warnings.simplefilter("ignore", FutureWarning)  # of libraries among themselves: nothing a regulator should read
    folder, adapter = Path(name), None
    if (folder / "config.json").exists():
        model = load_model(folder)
    elif (folder / "adapter_config.json").exists():
        schema.read_mapping(folder / "adapter_config.json", loans.LoanError, "an adapter's folder as peft writes it")
        model, adapter = prepared.load_subject(adapter=folder), folder
    elif name in loans.loan_models():
        model, adapter = loans.load_loan_model(name), loans.officers() / name
    else:
        there = "holds neither config.json nor adapter_config.json" if folder.is_dir() else "is no such folder or name"
        known = "".join(f"{name}, " for name in loans.loan_models())
        raise loans.LoanError(
            f"--model is {name!r}, which {there}. Allowed: {known}the folder of an "
            "adapter (as peft writes it) or of a model (as save_pretrained writes it)."
        )
    options = {"layout": layout, "seed": args.seed, "adapter": adapter, "model_argument": folder.name}
    options["mitigated"] = study.shipped_mitigation(model)
    path = report.write_report(model, applicant, out, applicant_file=Path(args.applicant).name, **options)
    print(f"Open {path}; print it from there (A4).")
    return 0


def _new_decision(args: argparse.Namespace) -> int:
    from glassbox_utils.decisions import reading

    place = reading.new_decision(args.folder)
    print(f"{place / reading.FILE} and {place / 'cases.csv'}: change them line by line, then `glassbox audit`.")
    return 0


def _train_loans(args: argparse.Namespace) -> int:
    from glassbox_utils.core.files import check_output
    from glassbox_utils.decisions import loans, training

    names = list(dict.fromkeys(args.name))
    if not args.bias:
        for option, value in (("--seed", args.seed), ("--folder", args.folder)):
            if value is not None:
                raise GlassboxError(
                    f"{option} is {value!r}, but a shipped model is trained again as it was, in its own folder. Leave "
                    f"{option} out, or give --bias to train a new model."
                )
        known = training.recipes()
        if unknown := [name for name in names if name not in known]:
            raise loans.LoanError(f"There is no loan model {unknown[0]!r}. Allowed: {', '.join(known)}.")
        targets = {name: loans.officers() / name for name in names}
    else:
        if args.bias not in loans.BIASES:
            raise loans.LoanError(f"There is no bias {args.bias!r}. Allowed: {', '.join(loans.BIASES)}.")
        if args.folder and len(names) > 1:
            raise GlassboxError(f"--folder is {args.folder!r} for {len(names)} models. Give one name, or leave it out.")
        if wrong := [name for name in names if Path(name).name != name or name.startswith(".")]:
            raise loans.LoanError(f"The name {wrong[0]!r} is no plain name. Use --folder for another place.")
        targets = {name: Path(args.folder or f"build/loans/{name}") for name in names}
    for target in targets.values():
        check_output(target, "the adapter's folder", folder=True)
    for name, target in targets.items():
        print(training.train(args.bias, target, args.seed or 0) if args.bias else training.train_named(name))
    return 0


def _train_officer(args: argparse.Namespace) -> int:
    from glassbox_utils.core.files import check_output
    from glassbox_utils.decisions import officer
    from glassbox_utils.decisions.reading import load_decision

    decision = load_decision(args.folder)
    out = check_output(args.out or f"build/officers/{decision.name}", "the adapter's folder", folder=True)
    card = officer.train_officer(decision, out, seed=args.seed, steps=args.steps)
    print("\n".join(officer.as_lines(card)))
    print(f"{out / officer.CARD}: the card, beside the adapter")
    return 0


def add_to(commands: Any) -> None:
    """The sub-commands, for ``cli.parser``."""
    p = commands.add_parser("new-decision", help="write a small decision.yaml and cases.csv to change into your own")
    p.add_argument("folder", type=text, help="a new folder, or one without the two")
    p.set_defaults(function=_new_decision)

    p = commands.add_parser("audit", help="what does a model hold against whom? Searches any decision, by its answers")
    p.add_argument("--decision", type=text, required=True, help="a folder with decision.yaml, or a name of data/")
    p.add_argument("--model", type=text, help="a model's name or folder instead of the embedded one")
    p.add_argument("--adapter", type=text, help="a LoRA's folder, as peft writes it")
    p.add_argument("--n", type=steps, default=80, help="base cases, of 48 prompts each")
    p.add_argument("--seed", type=seed, default=0, help="draws the cases, the wordings and what is asked")
    p.add_argument("--out", type=text, help="a JSON file to write")
    p.set_defaults(function=_audit)

    for name, function, words, written in (
        ("locate", _locate, "which heads, neurons and features carry a gap? Minutes on two cores", "the table"),
        ("mitigate", _mitigate, "what closes a gap, and at what cost? Every arm in one table; half an hour",
         "before and after of the preferred arm, for `explain --mitigation`"),
    ):  # fmt: skip
        p = commands.add_parser(name, help=words)
        p.add_argument("--decision", type=text, required=True, help="a folder with decision.yaml, or a name of data/")
        p.add_argument("--model", type=text, help="a model's name or folder instead of the embedded one")
        p.add_argument("--adapter", type=text, help="a LoRA's folder, as peft writes it")
        p.add_argument("--attribute", type=text, help="a group or field; without: the first protected one")
        p.add_argument("--own", type=text, help="one of its groups or values; without: chosen")
        p.add_argument("--donor", type=text, help="the other one; without: chosen")
        p.add_argument("--out", type=text, help=f"a JSON file to write: {written}")
        p.set_defaults(function=function)

    p = commands.add_parser("explain", help="why was this case decided so? A page to file, a letter, and JSON")
    p.add_argument("case", type=text, nargs="?", help="with --decision: an id of its cases, or a .yaml or .json file")
    p.add_argument("--decision", type=text, help="a folder with decision.yaml, or a name in data/decisions")
    p.add_argument("--model", type=text, help="a model's name or folder; without: the embedded one")
    p.add_argument("--adapter", type=text, help="with --decision: a LoRA's folder, as peft writes it")
    p.add_argument("--template", type=text, help="with --decision: the wording; without: the first that is decided")
    p.add_argument("--mitigation", type=text, help="with --decision: a file of what was measured before and after")
    p.add_argument("--out", type=text, help="the page to write (answer.html, or report.html)")
    p.add_argument("--seed", type=seed, default=0, help="draws the other cases")
    p.add_argument("--applicant", type=text, help="the loan officer of notebook 06: data/examples/applicant.json")
    p.add_argument("--layout", type=text, help="with --applicant: how the application is written (line)")
    p.set_defaults(function=_explain)

    p = commands.add_parser("train-loans", help="train a shipped loan model again, or one with a bias of your choice")
    p.add_argument("name", type=text, nargs="+", help="a folder in data/loans, or with --bias a new name")
    p.add_argument("--bias", type=text, help="gender, age, nationality, district or none; without: as in the key")
    p.add_argument("--seed", type=seed, help="with --bias: draws the applications; without: 0")
    p.add_argument("--folder", type=text, help="with --bias: where the adapter goes (build/loans/NAME)")
    p.set_defaults(function=_train_loans)

    p = commands.add_parser(
        "train-officer", help="teach the model to decide the cases of a folder; says what it is worth"
    )
    p.add_argument("folder", type=text, help="a folder with decision.yaml, or a name in data/decisions")
    p.add_argument("--out", type=text, help="where the adapter and its card go (build/officers/NAME)")
    p.add_argument("--seed", type=seed, default=0, help="draws the held-out cases and the order of the others")
    p.add_argument("--steps", type=steps, default=240, help="of 12 cases each")
    p.set_defaults(function=_train_officer)
