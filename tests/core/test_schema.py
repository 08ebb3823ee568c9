"""What people write is taken as it is, or refused in one paragraph: nothing is converted, lost or executed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from refusals import refused

from glassbox_utils.core import schema
from glassbox_utils.core.errors import GlassboxError


class ToyError(GlassboxError, ValueError):
    pass


@dataclass(frozen=True)
class Toy:
    size: Annotated[int, Field(ge=1)]
    rate: float = 0.5
    names: tuple[str, ...] = ()
    place: Path = Path("x")
    code: Annotated[str, Field(pattern=r"^[a-z]+$", description="small letters")] = "a"
    rest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        schema.check(self, ToyError)


def test_lists_and_paths_become_what_is_declared():
    toy = schema.build(Toy, {"size": 3, "names": ["a", "b"], "place": "here", "rate": 1}, "it", ToyError)
    assert toy.names == ("a", "b") and toy.place == Path("here") and toy.rate == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "3"}, r"size is '3'\. Allowed: a whole number\. Write it without quotes"),
        ({"size": True}, r"size is True\. Allowed: a whole number"),
        ({"size": 3.0}, r"size is 3.0"),
        ({"size": 0}, r"size is 0\. Allowed: greater than or equal to 1"),
        ({"size": 3, "rate": float("nan")}, r"rate is nan\. Allowed: a finite number"),
        ({"size": 3, "rate": "1e-3"}, r"rate is '1e-3'\. .*with a dot before an exponent"),
        ({"size": 3, "names": "abc"}, r"names is 'abc'\. Allowed: a list"),
        ({"size": 3, "names": ["a", 1]}, r"names\[1\] is 1"),
        ({"size": 3, "code": "A"}, r"code is 'A'\. Allowed: small letters"),
        ({"size": 3, "rest": []}, r"rest is \[\]\. Allowed: fields with values"),
        ({"size": 3, "sise": 3}, r"it has unknown fields: 'sise'\. Did you mean 'size'\?"),
        ({}, r"it is incomplete: size is missing"),
        (None, r"it holds None"),
    ],
)
def test_what_does_not_fit_is_named(values, message):
    with pytest.raises(ToyError, match=message):
        schema.build(Toy, values, "it", ToyError)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b"size: 1\nsize: 2\n", r"not valid YAML: the field 'size' is given twice"),
        ("a.yaml", b"rest:\n  a: 1\n  a: 1\n", r"the field 'a' is given twice"),
        ("a.json", b'{"size": 1, "size": 2}', r"not valid JSON: the field 'size' is given twice"),
        ("a.json", b'{"size": 1', r"not valid JSON: .* in line 1"),
        ("a.json", b"[" * 100_000, r"nested too deeply"),
        ("a.yaml", b"? [1]\n: 2\n", r"not valid YAML: unhashable type"),
        ("a.yaml", b"1: 2\n", r"instead of fields with values"),
        ("a.yaml", b"", r"holds None instead of fields"),
        ("a.yaml", b"\xff\xfe", r"not text in UTF-8 \(byte 0\)"),
        ("a.yaml", b"size: !!python/object/apply:os.abort []", r"could not determine a constructor"),
        ("a.yaml", b"x" * 1_000_001, r"has 1,000,001 bytes"),
    ],
)
def test_files_that_hold_no_fields(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ToyError, match=message) as caught:
        schema.read_mapping(tmp_path / name, ToyError, "a file of toys")
    assert "\n" not in str(caught.value) and str(caught.value).endswith("Give a file of toys.")


def test_a_merge_is_no_field_given_twice(tmp_path):
    (tmp_path / "a.yaml").write_text("\ufeffbase: &b {size: 1}\nrest: {<<: *b, size: 2}\n", encoding="utf-8")
    assert schema.read_mapping(tmp_path / "a.yaml", ToyError, "x") == {"base": {"size": 1}, "rest": {"size": 2}}


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["size", "rate", "names", "place", "code", "rest", "other"]), plain))
def test_whatever_is_given_is_taken_unchanged_or_refused_in_one_paragraph(values):
    try:
        toy = schema.build(Toy, values, "it", ToyError)
    except ToyError as refused:
        said = str(refused)
        assert "\n" not in said and len(said) < 900
        return
    for name, value in values.items():
        kept = getattr(toy, name)
        assert kept == (tuple(value) if name == "names" else Path(value) if name == "place" else value)
        assert json.dumps(kept, default=str) and type(kept) is not bool


def test_lines_are_named_for_every_key_and_entry(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# a remark\na: &x\n  - 1\n  - b: 2\n    c: 3\nd: *x\n")
    found = schema.read_marked(path, ToyError, "a file")
    assert found.values == {"a": [1, {"b": 2, "c": 3}], "d": [1, {"b": 2, "c": 3}]}
    assert found.place("a", 1, "c") == f"{path}, line 5 (a[1].c)" and found.place() == f"{path}, line 2"
    assert "line 6" in found.place("d", 1, "c") and "line 4" in found.place("a", 1, "nothing")
    assert found.under("a")("[1].b") == found.place("a", 1, "b") and found.under("a")("") == found.place("a")


def test_a_file_without_an_end_is_read_to_the_limit_only():
    for read in (schema.read_mapping, schema.read_marked):
        assert "bytes or more" in refused(lambda read=read: read(Path("/dev/zero"), ToyError, "a file"))
