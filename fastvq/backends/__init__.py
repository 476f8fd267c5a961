"""Where each backend lives: loading it, why it cannot serve a call, and what its kernels are handed."""
