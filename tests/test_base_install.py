"""The command with the base packages alone: `fastvq info` works, every other command says what to install."""

import json
import subprocess
import sys

import pytest

# A finder that knows none of the packages of the extra [models], as in an environment without them.
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("typer", "rich", "PIL", "safetensors", "mlxtend", "skimage"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def fastvq(*arguments):
    program = f"{BLOCK}\nsys.argv = ['fastvq', *{arguments!r}]\nimport fastvq.cli\nfastvq.cli.main()"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_info_describes_the_installation():
    done = fastvq("info")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["build"]["devices"]["cpu"]["backend"] == "cpu"


def test_version():
    done = fastvq("--version")
    assert (done.returncode, done.stdout.count(".")) == (0, 2)


@pytest.mark.parametrize("arguments", [("encode", "x"), ("info", "runs/vqvae"), ("--help",), ()])
def test_other_commands_say_what_to_install(arguments):
    done = fastvq(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith('fastvq: this command needs typer: pip install "fastvq-kernels[models]"; without it:')
    assert done.stderr.count("\n") == 1
