"""What the kernels need of a card, seen without one: they are compiled for it here, and their launches counted.

Shared memory over the limit of the card fails at the first launch; spilled registers make a kernel several times
slower; a kernel that is compiled anew for another length stops a training run for seconds. The kernels of this process
are interpreted (see tests/conftest.py), so processes of their own record what operators launch, forward and backward.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys

import pytest

SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}  # bytes a block may have, by compute capability

# (capability, K, V, dtype, gate): bytes a thread may spill, about a quarter above what Triton 3.6 and 3.9 need. A few
# hundred stay in the first cache. Capability 89 has the configurations, the limits and the code of 86.
MAY_SPILL = {
    (90, 128, 128, "bfloat16", False): 64,
    (90, 128, 128, "bfloat16", True): 640,
    (90, 64, 64, "bfloat16", False): 0,
    (90, 64, 64, "bfloat16", True): 176,
    (90, 128, 64, "bfloat16", True): 640,
    (90, 256, 256, "bfloat16", True): 1200,
    (90, 128, 128, "float32", True): 2250,
    (90, 128, 128, "float16", True): 128,
    (80, 128, 128, "bfloat16", True): 2200,
    (80, 64, 64, "bfloat16", False): 0,
    (86, 32, 32, "bfloat16", False): 32,
    (86, 64, 64, "bfloat16", True): 480,
    (86, 128, 128, "bfloat16", True): 2100,
    (89, 256, 256, "bfloat16", True): 3300,
}
# (capability, operator of hla.step, batch, K = V, tokens, whether S is packed): likewise. In float32, with a gate, two
# query heads to one of k, in place; a batch of 1 has the blocks of few programs.
STEP_MAY_SPILL = {
    (90, "linear_attn", 256, 128, 1, False): 0,
    (90, "hla2", 256, 128, 1, False): 0,
    (90, "hla2", 256, 128, 8, False): 0,
    (90, "hla2", 256, 128, 8, True): 0,
    (90, "hla2", 1, 128, 1, True): 16,
    (90, "hla3", 256, 128, 8, True): 0,
    (90, "hla_q", 256, 128, 1, False): 0,
    (90, "hla_q", 256, 128, 8, False): 32,  # (Triton 3.6 needs 0, 3.9 needs 20)
    (90, "hla_q", 256, 128, 1, True): 0,
    (90, "hla_q", 256, 256, 8, True): 0,
    (80, "hla3", 256, 256, 8, True): 0,
    (86, "hla2", 256, 128, 4, True): 0,
    (86, "hla_q", 256, 128, 4, True): 0,
}
# (capability, "block", batch, hidden size, heads): a token of a block and the shaping of its prompt: likewise.
BLOCK_MAY_SPILL = {
    (90, "block", 1, 2048, 16): 64,  # (Triton 3.6 needs 0, 3.9 needs 56)
    (90, "block", 8, 2048, 16): 64,  # (as above)
    (86, "block", 16, 768, 12): 32,
    (90, "block", 16, 2048, 8): 32,  # (heads of 256: hla.step)
    (90, "block", 32, 768, 12): 16,
    (90, "block", 32, 2048, 16): 48,  # (P of shape_step in shared memory: 24, 40)
    (90, "block", 64, 1024, 16): 16,
    (90, "block", 100, 2048, 16): 48,  # (as above)
    (90, "block", 200, 2048, 16): 64,
    (80, "block", 64, 768, 12): 16,
    (86, "block", 32, 768, 12): 0,
    (89, "block", 64, 2048, 16): 16,
}
# (capability, "readings", K = V, dtype): the kernels of hla_q of order 4, forward and backward: likewise.
READINGS_MAY_SPILL = {
    (90, "readings", 128, "bfloat16"): 400,  # (Triton 3.6 needs 288, 3.9 needs 160)
    (90, "readings", 64, "bfloat16"): 700,  # (360, 264, and 3.8 576; walk_readings 24, 40)
    (90, "readings", 96, "bfloat16"): 1000,  # (not by the kernel for Hopper)
    (90, "readings", 128, "float32"): 3200,
    (90, "readings", 64, "float16"): 16,  # (not by the kernel for Hopper)
    (80, "readings", 128, "bfloat16"): 320,
    (86, "readings", 128, "bfloat16"): 32,
    (89, "readings", 64, "bfloat16"): 16,
}
# (capability, "pieces", K = V, dtype): what pieces of a spread sequence launch for hla_q beyond that: likewise.
PIECES_MAY_SPILL = {
    (90, "pieces", 64, "bfloat16"): 0,
    (90, "pieces", 128, "bfloat16"): 0,
    (86, "pieces", 128, "float16"): 0,
}
# (capability, "training", K = V, dtype): what surrounds an operator in training, and summaries: likewise.
TRAINING_MAY_SPILL = {
    (90, "training", 128, "bfloat16"): 0,
    (90, "training", 256, "bfloat16"): 0,
    (86, "training", 128, "bfloat16"): 0,
}
# (capability, "rotary", D, dtype): rotary embeddings of q and k, forward and backward: likewise.
ROTARY_MAY_SPILL = {
    (90, "rotary", 64, "bfloat16"): 0,
    (90, "rotary", 256, "float32"): 0,
    (86, "rotary", 96, "bfloat16"): 0,
    (80, "rotary", 128, "float16"): 0,
}
# (capability, "loss", vocabulary, dtype): the cross-entropy, with and without gradients: likewise.
LOSS_MAY_SPILL = {
    (90, "loss", 32000, "bfloat16"): 0,
    (90, "loss", 50257, "float32"): 0,
    (80, "loss", 32000, "float16"): 0,
    (86, "loss", 257, "bfloat16"): 0,
}
MAY = MAY_SPILL | STEP_MAY_SPILL | BLOCK_MAY_SPILL | READINGS_MAY_SPILL | TRAINING_MAY_SPILL | ROTARY_MAY_SPILL
MAY |= LOSS_MAY_SPILL | PIECES_MAY_SPILL
PROCESSES = 2


def record_operator(
    op: str, B: int, T: int, heads: int, K: int, V: int, dtype: str, lengths=(), gate=True, per_token=(), **kw
) -> list:
    """What an operator launches forward and backward. per_token: names of arguments with a number per query head."""
    import torch

    import hla.kernels
    from hla.ops.checks import check_call
    from tests.kernels.offline import record

    new = lambda *shape, dtype=torch.float32: torch.zeros(B, T, *shape, dtype=dtype, requires_grad=True)  # noqa: E731
    q, k, v = (new(h, D, dtype=getattr(torch, dtype)) for h, D in ((heads, K), (1, K), (1, V)))
    kw |= {name: (new(heads) + 0.5).detach().requires_grad_() for name in per_token}
    cu = torch.tensor([0, *lengths]).cumsum(0).int() if lengths else None
    call = check_call(op, q, k, v, g=new(1) if gate else None, cu_seqlens=cu, **kw)
    return record(lambda: hla.kernels.run(call)[0].sum().backward())


def pretend(capability: int) -> None:
    """From now on the device is one of this compute capability."""
    import hla.kernels  # noqa: F401 - to be patched

    for name, module in list(sys.modules.items()):
        if name.startswith("hla.kernels") and hasattr(module, "device_config"):
            module.device_config = lambda device: (divmod(capability, 10), 132)


def launches_of(capability: int, K: int, V: int, dtype: str, gate: bool) -> list:
    """Of what hla2 launches on such a card: the first, and of those that add or reverse (and dot) the first each."""
    pretend(capability)
    picked = {}
    for launch in record_operator("hla2", 1, 512, 1, K, V, dtype, gate=gate, p="k", ridge=0.5):
        x = launch.arguments
        kind = (launch.kernel.__name__, bool(x.get("ADD")), bool(x.get("REVERSE")), x.get("DOT") is not None)
        if launch.kernel.__name__ != "walk" or kind[1:] in ((False,) * 3, (True, False, gate), (False, True, gate)):
            picked.setdefault(kind, launch)
    return list(picked.values())


def launches_of_step(capability: int, op: str, B: int, D: int, T: int, packed: bool) -> list:
    """The launch of a step, which is the same on every card."""
    import torch

    from hla.kernels.step import fused_step
    from hla.ops.checks import check_call
    from hla.ops.state import zeros
    from tests.kernels.offline import record

    q, k, v = (torch.zeros(B, T, heads, D, dtype=torch.bfloat16) for heads in (2, 1, 1))
    call = check_call(op, q, k, v, g=torch.zeros(B, T, 1), step=True)
    state = zeros(op, B, 2, 1, D, D, order=call.order)
    state = state.pack() if packed else state
    return record(lambda: fused_step(call, state, state))


def launches_of_block(capability: int, _: str, B: int, hidden_size: int, heads: int) -> list:
    """The launches of `token`, and that of `shape` for several tokens."""
    import torch

    import hla.kernels.token as kernels
    from hla.kernels.shape import project
    from hla.kernels.step import fused_step
    from hla.models import HLAConfig
    from hla.models.modeling_hla import HLABlock
    from hla.ops.checks import check_call
    from tests.kernels.offline import record

    def step(op, q, k, v, state, out_state, **options):
        """The kernel also on a CPU, with values that are valid, where nothing computed any."""
        valid = dict(g=0.0, ridge=1.0, nodes=0.5)
        options = {n: torch.full_like(x, valid[n]) if torch.is_tensor(x) else x for n, x in options.items()}
        return fused_step(check_call(op, q, k, v, step=True, **options), state, out_state)

    pretend(capability)
    kernels.step = step
    block = HLABlock(HLAConfig(hidden_size=hidden_size, num_attention_heads=heads), 1).to(torch.bfloat16)
    state = block.mixer.zero_state(B, torch.bfloat16, "cpu")
    one, many = (torch.zeros(B, T, hidden_size, dtype=torch.bfloat16) for T in (1, 100))
    with torch.no_grad():
        launches = record(lambda: kernels.token(block, one, state, None))
        fits = capability == 90 and hidden_size // heads <= 128
        assert ("shape_step_kernel" in {x.kernel.__name__ for x in launches}) == fits
        return launches + record(lambda: project(block.mixer, many, None, state.conv, True))


def compile_layers(cases: list[dict]) -> list[int]:
    """Bytes that a thread of `shape_step` spills, for blocks with these settings; with a mask, too."""
    import torch

    import hla.kernels.token as kernels
    from hla.models import HLAConfig
    from hla.models.modeling_hla import HLABlock
    from tests.kernels.offline import record

    pretend(90)
    spilled = []
    for case in cases:
        common = dict(hidden_size=64, num_attention_heads=4, intermediate_size=72, num_hidden_layers=1)
        block = HLABlock(HLAConfig(**common | case), 0).to(torch.bfloat16)
        state, x = block.mixer.zero_state(2, torch.float32, "cpu"), torch.zeros(2, 1, 64, dtype=torch.bfloat16)
        for mask in (None, torch.ones(2, 1, dtype=torch.bool)):
            with torch.no_grad():
                launches = record(lambda: kernels.token(block, x, state, mask))  # noqa: B023
            own = [launch for launch in launches if launch.kernel.__name__ == "shape_step_kernel"]
            spilled += [needs_of(launch, 90)[0].spilled for launch in own]
    return spilled


def count_loads(row: list) -> list[list]:
    """``[plain loads, copies to shared memory]`` of each `product` of a block."""
    codes = [needs_of(x, row[0])[1] for x in launches_of_block(*row) if x.kernel.__name__ == "product"]
    return [[len(re.findall(how, code)) for how in (r"ld\.global", r"cp\.async\.c[ag]")] for code in codes]


def launches_of_readings(capability: int, _: str, D: int, dtype: str) -> list:
    """The launches of the kernels that only hla_q has, those of a split among them."""
    pretend(capability)
    launches = record_operator("hla_q", 1, 1024, 1, D, D, dtype, per_token=("ridge",))
    whole = record_operator("hla_q", 2, 64, 1, D, D, dtype, per_token=("ridge",))
    # A walk that waits for nobody may only follow one that does, and read nothing that a launch in between writes.
    assert not any(x.arguments.get("LATE") for x in launches)
    late = [i for i, x in enumerate(whole) if x.arguments.get("LATE")]
    assert len(late) == (dtype == "bfloat16")
    for i in late:
        assert whole[i - 1].kernel is whole[i].kernel and not whole[i - 1].arguments["LATE"]
    modules = ("hla.kernels.query_side", "hla.kernels.pairs")
    own = [x for x in launches if x.kernel.__module__.startswith(modules)]
    gluon = {x.kernel.__name__ for x in own if x.kernel.is_gluon()}
    by_size = {
        64: {"walk_readings", "pair_gradients_hopper", "adjoint"},
        128: {"solve_hopper", "pair_gradients_hopper", "adjoint_at_once"},
    }
    assert gluon == (by_size.get(D, set()) if (capability, dtype) == (90, "bfloat16") else set())
    kinds = {(x.kernel.__name__, x.arguments.get("LEAVE") is None, x.arguments.get("REVERSE")): x for x in own}
    return list(kinds.values())


def launches_of_pieces(capability: int, _: str, D: int, dtype: str) -> list:
    """The second of three pieces: sums, folds, what goes over the borders; of `hla_q` with packed sequences, too."""
    from types import SimpleNamespace
    from unittest import mock

    import torch

    from hla.distributed import chains, exchange, readings
    from hla.distributed.packing import Packing
    from hla.ops.checks import check_call
    from tests.kernels.offline import record

    pretend(capability)
    parallel = SimpleNamespace(rank=1, size=3, group=None)
    nobody = dict(
        __init__=lambda self, group: setattr(self, "size", 3),
        gather=lambda self, x: x.new_zeros(3, x.numel()),
        land=lambda self: None,
    )
    new = lambda *shape: torch.zeros(1, 1024, *shape, dtype=getattr(torch, dtype), requires_grad=True)  # noqa: E731
    borders = torch.tensor([0, 500, 1500, 3072], dtype=torch.int32)

    def both(packing: Packing | None) -> None:
        cu = None if packing is None else packing.local
        g = torch.zeros(1, 1024, 1, requires_grad=True)
        call = check_call("hla_q", new(2, D), new(1, D), new(1, D), g=g, order=4, cu_seqlens=cu)
        readings.PendingReadings(parallel, call, None, packing).finish()[0].sum().backward()

    def chain(op: str, **options) -> None:
        call = check_call(op, new(2, D), new(1, D), new(1, D), **options)
        chains.PendingChain(parallel, call, None).finish()[0].sum().backward()

    def everything() -> None:
        both(None)
        both(Packing(borders, [0, 1024, 2048, 3072], 1))
        chain("hla3")
        chain("hla2", g=torch.zeros(1, 1024, 1, requires_grad=True), gain=torch.zeros(1, 1024, 2, requires_grad=True))

    with mock.patch.multiple(exchange.Flight, **nobody):
        launches = record(everything)
    # (The kernels of the operator itself have rows of their own.)
    own = ("_fold", "_enter", "_table", "walk", "moments", "scan_later")
    picked = {}
    for x in launches:
        if x.kernel.__name__ in own and x.arguments.get("ALL", True):
            picked.setdefault(compilation(x), x)
    assert {x.kernel.__name__ for x in picked.values()} >= {"_fold", "_enter", "_table", "walk"}
    return list(picked.values())


def launches_of_training(capability: int, _: str, D: int, dtype: str) -> list:
    import torch

    from hla import HigherOrderLinearAttention
    from hla.kernels.gates import gated_norm, silu_of_halves, silu_product
    from hla.kernels.moment import moments_of_keys
    from hla.kernels.residual_norm import residual_norm
    from hla.kernels.shape_training import shaped
    from hla.norm import RMSNorm
    from tests.kernels.offline import record

    pretend(capability)
    new = lambda *shape: torch.zeros(2, 512, *shape, dtype=getattr(torch, dtype), requires_grad=True)  # noqa: E731
    layer = HigherOrderLinearAttention(2 * D, 2)

    def everything() -> None:
        q, k, v, ridge, g = shaped(layer, new(layer.channels + 64), None, None)
        o, gate = new(2, D), new(2 * D)
        S, P = moments_of_keys(k, v, new(2))
        out = gated_norm(RMSNorm(D, eps=1e-6), o, gate) * silu_product(gate, q.flatten(2))
        out = out * silu_of_halves(new(4 * D), 2 * D)
        stream, normed = residual_norm(new(16 * D).float(), new(16 * D), torch.ones(16 * D), 1e-6, o.dtype)
        (out.sum() + S.sum() + P.sum() + (stream * normed).sum() + ridge.sum() + g.sum()).backward()

    return record(everything)


def launches_of_rotary(capability: int, _: str, D: int, dtype: str) -> list:
    """One, as all lengths and batches, forward and backward, have the same code."""
    import torch

    from hla.kernels.rotary import rotated
    from hla.rotary import rope_cos_sin
    from tests.kernels.offline import record

    def everything() -> None:
        for B, T in ((2, 512), (1, 17), (3, 131), (5, 1), (1, 1)):
            q, k, _ = torch.zeros(B, T, 8, D, dtype=getattr(torch, dtype), requires_grad=True).split([4, 2, 2], 2)
            q, k = rotated(q, k, *rope_cos_sin(torch.arange(T)[None], D, 1e4, q.dtype))
            (q.transpose(1, 2).pow(2).sum() + k.sum()).backward()

    launches = record(everything)
    assert len(launches) == 10 and len({compilation(launch) for launch in launches}) == 1
    return launches[:1]


def launches_of_loss(capability: int, _: str, V: int, dtype: str) -> list:
    import torch

    from hla.kernels.cross_entropy import cross_entropy_
    from tests.kernels.offline import record

    logits, targets = torch.zeros(2, V, dtype=getattr(torch, dtype)), torch.zeros(2, dtype=torch.int64)
    return record(lambda: [cross_entropy_(logits, targets, torch.zeros(2), gradient) for gradient in (False, True)])


def launches_of_row(row: tuple) -> list:
    for table, launches in (
        (ROTARY_MAY_SPILL, launches_of_rotary),
        (READINGS_MAY_SPILL, launches_of_readings),
        (PIECES_MAY_SPILL, launches_of_pieces),
        (TRAINING_MAY_SPILL, launches_of_training),
        (STEP_MAY_SPILL, launches_of_step),
        (BLOCK_MAY_SPILL, launches_of_block),
        (LOSS_MAY_SPILL, launches_of_loss),
    ):
        if row in table:
            return launches(*row)
    return launches_of(*row)


def ahead_of_wait(ptx: str) -> int | None:
    """How often a kernel that waits for the previous one asks for memory before it does so."""
    before, *after = ptx.split("griddepcontrol.wait")
    assert len(after) <= 1
    return len(re.findall(r"ld\.global|prefetch\.global|cp\.async\.c[ag]", before)) if after else None


def needs_of(launch, capability: int) -> tuple:
    """What a launch needs, and its PTX."""
    import triton

    from tests.kernels import offline

    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    # The report of the run of the assembler by Triton itself, whose choice of flags and version is its own.
    log = io.StringIO()
    code: list[str] = []
    offline._assembler_report = lambda ptx, _: code.append(ptx) or log.getvalue()
    with contextlib.redirect_stdout(log):
        return offline.compiled(launch, capability), code[0]


def compile_rows(rows: list) -> list[list]:
    """``[row, kernel, registers, spilled, shared, ahead_of_wait]`` of everything the rows launch."""
    results = []
    for row in rows:
        for launch in launches_of_row(tuple(row)):
            needs, ptx = needs_of(launch, row[0])
            assert bool(launch.options.get("launch_pdl")) == bool(launch.arguments.get("PDL"))
            results.append([row, *needs, ahead_of_wait(ptx)])
    return results


# Every kernel, and per-token numbers. Not `normalize`: it reads and writes tensors [B, T, H, 1], whose strides are not
# all multiples of 16 for every T.
OPERATORS = {
    "linear_attn": {},
    "hla2": {},
    "ahla": {},
    "hla3": dict(per_token=("ridge", "value_ridge")),
    "hla_n": dict(order=5),
    "hla_q": dict(per_token=("ridge",)),
}
WHOLE_SPLIT_PACKED = ((2, 128), (1, 2048), (1, 2048, (1000, 1048)), (1, 96, (96,)))
OTHERS = (
    *((3, 131), (1, 17), (5, 1), (1, 1), (7, 100), (1, 5001), (2, 4096)),
    *((1, 1777, (7, 0, 1500, 270)), (1, 9, (1,) * 9)),
)


def compilation(launch) -> str:
    """What Triton compiles a kernel anew for."""
    import torch
    from torch import Tensor

    kinds = []
    for parameter in launch.kernel.params:
        x = launch.arguments[parameter.name]
        if parameter.is_constexpr or x is None:
            kinds.append(f"{parameter.name}={x}")
        elif isinstance(x, Tensor) or isinstance(getattr(x, "dtype", None), torch.dtype):  # (or what stands for one)
            kinds.append(f"{parameter.name}:{x.dtype}, {x.data_ptr() % 16}")
        elif isinstance(x, int) and not parameter.do_not_specialize:
            kinds.append(f"{parameter.name}={1 if x == 1 else 'multiple of 16' if x % 16 == 0 else 'int'}")
    return " ".join([launch.kernel.__name__, *kinds, *map(str, launch.options.items())])


def count_compilations(names: list[str]) -> dict[str, list]:
    """By operator: what the calls of `OTHERS` compile that those of `WHOLE_SPLIT_PACKED` have not."""
    results = {}
    for name in names:
        kinds: list[set] = []
        for calls in (WHOLE_SPLIT_PACKED, OTHERS):
            kinds.append(set())
            for B, T, *lengths in calls:
                launches = record_operator(name, B, T, 4, 64, 64, "bfloat16", *lengths, **OPERATORS[name])
                kinds[-1] |= {compilation(launch) for launch in launches}
        results[name] = sorted(kinds[1] - kinds[0])
    return results


def count_surprises(names: list[str]) -> dict[str, list]:
    """By operator, and of what surrounds one in training: what is compiled ahead or launched, but not both."""
    import warnings
    from unittest import mock

    from tests.kernels import offline

    warnings.simplefilter("error")
    pretend(90)
    results: dict[str, list] = {}
    foreseen: list = []

    def note(name: str, launches: list) -> None:
        assert launches
        surprises = {compilation(x) for x in launches} ^ {compilation(x) for x in foreseen}
        results[name] = results.get(name, []) + sorted(surprises)
        foreseen.clear()

    original = offline.record
    with mock.patch.object(offline, "record", lambda function, _=None: original(function, foreseen)):
        for name in names:
            sizes = ((64, "bfloat16", True), (128, "bfloat16", True), (64, "float32", True), (128, "bfloat16", False))
            for D, dtype, gate in sizes:
                for B, T, *lengths in WHOLE_SPLIT_PACKED:
                    note(name, record_operator(name, B, T, 4, D, D, dtype, *lengths, gate=gate, **OPERATORS[name]))
        training = launches_of_training(90, "training", 64, "bfloat16")
        # (The norm with the stream is no `Operation`: one kernel each way.)
        note("training", [x for x in training if not x.kernel.__module__.endswith("residual_norm")])
        launches_of_rotary(90, "rotary", 64, "bfloat16")
    results["rotary"] = sorted({compilation(x) for x in foreseen})[1:]
    return results


def start(task: str, what: list) -> subprocess.Popen:
    """A process whose kernels are not interpreted."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-m", __name__, task, json.dumps(what)],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def result(process: subprocess.Popen):
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(output)


@pytest.fixture(scope="module")
def needs():
    """What every kernel of every row needs, by row."""
    pytest.importorskip("triton")
    rows, found = list(MAY), {}
    for process in [start("compile_rows", rows[i::PROCESSES]) for i in range(PROCESSES)]:
        for row, *rest in result(process):
            found.setdefault(tuple(row), []).append(rest)
    return found


@pytest.fixture(scope="module")
def compiled_anew():
    pytest.importorskip("triton")
    return result(start("count_compilations", list(OPERATORS)))


row = pytest.mark.parametrize("row", MAY, ids=lambda x: "-".join(map(str, x)))


@row
def test_kernels_stay_below_the_shared_memory_of_the_card(row, needs):
    assert needs[row]
    for kernel, _, _, shared, _ in needs[row]:
        assert shared <= SHARED[row[0]], kernel


@row
def test_kernels_spill_no_more_than_their_row_may(row, needs):
    for kernel, registers, spilled, *_ in needs[row]:
        assert spilled <= MAY[row], f"{kernel} with {registers} registers"


@pytest.mark.parametrize("T", [1, 8])
def test_a_large_batch_has_two_steps_of_hla_q_on_a_multiprocessor(T, needs):
    """One that loads its state while another one computes; alone, a token takes 1.4 times as long."""
    ((_, registers, *_),) = needs[90, "hla_q", 256, 128, T, False]
    assert 2 * 8 * 32 * registers <= 65536


@row
def test_kernels_of_one_token_ask_for_what_is_there_and_then_wait(row, needs):
    """Those of a few rows, on cards that can; a weight asked for behind the wait costs the time to reach memory."""
    overlap = row in BLOCK_MAY_SPILL and row[0] >= 90 and row[2] <= 128
    others = [x for x in needs[row] if x[0] != "walk_states"]
    assert all(x[-1] == (0 if row[0] >= 90 else None) for x in needs[row] if x not in others)  # waits, then reads
    *one, last = (ahead for *_, ahead in others)
    assert last is None and [ahead for ahead in one if (ahead is not None) != overlap] == []
    assert all((ahead or 0) == 0 for name, *_, ahead in others if name == "product")
    assert not overlap or all(ahead > 0 for name, *_, ahead in others[:-1] if name != "product")


def test_one_token_of_any_layer_compiles_for_hopper():
    pytest.importorskip("triton")
    cases = [
        dict(num_key_value_heads=2, head_dim=16, head_v_dim=128),
        dict(head_dim=128, head_v_dim=24),
        dict(conv_size=0, feature_map="elu1", qk_norm="rms"),
        dict(conv_size=1, order=1),
        dict(write_gate=False, decay="none", output_gate=False, ridge=0.5, nodes="chebyshev"),
        dict(decay="fixed", ridge="head", output_norm=False, feature_map="relu", qk_norm="none", conv_size=2),
    ]
    assert result(start("compile_layers", cases)) == [0] * 2 * len(cases)


@pytest.mark.parametrize("heads,hidden_size", [(16, 2048), (12, 768)])
def test_products_of_few_rows_only_stream(heads, hidden_size):
    """Their weights go to shared memory ahead of time, by all versions of Triton, also those chosen by a condition."""
    pytest.importorskip("triton")
    found = result(start("count_loads", [90, "block", 8, hidden_size, heads]))
    assert len(found) == 4 and all(plain == 0 and copies > 0 for plain, copies in found)


@pytest.mark.parametrize("name", OPERATORS)
def test_other_lengths_batches_and_packings_compile_nothing(name, compiled_anew):
    assert compiled_anew[name] == []


def test_what_is_compiled_ahead_is_what_is_launched():
    pytest.importorskip("triton")
    for name, surprises in result(start("count_surprises", list(OPERATORS))).items():
        assert surprises == [], name


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](json.loads(sys.argv[2]))))
