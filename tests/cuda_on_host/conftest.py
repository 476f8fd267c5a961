from tests.cuda_on_host.host import cuda_on_host  # noqa: F401
