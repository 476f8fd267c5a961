"""The README's examples run, and print what the README says they print."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_example(block):
    promised = re.findall(r"print\(.*\) +# (.*)", block)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), {})
    assert printed.getvalue().splitlines() == promised and promised


def test_the_two_commands_stand_alone_on_their_lines():
    for command in (
        'pip install -e ".[bench]" && python benchmarks/bench_quantize.py',
        'pip install -e ".[test]" && pytest -n auto --dist loadfile',
    ):
        assert README.splitlines().count(command) == 1
