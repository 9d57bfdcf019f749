"""What the parts of the book may import, and how large their modules may be."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ddpo_scratch

PACKAGE = Path(ddpo_scratch.__file__).parent
PART_I = sorted(path for path in PACKAGE.glob("*.py")
                if path.name not in ("__main__.py", "all.py", "_modidx.py"))
PART_II = [path for room in ("trainer", "models", "scorers", "command")
           for path in (PACKAGE / room).glob("*.py")]


def imported(path):
    "The modules of this package that a file imports, as `trainer.config`."
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import): found.update(name.name for name in node.names)
        if isinstance(node, ast.ImportFrom):
            above = ["ddpo_scratch", *path.relative_to(PACKAGE).parts[:-1]]
            start = above[:len(above) + 1 - node.level] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            found.update({base, *(f"{base}.{name.name}" for name in node.names)})
    return {name.removeprefix("ddpo_scratch.") for name in found
            if name.startswith("ddpo_scratch.")}


def test_parts_import_only_what_comes_before():
    "Part I nothing from II and III; part II nothing from the workshop."
    for path in PART_I:
        assert not {name.split(".")[0] for name in imported(path)} & {
            "trainer", "models", "scorers", "command", "workshop"}, path
    for path in PART_II: assert not any(x.startswith("workshop") for x in imported(path)), path
    assert "trainer.trainer" in imported(PACKAGE / "command" / "run.py")  # it sees what there is


def test_modules_are_short():
    "220 lines in part I (its checks apart), 400 elsewhere; `train` has 45."
    for path in (*PART_I, *PART_II, *(PACKAGE / "workshop").glob("*.py")):
        lines = path.read_text("utf-8").count("\n")
        assert lines <= (220 if path in PART_I and path.name != "checks.py" else 400), path
    tree = ast.parse((PACKAGE / "training.py").read_text("utf-8"))
    train, = (node for node in tree.body if getattr(node, "name", "") == "train")
    assert train.end_lineno - train.lineno + 1 <= 45


@pytest.mark.parametrize("module", ("stat_tracker", "ranges", "config", "command.flags"))
def test_imported_without_pytorch(module):
    "So that `ddpo_train --help` answers at once."
    code = f"import sys, ddpo_scratch.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
