"""How a folder is read: what people get wrong by a hair, each refused once, with its line, what is allowed and the fix;
and what looks odd and is fine."""

import re

import pytest
from refusals import refused

from glassbox_utils.core import assets
from glassbox_utils.decisions.decision import groups
from glassbox_utils.decisions.fields import Number, band_of, bands
from glassbox_utils.decisions.reading import DECISIONS, load_decision, new_decision

GOOD, TABLE = ((DECISIONS / "template" / name).read_text(encoding="utf-8") for name in ("decision.yaml", "cases.csv"))
RANGE, STEP = "range: [1, 500]", "range: [1, 500]\n    step: "
FEMALE, MALE = "[Ada, Cleo, Edith, Greta, Ivy, Lena]", "[Abel, Cole, Edgar, Gus, Ivan, Leo]"
ANSWERS = '[" accepted", " rejected"]'


def write(folder, yaml=GOOD, table=TABLE):
    place = new_decision(folder / "refunds")
    for name, text in (("decision.yaml", yaml), ("cases.csv", table)):
        (place / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return place


def changed(text, old, new):
    assert old in text
    return text.replace(old, new, 1)


def said_of(tmp_path, old, new, words, line=None):
    """What is said of the changed decision.yaml: in the line of the change, or ``line`` lines below or above it."""
    said = refused(lambda: load_decision(write(tmp_path, changed(GOOD, old, new))))
    at = GOOD[: GOOD.index(old)].count("\n") + 1 + (line or 0)
    assert f"{tmp_path}/refunds/decision.yaml" in said and re.search(rf"line {at}\b", said), said
    assert all(word in said for word in words), said


# --- decision.yaml ------------------------------------------------------------------------------------


WRONG = {
    "a kind that is a list": ("kind: category", "kind: [category]", ["is ['category']", "number, category, text"]),
    "a kind that is a mapping": ("kind: category", "kind: {a: b}", ["is {'a': 'b'}", "number, category, text"]),
    "nearly a kind": ("kind: category", "kind: categories", ["Did you mean 'category'?", "Correct it"]),
    "a huge range": (RANGE, "range: [0, 1.0e+30]", ["range[1] is", "1,000,000,000,000"]),
    "forty digits": (RANGE, f"range: [0, {'9' * 40}]", ["range[1] is", "1,000,000,000,000"]),
    "thousands of digits": (RANGE, f"range: [0, {'9' * 5000}]", ["no number that can be read"]),
    "many digits behind the point": (RANGE, "range: [0, 0.00000000001]", ["range[1] is 1e-11", "9 digits"]),
    "huge points": ("points: 1}", "points: 1.0e+300}", ["points is", "1,000,000,000,000"]),
    "tiny points": ("points: 1}", "points: 1.0e-300}", ["points is 1e-300", "9 digits"]),
    "a huge threshold": ("threshold: 2", "threshold: 1.0e+30", ["threshold is"]),
    "curly quotes": (ANSWERS, "[\u201c accepted\u201d, \u201c rejected\u201d]", ["answers[0]", "Take the others out"]),
    "quotes in quotes": (ANSWERS, "['\" accepted\"', ' rejected']", ["answers[0]", "with quotes that belong"]),
    "apostrophes around": (ANSWERS, '[" \'accepted\'", " rejected"]', ["answers[0]", "with quotes that belong"]),
    "a space behind": (ANSWERS, '["accepted ", " rejected"]', ["'accepted '", "none behind it", "Write 'accepted'"]),
    "two spaces in front": (ANSWERS, '[" accepted", "  rejected"]', ["'  rejected'", "Write ' rejected'"]),
    "answers but for spaces": (ANSWERS, '[" take it", " Take  it"]', ["say the same"]),
    "bands between whole numbers": (
        "role: merit\n    range: [1, 500]",
        "role: protected\n    bands: [30.5]\n    range: [1, 500]",
        ["bands holds 30.5", "whole numbers", "Write 31"],
        1,
    ),
    "values but for case": ('["yes", "no"]', '["yes", "no", "Yes"]', ["values[2]", "'yes'", "by case or spaces only"]),
    "values but for spaces": ('["yes", "no"]', '["a b", "a  b"]', ["values[1]", "by case or spaces only"]),
    "names but for case": (FEMALE, "[Ada, ada]", ["'ada'", "'Ada'", "by case or spaces only", "Remove one"]),
    "names of two groups but for case": (MALE, "[Abel, ADA]", ["'ADA'", "list 0", "'Ada'", "by case"]),
    "groups but for case": ("[female, male]", "[female, Female]", ["gender[1]", "by case or spaces only"]),
    "a group twice": ("[female, male]", "[female, female]", ["gender[1]", "twice", "Remove one"]),
    "a group without a list": ("[female, male]", "[female, male, other]", ["'other' is carried by no value"]),
    "a blank group": ("[female, male]", '[female, " "]', ["gender[1] is ' '", "Correct it"]),
    "an attribute of two lines": ("  gender: [f", '  "gen\\nder": [f', ["'gen\\nder'", "one line", "Rename it"]),
    "a template without a name": ("  accepted first:", '  "":', ["a template is called ''", "Rename it"]),
    "a template's name of two lines": ("  accepted first:", '  "a\\nb":', ["'a\\nb'", "one line"]),
    "a template's name in spaces": ("  accepted first:", '  " a":', ["' a'", "without spaces"]),
    "a carrier with a legitimate reason": (
        "  - field: customer", "  - field: receipt", ["'receipt' has the role merit", "Write `role: other`"],
    ),
    "a carrier that is a number": ("  - field: customer", "  - field: amount", ["it is a number", "customer"]),
    "a carrier that is nothing": ("  - field: customer", "  - field: custumer", ["Did you mean 'customer'?"]),
    "a known value that is none": (
        "role: protected", 'role: protected\n    known: ["a|b"]', ["known[0] is 'a|b'"], 1,
    ),
    "a blank title": ("title: Refunds", 'title: "  "', ["title is '  '", "Write what is decided"]),
    "a package that is none": ("file: cases.csv", "package: dalx\n  member: a.csv", ["'dalex'", "below `file:`"]),
    "a table with a byte 0": ("file: cases.csv", 'file: "a\\0b"', ["can't be read"]),
    "a key that looks like an index": ("    unit: euros", "    \u00b2: euros", ["'\u00b2'", "Allowed: role"]),
    "no kind": ("kind: category\n    role: merit", "role: merit", ["'receipt' has no `kind:`", "Add it"], -1),
    # YAML
    "a no-break space": ("    unit: euros", "\u00a0   unit: euros", ["U+00A0", "plain spaces"]),
    "a tab": ("    unit: euros", "\tunit: euros", ["begins with a tab", "plain spaces"]),
    "no colon": ("    unit: euros", "    unit euros", ["has no colon", "`name: value`"]),
    "no space behind a colon": ("title: R", "title:R", ["has no colon with a space", "`name: value`"]),
    "two colons": ("title: R", "title: a: R", ["'title' holds a colon", "in quotes"]),
    "an open bracket": ("[female, male]", "[female, male", ["line 48 opens is not closed"], 1),
    "an open quote": ("[female, male]", "['female, male]", ["not closed", "Close it"]),
    "a dash without a space": ("  - field: customer", "  -field: customer", ["a space is missing behind `-`"]),
    "another indentation": ("    unit: euros", "   unit: euros", ["indented otherwise", "like its neighbours"]),
    "a sign": ("title: R", "title: @R", ["'@'", "in quotes"]),
    "a tag": ("title: R", "title: !thing R", ["constructor", "Remove what begins with `!`"]),
    "no number": ("title: Refunds", "title: !!int ''", ["no number that can be read"]),
    "a date": ("title: Refunds", "title: 2020-13-45", ["read as a date", "in quotes"]),
    "a number for a key": ("title: R", "3: x\ntitle: R", ["'3'", "not be read as text"]),
    "a byte 0": ("title: R", "title: \0R", ["byte 0", "UTF-8"]),
    "a control character": ("title: R", "title: \x07R", ["U+0007", "Remove it"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_by_a_hair_is_refused_with_its_line(case, tmp_path):
    said_of(tmp_path, *WRONG[case])


def test_a_wrong_value_is_no_example_of_what_is_allowed(tmp_path):
    yaml = changed(GOOD, "kind: text", 'kind: text\n    known: ["a|b"]')
    assert "such as" not in refused(lambda: load_decision(write(tmp_path, yaml))).split("Allowed")[1]


@pytest.mark.parametrize("step", ["1.0e-300", "0.0000000001"])
def test_a_step_that_is_too_small_is_refused(step, tmp_path):
    said_of(tmp_path, RANGE, STEP + step, ["step is 1e-", "9 digits"], 1)


def test_more_steps_than_can_be_counted_are_refused(tmp_path):
    said_of(tmp_path, RANGE, "range: [0, 1000000]\n    step: 0.0000001", ["at most 1,000,000,000,000 steps"], 1)


def test_large_and_fine_numbers_are_taken(tmp_path):
    yaml = changed(GOOD, RANGE, "range: [-1000000000, 999000000000]")
    assert load_decision(write(tmp_path / "a", yaml)).fields["amount"].range == (-(10**9), 999 * 10**9)
    yaml = changed(GOOD, RANGE, "range: [1, 500]\n    step: 0.000001")
    assert load_decision(write(tmp_path / "b", yaml)).fields["amount"].step == 1e-6


def test_bands_that_are_no_step_are_named_right_where_there_are_fractions():
    rule = Number("protected", (0, 2), 0.1, "", (0.55,))
    assert bands(rule) == ("0 to below 0.55", "0.55 to 2") and band_of(rule, 0.5) == "0 to below 0.55"


def test_the_same_template_under_two_names_is_refused(tmp_path):
    second = GOOD[GOOD.index("  rejected first:") : GOOD.index("# What a case holds")]
    yaml = changed(
        GOOD, second, second + second.replace("rejected first", "again").replace("split: report", "split: far")
    )
    said = refused(lambda: load_decision(write(tmp_path, yaml)))
    assert "(templates.again)" in said and "says the same as 'rejected first'" in said and "Change one" in said


@pytest.mark.parametrize("answers", ['[" don\'t", " do"]', '["yes", "no"]', '[" oui", " non merci"]'])
def test_answers_with_apostrophes_in_them_or_without_a_space_are_taken(answers, tmp_path):
    assert load_decision(write(tmp_path, changed(GOOD, ANSWERS, answers)))


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        (b"", ["line 1", "it is empty"]),
        (b"# only a remark\n", ["line 1", "all remarks"]),
        (GOOD.replace("Refunds", "Geld zur\u00fcck").encode("latin-1"), ["line 3", "Save the file as UTF-8"]),
        (GOOD.encode() + b"#" * 1_000_000, ["bytes or more. Allowed: at most 1,000,000. Give a decision.yaml"]),
        (b"? [a]\n: b\n", ["line 1", "is a list or a mapping"]),
    ],
    ids=["empty", "remarks", "latin-1", "huge", "a list as a key"],
)
def test_what_is_no_yaml_is_refused_once_with_the_fix(yaml, words, tmp_path):
    said = refused(lambda: load_decision(write(tmp_path, yaml)))
    assert all(word in said for word in words) and said.count("Give a decision.yaml") == 1, said


def test_a_place_that_is_no_folder_says_which_was_meant(tmp_path):
    assert "Did you mean 'hiring'?" in refused(lambda: load_decision("hirng"))
    place = write(tmp_path)
    said = refused(lambda: load_decision(place / "decision.yaml"))
    assert "is a file" in said and f"Give the folder: {place}" in said
    assert "is a file, no folder" in refused(lambda: load_decision(place / "cases.csv"))


def test_a_file_that_a_package_does_not_hold_is_named_with_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "members", lambda name: ["data/german.csv"])
    yaml = changed(GOOD, "file: cases.csv", "package: dalex\n  member: data/germn.csv")
    said = refused(lambda: load_decision(write(tmp_path, yaml)))
    assert "(cases.member)" in said and "Did you mean 'data/german.csv'?" in said


# --- cases.csv ----------------------------------------------------------------------------------------


NAMES = {
    "in small letters": ("ada", "case, spaces"),
    "in capitals": ("ADA", "case, spaces"),
    "a Cyrillic letter": ("\u0410da", "another alphabet"),
    "a small Cyrillic letter": ("Ad\u0430", "another alphabet"),
    "both": ("\u0430da", "another alphabet"),
    "letters as wide as Chinese ones": ("\uff21da", "form of a letter"),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_name_that_looks_like_a_listed_one_is_refused(case, tmp_path):
    name, why = NAMES[case]
    said = refused(lambda: load_decision(write(tmp_path, table=changed(TABLE, "R01,Ada", f"R01,{name}"))))
    assert all(word in said for word in ("cases.csv, line 2", repr(name), "Did you mean 'Ada'?", why, "Correct")), said


def test_a_listed_name_in_other_letters_is_taken(tmp_path):
    table = changed(TABLE, "R01,Ada", "R01,\u0410da")
    yaml = changed(GOOD, MALE, "[Abel, Cole, Edgar, Gus, Ivan, Leo, \u0410da]")
    found = load_decision(write(tmp_path, yaml, table))
    assert groups(found, found.cases[0]) == {"gender": "male"}


def test_a_few_names_that_no_list_holds_are_taken(tmp_path):
    found = load_decision(write(tmp_path, table=changed(TABLE, "R01,Ada", "R01,Ann")))
    assert groups(found, found.cases[0]) == {"gender": None}


def test_a_table_without_any_listed_name_is_refused(tmp_path):
    table = re.sub(r"^(R\d+),\w+", r"\1,Bob", TABLE, flags=re.MULTILINE)
    said = refused(lambda: load_decision(write(tmp_path, table=table)))
    assert "no case has a value of 'customer'" in said and "'Bob'" in said and "such as 'Abel'" in said


ROWS = {
    "trailing commas": (TABLE, TABLE.replace("\n", ",,\n"), 1, ["(2)", "Remove the trailing ','"]),
    "trailing commas of a row": ("180,28,no", "180,28,no,,", 2, ["Remove the trailing ','"]),
    "a column without a name": (",amount", ",,amount", 1, ["column 3 has no name"]),
    "an index": (TABLE, "".join(f",{row}\n" for row in TABLE.split()), 1, ["column 1 has no name", "index=False"]),
    "a blank id": ("R01,", " ,", 2, ["'id' is ' '", "no spaces"]),
    "an id with a space": ("R02,", "R01 ,", 3, ["'R01 '", "no spaces"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_wrong_row_is_refused_with_its_line(case, tmp_path):
    old, new, line, words = ROWS[case]
    said = refused(lambda: load_decision(write(tmp_path, table=changed(TABLE, old, new))))
    assert f"cases.csv, line {line}" in said and all(word in said for word in words), said


def test_what_ships_is_read():
    for name, n in (("hiring", 240), ("loan-officer", 400), ("template", 24)):
        assert len(load_decision(name).cases) == n
