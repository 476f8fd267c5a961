"""Two and four real processes on gloo: statistics, k-means, dead codes, sharded codebooks, DDP and FSDP."""

import copy
import multiprocessing
import os
import sys
import traceback

import pytest
import torch
import torch.distributed as dist

from fastvq import distributed
from fastvq.nn import GroupedVQ, ResidualVQ, VectorQuantizer, update_codebooks
from fastvq.ops import nearest
from tests.support.cases import HARD, METRICS, generator

pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="torch has no gloo here")
TIMEOUT = 120
D = 12


def _main(rank, world, address, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    results = {}
    try:
        for name, job in JOBS.items():
            torch.manual_seed(100 + rank)  # ranks do not share a random state
            results[name] = job(rank, world)
        queue.put((rank, None, results))
        dist.barrier()
    except BaseException:
        queue.put((rank, traceback.format_exc(), results))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """{job: [result of rank 0, 1, ...]}: the processes are started once and do every job in turn."""
    world = request.param
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    address = f"file://{tmp_path_factory.mktemp('ranks')}/meet"
    processes = [context.Process(target=_main, args=(r, world, address, queue)) for r in range(world)]
    for p in processes:
        p.start()
    try:
        found = {}
        for _ in range(world):
            rank, error, results = queue.get(timeout=TIMEOUT)
            assert error is None, f"rank {rank}:\n{error}"
            found[rank] = results
    finally:
        for p in processes:
            p.join(timeout=10)
            if p.is_alive():
                p.terminate()
    return {name: [found[r][name] for r in range(world)] for name in JOBS}


JOBS = {}


def job(function):
    JOBS[function.__name__] = function
    return function


def share(x, rank, world):
    """Uneven: rank r takes the rows up to (r+1)^2 / world^2; the first gets few."""
    n = len(x)
    return x[n * rank**2 // world**2 : n * (rank + 1) ** 2 // world**2]


def numbers(module):
    return {name: b.numpy().copy() for name, b in module.state_dict().items()}


def agree(results):
    return all((results[0][name] == other[name]).all() for other in results[1:] for name in results[0])


def seeded(make):
    torch.manual_seed(7)
    module = make()
    torch.manual_seed(100 + (distributed.rank()))
    return module


STEPS = 5
MODULES = {
    "plain": lambda **o: VectorQuantizer(D, 31, **o),
    "cosine": lambda **o: VectorQuantizer(D, 31, metric="cosine", **o),
    "grouped": lambda **o: GroupedVQ(D, 31, 3, **o),
    "residual": lambda **o: ResidualVQ(D, 31, 3, **o),
    "shared": lambda **o: ResidualVQ(D, 31, 3, shared_codebook=True, **o),
}


def batches():
    return [torch.randn(301, D, generator=generator(step)) for step in range(STEPS)]


@job
def statistics(rank, world):
    """Uneven shares; in the third step the last rank alone has vectors."""
    found = {}
    for name, make in MODULES.items():
        for update in ("forward", "manual"):
            module = seeded(lambda make=make, update=update: make(update=update))
            for step, x in enumerate(batches()):
                mine = share(x, rank, world)
                if step == 2:
                    mine = x if rank == world - 1 else x[:0]
                module(mine)
                update_codebooks(module)
            found[name, update] = numbers(module)
    return found


def test_ranks_equal_one_process_with_the_whole_batch(ranks):
    for name, make in MODULES.items():
        torch.manual_seed(7)
        whole = make()
        for x in batches():
            whole(x)
        for update in ("forward", "manual"):
            results = [r[name, update] for r in ranks["statistics"]]
            assert agree(results), f"{name}: ranks drifted apart"
            for key, value in whole.state_dict().items():
                # Sums of up to four float32 parts instead of one, over five steps.
                torch.testing.assert_close(torch.from_numpy(results[0][key]), value, rtol=3e-6, atol=3e-6)
            ours, x = copy.deepcopy(whole), batches()[0]
            ours.codebook.copy_(torch.from_numpy(results[0]["codebook"]))
            assert torch.equal(ours.encode(x), whole.encode(x))


@job
def learning(rank, world):
    """k-means start and dead codes, with unlike shares and unlike random states."""
    found = {}
    for name, make in {
        "vq": lambda: VectorQuantizer(D, 31, kmeans_init=True, dead_code_threshold=9.0),
        "separate": lambda: GroupedVQ(D, 31, 2, kmeans_init=True, dead_code_threshold=9.0),
        "residual": lambda: ResidualVQ(D, 31, 2, kmeans_init=True, dead_code_threshold=9.0, update="manual"),
        "empty rank": lambda: VectorQuantizer(D, 31, kmeans_init=True, dead_code_threshold=9.0),
    }.items():
        module = make()  # not even the start is alike: k-means is what makes it so
        for x in batches():
            mine = share(x, rank, world)
            module(mine[:0] if name == "empty rank" and rank == 0 else mine)
            update_codebooks(module)
        found[name] = numbers(module)
    return found


def test_kmeans_and_dead_codes_agree(ranks):
    rows = torch.cat(batches())
    for name in ranks["learning"][0]:
        results = [r[name] for r in ranks["learning"]]
        assert agree(results), name
        assert all(torch.from_numpy(v).double().isfinite().all() for v in results[0].values())
        assert results[0]["initialised"].all()
    codebook = torch.from_numpy(ranks["learning"][0]["vq"]["codebook"])
    assert (codebook[:, None] == rows).all(-1).any(), "no dead code was replaced, so nothing was tested"


@job
def silence(rank, world):
    """Eval and state_dict by one rank alone must not wait for the others."""
    module = seeded(lambda: VectorQuantizer(D, 31, kmeans_init=True))
    x = torch.randn(50, D)
    module(x)
    if rank == 0:
        module.state_dict()
        module.eval()(x)
        module.encode(x)
        module.usage()
    return True


def test_no_communication_in_eval(ranks):
    assert all(ranks["silence"])


@job
def messages(rank, world):
    """All-reduces of a forward, and of update_codebooks for a whole model."""
    found, original = {}, dist.all_reduce
    model = torch.nn.ModuleList([seeded(lambda m=m: m(update="manual")) for m in MODULES.values()])
    single = [seeded(lambda m=m: m(dead_code_threshold=1.0)) for m in MODULES.values()]
    calls = []
    dist.all_reduce = lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    try:
        x = torch.randn(40, D)
        for name, module in zip(MODULES, single, strict=True):
            calls.clear()
            module(x)
            found[name] = len(calls)
        calls.clear()
        for module in model:
            module(x)
        found["recording"] = len(calls)
        update_codebooks(model)
        found["model"] = len(calls)
    finally:
        dist.all_reduce = original
    return found


def test_one_message_a_forward_or_a_model(ranks):
    for found in ranks["messages"]:
        assert found == {**dict.fromkeys(MODULES, 1), "recording": 0, "model": 1}


@job
def packing(rank, world):
    big = torch.tensor([2**35 + rank, 4095, 0, 2**24 + 1])
    a, b, c = distributed.all_reduce_packed([torch.full((3, 2), rank + 0.5), big, torch.ones(1, dtype=torch.float64)])
    rows = distributed.gather_rows(torch.full((rank, 2), float(rank)))
    return a.tolist(), b.tolist(), c.tolist(), rows.tolist()


def test_packing(ranks):
    world = len(ranks["packing"])
    total = sum(range(world))
    for a, b, c, rows in ranks["packing"]:
        assert a == [[total + world / 2] * 2] * 3 and c == [world]
        assert b == [2**35 * world + total, 4095 * world, 0, (2**24 + 1) * world]
        assert rows == [[float(r)] * 2 for r in range(world) for _ in range(r)]


SHARDED = ("midpoints_of_two_codes", "dyadic_grid", "all_codes_equal", "some_codes_not_finite", "every_code_not_finite",
           "some_rows_not_finite", "zero_codes", "only_zero_codes", "float64_tie", "permutations_of_one_vector",
           "overflow_in_float32", "norms_from_tiny_to_huge")  # fmt: skip


@job
def sharded(rank, world):
    found = {}
    for case in SHARDED:
        x, codebook = HARD[case](generator(0))
        if len(codebook) < 4:
            codebook = codebook.repeat(2, 1)
        # Shards of different sizes.
        cuts = [len(codebook) * (r * (r + 1)) // (world * (world + 1)) for r in range(world + 1)]
        if len(set(cuts)) <= world:
            cuts = [len(codebook) * r // world for r in range(world + 1)]
        mine = codebook[cuts[rank] : cuts[rank + 1]]
        for metric in METRICS:
            found[case, metric] = distributed.nearest_sharded(x[:, None], mine, metric=metric).numpy().copy()
    return found


def test_sharded_lookup_equals_the_whole(ranks):
    for (case, metric), indices in ranks["sharded"][0].items():
        x, codebook = HARD[case](generator(0))
        if len(codebook) < 4:
            codebook = codebook.repeat(2, 1)
        expected = nearest(x[:, None], codebook, metric=metric).numpy()
        for other in ranks["sharded"]:
            assert (other[case, metric] == expected).all(), (case, metric)
        assert indices.shape == (len(x), 1)


@job
def groups(rank, world):
    """Half of the ranks hold quantizers, the others do not; no rank waits for the others."""
    n = max(1, world // 2)
    group = dist.new_group(list(range(n)))
    if rank >= n:
        with pytest.raises(ValueError, match="group must be one that this rank belongs to"):
            VectorQuantizer(D, 31, group=group)
        return None
    found = {}
    for name, make in MODULES.items():
        for update in ("forward", "manual"):
            module = seeded(lambda make=make, update=update: make(update=update, group=group))
            copied = copy.deepcopy(module)
            for x in batches():
                copied(share(x, rank, n))
                update_codebooks(copied)
            found[name, update] = numbers(copied)
    for make in (VectorQuantizer, lambda *a, **o: ResidualVQ(a[0], a[1], 2, **o)):
        module = make(D, 31, kmeans_init=True, dead_code_threshold=9.0, group=group)
        for x in batches():
            module(share(x, rank, n))
        found["start", str(make)[:10]] = numbers(module)
    # Quantizers of several groups: a message each.
    alone = seeded(lambda: VectorQuantizer(D, 31, sync="none", update="manual"))
    together = seeded(lambda: VectorQuantizer(D, 31, group=group, update="manual"))
    for module in (alone, together):
        module(share(batches()[0], rank, n))
    update_codebooks(torch.nn.ModuleList([alone, together]))
    found["counts"] = {"alone": alone.counts.sum().numpy(), "together": together.counts.sum().numpy()}
    return found


def test_a_group_of_ranks_equals_one_process(ranks):
    world = len(ranks["groups"])
    members = [found for found in ranks["groups"] if found is not None]
    assert len(members) == max(1, world // 2)
    for name, make in MODULES.items():
        torch.manual_seed(7)
        whole = make()
        for x in batches():
            whole(x)
        for update in ("forward", "manual"):
            results = [found[name, update] for found in members]
            assert agree(results)
            for key, value in whole.state_dict().items():
                torch.testing.assert_close(torch.from_numpy(results[0][key]), value, rtol=3e-6, atol=3e-6)
    for key in [key for key in members[0] if key[0] == "start"]:
        assert agree([found[key] for found in members])
    assert all(found["counts"]["together"] == 301 for found in members)
    assert sum(int(found["counts"]["alone"]) for found in members) == 301


@job
def same_codebooks(rank, world):
    """FASTVQ_CHECK=2 finds a rank whose codebook differs, on every rank."""
    found = []
    os.environ["FASTVQ_CHECK"] = "2"
    try:
        for update in ("forward", "manual"):
            module = seeded(lambda update=update: VectorQuantizer(D, 31, update=update))
            module(torch.randn(40, D))
            update_codebooks(module)  # equal codebooks pass
            if rank == world - 1:
                module.codebook[[3, 4]] = module.codebook[[4, 3]]
            with pytest.raises(RuntimeError) as error:
                module(torch.randn(40, D))
                update_codebooks(module)
            found.append(str(error.value))
    finally:
        del os.environ["FASTVQ_CHECK"]
    module(torch.randn(40, D))
    update_codebooks(module)  # off by default
    return found


def test_codebooks_that_differ_are_named(ranks):
    last = len(ranks["same_codebooks"]) - 1
    for found in ranks["same_codebooks"]:
        for message in found:
            assert f"VectorQuantizer: codebook must be the same on every rank, but rank {last} of the group" in message


@job
def totals(rank, world):
    module = seeded(lambda: VectorQuantizer(D, 31))
    module.track_usage()
    for training in (True, False):
        module.train(training)(share(batches()[0], rank, world))
    return module.usage(total=True).counts.numpy(), module.usage(total=True, all_ranks=True).counts.numpy()


def test_usage_of_all_ranks(ranks):
    mine, every = zip(*ranks["totals"], strict=True)
    assert all((sum(mine) == e).all() for e in every) and every[0].sum() == 2 * 301
    assert sum(m.sum() > 0 for m in mine) > 1


@job
def waiting(rank, world):
    """k-means waits while no rank has a usable vector, and starts with those of one rank."""
    module, found = VectorQuantizer(D, 31, kmeans_init=True), []
    x = batches()[0]
    for batch in (x[:0], torch.full_like(x, torch.nan), x if rank == world - 1 else x[:0]):
        module(batch)
        found.append(bool(module.initialised))
    return found, numbers(module)


def test_kmeans_waits_on_all_ranks(ranks):
    assert all(found == [False, False, True] for found, _ in ranks["waiting"])
    assert agree([state for _, state in ranks["waiting"]])


class Model(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.encoder = torch.nn.Linear(D, D)
        self.vq = VectorQuantizer(D, 31, dead_code_threshold=1.0, **options)
        self.decoder = torch.nn.Linear(D, D)

    def forward(self, x):
        q = self.vq(self.encoder(x))
        return self.decoder(q.quantized), q.commitment_loss


def fit(wrapped, model, rank, world):
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for x in batches():
        mine = x[rank::world][: 301 // world]
        out, commitment = wrapped(mine)
        loss = (out - mine).square().mean() + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_codebooks(model)
    return {name: b.numpy().copy() for name, b in model.vq.named_buffers() if b.dtype != torch.bool}


@job
def ddp(rank, world):
    found = {}
    for update in ("forward", "manual"):
        model = seeded(lambda update=update: Model(update=update))
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        found[update] = fit(wrapped, model, rank, world)
    return found


@job
def micro_batches(rank, world):
    """DistributedDataParallel sends all buffers of rank 0 at every forward; statistics that wait are not among them."""
    model = seeded(lambda: Model(update="manual"))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for part in batches()[0][rank::world][: 301 // world].split(20):
        wrapped(part)
    update_codebooks(model)
    return model.vq.counts.numpy().copy(), numbers(model)


def test_micro_batches_under_ddp(ranks):
    world = len(ranks["micro_batches"])
    assert agree([state for _, state in ranks["micro_batches"]])
    torch.manual_seed(7)
    whole = Model(update="manual")
    for rank in range(world):
        whole(batches()[0][rank::world][: 301 // world])
    update_codebooks(whole)
    assert all((counts == whole.vq.counts.numpy()).all() for counts, _ in ranks["micro_batches"])


@job
def fsdp(rank, world):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    found = {}
    for precision in ("float32", "bfloat16"):
        model = seeded(Model)
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, precision))
        for part in (model.encoder, model.decoder, model):
            fully_shard(part, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (world,)), mp_policy=policy)
        found[precision] = fit(model, model, rank, world)
    return found


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_wrapped_modules(ranks, wrapper):
    for name in ranks[wrapper][0]:
        results = [{k: v for k, v in r[name].items() if not k.startswith("pending")} for r in ranks[wrapper]]
        assert agree(results), name
        for value in results[0].values():
            assert value.dtype in ("float32", "int64")
        assert not (results[0]["cluster_size"] == 1).all(), "nothing was learned"
