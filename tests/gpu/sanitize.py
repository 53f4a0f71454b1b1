"""Every kernel once on little data, for NVIDIA's memory checker, which pytest would only slow down:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.gpu.sanitize
PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python -m tests.gpu.sanitize

Prints the cases as they end. The checker prints what it found, and its number of errors last.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import hla
from hla.models import HLACache, HLAConfig, HLAForCausalLM

OPERATORS: dict[str, Callable[..., Tensor]] = {
    "linear_attn": hla.linear_attn, "hla2": hla.hla2, "ahla": hla.ahla, "hla3": hla.hla3, "hla_q": hla.hla_q,
}  # fmt: skip


def operator(name: str, B: int, T: int, D: int, gated: bool, packed: bool = False) -> None:
    """Forward and backward, with two query heads to one of k."""
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = new(B, T, 2, D), new(B, T, 1, D), new(B, T, 1, D)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    options = {}
    if gated:
        options["g"] = -torch.rand(B, T, 1, device="cuda") / 10
    if name == "hla_q":
        options |= {"ridge": 0.5 + torch.rand(B, T, 2, device="cuda"), "nodes": torch.rand(B, T, 2, 5, device="cuda")}
    inputs = [x.detach().requires_grad_() for x in (q, k, v, *options.values())]
    options = dict(zip(options, inputs[3:], strict=True))
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 70, 70, T], device="cuda", dtype=torch.int32)
    found = OPERATORS[name](*inputs[:3], **options)
    o = found[0] if isinstance(found, tuple) else found
    o.backward(torch.randn_like(o))
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


def model(head_dim: int, **settings: object) -> HLAForCausalLM:
    torch.manual_seed(0)
    config = HLAConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, num_hidden_layers=2, intermediate_size=1100, vocab_size=500,
        **settings,
    )  # fmt: skip
    return HLAForCausalLM(config).cuda()


def training(head_dim: int) -> None:
    """A step of a model: convolution, features, gates, norms, loss."""
    trained, ids = model(head_dim), torch.randint(500, (2, 150), device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        trained(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in trained.parameters())


@torch.inference_mode()
def generation(head_dim: int, rows: int) -> None:
    """A prompt and two tokens of ``rows`` rows."""
    generating = model(head_dim).eval().to(torch.bfloat16)
    cache, ids = HLACache(generating.config), torch.randint(500, (rows, 12), device="cuda")
    generating(input_ids=ids[:, :10], past_key_values=cache)
    for t in (10, 11):
        assert generating(input_ids=ids[:, t : t + 1], past_key_values=cache).logits.isfinite().all()


@torch.inference_mode()
def step(name: str, rows: int, D: int, tokens: int, packed: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, tokens, h, D, device="cuda", dtype=torch.bfloat16) / D**0.5 for h in (2, 1, 1))
    _, state = OPERATORS[name](q, k, v, output_final_state=True)
    state = state.pack() if packed else state
    assert hla.step(name, q, k, v, state, out_state=state)[0].isfinite().all()


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for name in OPERATORS:
        for D in (64, 128):
            for gated in (False, True):
                for B, T, packed in ((2, 150, False), (1, 150, True), (1, 1100, False)):
                    text = f"{name}, {B} x {T} x {D}" + ", gated" * gated + ", packed" * packed
                    yield text, lambda a=(name, B, T, D, gated, packed): operator(*a)
    for D in (64, 128):
        yield f"training, {D}", lambda D=D: training(D)
        for rows in (1, 2, 5, 70, 140):  # of one row, of two, tiles, two programs on a multiprocessor, cuBLAS
            yield f"generation, {D}, {rows} rows", lambda D=D, rows=rows: generation(D, rows)
    for name in ("linear_attn", "hla2", "hla3", "hla_q"):
        for tokens, packed in ((1, False), (3, False), (1, True)):
            if not (packed and name == "linear_attn"):
                text = f"step of {name}, {tokens}" + ", packed" * packed
                yield text, lambda a=(name, 3, 128, tokens, packed): step(*a)


def main() -> None:
    wanted = sys.argv[1:]
    for text, run in cases():
        if not wanted or any(part in text for part in wanted):
            run()
            torch.cuda.synchronize()
            print(text, flush=True)


if __name__ == "__main__":
    main()
