"""The command as a whole: exit codes, Ctrl-C, ``--debug``, ``--dtype``, pipes, and terminals without all letters."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest
import torch

from glassbox_utils import cli
from glassbox_utils.core import assets, files, models, studies
from glassbox_utils.core.errors import GlassboxError

COMMANDS = cli.parser()._subparsers._group_actions[0].choices


def planted(monkeypatch, error, command="_assets", module=cli):
    """A command that fails like this when it works."""

    def fail(args):
        if error:
            raise error
        return 0

    monkeypatch.setattr(module, command, fail)


# --- what went wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (GlassboxError("The value is 3. Allowed: 4."), 2, "glassbox: The value is 3. Allowed: 4.\n"),
        (TypeError("'int' object\nis not iterable"), 1, "TypeError: 'int' object is not iterable. This was not"),
        (RecursionError(), 1, "RecursionError. This was not foreseen; run again with --debug"),
        (MemoryError("x" * 10_000), 1, "MemoryError: xxx"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "OutOfMemoryError: CUDA out of memory. This"),
        (FileNotFoundError(2, "No such file or directory", "x/y"), 2, "x/y can't be read or written (No such file"),
        (OSError(36, "File name too long", "x" * 9000), 2, "can't be read or written (File name too long)"),
        (OSError("a library's own"), 1, "OSError: a library's own."),
        (KeyboardInterrupt(), 130, "glassbox: stopped."),
        (None, 0, ""),
    ],
)
def test_what_went_wrong_is_one_line_and_debug_brings_the_traceback(monkeypatch, capsys, error, code, said):
    planted(monkeypatch, error)
    assert cli.main(["assets"]) == code
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == bool(said) and "Traceback" not in err and len(err) < 700
    assert cli.main(["assets", "--debug"]) == code
    err = capsys.readouterr().err
    assert ("Traceback" in err and "in fail" in err) == bool(error) and "run again with --debug" not in err


def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path):
    code = (
        "import sys\nfrom glassbox_utils import cli\ncli._assets = lambda args: [print('x' * 80) for _ in range(9999)]"
    )
    command = f"{sys.executable} -c \"{code}\nsys.exit(cli.main(['assets']))\" | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout == "x" * 80 + "\n" and done.stderr == ""


def test_a_terminal_without_all_letters_ends_no_command():
    code = "from glassbox_utils import cli\ncli._assets = lambda args: print('\\u03bb \\xe9')\ncli.main(['assets'])"
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain)
    assert done.returncode == 0 and done.stdout == "\\u03bb \\xe9\n"


def test_all_files_are_read_in_a_locale_without_utf8(tmp_path):
    """LANG=C: what ships, and what is written and read again."""
    code = (
        "import locale, pathlib, sys\nassert locale.getencoding() != 'utf-8'\n"
        "from glassbox_utils.core import corpora, studies\n"
        "from glassbox_utils.decisions import loans, training\nfrom glassbox_utils.steering import contrast\n"
        "from glassbox_utils.saes import config, clamping_study\n"
        "loans.vocabulary(); training.recipes(); contrast.pairs('tone', 'train'); contrast.prompts('report')\n"
        "next(corpora.landmark_passages(5)); clamping_study.prompts()\n"
        "config.read_config(config.saes_folder() / 'topk-2048-l14')\n"
        "[studies.read_table(p.stem) for p in studies.table_path('x').parent.glob('*.json')]\n"
        "value = studies.resumed('x', 'k', lambda: ['喜び'])\n"
        "assert value == ['喜び'] == studies.resumed('x', 'k', None)"
    )
    path = tmp_path / "probe.py"
    path.write_text(code, encoding="utf-8")
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    plain |= {assets.CACHE_VARIABLE: str(tmp_path), "PYTHONPATH": str(assets.ROOT)}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr[-500:]


# --- Ctrl-C -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_in_any_command_is_one_line(monkeypatch, capsys, name):
    function = COMMANDS[name].get_default("function")
    planted(monkeypatch, KeyboardInterrupt(), function.__name__, sys.modules[function.__module__])
    needed = {
        "audit": ["--decision", "x"],
        "explain": ["--applicant", "x"],
        "locate": ["--decision", "x"],
        "mitigate": ["--decision", "x"],
        "site": [],
        "workshop": [],
        "reproduce": [],
        "kit": [],
        "compat": [],
        "compare": ["x", "x"],
        "assets": [],
        "run": [],
        "execute": [],
        "corpus": [],
    }
    assert cli.main([name, *needed.get(name, ["x"])]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def interrupted(tmp_path, code, started):
    """A process that gets Ctrl-C, as its terminal sends it, once a file is there: exit code, output, seconds."""
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
    process = subprocess.Popen(
        [sys.executable, "-c", heard + code], stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path
    )
    while not started.exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.2)
    begin = time.perf_counter()
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    return process.returncode, said, time.perf_counter() - begin


def test_ctrl_c_while_writing_leaves_what_was_there(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old")
    code = (
        "import pathlib, sys, time\nfrom glassbox_utils import cli\nfrom glassbox_utils.core import files\n"
        "def write(args):\n    with files.atomic_path(pathlib.Path('page.html')) as partial:\n"
        "        partial.write_text('half')\n        pathlib.Path('started').touch()\n        time.sleep(60)\n"
        "cli._assets = write\nsys.exit(cli.main(['assets']))"
    )
    status, said, seconds = interrupted(tmp_path, code, tmp_path / "started")
    assert status == 130 and said.startswith("glassbox: stopped.") and said.count("\n") == 1 and seconds < 5
    assert page.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "started"]


def test_ctrl_c_in_a_notebook_ends_its_kernel_and_keeps_the_notebook(tmp_path):
    source = "import os, pathlib, time\npathlib.Path('started').write_text(str(os.getpid()))\ntime.sleep(60)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, tmp_path / "07_small.ipynb")
    before = (tmp_path / "07_small.ipynb").read_bytes()
    code = (
        "import pathlib, sys\nfrom glassbox_utils import cli\nfrom glassbox_utils.lab import notebooks\n"
        "notebooks.NOTEBOOKS = pathlib.Path().absolute()\nsys.exit(cli.main(['execute', '7']))"
    )
    status, said, _ = interrupted(tmp_path, code, tmp_path / "started")
    lines = [line for line in said.splitlines() if line and "cell" not in line]  # but for the bar of progress
    assert status == 130 and len(lines) == 1 and lines[0].startswith("glassbox: stopped."), said
    assert (tmp_path / "07_small.ipynb").read_bytes() == before
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "started").read_text()), 0)


# --- device and number type ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_a_number_type_and_debug(name):
    assert all(option in COMMANDS[name].format_help() for option in ("--device", "--dtype", "--debug"))


def test_the_number_type_reaches_the_model_and_is_forgotten_after_the_command(monkeypatch, tiny_llama, capsys):
    folder, seen = tiny_llama.origin.files[0].parent, []
    monkeypatch.setattr(cli, "_assets", lambda args: seen.append(models.load_model(folder).dtype) or 0)
    for name in ("bfloat16", "float16", "float32"):
        assert cli.main(["assets", "--dtype", name]) == 0
    assert seen == [torch.bfloat16, torch.float16, torch.float32] and "GLASSBOX_MODEL_DTYPE" not in os.environ
    assert models.load_model(folder).dtype == torch.float32
    monkeypatch.setenv("GLASSBOX_MODEL_DTYPE", "float9")
    assert cli.main(["assets"]) == 2 and "'float9' can't be used. Allowed: float32" in capsys.readouterr().err
    assert models.load_model(folder, dtype="float16").dtype == torch.float16, "what is asked for comes first"


def test_a_part_of_a_study_is_not_reused_in_another_number_type(tmp_path, monkeypatch):
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))
    assert studies.resumed("x", "key", lambda: 1) == 1 and studies.resumed("x", "key", lambda: 2) == 1
    monkeypatch.setenv("GLASSBOX_MODEL_DTYPE", "bfloat16")
    assert studies.resumed("x", "key", lambda: 3) == 3


def test_the_long_name_of_a_page_is_no_obstacle(tmp_path):
    name = "p" * 250 + ".html"
    assert files.check_output(tmp_path / name, "--out") == tmp_path / name
