"""Trains a VQ-VAE on two processes with DistributedDataParallel, and checks that both hold the same codebook.

Gradients are averaged by DistributedDataParallel. The codebook has no gradient: its statistics (sums and counts of
vectors for each code) are summed over the processes, in one message a step. So every process learns the same codes from
all batches, and the result does not depend on how a batch is cut over processes, up to rounding. The script prints the
loss and a checksum of the codebook, from each process.

    pip install ".[models]"
    torchrun --nproc-per-node 2 examples/ddp_training.py
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastvq.data import Digits, normalise
from fastvq.models import VQVAE

BATCH = 64  # of all processes together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few steps, for a test")
    steps = 6 if parser.parse_args().short else 300

    # gloo runs on any machine; on GPUs take "nccl", and move the model and the batches to the process's device.
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights and the same batches on every process
    # DistributedDataParallel copies the buffers of process 0 to the others before each forward. The codebooks are equal
    # on all processes already, so that message is left out.
    model = DistributedDataParallel(
        VQVAE(1, 32, n_codes=128, code_dim=16, kmeans_init=True, dead_code_threshold=2.0), broadcast_buffers=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = normalise(Digits("train").pixels)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (BATCH,))
        output = model(images[chosen[rank::world]])  # this process's share
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if rank == 0 and (step % 50 == 0 or step == steps):
            print(f"step {step}: loss {output.loss.item():.4f}", flush=True)

    codebook = model.module.quantizers[0].codebook
    gathered = [torch.empty_like(codebook) for _ in range(world)]
    dist.all_gather(gathered, codebook.contiguous())
    if rank == 0:
        same = all(torch.equal(gathered[0], other) for other in gathered)
        print(f"{world} processes; the same codebook to the bit: {same}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
