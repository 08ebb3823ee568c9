"""The browser of the tests: Debian's chromium (apt-get install chromium), or the one that CHROMIUM names."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

EXECUTABLE = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
DESKTOP, PHONE = {"width": 1300, "height": 900}, {"width": 390, "height": 844}
NEEDED = pytest.mark.skipif(
    EXECUTABLE is None, reason="BROWSER TESTS SKIPPED: apt-get install chromium (or set CHROMIUM=)"
)


@contextmanager
def launched() -> Iterator:
    """A running browser of playwright, closed at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=FLAGS)
        yield browser
        browser.close()
