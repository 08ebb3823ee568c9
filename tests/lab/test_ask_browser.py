"""The page one can question, as a reader uses it: loaded from a server of this machine, every control moved, no mouse.

By command, since it exports the shipped model (0.3 GB): `pytest tests/lab/test_ask_browser.py -m long`. Needs extras
`more` and `web`, Debian's chromium, and npm. `GLASSBOX_ASK_SITE=build/site` takes a site that was built with --ask.
"""

import os
import threading
from pathlib import Path

import axe
import chromium
import pytest
from chromium import DESKTOP, PHONE

pytest.importorskip("onnxruntime", reason="ASK TESTS SKIPPED: pip install -r requirements-web.lock")
pytest.importorskip("myst_nb", reason="SITE TESTS SKIPPED: pip install -r requirements-more.lock")

from glassbox_utils.cli import main
from glassbox_utils.core.models import load_model
from glassbox_utils.core.text import chat, tokenize
from glassbox_utils.decisions import loans
from glassbox_utils.lab import ask

PATIENCE = 300_000  # ms: a busy machine is no fault of the page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.long,
    pytest.mark.timeout(7200),
    chromium.NEEDED,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if given := os.environ.get("GLASSBOX_ASK_SITE"):
        return Path(given)
    out = tmp_path_factory.mktemp("asked") / "site"
    assert main(["site", "--ask", "--out", str(out), "--module", "core.text"]) == 0
    return out


@pytest.fixture(scope="module")
def address(folder):
    with ask.served(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def opened(browser, address, viewport=DESKTOP, scheme="light", load=True):
    """The page, and a list that fills with what goes wrong on it."""
    page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
    page.set_default_timeout(PATIENCE)
    wrong = []
    page.on("requestfailed", lambda request: wrong.append(f"failed request {request.url}"))
    page.on("console", lambda m: wrong.append(f"console: {m.text[:300]}") if m.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on(
        "request", lambda r: None if r.url.startswith((address, "blob:", "data:")) else wrong.append(f"asks {r.url}")
    )
    page.goto(address + "ask.html")
    if load:
        page.get_by_role("button", name="Load the model").click()
        page.wait_for_selector('#ask[data-state="ready"]')
        page.wait_for_function("document.querySelector('[data-part=verdict]').dataset.difference")
    return page, wrong


@pytest.fixture(scope="module")
def page(browser, address):
    page, wrong = opened(browser, address)
    yield page
    assert wrong == [], wrong


def difference(page):
    return float(page.locator("[data-part=verdict]").get_attribute("data-difference"))


def changed(page, act):
    """What the decision is before and after something is done."""
    before, shown = difference(page), page.locator("[data-part=verdict]").get_attribute("data-difference")
    act()
    page.wait_for_function(
        "x => document.querySelector('[data-part=verdict]').dataset.difference !== x && !document.querySelector('#ask').ariaBusy",  # noqa: E501
        arg=shown,
    )
    return before, difference(page)


def of_axe(page):
    page.evaluate(axe.script().read_text(encoding="utf-8"))
    return page.evaluate(axe.RUN)


def test_it_loads_and_says_how_long(page):
    seconds = float(page.locator("#ask").get_attribute("data-seconds"))
    print(f"loaded in {seconds} s at a load of {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    assert "was loaded in" in page.locator("[data-part=status]").inner_text()


def test_tokens_and_decisions_are_those_of_python(page):
    officer = loans.load_loan_model("deployed")
    texts = ask.texts_to_compare(1000)
    ids = page.evaluate("texts => document.querySelector('#ask').ask('encode', {texts})", texts)
    assert ids == [tokenize(officer, [text]).input_ids[0].tolist() for text in texts]
    n = int(os.environ.get("GLASSBOX_ASK_N", 24))
    ours = loans.decide_texts(officer, texts[:n], asked=False).numpy()
    one = """text => document.querySelector('#ask').ask('decide', {text, officer: 1})
      .then(r => [r.difference, r.lens.at(-1)])"""
    theirs = [page.evaluate(one, text) for text in texts[:n]]
    found = ask.agreement(ours, [x for x, _ in theirs])
    print(found)
    assert found.share >= 0.995, found
    assert max(abs(a - b) for a, b in theirs) < 1e-2  # the last layer's reading is the decision


def test_a_changed_field_changes_the_decision_and_says_so(page):
    low, high = (
        changed(page, lambda v=value: page.locator("[name=credit_score]").fill(v))[1] for value in ("510", "780")
    )
    assert high > low
    assert page.locator("[data-part=verdict]").inner_text() in ("Approved", "Rejected")
    page.locator("[name=credit_score]").fill("12")
    page.wait_for_function(
        "document.querySelector('[data-part=wrong]').textContent.includes('Allowed: a whole number from 300 to 850')"
    )
    changed(page, lambda: page.locator("[name=credit_score]").fill("640"))
    page.get_by_role("button", name="Change the name's gender").click()
    page.wait_for_function("document.querySelector('[data-part=named]').textContent.includes('Control,')")


def test_a_head_is_switched_off_and_on_by_keyboard_and_has_its_control(page):
    before = difference(page)
    page.locator("[data-at='0.0']").focus()
    for key in ("ArrowDown",) * 15 + ("ArrowRight",) * 8:
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.at") == "15.8"
    assert "of its attention goes to the name" in page.locator("[data-at='15.8']").get_attribute("aria-label")
    _, without = changed(page, lambda: page.keyboard.press("Space"))
    assert page.locator("[data-at='15.8']").get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Measure the control").click()
    page.wait_for_function(
        "document.querySelector('[data-part=measured]').textContent.includes('each other head of layer 15')"
    )
    _, again = changed(
        page, lambda: page.keyboard.press("Escape") or page.get_by_role("button", name="All heads on").click()
    )
    assert again == before != without


def test_the_mitigation_is_switched_on_beside_its_control(page):
    plain, mended = changed(page, lambda: page.get_by_label("on (affine").check())
    _, drawn = changed(page, lambda: page.get_by_label("control: random directions").check())
    assert len({plain, mended, drawn}) == 3
    assert "Without the switches below" in page.locator("[data-part=numbers]").inner_text()
    changed(page, lambda: page.get_by_label("off", exact=True).check())
    assert difference(page) == plain


def test_the_base_model_does_not_pretend_to_decide(page):
    changed(page, lambda: page.get_by_label("the base model, never").check())
    share = page.evaluate("() => document.querySelector('[data-part=numbers]').textContent")
    assert page.locator("[data-part=verdict]").inner_text() == "The model does not decide", share
    changed(page, lambda: page.get_by_label("the loan officer").check())


def answered(page, n):
    page.wait_for_function("n => document.querySelectorAll('[data-part=answers] li[data-done]').length >= n", arg=n)
    return page.locator("[data-part=answers] li").first.get_attribute("data-done")


def test_the_dial_turns_the_answer_and_greedy_answers_are_pythons(page):
    from glassbox_utils.core.text import generate
    from glassbox_utils.steering import load_vector, steer

    question, model = "How was the opening night?", load_model()
    page.get_by_role("button", name="Answer").click()
    plain = answered(page, 1)
    page.get_by_label("Tone, from complaint").focus()
    page.keyboard.press("Home")
    minus = answered(page, 2)
    page.keyboard.press("End")
    plus = answered(page, 3)
    assert len({plain, minus, plus}) == 3
    page.locator("[name=direction]").select_option("tone.random")
    answered(page, 4)
    prompt, tone = chat(model, question), load_vector("tone")
    for found, alpha in ((plain, 0.0), (minus, -0.0125), (plus, 0.0125)):
        with steer(model, tone, alpha):
            wanted = generate(model, [prompt], ask.TOKENS)[0]
        assert found.strip()[:40] == wanted.strip()[:40]


@pytest.mark.parametrize(("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "light"), (PHONE, "dark")])
def test_it_is_accessible_and_fits_before_and_after_loading(browser, address, viewport, scheme):
    page, wrong = opened(browser, address, viewport, scheme, load=False)
    faults = of_axe(page)
    if (viewport, scheme) != (PHONE, "light"):
        page.get_by_role("button", name="Load the model").click()
        page.wait_for_selector('#ask[data-state="ready"]')
        page.wait_for_function("document.querySelector('[data-part=verdict]').dataset.difference")
        faults += of_axe(page)
    if page.evaluate("() => document.documentElement.scrollWidth > window.innerWidth + 1"):
        faults.append(f"is wider than {viewport['width']} pixels")
    if place := os.environ.get("GLASSBOX_SHOTS"):
        page.screenshot(path=f"{place}/ask-{viewport['width']}-{scheme}.png", full_page=True)
    page.close()
    assert faults + wrong == []


def test_from_a_file_it_says_what_it_needs(browser, folder):
    page = browser.new_page()
    page.goto((folder / "ask.html").resolve().as_uri())
    assert "glassbox serve" in page.locator("[data-part=status]").inner_text()
    assert page.get_by_role("button", name="Load the model").is_disabled()
    page.close()
