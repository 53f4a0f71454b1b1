"""``python -m benchmarks.state_dtype``: what a bfloat16 state costs in accuracy, over 100,000 tokens of decoding.

Every operator takes the same tokens with a float64, a float32 and a bfloat16 state, in place, as an engine would; the
error is that of the outputs (relative, all heads of 64 tokens together) against float64. Decays differ by head: a state
that forgets within a few hundred tokens forgets its rounding too, one that never forgets rounds every token it adds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import hla
from benchmarks.measure import environment, say, write_csv
from hla.ops import state as states

DECAYS = (0.0, -1e-4, -1e-3, -1e-2, -1e-1)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def tokens(count: int, heads: int, dim: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (unit length) and v, ``[count, 1, heads, dim]`` float64."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, count, 1, heads, dim, dtype=torch.float64, generator=generator, device=device)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


def outputs(op: str, dtype: torch.dtype, inputs: tuple[Tensor, ...], g: Tensor, at: list[int], window: int) -> Tensor:
    """Outputs of the ``window`` tokens before each position of ``at``: ``[len(at), window, heads, dim]`` float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (x.to(wide) for x in inputs)
    heads, dim = q.shape[2:]
    state: Any = states.zeros(op, 1, heads, heads, dim, dim, dtype=wide, device=q.device)
    state = type(state)(*(None if x is None else x.to(dtype) for x in state))
    wanted = {t: (i, t - (n - window)) for i, n in enumerate(at) for t in range(n - window, n)}
    kept = torch.zeros(len(at), window, heads, dim, dtype=torch.float64, device=q.device)
    for t in range(max(at)):
        o, state = hla.step(op, q[t], k[t], v[t], state, g=g[None].float(), out_state=state)
        if t in wanted:
            kept[wanted[t]] = o[0].double()
    return kept


def measure(op: str, count: int, dim: int, device: str, window: int = 64) -> list[dict]:
    at = [n for n in (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000) if n <= count]
    g = torch.tensor(DECAYS, device=device, dtype=torch.float64)
    inputs = tokens(max(at), len(DECAYS), dim, device)
    found = {name: outputs(op, dtype, inputs, g, at, window) for name, dtype in DTYPES.items()}
    truth = found.pop("float64")
    rows = []
    for name, x in found.items():
        error = (x - truth).norm(dim=(1, 3)) / truth.norm(dim=(1, 3))
        rows += [
            {"operator": op, "D": dim, "state": name, "token": n, "g": decay, "relative_error": f"{float(e):.3g}"}
            for n, line in zip(at, error, strict=True)
            for decay, e in zip(DECAYS, line, strict=True)
        ]
    return rows


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    operators = list(dict.fromkeys(row["operator"] for row in rows))
    figure, axes = plt.subplots(1, len(operators), figsize=(4.5 * len(operators), 4), squeeze=False, sharey=True)
    for ax, op in zip(axes[0], operators, strict=True):
        for i, decay in enumerate(DECAYS):
            for name, style in (("bfloat16", "-"), ("float32", ":")):
                line = [r for r in rows if (r["operator"], r["g"], r["state"]) == (op, decay, name)]
                ax.plot(
                    [r["token"] for r in line], [float(r["relative_error"]) for r in line], style, color=f"C{i}",
                    label=f"g = {decay:g}" if name == "bfloat16" else None,
                )  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="tokens", title=op)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("relative error of the outputs")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(DECAYS), title="bfloat16 solid, float32 dotted")
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--operators", nargs="+", default=["linear_attn", "hla2", "hla_q"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/state_dtype.csv"))
    args = parser.parse_args()
    rows: list[dict] = []
    with torch.inference_mode():
        for op in args.operators:
            say(f"{op} ...")
            rows += [row | environment(args.device) for row in measure(op, args.tokens, args.dim, args.device)]
            write_csv(args.out, rows)
    plot(rows, args.out.with_suffix(".png"))
    say(f"wrote {args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
