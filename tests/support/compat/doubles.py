"""Quantizers of repositories that are no packages, written afresh from what they do: the plain matrix way."""

import random

import torch
import torch.nn.functional as F
from torch import nn

from fastvq.compat.var import Refinements


def squared_distances(x, codes):  # [N, D], [K, D] -> [N, K]
    return x.square().sum(1, keepdim=True) - 2 * x @ codes.T + codes.square().sum(1)


class Quantize(nn.Module):
    """rosinality: an averaged codebook [D, K] with sizes that start at zero."""

    def __init__(self, dim, n_embed, decay=0.99, eps=1e-5):
        super().__init__()
        self.dim, self.n_embed, self.decay, self.eps = dim, n_embed, decay, eps
        codes = torch.randn(dim, n_embed)
        self.register_buffer("embed", codes)
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", codes.clone())

    def forward(self, input):
        flat = input.reshape(-1, self.dim)
        index = squared_distances(flat, self.embed.T).argmin(1)
        quantized = self.embed_code(index.view(input.shape[:-1]))
        if self.training:
            one_hot = F.one_hot(index, self.n_embed).to(flat.dtype)
            self.cluster_size.data.mul_(self.decay).add_(one_hot.sum(0), alpha=1 - self.decay)
            self.embed_avg.data.mul_(self.decay).add_(flat.detach().T @ one_hot, alpha=1 - self.decay)
            total = self.cluster_size.sum()
            size = (self.cluster_size + self.eps) / (total + self.n_embed * self.eps) * total
            self.embed.data.copy_(self.embed_avg / size)
        difference = (quantized.detach() - input).square().mean()
        return input + (quantized - input).detach(), difference, index.view(input.shape[:-1])

    def embed_code(self, embed_id):
        return F.embedding(embed_id, self.embed.T)


Quantize.__module__ = "vqvae"


class VectorQuantizer2(nn.Module):
    """taming-transformers: a learnable codebook, beta on the codebook's side unless legacy is False."""

    def __init__(self, n_e, e_dim, beta, remap=None, unknown_index="random", sane_index_shape=False, legacy=True):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.remap, self.sane_index_shape = remap, sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)

    def remap_to_used(self, indices):
        return indices % 3

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        z = z.movedim(1, -1)
        index = squared_distances(z.reshape(-1, self.e_dim), self.embedding.weight).argmin(1)
        codes = self.embedding(index).view(z.shape)
        to_codes, to_z = F.mse_loss(codes.detach(), z), F.mse_loss(codes, z.detach())
        loss = to_codes + self.beta * to_z if self.legacy else self.beta * to_codes + to_z
        if self.remap is not None:
            index = self.remap_to_used(index.view(len(z), -1)).reshape(-1, 1)
        index = index.reshape(z.shape[:-1]) if self.sane_index_shape else index
        return (z + (codes - z).detach()).movedim(-1, 1).contiguous(), loss, (None, None, index)


VectorQuantizer2.__module__ = "taming.modules.vqvae.quantize"


class ScaleQuantizer(nn.Module):
    """VAR: residuals quantized from a coarse scale to the full one, each enlarged and refined."""

    def __init__(self, vocab_size, Cvae, using_znorm, beta=0.25, v_patch_nums=(1, 2, 4), quant_resi=0.5):
        super().__init__()
        self.vocab_size, self.Cvae, self.using_znorm, self.beta = vocab_size, Cvae, using_znorm, beta
        self.v_patch_nums, self.prog_si, self.record_hit = v_patch_nums, -1, 0
        self.quant_resi = Refinements(Cvae, quant_resi, 4, shared=True)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(v_patch_nums), vocab_size))
        self.embedding = nn.Embedding(vocab_size, Cvae)

    def walk(self, f):
        size, last, rest = f.shape[2:], len(self.v_patch_nums) - 1, f.detach().clone()
        for scale, n in enumerate(self.v_patch_nums):
            small = rest if scale == last else F.interpolate(rest, size=(n, n), mode="area")
            rows, codes = small.movedim(1, -1).reshape(-1, self.Cvae), self.embedding.weight.detach()
            if self.using_znorm:
                index = (F.normalize(rows, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(1)
            else:
                index = squared_distances(rows, codes).argmin(1)
            h = self.embedding(index.view(len(f), n, n)).movedim(-1, 1)
            h = h if scale == last else F.interpolate(h, size=size, mode="bicubic")
            h = self.quant_resi[scale / last](h.contiguous())
            rest = rest - h.detach()
            yield index, h

    def forward(self, f_BChw, ret_usages=False):
        f = f_BChw.float()
        f_hat, loss = torch.zeros_like(f), 0
        for _, h in self.walk(f):
            f_hat = f_hat + h
            loss = loss + self.beta * F.mse_loss(f_hat.detach(), f) + F.mse_loss(f_hat, f.detach())
        return f_hat.detach() - f.detach() + f, None, loss / len(self.v_patch_nums)

    def f_to_idxBl_or_fhat(self, f_BChw, to_fhat, v_patch_nums=None):
        result, f_hat = [], torch.zeros_like(f_BChw)
        for index, h in self.walk(f_BChw):
            f_hat = f_hat + h
            result.append(f_hat if to_fhat else index.view(len(f_BChw), -1))
        return result


ScaleQuantizer.__name__, ScaleQuantizer.__module__ = "VectorQuantizer2", "models.quant"


class VQ(nn.Module):
    """unixpickle: a learnable dictionary; entries unused for dead_rate steps become vectors of the batch."""

    def __init__(self, num_channels, num_latents, dead_rate=100):
        super().__init__()
        self.num_channels, self.num_latents, self.dead_rate = num_channels, num_latents, dead_rate
        self.dictionary = nn.Parameter(torch.randn(num_latents, num_channels))
        self.usage_count = nn.Parameter(torch.full((num_latents,), dead_rate), requires_grad=False)

    def forward(self, inputs):
        rows = inputs.movedim(1, -1)
        flat = rows.reshape(-1, self.num_channels)
        index = squared_distances(flat, self.dictionary).argmin(1)
        embedded = F.embedding(index.view(rows.shape[:-1]), self.dictionary).movedim(-1, 1).contiguous()
        passed = embedded.detach() + (inputs - inputs.detach())
        if self.training:
            used = set(index.tolist())
            for code in range(self.num_latents):
                count = int(self.usage_count[code]) + (self.dead_rate if code in used else -1)
                self.usage_count.data[code] = max(0, min(self.dead_rate, count))
            for code in range(self.num_latents):
                if self.usage_count[code] == 0:
                    self.dictionary.data[code] = random.choice(flat.detach())
        return embedded, passed, index.view(rows.shape[:-1])


VQ.__module__ = "vq_vae_2.vq"
