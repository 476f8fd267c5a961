"""Trains a VQ-VAE under Hugging Face Accelerate, with gradient accumulation.

Two things differ from a plain loop. The quantizer is made with ``update="manual"``: it adds up statistics over the
micro-batches, and ``update_codebooks`` learns from them once a step. And the call comes only where Accelerate has
gathered a whole step (``accelerator.sync_gradients``). With several processes the statistics of all of them are summed
by the same call, so every process holds the same codes. The script prints the loss and, at the end, the codes in use.

    pip install accelerate ".[models]"
    python examples/train_with_accelerate.py
    accelerate launch --num_processes 2 --cpu examples/train_with_accelerate.py
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from fastvq.data import Digits, normalise
from fastvq.models import VQVAE
from fastvq.nn import update_codebooks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few steps, for a test")
    short = parser.parse_args().short
    micro_steps = 16 if short else 2000

    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=4)
    images = normalise(Digits("train").pixels)
    loader = DataLoader(TensorDataset(images), batch_size=32, shuffle=True, drop_last=True)
    model = VQVAE(1, 32, n_codes=128, code_dim=16, kmeans_init=True, dead_code_threshold=2.0, update="manual")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    done = 0
    while done < micro_steps:
        for (image,) in loader:
            with accelerator.accumulate(model):
                output = model(image)
                accelerator.backward(output.loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                update_codebooks(model)
            done += 1
            if done % (micro_steps // 4) == 0:
                accelerator.print(f"micro-batch {done}: loss {output.loss.item():.4f}")
            if done == micro_steps:
                break

    # Each process encodes another batch; ``gather`` joins their ids.
    model.eval()
    ids = accelerator.gather(accelerator.unwrap_model(model).encode(next(iter(loader))[0]))
    accelerator.print(f"processes: {accelerator.num_processes}; codes in one batch: {ids.unique().numel()} of 128")
    accelerator.end_training()


if __name__ == "__main__":
    main()
