"""A tiny untrained run, and a client that speaks to the page as a browser does."""

from __future__ import annotations

import io
import time

import numpy as np
import torch
from PIL import Image

from fastvq.data import Picture, Source
from fastvq.models import Prior
from fastvq.serve import LoadedRun, Run
from fastvq.serve.server import make_app
from tests.support.models.small import small_vqvae, small_vqvae2


class Held(Source):
    """Three random pictures with labels."""

    name, channels, size, n_classes = "held", 1, 16, 4

    def __len__(self):
        return 3

    def read(self, index):
        pixels = torch.randint(0, 256, (1, 16, 16), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        return Picture(f"held-{index}", pixels, index)


def loaded(levels=1, channels=1, prior=True, n_classes=4):
    model = (small_vqvae if levels == 1 else small_vqvae2)(channels=channels).eval()
    torch.manual_seed(7)
    priors = [
        Prior(k, 8, 2, n_classes, above=[(16, 1 << (level - i)) for i in range(level)]).eval()
        for level, k in enumerate(model.n_codes)
    ]
    return LoadedRun(model, priors if prior else None, "train a prior first", Held("all"), 16)


def runs(**options):
    return [Run("tiny", lambda: loaded(**options)), Run("broken", lambda: _raise())]


def _raise():
    raise ValueError("this run is damaged")


def noise(width=16, height=16, seed=0, mode="L"):
    """A PNG file of random pixels."""
    shape = (height, width) if mode == "L" else (height, width, 3)
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(data, "png")
    return data.getvalue()


def pixels(png):
    return np.array(Image.open(io.BytesIO(png)))


class Page:
    """Requests of one browser; ``finish`` follows a job to its end."""

    def __init__(self, client):
        self.client = client

    def finish(self, response, state="done"):
        assert response.status_code == 202, response.text
        for _ in range(600):
            job = self.client.get(f"/api/jobs/{response.json()['job']}").json()
            if job["state"] not in ("waiting", "running"):
                break
            time.sleep(0.02)
        assert job["state"] == state, job
        return job["result"] if state == "done" else job["error"]

    def open(self, data=b"", state="done", run="tiny", **query):
        return self.finish(self.client.post("/api/open", params={"run": run, **query}, content=data), state)

    def edit(self, session, state="done", **asked):
        return self.finish(self.client.post(f"/api/sessions/{session['id']}/edit", json=asked), state)

    def picture(self, session, view="picture"):
        return pixels(self.client.get(f"/api/sessions/{session['id']}/views/{view}").content)


def app(**options):
    return make_app(runs(**options), hosts=["testserver", "localhost"])
