"""Files: whole or not at all, with the mode that the user lets files have; what is no file is written into."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from seqlab.files import is_stream, open_text, write_atomic, write_text

ROOT = Path(__file__).resolve().parents[1]


WRITERS = {
    "trainer.pt": "from seqlab.training.trainer_state import AtomicCheckpointIO as IO; IO().save_checkpoint({'x': torch.zeros(9999)}, path)",
    "model.safetensors": "from seqlab.training.checkpoint import save_model; save_model(torch.nn.Linear(99, 99), path.parent, '')",
    "plot.png": "from seqlab import report; report.save_figure(report.new_figure()[0], path)",
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_does_not_fit_on_the_disk_is_a_user_error_and_leaves_nothing(name, tmp_path):
    """A limit on file size stands in for a full disk."""
    pytest.importorskip("resource", reason="needs a Unix system")
    script = "import pathlib, resource, signal, torch\nfrom seqlab.errors import UserError\n"
    script += f"path = pathlib.Path({str(tmp_path / name)!r})\n"
    script += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
    script += f"try:\n    {WRITERS[name]}\nexcept UserError as error:\n    print(error)\n"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "MPLCONFIGDIR": str(tmp_path.parent)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert f"{tmp_path / name}: cannot be written (" in done.stdout, done.stderr
    assert {p.name for p in tmp_path.iterdir()} <= {"config.yaml"}


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_for_those_whom_the_user_lets_read(tmp_path, umask, mode):
    """They were readable by everybody, whatever the umask."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_what_is_no_file_is_written_into_and_not_replaced(tmp_path):
    """`--json /dev/null` as root put a file in the place of the device, for everybody; a link was replaced by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    write_text(pipe, "into a pipe")
    assert reader.communicate(timeout=30)[0] == b"into a pipe" and pipe.is_fifo()
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to("there/file.json")
    for text in ("one", "two"):  # a link to nothing yet, then to a file
        write_text(link, text)
        assert link.is_symlink() and (tmp_path / "there" / "file.json").read_text() == text
    assert is_stream(Path("/dev/null")) and is_stream(Path("/dev/stdout")) and not is_stream(link) and not is_stream(Path("/dev/shm/x"))
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from seqlab.files import write_text; write_text('/dev/stdout', 'b')"
    with open(tmp_path / "out", "w") as out:
        out.write("a")
        out.flush()
        subprocess.run([sys.executable, "-c", script], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "ab"
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "there", "link.json", "out"}


def test_an_error_of_what_is_written_is_no_error_of_the_disk(tmp_path):
    def write(path):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        write_atomic(tmp_path / "file", write)
    assert not list(tmp_path.iterdir())


def test_lines_appear_as_a_file_when_all_are_there_and_at_once_in_a_pipe(tmp_path):
    with open_text(tmp_path / "a.tsv") as file:
        file.write("one\n")
        file.flush()
        assert not (tmp_path / "a.tsv").exists()
    assert (tmp_path / "a.tsv").read_text() == "one\n"
    with pytest.raises(OSError, match="of the input"), open_text(tmp_path / "a.tsv") as file:  # named as what it is
        file.write("two\n")
        raise OSError("of the input")
    assert (tmp_path / "a.tsv").read_text() == "one\n" and {path.name for path in tmp_path.iterdir()} == {"a.tsv"}
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["head", "-n", "1", tmp_path / "pipe"], stdout=subprocess.PIPE)
    with open_text(tmp_path / "pipe") as file:
        file.write("row\n")
        file.flush()
        assert reader.communicate(timeout=30)[0] == b"row\n"  # before the end
