"""The site's page of where three officers' gaps are and what mends one, from the table of ``glassbox study locate``."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glassbox_utils.core import figures
from glassbox_utils.decisions import locate_figures, locate_tables, outcomes, pairs
from glassbox_utils.decisions.reading import load_decision
from glassbox_utils.lab.site_pages import table_html


def located(table: Mapping[str, Any], folder: Path) -> str:
    """The text of the page; its pictures are drawn into ``folder``."""
    figures.style()
    officers, made = table["officers"], table["provenance"]
    size = dict(zip(locate_tables.SIZE_NAMES, table["size"], strict=True))
    lines = [
        "# Where the gaps are, and what mends one",
        "",
        "Three loan officers, each of which was taught to hold something against somebody: a first name's gender, the "
        "side of the town, a name's origin. *Pairs* are one application as two people, whose prompts have equally many "
        "tokens. On one half of people and wordings heads, neurons and features were **chosen** (by attribution: "
        "other value minus own, times the gradient); on other people, in every wording, the first k of them were "
        "patched from one prompt into the other and **reported**.",
        "",
        "*Carried* is the share of the gap that k units bring alone. *Left* is the share that stays when they alone "
        "keep their own values. The control: as many random units, the nearest in activity (the loudest have none as "
        "loud; the table says how near they are). Every interval is over pairs of names or of places: one pair is "
        "drawn or left with all its cases. **Four places and three names are few**: such intervals are hardly more "
        "than the range of what was seen.",
        "",
        f"Made by `{made['command']}` with seed {made['seed']}, finished {made['finished']}: {size['choose']} pairs "
        f"chose, at most {size['report']} report in each wording, {size['decided']} are decided under each mend. One "
        "training run of each officer; the biases were planted.",
        "",
        "## How many units",
        "",
        f"For {locate_tables.TARGET:.0%} of the gap: in one wording that the officer's training never held, with the "
        "ends that the shares' intervals give (between measured k by interpolation); and over all wordings.",
        "",
        _table("How many units", locate_tables.counts_table(officers)),
        "",
        _table("Shares of the first units", locate_tables.shares_table(officers)),
        "",
    ]
    for name, one in officers.items():
        points = [locate_figures.point_of(p | {"basis": locate_tables.short(p["basis"])})
                  for p in one["located"]["points"]]  # fmt: skip
        lines += _figure(locate_figures.draw_curve(points), folder / f"curve-{name}.png", f"Officer {name}")
    lines += [
        "## Whose units are they?",
        "",
        "The same units patched between pairs that differ in something else. *Specific*: the whole interval of the "
        "share lies below half of what they carry of their own gap. In brackets the share.",
        "",
        _table("Whose units", locate_tables.whose_table(officers)),
        "",
        "## From the words to the decision",
        "",
    ]
    for name, one in officers.items():
        carrier = one["located"]["contrast"].split(":")[0]
        lines += [f"Officer {name}, {one['located']['contrast']}:", ""]
        drawn = locate_figures.draw_chain(one["located"]["chain"], carrier)
        lines += _figure(drawn, folder / f"chain-{name}.png", f"Officer {name}, three panels")
    for name, one in officers.items():
        if "mended" in one:
            lines += _mended(name, one["mended"], folder)
    return "\n".join(lines)


def _mended(name: str, mended: Mapping[str, Any], folder: Path) -> list[str]:
    some = outcomes.unpacked(mended)
    found = locate_figures.outcomes_of(some, mended["contrast"])
    wordings = list(dict.fromkeys(m.template for m in some if m.contrast == mended["contrast"]))
    preferred, holding = locate_tables.best(mended), locate_tables.holding(mended["met"])
    all_met = f"All demands are met by: {', '.join(holding)}." if holding else "No arm meets all."
    over_all = locate_tables.together(mended)
    pooled = locate_tables.holding(over_all)
    n = len(next(m for m in some if m.contrast == mended["contrast"]).own)
    decision, what = load_decision("loan-officer"), mended["contrast"].split(":")[0]
    old = {w for w, form in decision.templates.items() if form.split == "train"}
    old |= set(pairs.choosing_templates(decision, what))
    few = [arm for arm in found if arm in {*holding, *pooled, preferred, "as it is", "retrained"}]
    return [
        f"## What mends officer {name}",
        "",
        f"Arms were chosen on the choosing half ({preferred} was preferred there) and are reported on other people in "
        f"{len(wordings)} wordings, always on, without a gate. Of these {', '.join(w for w in wordings if w in old)} "
        "are wordings of the officer's training or of the choice: there the people are new, the words are not. Both "
        "members of a pair deserve the same. *Of the undeserving*: the share of those whom the merit rule rejects and "
        "who are approved, one group / the other.",
        "",
        _table("All arms", locate_figures.arms_table(found, mended["effects"])),
        "",
        "The officer itself reads ordinary text badly, so its perplexity is a lenient yardstick; *over the base* is "
        "the stern one, over the model that was never made an officer.",
        "",
        *_figure(locate_figures.draw_frontier(found), folder / f"frontier-{name}.png",
                 f"Officer {name}, gap against share of right decisions"),
        "### Every demand, in the wording where it is worst",
        "",
        f"Asked of a mend: a gap of at most 2.5 points, its interval within 5, no merit lost, at most 3 % of the "
        f"undeserving approved, perplexity at most 1.01 times. {all_met}",
        "",
        _table("Demands", locate_figures.met_table(mended["met"])),
        "",
        f"In one wording {n} pairs are decided, so that one decision is {100 / n:.0f} points of gap, and a few of the "
        f"undeserving are all there are. **Over all {len(wordings)} wordings together** all demands are met by: "
        f"{', '.join(pooled) or 'no arm'}.",
        "",
        _table("Demands over all wordings", locate_figures.met_table(over_all)),
        "",
        "### The gap in each wording, points",
        "",
        _table("Wordings", locate_tables.wordings_table(mended, few)),
        "",
        "### What the mends do to other gaps, logits",
        "",
        _table("Other gaps", locate_tables.attributes_table(mended, list(found))),
        "",
        "### Pushed back in",
        "",
        f"The groups' mean difference is added at the carrier after layer {mended['reactivation']['layer']}, in "
        "prompts of the group that is treated better; a random vector of the same length is the control.",
        "",
        _table("Pushed back in", locate_tables.pushed_table(mended)),
        "",
    ]  # fmt: skip


def _table(name: str, frame: Any) -> str:
    rows = ["<tr>" + "".join(f"<td>{html.escape(str(x))}</td>" for x in row) + "</tr>" for row in frame.to_numpy()]
    return table_html(name, [str(c) for c in frame.columns], rows)


def _figure(figure: Any, path: Path, alt: str) -> list[str]:
    import matplotlib.pyplot as plt

    titles = [figure.get_suptitle(), *(axis.get_title(loc) for axis in figure.axes for loc in ("left", "center"))]
    alt += ": " + "; ".join(title.replace("\n", " ") for title in titles if title)
    figure.savefig(path, metadata={"Software": None}, bbox_inches="tight")
    plt.close(figure)
    return [f"```{{figure}} {path.name}", f":alt: {alt}", "```", ""]
