"""Runs of 2 and 4 processes that count what the formulas say: bytes received, and bytes kept for the backward pass.

Bytes are counted where PyTorch hands a collective to its backend, so that nothing is missed, whoever called it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hla.layers
from benchmarks.scale import formulas
from benchmarks.scale.formulas import Traffic
from benchmarks.scale.peers import ring_attention, ulysses_attention
from hla.distributed import SequenceParallel, parallelize_hla, shard_sequence
from hla.models import HLAConfig, HLAForCausalLM
from hla.models.modeling_hla import HLABlock
from hla.ops.checks import HAS_TRITON

# Sizes without common factors (heads but for Ulysses), so that no formula is right by accident.
TINY = HLAConfig(
    vocab_size=97, hidden_size=20, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=6,
    head_v_dim=10, intermediate_size=28, conv_size=3,
)  # fmt: skip
ROWS, TOKENS = 2, 44  # sequences, and tokens of each
KINDS = {"all_gather": "all_gather", "allgather": "all_gather", "alltoall": "all_to_all", "reduce_scatter":
         "reduce_scatter", "allreduce": "all_reduce", "recv": "send", "send": ""}  # fmt: skip


class Counter(TorchDispatchMode):
    """Bytes this rank receives from others, by collective.

    Args:
        sp: ranks that take part in an all-to-all (of the others the tensors tell).
    """

    def __init__(self, sp: int):
        super().__init__()
        self.sp, self.bytes = sp, dict.fromkeys(Traffic._fields, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "barrier":
            return
        kind = next((kind for start, kind in KINDS.items() if name.strip("_").startswith(start)), None)
        if kind is None:
            raise NotImplementedError(f"nothing is known about the bytes of c10d::{name}")
        first, second = (_bytes(x) for x in args[:2])
        if kind == "all_to_all":  # output, input; a rank's own part stays
            assert first == second and first % self.sp == 0
            self.bytes[kind] += first // self.sp * (self.sp - 1)
        elif kind in ("all_gather", "reduce_scatter"):
            self.bytes[kind] += abs(first - second)
        elif kind:
            self.bytes[kind] += first

    @property
    def traffic(self) -> Traffic:
        return Traffic(**self.bytes)


def _bytes(x: Any) -> int:
    if isinstance(x, Tensor):
        return x.numel() * x.element_size()
    return sum(map(_bytes, x)) if isinstance(x, list | tuple) else 0


Check = tuple[str, Any, Any]  # what, by formula, counted


def count_layer(sp: dist.ProcessGroup) -> Iterator[Check]:
    """One mixer, forward and backward, at two lengths."""
    size = dist.get_world_size(sp)
    for tokens in (TOKENS, 3 * TOKENS):
        layer = hla.layers.HigherOrderLinearAttention(**TINY.mixer_arguments())
        layer.sequence_parallel = SequenceParallel(sp)
        x = torch.randn(ROWS, tokens // size, TINY.hidden_size, requires_grad=True)
        with Counter(size) as counter:
            layer(x)[0].square().sum().backward()
        yield f"layer, {tokens} tokens", formulas.hla_layer(TINY, size, ROWS, kernels=False), counter.traffic


def count_kernels(sp: dist.ProcessGroup) -> Iterator[Check]:
    """A mixer as it runs on GPUs, its operator by the kernels (interpreted here), and what that keeps for the piece."""
    size = dist.get_world_size(sp)
    layer = hla.layers.HigherOrderLinearAttention(**TINY.mixer_arguments(), backend="triton")
    layer.sequence_parallel = SequenceParallel(sp)
    x = torch.randn(ROWS, TOKENS // size, TINY.hidden_size, requires_grad=True)
    with Counter(size) as counter:
        layer(x)[0].square().sum().backward()
    yield "layer by kernels", formulas.hla_layer(TINY, size, ROWS), counter.traffic

    q, k, v = (y[:, :, : TOKENS // size].transpose(1, 2).requires_grad_() for y in _heads(torch.float32))
    g = -torch.rand(*k.shape[:3], requires_grad=True)
    alone = _kept(lambda: hla.hla_q(q, k, v, g=g, backend="triton"))
    piece = _kept(lambda: SequenceParallel(sp).run("hla_q", q, k, v, g=g, backend="triton"))
    yield "summaries by kernels", formulas.fold_bytes(TINY, size, ROWS), piece - alone


def count_chains(sp: dist.ProcessGroup) -> Iterator[Check]:
    """The other operators by their kernels: what they receive."""
    size, (q, k, v) = dist.get_world_size(sp), _heads(torch.float32)
    H, HKV, K, V = TINY.num_attention_heads, TINY.num_key_value_heads, TINY.head_dim, TINY.head_v_dim
    for op in ("linear_attn", "hla2", "ahla", "hla3"):
        pieces = [y[:, :, : TOKENS // size].transpose(1, 2).clone().requires_grad_() for y in (q, k, v)]
        with Counter(size) as counter:
            SequenceParallel(sp).run(op, *pieces, backend="triton")[0].sum().backward()
        decays, states = formulas.chain_numbers(op, HKV=HKV, HP=H, K=K, V=V)
        told = (size - 1) * ROWS * formulas.F32
        yield f"{op} by kernels", Traffic(all_gather=told * (decays + 2 * states)), counter.traffic


def _kept(function: Callable[[], Any], without: Collection[int] = ()) -> int:
    """Bytes that a function keeps for its backward pass, but for storages that begin at these addresses."""
    storages: dict[int, Any] = {}

    def keep(y: Tensor) -> Tensor:
        storages[y.untyped_storage().data_ptr()] = y.untyped_storage()
        return y

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        result = function()
    total = sum(s.nbytes() for pointer, s in storages.items() if pointer not in without)
    del result
    return total


def count_model(sp: dist.ProcessGroup, checkpointing: bool) -> Iterator[Check]:
    """A language model, forward and backward."""
    size = dist.get_world_size(sp)
    model = _model(sp, checkpointing)
    piece = _piece(SequenceParallel(sp))
    with Counter(size) as counter:
        model(**piece).loss.backward()
    expected = formulas.hla_layer(TINY, size, ROWS, checkpointing, kernels=False).times(TINY.num_hidden_layers)
    name = f"model{', activation checkpointing' if checkpointing else ''}"
    yield name, expected.plus(formulas.loss_traffic(size)), counter.traffic


def count_fsdp(sp: dist.ProcessGroup, checkpointing: bool) -> Iterator[Check]:
    """The same under `parallelize_hla`, sharded over all ranks, and the memory of the shards."""
    size, ranks = dist.get_world_size(sp), dist.get_world_size()
    torch.manual_seed(0)
    model = parallelize_hla(
        HLAForCausalLM(TINY).train(), init_device_mesh("cpu", (ranks // size, size), mesh_dim_names=("dp", "sp")),
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, activation_checkpointing=checkpointing,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    piece = _piece(model.sequence_parallel)
    with Counter(size) as counter:
        model(**piece).loss.backward()
    expected = formulas.hla_layer(TINY, size, ROWS, checkpointing, kernels=False).times(TINY.num_hidden_layers)
    expected = expected.plus(formulas.loss_traffic(size)).plus(formulas.fsdp_step(TINY, ranks))
    name = f"FSDP2 over {ranks} ranks{', activation checkpointing' if checkpointing else ''}"
    yield name, expected, counter.traffic

    optimizer.step()
    kept = [y for p in model.parameters() for y in (p, p.grad, *optimizer.state[p].values()) if y.dim()]
    own = torch.tensor(float(sum(_bytes(y.to_local()) for y in kept)))
    dist.all_reduce(own)  # of all ranks: the last ones have less
    unpadded = formulas.STATE_BYTES * formulas.parameters(TINY)
    yield f"{name}: parameters, gradients, moments", unpadded, int(own)


def count_peers(sp: dist.ProcessGroup) -> Iterator[Check]:
    """Ring attention and Ulysses of the same heads."""
    size = dist.get_world_size(sp)
    q, k, v = _heads()
    pieces = [x.chunk(size, 2)[dist.get_rank(sp)].detach().requires_grad_() for x in (q, k, v)]
    peers: list[tuple[str, Callable[..., Tensor], Traffic | None]] = [
        ("ring attention", ring_attention, formulas.ring_layer(TINY, size, TOKENS, ROWS)),
        ("Ulysses", ulysses_attention, formulas.ulysses_layer(TINY, size, TOKENS, ROWS)),
    ]
    for name, attention, expected in peers:
        with Counter(size) as counter:
            attention(*pieces, sp).float().square().sum().backward()
        yield name, expected, counter.traffic


def count_memory(sp: dist.ProcessGroup) -> Iterator[Check]:
    """Bytes a block keeps for its backward pass: per token, and on the last rank for the summaries.

    The operator and the norms are replaced by functions that keep what their kernels for GPUs keep.
    """
    size = dist.get_world_size(sp)

    def kept(tokens: int, parallel: SequenceParallel | None) -> int:
        block = HLABlock(TINY, 0).bfloat16()
        for name in HLAForCausalLM._keep_in_fp32_modules_strict:
            if hasattr(block.mixer, name):
                setattr(block.mixer, name, nn.Parameter(getattr(block.mixer, name).float()))
        assert isinstance(block.mixer, hla.layers.HigherOrderLinearAttention)
        block.mixer.sequence_parallel = parallel
        x = torch.randn(ROWS, tokens, TINY.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        held = {p.untyped_storage().data_ptr() for p in block.parameters()}
        with _as_on_gpus():
            return _kept(lambda: block(x), held)

    per_token = (kept(30, None) - kept(20, None)) / (10 * ROWS)
    yield "activations of a block per token", formulas.activation_bytes(TINY), per_token
    folded = _fold_kept(sp)
    if dist.get_rank(sp) == size - 1:
        expected = formulas.fold_bytes(TINY, size, ROWS, kernels=False)
        yield "summaries and the fold on the last rank", expected, folded


def _fold_kept(sp: dist.ProcessGroup) -> int:
    """Bytes that folding the summaries of the ranks before keeps."""
    from hla.distributed.exchange import Exchange
    from hla.distributed.packing import fold_sums
    from hla.ops.state import HLAQState

    HKV, K, V = TINY.num_key_value_heads, TINY.head_dim, TINY.head_v_dim
    new = lambda *shape: torch.randn(ROWS, HKV, *shape, requires_grad=True)  # noqa: E731
    told = Exchange([new(), new(K, K), new(K, V)], sp).wait_stacked()
    empty = HLAQState(new(K, K), new(K, V))
    return _kept(lambda: fold_sums(empty, told, dist.get_rank(sp), None, None, from_zero=True))


class _Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, ridge, nodes):
        o = q.new_zeros(*q.shape[:3], v.shape[3])
        ctx.save_for_backward(q, k, v, g, ridge, nodes, torch.zeros_like(o))
        return o


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, torch.zeros(x.shape[:-1]))
        return torch.zeros_like(x)


@contextlib.contextmanager
def _as_on_gpus() -> Iterator[None]:
    def operator(q, k, v, *, g, ridge, nodes, **unused):
        return _Operator.apply(q, k, v, g, ridge, nodes), None

    def norm(x, shape, weight, eps):
        return _Norm.apply(x, weight)

    with mock.patch.dict(hla.layers.OPERATORS, hla_q=operator), mock.patch.object(F, "rms_norm", norm):
        yield


def _model(sp: dist.ProcessGroup, checkpointing: bool) -> HLAForCausalLM:
    torch.manual_seed(0)
    model = HLAForCausalLM(TINY).train()
    model.set_sequence_parallel(SequenceParallel(sp))
    if checkpointing:  # (transformers renamed it)
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def _piece(parallel: SequenceParallel) -> dict[str, Tensor]:
    ids = torch.randint(TINY.vocab_size, (ROWS, TOKENS))
    return shard_sequence({"input_ids": ids, "labels": ids}, parallel)


def _heads(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k and v ``[B, H, T, D]`` of whole sequences, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    H, HKV = TINY.num_attention_heads, TINY.num_key_value_heads
    widths = ((H, TINY.head_dim), (HKV, TINY.head_dim), (HKV, TINY.head_v_dim))
    return [torch.randn(ROWS, h, TOKENS, w, generator=generator).to(dtype) for h, w in widths]


def all_checks(sp: dist.ProcessGroup) -> Iterator[Check]:
    """Everything that is counted on the ranks of ``sp``; FSDP2 goes over all there are."""
    yield from count_layer(sp)
    if HAS_TRITON:
        yield from count_kernels(sp)
        yield from count_chains(sp)
    for checkpointing in (False, True):
        yield from count_model(sp, checkpointing)
        yield from count_fsdp(sp, checkpointing)
    yield from count_peers(sp)
    yield from count_memory(sp)


def _process(rank: int, ranks: int, path: str, results: Any) -> None:
    try:
        torch.set_num_threads(1)
        if any(name == "lo" for _, name in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
        )
        found = []
        for sp in [n for n in (2, 4) if n <= ranks]:
            groups = [dist.new_group(list(range(i, i + sp))) for i in range(0, ranks, sp)]
            found += [(sp, *check) for check in all_checks(groups[rank // sp])]
        results.put((rank, found))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        results.put((rank, traceback.format_exc()))


def run(ranks: int, say: Callable[[str], None] = print) -> bool:
    """All checks in new processes; whether everything is equal, to the byte, on every rank."""
    context = mp.get_context("forkserver")  # a server that has imported everything, once
    context.set_forkserver_preload(["benchmarks.scale.counting"])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_process, args=(r, ranks, f"{folder}/meet", results), daemon=True)
            for r in range(ranks)
        ]
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # what they import asks for it
            for process in processes:
                process.start()
        answers = dict(results.get(timeout=300) for _ in processes)
        for process in processes:
            process.join(60)
    equal = True
    for rank, found in sorted(answers.items()):
        if isinstance(found, str):
            say(f"rank {rank} of {ranks}:\n{found}")
            equal = False
            continue
        for sp, what, expected, counted in found:
            same = expected == counted
            equal = equal and same
            if not same or rank == ranks - 1:
                verdict = "equal" if same else f"NOT EQUAL: {counted}"
                say(f"{ranks} processes, sequence on {sp}, rank {rank}: {what}: {_readable(expected)}, {verdict}")
    return equal


def _readable(x: Any) -> str:
    if not isinstance(x, Traffic):
        return f"{x:,} bytes"
    return ", ".join(f"{name} {n:,}" for name, n in x._asdict().items() if n) + " bytes"
