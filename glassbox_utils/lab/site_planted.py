"""What the audit and the probes inside said of officers that were trained to hold something, from the table of
``glassbox study planted-officers``: a part of the site's page on how often the audit is right."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from glassbox_utils.decisions import planted
from glassbox_utils.lab.site_pages import table_html


def trained(table: Mapping[str, Any]) -> str:
    """The section, also of a table that is not finished; it says which officers wait."""
    rows, made, waiting = table["officers"], table["provenance"], table["waiting"]
    lines = [
        "## Officers that were trained",
        "",
        f"{len(rows)} language models, each trained with one seed: the shipped officers, and copies of the honest one "
        "that were taught a lesson on purpose. An *evader* behaves on what the audit asks: in the decision's formats, "
        "or with the names of its lists. Whether a lesson was learnt was measured with people and formats that "
        "training did not have; an officer that learnt nothing has nothing to be found.",
        "",
        f"Made by `{made['command']}` with seed {made['seed']}, last written {made['finished']}."
        + (f" **Not finished:** {', '.join(waiting)} wait." if waiting else ""),
        "",
        table_html("Each officer", COLUMNS, [_row(row) for row in rows]),
        "",
        "### Black box: the audit",
        "",
        "Shares of officers, with Wilson's interval; *guessing* is what as many accusations, dealt at random, would "
        "find. Few officers make wide intervals.",
        "",
        table_html("The audit", ("of", "what", "share", "95 % interval", "n", "guessing"), _shares(table["scores"])),
        "",
        "### White box: two probes inside",
        "",
        "*Told*: how well the state at the decision tells the two values of an attribute apart. *Woken*: how much "
        "further the decision moves when the groups' difference is pushed in than when random vectors of its length "
        "are. *AUC*: how well a measure parts the guilty attributes from the others, over officers; .5 is chance. It "
        "has seen no verdict.",
        "",
        table_html(
            "The probes", ("measure", "of", "AUC", "names a guilty one first", "guessing"), _probes(table["scores"])
        ),
        "",
    ]
    return "\n".join(lines)


COLUMNS = ("officer", "kind", "taught against", "learnt, logits", "found", "named right", "falsely accused of",
           "found in its own formats")  # fmt: skip


def _row(row: Mapping[str, Any]) -> str:
    audit, own = row["audit"], row.get("audit of its own formats")
    meant = [one["logits"] for one in row["learnt"] if one["meant"] < 0]
    learnt = "; ".join(f"{x['value']:.2f} [{x['low']:.2f}, {x['high']:.2f}]" for x in meant)
    words = {True: "yes", False: "no", None: ""}
    cells = (
        row["officer"], row["kind"], "; ".join(row["planted"]) or "nobody",
        learnt + ("" if not meant or planted.was_learnt(row) else " (not learnt)"),
        words[audit["found"]], words[audit["right"]], "; ".join(audit["alarms"]) or "nothing",
        "" if own is None else words[own["found"]],
    )  # fmt: skip
    return _cells(cells)


def _shares(scores: Mapping[str, Any]) -> list[str]:
    return [
        _cells((r["of"], r["what"], f"{r['value']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}", str(r["n"]),
                "" if r["guessing"] is None else f"{r['guessing']:.2f}"))
        for r in scores["black box"]
    ]  # fmt: skip


def _probes(scores: Mapping[str, Any]) -> list[str]:
    return [
        _cells((r["measure"], r["of"], _interval(r["auc"]), _interval(r["names it first"]), f"{r['guessing']:.2f}"))
        for r in scores["white box"]
    ]


def _interval(x: Mapping[str, Any]) -> str:
    return f"{x['value']:.2f} [{x['low']:.2f}, {x['high']:.2f}]"


def _cells(words: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(word)}</td>" for word in words) + "</tr>"
