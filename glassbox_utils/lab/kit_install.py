"""Installs a kit, without any network and with nothing but Python. It lies in the kit as ``install.py``.

    python3 install.py

makes ``glassbox/.venv`` from the wheels beside it, prepares the model, and says how to start. A second call goes on.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path


def tag() -> list[str]:
    """What wheels are made for: version of Python, system, processor."""
    return [f"{sys.version_info[0]}.{sys.version_info[1]}", platform.system(), platform.machine()]


def refusal(made_for: list[str], mine: list[str]) -> str:
    """In one paragraph, why this Python can't install the kit; empty if it can."""
    if made_for == mine:
        return ""
    names = ("Python", "the system", "the processor")
    wrong = [f"{n} is {b}, the kit's is {a}" for n, a, b in zip(names, made_for, mine) if a != b]  # noqa: B905
    return (
        f"This kit was made for another machine: {'; '.join(wrong)}. Use {'python' + made_for[0]} on "
        f"{made_for[1]} {made_for[2]}, or make a kit on a machine like this one: `make kit`."
    )


def call(*command: object) -> None:
    """Run a command; its own words are shown only if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{' '.join(str(c) for c in command)} failed:\n{(done.stderr or done.stdout).strip()[-3000:]}")


def main() -> None:
    """Install, and say how to start."""
    here = Path(__file__).resolve().parent
    card = json.loads((here / "kit.json").read_text(encoding="utf-8"))
    if words := refusal(card["made_for"], tag()):
        sys.exit(words)
    home, venv = here / "glassbox", here / "glassbox" / ".venv"
    binaries = venv / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / ("python.exe" if os.name == "nt" else "python")
    if not python.exists():
        print("1 of 3: an environment", flush=True)
        call(sys.executable, "-m", "venv", venv)
    print("2 of 3: packages, from the wheels of the kit (minutes)", flush=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--no-index"]
    locks = [home / name for name in ("requirements.lock", "requirements-more.lock") if (home / name).exists()]
    call(*pip, "--find-links", here / "wheels", *(part for lock in locks for part in ("-r", lock)))
    call(*pip, "--no-deps", "--no-build-isolation", "--editable", home)
    where = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    # a line that Python runs when it starts: commands, kernels and make find the kit's downloads without being told
    line = f"import os; os.environ.setdefault('GLASSBOX_CACHE', {str(here / 'cache')!r})\n"
    Path(where.stdout.strip(), "glassbox_kit.pth").write_text(line, encoding="utf-8")
    if card["model"]:
        print("3 of 3: the model", flush=True)
        call(python, "-m", "glassbox_utils", "assets", "--fetch")
    (venv / ".installed").touch()  # make asks no network either
    (venv / ".more").touch()
    print(f"Done. Open the notebooks:\n  {binaries / 'jupyter'} lab --notebook-dir {home / 'notebooks'}")
    print(f"or run one into a page:\n  {binaries / 'glassbox'} run 01 --site {here / 'pages'}")
    if (here / "site" / "index.html").exists():
        print(f"or read the site: {here / 'site' / 'index.html'}")


if __name__ == "__main__":
    main()
