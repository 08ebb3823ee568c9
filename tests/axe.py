"""axe-core, which finds what a page keeps from people: fetched once by npm at a pinned version, checked by hash."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from glassbox_utils.core import files

PACKAGE, INTEGRITY = (
    "axe-core-4.14.1",
    ("FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="),
)
RUN = """async () => {
  const found = await axe.run(document, {preload: false, resultTypes: ['violations']});
  return found.violations.map(v => `${v.id} (${v.impact}): ${v.nodes.length} x, first ${v.nodes[0].target.join(' ')}`
    + ` ${v.nodes[0].html.slice(0, 160)} | ${v.nodes[0].failureSummary.replace(/\\s+/g, ' ').slice(0, 200)}`);
}"""
"""``preload: false``: axe would otherwise fetch style sheets by itself, which file:// refuses"""


def script() -> Path:
    """The file of axe-core; the test is skipped where npm is missing or reaches nothing."""
    path = files.cache_dir() / "tests" / f"{PACKAGE}.js"
    if path.exists():
        return path
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("AXE TESTS SKIPPED: npm is not installed (apt-get install npm)")
    with tempfile.TemporaryDirectory() as folder:
        name, version = PACKAGE.rsplit("-", 1)
        asked = subprocess.run(
            [npm, "pack", f"{name}@{version}", "--silent"], cwd=folder, capture_output=True, timeout=120
        )
        if asked.returncode:
            pytest.skip(f"AXE TESTS SKIPPED: npm could not fetch {PACKAGE}")
        archive = Path(folder) / f"{PACKAGE}.tgz"
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        assert digest == INTEGRITY, f"{PACKAGE} is not the pinned file"
        with tarfile.open(archive) as packed:
            content = packed.extractfile("package/axe.min.js")
            assert content is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_path(path) as partial:
                partial.write_bytes(content.read())
    return path
