"""``fastvq info --verify``: the record is the oracle's, and a wrong kernel or other inputs fail it."""

import ctypes
import hashlib

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastvq import _counter, _verify
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import views
from fastvq.backends.golden import record as packaged
from fastvq.cli.commands import app
from tests.support import golden_record


def info_verify():
    return CliRunner().invoke(app, ["info", "--verify"])


@pytest.fixture
def few(monkeypatch):
    """Three of the lookups, one instruction set."""
    some = list(packaged.lookups())[9:12]
    monkeypatch.setattr(_verify, "lookups", lambda: iter(some))
    monkeypatch.setattr(cpu_backend, "available_isas", lambda: ["generic"])
    return some


def test_the_record_is_the_oracles():
    record = packaged.recorded()
    lookups = list(packaged.lookups())
    assert [lookup.name for lookup in lookups] == list(record)
    for lookup in lookups:
        if len(lookup.x) < 1000:
            assert golden_record.entry(lookup) == record[lookup.name]
        assert len(lookup.codebook) < 1 << 16  # what the encoding holds


def test_the_counter_is_the_same_everywhere():
    # From the published splitmix64: the first numbers of seed 0 begin after one step.
    assert _counter.bits(0, 4).tolist() == [0, 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    drawn = _counter.integers(1, (100_000,), -3, 4)
    assert drawn.min() == -3 and drawn.max() == 3 and abs(drawn.mean()) < 0.03
    values = _counter.normal_like(2, (100_000,))
    assert abs(values.mean()) < 0.02 and abs(values.var() - 4 / 3) < 0.03
    assert (values == values.astype(np.float32)).all()
    assert hashlib.sha256(values.tobytes()).hexdigest().startswith("3d7d88bd2bb4089e")


def test_every_backend_and_instruction_set_here_passes():
    result = info_verify()
    lines = result.stdout.splitlines()
    assert result.exit_code == 0, result.output
    assert lines[-1] == "verdict: every index is the recorded one"
    assert [line.split(":")[0] for line in lines if "as recorded" in line][: len(cpu_backend.available_isas())] == [
        f"cpu, {isa}" for isa in cpu_backend.available_isas()
    ]


def test_a_wrong_kernel_fails(few, monkeypatch):
    right = cpu_backend._cpu.nearest

    def wrong(*arguments):
        result = right(*arguments)
        if arguments[2] == views.METRICS["cosine"]:  # one index of one metric
            ctypes.c_int64.from_address(arguments[4]).value ^= 1
        return result

    monkeypatch.setattr(cpu_backend._cpu, "nearest", wrong)
    result = info_verify()
    assert result.exit_code == 1
    assert f"cpu, generic: WRONG: 1 of {len(few[0].x)} indices differ in plain" in result.stdout
    assert "verdict: 1 of 2 ways to look up are wrong on this machine" in result.stdout


def test_a_kernel_that_raises_fails(few, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(cpu_backend._cpu, "nearest", broken)
    verdicts, _ = _verify.verify()
    assert verdicts[0].fault.startswith("RuntimeError: no kernel image, in ")


def test_other_inputs_are_no_verdict_on_indices(few, monkeypatch):
    changed = few[0]._replace(x=few[0].x + 1)
    monkeypatch.setattr(_verify, "lookups", lambda: iter([changed]))
    verdicts, _ = _verify.verify()
    assert [v.what for v in verdicts] == ["inputs"] and "makes other numbers" in verdicts[0].fault
    assert info_verify().exit_code == 1


def test_the_state_of_the_process_is_put_back(few):
    threads = torch.get_num_threads()
    _verify.verify()
    assert torch.get_num_threads() == threads
