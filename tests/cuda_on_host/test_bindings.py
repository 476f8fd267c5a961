from tests.cuda_on_host import host
from tests.test_bindings import binding_of, stub_of


def test_the_stub_is_the_binding():
    assert binding_of(host.module()) == stub_of("_cuda")
