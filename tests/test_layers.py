"""Who may import whom: the library knows nothing of tasks, of raw files or of the command line."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "seqlab": {"tasks", "data_prep", "configs", "cli", "typer"},
    "data_prep": {"tasks", "configs", "cli", "typer", "lightning"},
    "tasks": {"data_prep", "cli", "typer", "rich", "lightning"},
    "tasks/commands": {"cli", "lightning"},
}


def imported(source: str) -> set[str]:
    """Top-level names of everything that the source imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_arrows_point_one_way(folder):
    paths = (ROOT / folder).glob("*.py") if folder.startswith("tasks") else (ROOT / folder).rglob("*.py")
    found = {str(path.relative_to(ROOT)): bad for path in paths if (bad := imported(path.read_text()) & FORBIDDEN[folder])}
    assert not found


def test_tasks_use_commands_nowhere():
    for path in [*(ROOT / "tasks").glob("*.py"), *(ROOT / "seqlab").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]:
        assert "tasks.commands" not in path.read_text(), path


def test_what_the_test_sees():
    assert imported("import a.b\nfrom c.d import e\ndef f():\n    import g\nfrom . import h\n") == {"a", "c", "g"}


def test_parts_of_the_library_are_there_when_they_are_named():
    """In a process of its own: here everything has been imported already."""
    script = (
        "import sys, seqlab\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "assert seqlab.ops.selective_scan and seqlab.model.ModelConfig and seqlab.tokenizers.nucleotide.encode\n"
        "assert not {'numba', 'lightning', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not hasattr(seqlab, 'nothing') and not hasattr(seqlab, '__wrapped__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
