"""The command is found under both of its names, and a shell can complete its options."""

import runpy
import sys

import pytest


def test_python_dash_m_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastvq", "info", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("fastvq", run_name="__main__")
    assert stopped.value.code in (0, None) and "--verify" in capsys.readouterr().out


def test_a_shell_completes_options(monkeypatch, capsys):
    from fastvq.cli import app

    monkeypatch.setenv("_FASTVQ_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "fastvq info --ver")
    monkeypatch.setenv("COMP_CWORD", "2")
    with pytest.raises(SystemExit):
        app(prog_name="fastvq")
    assert "--verify" in capsys.readouterr().out
