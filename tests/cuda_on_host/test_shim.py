"""The kernels are trusted as far as cuda_on_host finds what can be wrong with one: it must find seven seeded bugs."""

import pytest

from tests.cuda_on_host import host

N = 200  # no multiple of a block
RIGHT = "80 120"


@pytest.mark.parametrize("kind", host.FLAGS)
def test_the_right_kernel_passes(kind):
    done = host.run(host.program("seeded", kind), 0, N)
    assert (done.returncode, done.stdout.strip()) == (0, RIGHT), done.stderr


@pytest.mark.parametrize(
    ("variant", "kind", "message"),
    [
        pytest.param(1, "address", "heap-buffer-overflow", id="missing_tail_mask"),
        pytest.param(2, "plain", "nan", id="unwritten_shared"),
        pytest.param(3, "thread", "data race", id="missing_barrier"),
        pytest.param(4, "plain", "threads wait for others that have returned", id="barrier_after_return"),
        pytest.param(5, "thread", "data race", id="plain_counter"),
        pytest.param(6, "thread", "data race", id="missing_wait"),
        pytest.param(7, "plain", "threads wait for memory", id="missing_arrival"),
    ],
)
def test_a_seeded_bug_is_caught(variant, kind, message):
    done = host.run(host.program("seeded", kind), variant, N)
    assert message in done.stdout + done.stderr
    assert done.returncode != 0 or message == "nan"
