"""On a CUDA GPU: the PyTorch form equals its float64 truth, models train under autocast and generate.

(`test_kernels` has the Triton kernels.)
"""

import pytest
import torch

import hla
from hla.ops import state as states
from tests.ops.cases import CASES, F64, Inputs, gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SOME = [(n, o) for n, o in CASES if o in ("plain", "g", "g,p=k,per token", "value_ridge,value_gain")]


@pytest.mark.parametrize("name,option", SOME)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_outputs_and_gradients_equal_the_float64_truth(name, option, dtype, tolerance):
    x = Inputs(name, option, B=2, T=300, K=16, V=24)
    results = []
    for cast, device in ((dtype, "cuda"), (F64, "cpu")):
        leaves = {}
        for n, y in x.tensors().items():
            y = y.float() if n == "g" else (0.5 * y).to(dtype)
            keep = torch.float32 if n == "g" and cast != F64 else cast
            leaves[n] = y.to(device, keep).requires_grad_()
        q, k, v, kw = x.with_tensors(leaves)
        o, _ = getattr(hla, x.op)(q, k, v, **kw, backend="torch")
        do = torch.randn(o.shape, dtype=F64, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([o, *gradients(o, leaves.values(), do.to(device, cast))])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        assert float((a.cpu().double() - b).norm() / b.norm().clamp(min=1e-30)) <= tolerance


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_packed_equals_separate_without_synchronising(backend):
    x = Inputs("hla3", "g", B=1, T=300, K=16, V=16, dtype=torch.float32)
    leaves = [y.float().cuda().requires_grad_() for y in (x.q, x.k, x.v, x.kw["g"])]
    borders = [0, 70, 70, 199, 300]
    cu = torch.tensor(borders, dtype=torch.int32, device="cuda")

    def call(q, k, v, g, **more):
        o, _ = hla.hla3(q, k, v, g=g, backend=backend, **more)
        return [o.detach(), *torch.autograd.grad(o, (q, k, v, g), torch.ones_like(o))]

    call(*leaves, cu_seqlens=cu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = call(*leaves, cu_seqlens=cu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cut = lambda a, b: [y.detach()[:, a:b].requires_grad_() for y in leaves]  # noqa: E731
    parts = [call(*cut(a, b)) for a, b in zip(borders, borders[1:], strict=False)]
    for x, *ys in zip(packed, *parts, strict=True):
        y = torch.cat(ys, 1)
        assert float((x - y).norm() / y.norm()) <= 2e-5


def test_steps_in_place_inside_a_cuda_graph():
    op, B, H, K = "hla2", 2, 4, 16
    q, k, v = (torch.randn(B, H, K, device="cuda") for _ in range(3))
    state = states.zeros(op, B, H, H, K, K, device="cuda")
    truth_state, truth = None, []
    for _ in range(4):
        o, truth_state = hla.step(op, q, k, v, truth_state)
        truth.append(o)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        hla.step(op, q, k, v, state, out_state=state)
    torch.cuda.synchronize()
    for y in state:
        if y is not None:
            y.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = hla.step(op, q, k, v, state, out_state=state)
    for expected in truth:
        graph.replay()
        assert torch.allclose(o, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["linear_attn", "hla2", "ahla", "hla3", "hla_q"])
def test_a_model_trains_under_autocast_and_generates(op):
    config = hla.HLAConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, op=op
    )
    torch.manual_seed(0)
    model = hla.HLAForCausalLM(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(64, (4, 16), device="cuda").repeat(1, 8)  # a pattern that repeats
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with torch.no_grad():
        with_cache = model.generate(ids[:1, :40], max_new_tokens=24, do_sample=False)
        without = model.generate(ids[:1, :40], max_new_tokens=24, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)
