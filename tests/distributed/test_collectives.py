"""What travels between ranks, how often, and what is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import hla
from hla.distributed import SequenceParallel
from hla.distributed.exchange import Exchange
from hla.layers import HigherOrderLinearAttention
from tests.ops.cases import F64, Inputs

COLLECTIVES = [
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "gather", "irecv", "isend", "recv", "reduce",
    "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "scatter", "send",
]  # fmt: skip
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

# Numbers per sequence that one rank tells, for HQ = HP = 4 heads, HKV = 2, K = 3, V = 5 (docs/distributed.md).
NUMBERS = {
    "linear_attn": 2 * (1 + 3 * 5),
    "hla_q4": 2 * (1 + 3 * 3 + 3 * 5),
    "hla2": 2 * (1 + 3 * 3) + 4 * 2 * 3 * 5,
    "ahla": 2 * (1 + 3 * 5) + 4 * (3 * 3 + 3 * 5),
    "ahla3": 2 * (1 + 3 * 5) + 2 * 4 * (3 * 3 + 3 * 5),
    "hla3": 2 * (1 + 3 * 3 + 3 * 5) + 4 * 2 * (3 * 3 + 3 * 5),
}


@contextlib.contextmanager
def recorded():
    """(name, numbers sent, dtype) of every collective."""
    calls, patch = [], pytest.MonkeyPatch()

    def wrap(name, original):
        def function(*args, **kwargs):
            sent = args[1] if name.endswith("single") or name.endswith("into_tensor") else args[0]
            calls.append((name, sent.numel(), sent.dtype))
            return original(*args, **kwargs)

        return function

    for name in COLLECTIVES:
        if hasattr(dist, name):
            patch.setattr(dist, name, wrap(name, getattr(dist, name)))
    try:
        yield calls
    finally:
        patch.undo()


def check_operator(groups, rank, name, dtype):
    """One all-gather forward and one all-to-all backward, float32, of a size that does not depend on the length."""
    parallel = SequenceParallel(groups[4])
    for T in (8, 33):
        for packed in (False, True):
            x = Inputs(name, "g", B=1, T=T, dtype=F64)
            q, k, v = (y.to(dtype).requires_grad_() for y in (x.q, x.k, x.v))
            g = x.kw["g"].to(F64 if dtype == F64 else torch.float32)
            more = {"cu_seqlens": torch.tensor([0, 3, T, 4 * T])} if packed else {}
            with recorded() as calls, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                o, state = parallel.run(x.op, q, k, v, **{**x.kw, "g": g}, **more, output_final_state=not packed)
            wide = F64 if dtype == F64 else torch.float32
            assert calls == [(GATHER, NUMBERS[name], wide)]
            assert o.dtype == dtype and (state is None or all(y.dtype == wide for y in state if y is not None))
            with recorded() as calls:
                o.sum().backward()
            assert calls == [("all_to_all_single", 4 * NUMBERS[name], wide)]


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_one_collective_each_way(run, name, dtype):
    run(check_operator, name, dtype)


def check_layer(groups, rank):
    layer = HigherOrderLinearAttention(24, 4)
    layer.sequence_parallel = SequenceParallel(groups[4])
    x = torch.randn(2, 10, 24, requires_grad=True)
    with recorded() as calls:
        y, _ = layer(x)
        y.sum().backward()
    halo = 2 * 3 * 3 * 24  # the last 3 inputs of q, k and v
    summary = 2 * 4 * (1 + 6 * 6 + 6 * 6)
    f32 = torch.float32
    there = [(GATHER, halo, f32), (GATHER, summary, f32)]
    back = [("all_to_all_single", 4 * summary, f32), ("all_to_all_single", 4 * halo, f32)]
    assert calls == there + back


def test_a_layer_tells_its_halo_and_its_summary(run):
    run(check_layer)


def check_alone(groups, rank):
    if rank:
        return
    layer = HigherOrderLinearAttention(24, 4)
    x = torch.randn(2, 10, 24)
    expected, _ = layer(x)
    layer.sequence_parallel = SequenceParallel(groups[1])
    with recorded() as calls:
        y, _ = layer(x)
    assert not calls and torch.equal(y, expected)


def test_one_rank_tells_nothing(run):
    run(check_alone)


def check_overlap(groups, rank):
    """The gather is on its way while other work is done, and so is what goes back."""
    order = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            order.append("work")
            return x * 1

        @staticmethod
        def backward(ctx, dx):
            order.append("work back")
            return dx * 1

    patch = pytest.MonkeyPatch()
    for name in (GATHER, "all_to_all_single"):
        original = getattr(dist, name)

        def function(*args, original=original, name=name, **kwargs):
            assert kwargs["async_op"]
            order.append(f"start {name}")
            handle = original(*args, **kwargs)

            class Handle:
                def wait(self):
                    order.append(f"end {name}")
                    handle.wait()

            return Handle()

        patch.setattr(dist, name, function)
    x = torch.randn(3, requires_grad=True)
    exchange = Exchange([2 * x], groups[4])
    y = Noted.apply(x)
    told = exchange.wait()
    (sum(row[0] for row in told) * y).sum().backward()
    patch.undo()
    there = [f"start {GATHER}", "work", f"end {GATHER}"]
    assert order == there + ["start all_to_all_single", "work back", "end all_to_all_single"]


def test_the_exchange_overlaps_other_work(run):
    run(check_overlap)


def check_same_bits(groups, rank):
    x = Inputs("hla2", "g", T=12, dtype=torch.float32)
    results = []
    for _ in range(3):
        leaves = {n: y.clone().requires_grad_() for n, y in x.tensors().items()}
        q, k, v, kw = x.with_tensors(leaves)
        o, state = SequenceParallel(groups[4]).run("hla2", q, k, v, **kw, output_final_state=True)
        (o.square().sum() + state.F.sum()).backward()
        results.append([o, *state[:2], *(y.grad for y in leaves.values())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    everywhere = [torch.empty_like(results[0][2]) for _ in range(4)]
    dist.all_gather(everywhere, results[0][2].detach().contiguous(), group=groups[4])
    assert all(torch.equal(y, everywhere[0]) for y in everywhere)


def test_same_bits_every_time_and_the_same_state_everywhere(run):
    run(check_same_bits)


def check_refusals(groups, rank):
    parallel = SequenceParallel(groups[4])
    x = Inputs("hla2", "g", T=8)
    B1 = Inputs("hla2", "g", B=1, T=8)
    cases = [
        (ValueError, "hla_n has no segment summaries.* of order 4", ("hla_n", x), {"order": 4}),
        (ValueError, "op must be one of", ("hla9", x), {}),
        (ValueError, "q.*multiple|g must have shape", ("hla2", x), {"g": x.kw["g"][:, :3]}),
        (TypeError, "unexpected keyword argument 'normalise'", ("hla2", x), {"normalise": True}),
        (TypeError, "initial_state of hla2 must be a HLA2State", ("hla2", x), {"initial_state": (1, 2)}),
        (ValueError, "whole sequence, 32; got 8", ("hla2", B1), {"cu_seqlens": torch.tensor([0, 8])}),
        (ValueError, "must have shape", ("hla2", B1), {"cu_seqlens": torch.tensor(32)}),
        (ValueError, "B = 1", ("hla2", x), {"cu_seqlens": torch.tensor([0, 32])}),
        (TypeError, "cu_seqlens must be a tensor", ("hla2", B1), {"cu_seqlens": [0, 32]}),
        (ValueError, "backend must be", ("hla2", B1), {"backend": "fast"}),
    ]
    for error, text, (op, y), more in cases:
        with pytest.raises(error, match=text):
            parallel.run(op, y.q, y.k, y.v, **more)
    with pytest.raises(ValueError, match=f"rank {rank} has 8 tokens; lengths says 7"):
        SequenceParallel(groups[4], [7] * 4).run("hla2", B1.q, B1.k, B1.v, cu_seqlens=torch.tensor([0, 28]))
    with pytest.raises(ValueError, match="one number for each of the 4 ranks; got 3"):
        SequenceParallel(groups[4], [1, 2, 3])
    with pytest.raises(ValueError, match="not be negative"):
        SequenceParallel(groups[4], [1, 2, 3, -1])
    with pytest.raises(ValueError, match="group must be a ProcessGroup"):
        SequenceParallel("gloo")
    if rank > 1:
        with pytest.raises(ValueError, match="this process is"):
            SequenceParallel(groups[2])
    mesh = DeviceMesh("cpu", torch.arange(4), mesh_dim_names=("sp",))
    assert SequenceParallel(mesh).rank == SequenceParallel().rank == rank
    grid = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "sp"))
    assert SequenceParallel(grid["sp"]).size == 2 and SequenceParallel(grid["sp"]).rank == rank % 2
    with pytest.raises(ValueError, match="2 dimensions"):
        SequenceParallel(grid)


def test_refusals(run):
    run(check_refusals)


def test_a_process_group_is_needed():
    with pytest.raises(ValueError, match="init_process_group"):
        SequenceParallel()
    assert hla.HigherOrderLinearAttention(8, 2).sequence_parallel is None
