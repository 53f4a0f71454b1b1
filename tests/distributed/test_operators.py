"""Operators on pieces of a sequence are the operators on the whole: outputs, states and all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hla
from hla.distributed import SequenceParallel
from hla.ops import linear_attn, segments
from hla.ops.state import zeros
from tests.ops.cases import CASES, F64, Inputs, assert_close, gradients, relative_error

NAMES = ("linear_attn", "hla2", "ahla", "ahla1", "ahla3", "hla3", "hla_n1", "hla_q1", "hla_q4")
OPTIONS = ("g", "p=HKV", "g,p=k,per token", "g,normalize,ridge", "value_ridge,value_gain", "g,nodes,ridge per token")
PARALLEL_CASES = [
    (name, option)
    for name, option in CASES
    if name in NAMES and (option in OPTIONS or (name, option) == ("linear_attn", "normalize"))
]
LENGTHS = {2: [14, 11], 4: [6, 7, 1, 11]}
BORDERS = {
    "inside pieces": [0, 4, 9, 20, 25],
    "on borders": [0, 6, 13, 14, 25],
    "one sequence": [0, 25],
    "empty ones": [0, 0, 6, 6, 13, 14, 14, 20, 25, 25],
    "many on one rank": [0, 1, 2, 3, 4, 15, 17, 20, 24, 25],
}


def small_chunks() -> None:
    """Several chunks and blocks even in a small piece. (In a process of its own.)"""
    linear_attn.CHUNK, linear_attn.BLOCK_NUMBERS = 4, 1
    segments.CHUNK, segments.BLOCK_NUMBERS = 1, 1


class Whole:
    """Leaves and loss weights, the same on every rank; what a single process makes of them."""

    def __init__(self, x: Inputs, rows: int, with_state: bool, dtype: torch.dtype, **options):
        self.x, self.options = x, options
        generator = torch.Generator().manual_seed(1)
        self.r = lambda *s: torch.randn(*s, dtype=F64, generator=generator).to(dtype)
        leaves = {n: y.clone().requires_grad_() for n, y in x.tensors().items()}
        state = self.cls = None
        if with_state:
            p = x.kw.get("p", "q")
            heads = p.shape[2] if isinstance(p, Tensor) else {"q": 4, "k": 2}[p]
            empty = zeros(
                x.op, rows, 4, 2, 3, 5, order=x.order, p_heads=heads, normalize="normalize" in x.kw, dtype=dtype
            )
            state = [None if y is None else self.r(*y.shape).abs().requires_grad_() for y in empty]
            if hasattr(empty, "S") and empty.S is not None:
                state[0] = (state[0].detach() @ state[0].detach().mT).requires_grad_()
            self.cls = type(empty)
            leaves |= {f"state {i}": y for i, y in enumerate(state) if y is not None}
        self.leaves = leaves
        self.state = state

    def initial(self, leaves: dict[str, Tensor]):
        if self.state is None:
            return None
        return self.cls(*(leaves.get(f"state {i}") for i in range(len(self.state))))

    def call(self, function, leaves: dict[str, Tensor], cut=lambda y: y, finals=True, **options):
        given = {n: cut(leaves[n]) if leaves[n].dim() > 2 else leaves[n] for n in self.x.tensors()}
        q, k, v, kw = self.x.with_tensors(given)
        return function(
            q, k, v, initial_state=self.initial(leaves), output_final_state=finals, **kw, **self.options, **options
        )


def check(
    groups, rank, name, option, size, dtype=F64, borders=None, with_state=False, lengths=None, tolerance=1e-10, T=25,
    V=5, **options,
):  # fmt: skip
    if rank >= size:
        return
    small_chunks()
    B = 2 if borders is None else 1
    rows = B if borders is None else len(borders) - 1
    x = Inputs(name, option, B=B, T=T, V=V, dtype=dtype)
    cu = {} if borders is None else {"cu_seqlens": torch.tensor(borders)}
    whole = Whole(x, rows, with_state, dtype, **cu)
    finals = options.get("finals", True)
    o, final = whole.call(getattr(hla, x.op), whole.leaves, finals=finals)
    final = final or ()
    do, dfinal = whole.r(*o.shape), [None if y is None else whole.r(*y.shape) for y in final]
    loss = (o * do).sum() + sum((y * dy).sum() for y, dy in zip(final, dfinal, strict=True) if y is not None)
    truth = dict(zip(whole.leaves, gradients(loss, whole.leaves.values()), strict=True))

    parallel = SequenceParallel(groups[size], lengths or LENGTHS.get(size))
    borders_of_pieces = [sum(parallel.lengths[:r]) for r in range(size + 1)] if parallel.lengths else [0, T]
    span = slice(*borders_of_pieces[rank : rank + 2])
    leaves = {n: y.detach().clone().requires_grad_() for n, y in whole.leaves.items()}
    mine, ends = whole.call(lambda *a, **kw: parallel.run(x.op, *a, **kw), leaves, lambda y: y[:, span], **options)
    assert_close(mine, o[:, span], tolerance, "o")
    loss = (mine * do[:, span]).sum()
    for y, end, dy in zip(final, ends or (), dfinal, strict=True):
        assert (y is None) == (end is None)
        if y is not None:
            assert end.dtype == y.dtype
            assert_close(end, y, tolerance, "final state")
            loss = loss + (end * dy).sum() / size  # every rank has it in its loss
    for n, y in zip(leaves, gradients(loss, leaves.values()), strict=True):
        y = y.contiguous()  # (gloo adds up memory as it lies)
        dist.all_reduce(y, group=groups[size])
        assert_close(y, truth[n], tolerance, f"gradient of {n}")


@pytest.mark.parametrize("name,option", PARALLEL_CASES)
def test_pieces_are_the_whole(run, name, option):
    run(check, name, option, 4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2])
def test_other_sizes(run, name, size):
    run(check, name, "g", size)


@pytest.mark.parametrize("name", NAMES)
def test_initial_states(run, name):
    run(check, name, "g", 4, F64, None, True)


@pytest.mark.parametrize("name", ["linear_attn", "hla2", "ahla", "hla3"])
def test_initial_states_of_normalised_operators(run, name):
    run(check, name, "normalize", 4, F64, None, True)


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("name", ["hla2", "ahla", "hla3", "hla_q4"])
def test_packed_sequences(run, name, borders):
    run(check, name, "g", 4, F64, borders)
    run(check, name, "g", 4, F64, borders, True)


@pytest.mark.parametrize("lengths", [[25, 0, 0, 0], [0, 0, 25, 0], [0, 14, 0, 11], [0, 0, 0, 25]])
def test_pieces_of_any_length(run, lengths):
    for borders in (None, BORDERS["empty ones"], BORDERS["inside pieces"]):
        run(check, "hla_q4", "g", 4, F64, borders, True, lengths)


def check_float32(groups, rank, name, option, dtype):
    """Errors against the float64 truth are those of a single process."""
    small_chunks()
    parallel = SequenceParallel(groups[4])
    x = Inputs(name, option, B=1, T=80, K=8, V=8, dtype=F64)
    x.q, x.k = (torch.nn.functional.normalize(y, dim=-1) for y in (x.q, x.k))
    x.kw["g"] = x.kw["g"] / 20  # what a piece begins with is felt in all of it
    low = {n: y.to(torch.float32 if n == "g" else dtype) for n, y in x.tensors().items()}
    do = torch.randn(1, 80, 4, 8, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)
    span = slice(20 * rank, 20 * rank + 20)
    results = []
    for kind in ("truth", "single", "parallel"):
        leaves = {n: (y.double() if kind == "truth" else y).clone().requires_grad_() for n, y in low.items()}
        cut = (lambda y: y[:, span] if y.dim() > 2 else y) if kind == "parallel" else lambda y: y
        q, k, v, kw = x.with_tensors({n: cut(y) for n, y in leaves.items()})
        # A pass at low precision around it changes nothing.
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "parallel"):
            o, _ = parallel.run(x.op, q, k, v, **kw) if kind == "parallel" else getattr(hla, x.op)(q, k, v, **kw)
        assert o.dtype == v.dtype
        found = [y.double().contiguous() for y in gradients((o.double() * cut(do)).sum(), leaves.values())]
        if kind == "parallel":
            for y in found:
                dist.all_reduce(y, group=groups[4])
        results.append([o if kind == "parallel" else o[:, span], *found])
    for n, truth, single, mine in zip(["o", *low], *results, strict=True):
        error, usual = relative_error(mine, truth), relative_error(single, truth)
        # Summary and operator both read the token: in bfloat16 its gradient is the rounded sum of two rounded parts,
        # and what is summed may be larger than the sum.
        floor, factor = (1e-6, 2) if dtype == torch.float32 else (4e-3 if n == "o" else 4 * 2**-9, 3)
        assert error <= max(factor * usual, floor), f"{n}: {error:.1e}, {usual:.1e} in one process"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["linear_attn", "hla2", "ahla", "ahla3", "hla3", "hla_q4"])
def test_low_precision_is_no_worse_than_in_one_process(run, name, dtype):
    run(check_float32, name, "g", dtype)


def check_kernels(
    groups, rank, option, size, with_state, lengths=None, T=25, borders=None, V=5, name="hla_q4"
):  # fmt: skip
    from hla.distributed.chains import PendingChain
    from hla.distributed.readings import PendingReadings
    from hla.kernels import segments as cuts

    taken, kind = [], PendingReadings if name == "hla_q4" else PendingChain
    finish = lambda self: taken.append(self) or real(self)  # noqa: E731
    real, kind.finish = kind.finish, finish
    before, cuts.SHORTEST_SEGMENT = cuts.SHORTEST_SEGMENT, 64
    try:
        check(
            groups, rank, name, option, size, torch.float32, borders, with_state, lengths, 3e-4, T, V,
            backend="triton", finals=borders is None,
        )  # fmt: skip
    finally:
        cuts.SHORTEST_SEGMENT, kind.finish = before, real
    assert len(taken) == (rank < size)


@pytest.mark.parametrize("option", ["plain", "g", "g,nodes,ridge per token"])
@pytest.mark.parametrize("with_state", [False, True])
def test_pieces_by_the_kernels_of_hla_q(run, option, with_state):
    pytest.importorskip("triton")
    run(check_kernels, option, 4, with_state)


@pytest.mark.parametrize("lengths", [[100, 70], [0, 170]])
def test_pieces_in_several_segments(run, lengths):
    pytest.importorskip("triton")
    run(check_kernels, "g", 2, True, lengths, 170)


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_packed_pieces_by_the_kernels_of_hla_q(run, borders):
    pytest.importorskip("triton")
    run(check_kernels, "g", 4, False, None, 25, borders)


@pytest.mark.parametrize("lengths", [[25, 0, 0, 0], [0, 14, 0, 11], [0, 0, 0, 25]])
def test_packed_pieces_of_any_length_by_the_kernels(run, lengths):
    pytest.importorskip("triton")
    for borders in (BORDERS["empty ones"], BORDERS["inside pieces"]):
        run(check_kernels, "plain", 4, False, lengths, 25, borders)


@pytest.mark.parametrize("borders", [[0, 30, 120, 120, 170], [0, 170]])
def test_packed_pieces_in_several_segments(run, borders):
    pytest.importorskip("triton")
    run(check_kernels, "g", 2, False, [100, 70], 170, borders)


def test_pieces_with_wide_values(run):
    """(More than `hla.kernels.pairs` takes.)"""
    pytest.importorskip("triton")
    run(check_kernels, "g", 2, False, [70, 30], 100, None, 144)


def check_misuse(groups, rank):
    if rank >= 2:
        return
    parallel = SequenceParallel(groups[2])
    x = Inputs("hla_q4", "g", T=20, dtype=torch.float32)
    q, k, v, kw = x.with_tensors({n: y[:, :10].clone().requires_grad_() for n, y in x.tensors().items()})
    call = lambda f, *tensors: f("hla_q", *tensors, **kw, backend="triton")  # noqa: E731
    o, _ = call(parallel.run, q, k, v)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(o.sum(), v, create_graph=True)
    with torch.no_grad():
        o, _ = call(parallel.run, q, k, v)
        assert not o.requires_grad
        pending = call(parallel.begin, q, k, v)
        k.mul_(2)
        with pytest.raises(RuntimeError, match="changed in place after `begin`"):
            pending.finish()
        pending.message.told()  # (on its way)
        kw["g"] = kw["g"][:0]
        assert call(parallel.run, q[:0], k[:0], v[:0])[0].shape == (0, 10, 4, 5)


def test_what_goes_wrong_is_said(run):
    pytest.importorskip("triton")
    run(check_misuse)


def check_compiled(groups, rank):
    if rank >= 2:
        return
    parallel = SequenceParallel(groups[2])
    x = Inputs("hla_q4", "g", T=20, dtype=torch.float32)
    tensors = [y[:, :10].clone().requires_grad_() for y in x.tensors().values()]

    def output(q, k, v, g):
        return parallel.run("hla_q", 2 * q, k, v, g=g, order=4, backend="triton")[0].square()

    found, expected = torch.compile(output, backend="eager")(*tensors), output(*tensors)
    assert torch.equal(found, expected)
    for y, z in zip(*(torch.autograd.grad(o.sum(), tensors) for o in (found, expected)), strict=True):
        assert torch.equal(y, z)


def test_compiled_around_pieces(run):
    pytest.importorskip("triton")
    run(check_compiled)


def run_chain(run, name, option, size, with_state, lengths=None, T=25):
    pytest.importorskip("triton")
    run(check_kernels, option, size, with_state, lengths, T, None, 5, name)


@pytest.mark.parametrize("name", ["linear_attn", "hla2", "ahla", "ahla3", "hla3", "hla_n1"])
@pytest.mark.parametrize("option", ["plain", "g"])
def test_pieces_by_the_kernels_of_chains(run, name, option):
    run_chain(run, name, option, 4, option == "g")


@pytest.mark.parametrize(
    "name,option",
    [
        ("hla2", "g,p=k,per token"), ("hla2", "ridge,gain per token"), ("hla3", "value_ridge,value_gain"),
        ("ahla", "p=HKV"), ("hla2", "g,normalize,ridge"), ("hla2", "scale"),
    ],
)  # fmt: skip
def test_options_of_chains(run, name, option):
    run_chain(run, name, option, 2, False)


@pytest.mark.parametrize("name,option", [("hla2", "g"), ("hla3", "plain")])
def test_chains_in_several_segments(run, name, option):
    run_chain(run, name, option, 2, True, [100, 70], 170)


@pytest.mark.parametrize("lengths", [[25, 0], [0, 25]])
def test_chains_on_pieces_of_any_length(run, lengths):
    run_chain(run, "hla2", "g", 2, True, lengths)
