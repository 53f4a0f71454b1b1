"""What the heads of a model read: attention maps, spectra and gates of every layer on a text, as one HTML page.

An HLA layer never forms a T x T matrix, but it is linear in its values: its output is ``A V`` with the matrix A of
`hla.reference.weights`. So a layer has attention maps as softmax attention has them, except that weights have signs and
rows need not sum to 1. `record` runs a model and keeps what each operator was given; a `Record` derives the rest.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hla.errors import HLAError
from hla.layers import HigherOrderLinearAttention
from hla.ops import reference
from hla.ops.family import transforms_keys
from hla.plots import Panel, attention_map, curves, strips

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_TOKENS = 512
SPECTRUM_POINTS = 128  # positions at which eigenvalues are computed
NONZERO = 1e-6  # of the largest eigenvalue: what is smaller counts as 0 where no ridge is added
PAGE = "inspect.html"


@dataclass
class Record:
    """What one layer computed on one text.

    op: the operator, or ``"softmax"``. q, k: ``[1, T, heads, K]``, v: ``[1, T, heads, V]``, as the operator got them.
    options: its other arguments (g, ridge, gain, nodes, ...). o: what it returned, ``[1, T, HQ, V]``. hidden, output:
    ``[1, T, hidden_size]``, into and out of the layer. write: the write gate ``[1, T, HKV]``, or None.
    """

    op: str = "softmax"
    order: int | None = None
    q: Tensor = field(default_factory=lambda: torch.empty(0))
    k: Tensor = field(default_factory=lambda: torch.empty(0))
    v: Tensor = field(default_factory=lambda: torch.empty(0))
    o: Tensor = field(default_factory=lambda: torch.empty(0))
    options: dict[str, Any] = field(default_factory=dict)
    write: Tensor | None = None
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))

    def weights(self) -> Tensor:
        """The effective attention of every head, float64 ``[HQ, T, T]``: the operator's output is ``weights @ v``."""
        q, k = self.q.double(), self.k.double()
        if self.op != "softmax":
            options: dict[str, Any] = {n: x.double() if isinstance(x, Tensor) else x for n, x in self.options.items()}
            return reference.weights(self.op, q, k, **options)[0]
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = q[0].transpose(0, 1) @ k[0].permute(1, 2, 0) * q.shape[-1] ** -0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(-1)

    def read(self, weights: Tensor) -> Tensor:
        """``weights @ v``, float64 ``[1, T, HQ, V]``."""
        v = self.v.double().repeat_interleave(weights.shape[0] // self.v.shape[2], dim=2)
        return (weights @ v[0].transpose(0, 1)).transpose(0, 1)[None]

    def transforms_keys(self) -> bool:
        """Whether the operator has keys k~, and so the state S with the gate 2g."""
        return self.op != "softmax" and transforms_keys(self.op, self.order or 2)  # ahla of a layer is of order 2

    def spectrum(self) -> dict[str, Any]:
        """The eigenvalues of the keys' moment ``S_t = sum_j decay_tj k_j k_j^T`` at up to 128 positions.

        Returns:
            ``x``, the positions; ``share`` and ``rank``, ``[HKV, points]``: the largest eigenvalue over the trace, and
            the effective rank ``exp(-sum_i s_i log s_i)`` of the shares ``s_i``; ``condition``, ``[HQ, points]`` for
            hla_q, of ``S_t + ridge_t I``, the matrix it inverts; else ``[HKV, points]``, of S_t on its own range.
        """
        k = self.k[0].double().transpose(0, 1)  # [HKV, T, K]
        length = k.shape[1]
        points = torch.linspace(0, length - 1, min(length, SPECTRUM_POINTS), device=k.device).round().long()
        decay = torch.ones(length, length, dtype=k.dtype, device=k.device).tril()[points].expand(len(k), -1, -1)
        g = self.options.get("g")
        if g is not None:
            # k~ reads S with the gate 2g, see hla.ops.family.
            gate = 2 if self.transforms_keys() else 1
            sums = gate * g[0].double().T.cumsum(-1)
            decay = decay * (sums[:, points, None] - sums[:, None]).clamp(max=0).exp()
        values = torch.stack(
            [torch.linalg.eigvalsh(torch.einsum("tj,jk,jl->tkl", *x)) for x in zip(decay, k, k, strict=True)]
        ).clamp(min=0)
        shares = values / values.sum(-1, keepdim=True).clamp(min=1e-300)
        largest = values[..., -1]
        if self.op == "hla_q":
            ridge = self.options["ridge"]
            r = ridge[0].double().T[:, points] if isinstance(ridge, Tensor) else ridge
            group = self.q.shape[2] // len(k)
            least, most = (x.repeat_interleave(group, dim=0) + r for x in (values[..., 0], largest))
        else:
            nonzero = values > NONZERO * largest[..., None]
            least, most = values.where(nonzero, largest[..., None]).amin(-1), largest
        return {
            "x": points.tolist(),
            "share": shares[..., -1],
            "rank": torch.special.entr(shares).sum(-1).exp(),
            "condition": most / least.clamp(min=1e-300),
        }

    def gates(self) -> list[Panel]:
        """Per token and head, ``[heads, T]``: decay, write gate, ridge, gain, ... (those the layer has), and |o|."""
        panels = []
        g = self.options.get("g")
        if g is not None:
            panels.append(Panel(_lines(g.exp()), "decay exp(g)", limits=(0, 1)))
        if self.write is not None:
            panels.append(Panel(_lines(self.write), "write gate b", limits=(0, 1)))
        for name in ("ridge", "gain", "value_ridge", "value_gain"):
            x = self.options.get(name)
            if isinstance(x, Tensor):
                panels.append(Panel(_lines(x), name.replace("_", " "), log=bool((x > 0).all())))
        size = self.o.square().mean(-1).sqrt().clamp(min=1e-12)
        return [*panels, Panel(_lines(size), "size of the output", log=True)]

    def nodes(self) -> Tensor | None:
        """The nodes of hla_q ``[HQ, order + 1]``, means over the tokens if the layer has them per token."""
        nodes = self.options.get("nodes")
        return nodes if nodes is None or nodes.dim() == 2 else nodes[0].mean(0)


def _lines(x: Tensor) -> list[list[float]]:
    """``[1, T, heads]`` as one line per head."""
    return x[0].T.tolist()


def record(model: PreTrainedModel, ids: Sequence[int]) -> list[Record]:
    """Run a model on a text and keep what every layer computed.

    Args:
        model: an `hla.HLAForCausalLM`.
        ids: the tokens, at least 2.
    """
    mixers = [block.mixer for block in model.model.layers]
    records = [Record() for _ in mixers]
    device = next(model.parameters()).device
    with ExitStack() as stack, torch.no_grad():
        for mixer, kept in zip(mixers, records, strict=True):
            stack.enter_context(watch(mixer, kept))
        model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    return records


@contextmanager
def watch(mixer: nn.Module, kept: Record) -> Iterator[None]:
    """While this is open, a call of the layer leaves in ``kept`` what it computed."""
    linear = isinstance(mixer, HigherOrderLinearAttention)
    name = "_operate" if linear else "_attend"
    original = getattr(mixer, name)

    def operate(q: Tensor, k: Tensor, v: Tensor, options: Any, *others: Any) -> Any:
        result = original(q, k, v, options, *others)
        if isinstance(mixer, HigherOrderLinearAttention):
            options = mixer._operator_options(options)  # (with order and scale)
            # (a coefficient per head is a view of its parameter, even where no gradients are kept)
            kept.options = {n: x.detach() if isinstance(x, Tensor) else x for n, x in options.items()}
            kept.q, kept.k, kept.v, kept.o = q, k, v, result[0]
        else:  # with heads before tokens
            kept.q, kept.k, kept.v, kept.o = (x.transpose(1, 2) for x in (q, k, v, result))
        return result

    def whole(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        kept.hidden, kept.output = inputs[0], output[0] if linear else output

    def written(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept.write = torch.sigmoid(output)

    hooks = [mixer.register_forward_hook(whole)]
    if isinstance(mixer, HigherOrderLinearAttention):
        kept.op, kept.order = mixer.op, mixer.order if mixer.op == "hla_q" else None
        if mixer.write_gate:
            hooks.append(mixer.write_proj.register_forward_hook(written))
    setattr(mixer, name, operate)
    try:
        yield
    finally:
        delattr(mixer, name)
        for hook in hooks:
            hook.remove()


# ------------------------------------------------------------------------------------------------ what the maps show

KINDS = ("itself", "1 back", "2 to 3 back", "4 to 15 back", "16 and more back", "same token", "after the same token")


def where_weight_lies(weights: Tensor, ids: Sequence[int]) -> list[list[float]]:
    """The share of each row's ``sum |weight|`` that lies on each of KINDS, and on negative weights; means over rows.

    The last two kinds overlap the others: earlier places of the same token, and the tokens that came right after those
    places (what recall and copying read); their means are over the rows that have such a place (NaN if none has).

    Args:
        weights: ``[H, T, T]``. ids: the T tokens.

    Returns:
        For each head the shares of KINDS and, last, the negative share.
    """
    length = weights.shape[-1]
    position = torch.arange(length, device=weights.device)
    back = position[:, None] - position
    tokens = torch.tensor(list(ids), device=weights.device)
    same = (tokens[:, None] == tokens) & (back > 0)
    after = torch.zeros_like(same)
    after[:, 1:] = same[:, :-1]
    masks = [back == 0, back == 1, (back >= 2) & (back < 4), (back >= 4) & (back < 16), back >= 16, same, after]
    size = weights.abs()
    shares = size / size.sum(-1, keepdim=True).clamp(min=1e-300)
    rows = []
    for share, signed in zip(shares, weights, strict=True):
        means = [(share * mask).sum(-1) for mask in masks]
        kept = [x[mask.any(-1)] if i >= 5 else x for i, (x, mask) in enumerate(zip(means, masks, strict=True))]
        rows.append([float(x.mean()) for x in kept] + [float((share * (signed < 0)).sum(-1).mean())])
    return rows


def strongest(weights: Tensor, t: int, labels: Sequence[str], count: int = 3) -> str:
    """The tokens that row t of one map ``[T, T]`` reads most, with position and relative weight, as text."""
    row = weights[t, : t + 1]
    best = row.abs().topk(min(count, t + 1)).indices.tolist()
    largest = float(row.abs().max()) or 1.0
    return ", ".join(f"{labels[j]} ({j}) {float(row[j]) / largest:+.2f}" for j in best)


# ---------------------------------------------------------------------------------------------------------- the page

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1500px; margin: 2em auto; padding: 0 1em; color: #222; }
img { max-width: 100%; display: block; margin: 0.5em 0 1em; }
p, ul { max-width: 52em; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; font-size: 13px; }
th, td { border-bottom: 1px solid #ddd; padding: 0.2em 0.7em; text-align: right; }
th:first-child, td:first-child, .words td, .words th { text-align: left; }
.words td { font-family: ui-monospace, monospace; }
.text { font-family: ui-monospace, monospace; line-height: 2; max-width: none; }
.text span { background: #f0f2f5; border-radius: 3px; padding: 0.1em 0.15em; margin: 0 1px; white-space: pre-wrap; }
.text sub { color: #888; }
"""

HOW_TO_READ = """
<h2>How to read this page</h2>
<p>A layer's operator returns <code>o = A V</code>: row t of the matrix A says with which weight token t reads the
value of each token j. HLA never forms A, but A is what it computes. Four things differ from softmax attention. Weights
have signs: <b>red</b> adds a value, <b>blue</b> subtracts it (the sign of a whole head means nothing, its values could
be turned as well). Rows do not sum to 1, and each head's output is normalised afterwards; so colours are relative to
the largest weight of the row. Key and value of a token come out of a short convolution, if the model has one, so they
hold a little of the tokens just before it. And weights of higher order are sums over paths through other tokens, not
the match of one query with one key.</p>
<ul>
<li><b>Attention maps</b>: rows read, columns are read. A diagonal line is a fixed distance; a column is a token that
everyone reads; a single spot is a choice by content; a band that fades below the diagonal is decay, and one that ends
at once is a reset.</li>
<li><b>Where the weight lies</b>: shares of the row's sum of |weight|, means over rows. "Same token" are earlier places
of the token that reads, "after the same token" what came next there: the place that copying and recall read (means
over rows that have such a place; they overlap the distances). The last line is what reading all tokens alike would
give.</li>
<li><b>Spectrum of S</b>: S<sub>t</sub> is the decayed sum of k k<sup>T</sup> so far; where an operator has no S it is
shown all the same, as the second moment of its keys. A largest share near 1 says that the keys all point one way; the
effective rank says how many directions are in use (at most the head's width). The condition number says how far apart
strong and weak directions are: for hla_q that of S + ridge I, which its steps invert (well up to a condition of about
the order squared, with Chebyshev's nodes); else that of S without its zeros.</li>
<li><b>Gates</b>, one row of colours per head. The decay exp(g) multiplies the state before each token: 1 keeps
everything, 0.9 halves it in 7 tokens, 0 forgets all. The write gate b is the share with which a token enters S and P
(k and v are multiplied by its root). The ridge is what least squares adds to S: far below S's eigenvalues the head
recalls exactly, far above it is plain linear attention with a small output. The size of the output (root mean square
of a head's numbers, before the norm) matters only when it is small: the norm lifts what is above the root of its
eps (0.001 by default), and a head far below that is silent at that token. The nodes set hla_q's step sizes,
1 / (ridge + node trace(S)): a small node is a long step.</li>
</ul>
"""


def page(records: Sequence[Record], ids: Sequence[int], tokens: Sequence[str], name: str) -> str:
    """The HTML page: text, how to read it, and for every layer its maps, tables, spectrum and gates.

    Args:
        records: of `record`. ids, tokens: the T tokens as numbers and as texts. name: what to call the model.
    """
    labels = [visible(token) for token in tokens]
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}: what its heads read</title>',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(name)}: what its heads read</h1>",
        f"<p>{len(records)} layers on {len(tokens)} tokens, the first of which stands for the start of a document. "
        "Small numbers count positions.</p>",
        '<p class="text">' + "".join(_token(i, label) for i, label in enumerate(labels)) + "</p>",
        HOW_TO_READ,
    ]
    for number, kept in enumerate(records):
        parts += _layer(number, kept, ids, labels)
    return "\n".join([*parts, "</body></html>", ""])


def _layer(number: int, kept: Record, ids: Sequence[int], labels: Sequence[str]) -> Iterator[str]:
    weights = kept.weights()
    heads = [f"head {h}" for h in range(len(weights))]
    what = kept.op + (f" of order {kept.order}" if kept.order else "")
    grouped = kept.k.shape[2] != kept.q.shape[2]
    constants = ", ".join(
        f"{name.replace('_', ' ')} {x:g}"
        for name, x in kept.options.items()
        if isinstance(x, float) and (name, x) not in (("gain", 1.0), ("value_gain", 1.0))
    )
    truth = kept.o.double()
    error = float((kept.read(weights) - truth).norm() / truth.norm().clamp(min=1e-300))
    yield f"<h2>Layer {number}: {what}</h2>"
    yield (
        f"<p>{len(weights)} heads of width {kept.q.shape[-1]}"
        + (f", {kept.k.shape[2]} key heads" if grouped else "")
        + (f"; {constants}" if constants else "")
        + f". The maps times the values give the operator's output up to a relative error of {error:.0e}.</p>"
    )
    yield "<h3>Attention maps</h3>"
    yield _image(attention_map(weights.cpu().numpy(), tokens=labels, names=heads), f"attention maps of layer {number}")
    yield "<h3>Where the weight lies</h3>"
    length = weights.shape[-1]
    alike = torch.ones(1, length, length, dtype=weights.dtype, device=weights.device).tril()
    rows = [
        [who, *(f"{x:.0%}" if x == x else "" for x in shares)]
        for who, shares in zip([*heads, "all alike"], where_weight_lies(torch.cat([weights, alike]), ids), strict=True)
    ]
    yield _table(["", *KINDS, "negative"], rows)
    positions = sorted({round(length * part / 5) - 1 for part in range(1, 6) if round(length * part / 5) >= 2})
    yield "<p>What some positions read most (position, weight relative to the largest):</p>"
    yield _table(
        ["", *(f"{labels[t]} ({t}) reads" for t in positions)],
        [[who, *(strongest(A, t, labels) for t in positions)] for who, A in zip(heads, weights, strict=True)],
        "words",
    )
    spectrum = kept.spectrum()
    per = " (per key head)" if grouped else ""
    condition = "condition of S + ridge I" if kept.op == "hla_q" else f"condition of S without its zeros{per}"
    panels = [
        Panel(spectrum["share"].tolist(), f"largest eigenvalue / trace{per}", limits=(0, 1.03)),
        Panel(spectrum["rank"].tolist(), f"effective rank{per}"),
        Panel(spectrum["condition"].tolist(), condition, log=True),
    ]
    has_moment = kept.op == "hla_q" or kept.transforms_keys()
    yield f"<h3>Spectrum of {'S' if has_moment else 'the second moment of the keys'}</h3>"
    yield _image(curves(panels, spectrum["x"], names=heads), f"spectrum of layer {number}")
    yield "<h3>Gates</h3>"
    yield _image(strips(kept.gates(), tokens=labels), f"gates of layer {number}")
    nodes = kept.nodes()
    if nodes is not None:
        yield f"<p>Nodes{' (means over the tokens)' if kept.options['nodes'].dim() > 2 else ''}:</p>"
        rows = [[who, *(f"{x:.3f}" for x in line)] for who, line in zip(heads, nodes.tolist(), strict=True)]
        yield _table(["", *(f"step {n}" for n in range(nodes.shape[-1]))], rows)


def visible(token: str) -> str:
    """A token as text in which blanks and line ends can be seen."""
    for blank, sign in (("\r", "␍"), ("\n", "⏎"), ("\t", "⇥"), (" ", "·")):
        token = token.replace(blank, sign)
    return token or "∅"


def _token(position: int, label: str) -> str:
    mark = f"<sub>{position}</sub>" if position % 8 == 0 else ""
    return f'<span title="{position}">{html.escape(label)}</span>{mark}<wbr>'


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "shares") -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join([f'<table class="{kind}">', line(header, "th"), *(line(row, "td") for row in rows), "</table>"])


def inspect_model(folder: str, text: str, out: Path, *, tokens: int = 96, device: torch.device | None = None) -> Path:
    """Write the page of a model folder on the first tokens of a text.

    Args:
        folder: a model folder, as `hla train` writes it.
        text: the text; a token for the start of a document is put before it.
        out: the folder for ``inspect.html``; made if missing.
        tokens: how many tokens of the text to use, from 2 to 512.
        device: where to run; None is the CPU.

    Returns:
        The path of the page.

    Raises:
        HLAError: tokens out of range, no such model, a model of another kind, a text of fewer than 2 tokens, or a
            folder that cannot be written.
    """
    from hla.checkpoint import load_model
    from hla.generate import prompt_ids

    if not 2 <= tokens <= MAX_TOKENS:
        raise HLAError(f"tokens must be from 2 to {MAX_TOKENS}, not {tokens}")
    model, tokenizer, _ = load_model(folder, device)
    kind = model.config.model_type
    if kind != "hla":
        raise HLAError(f"{folder!r} is not an HLA model: its model_type is {kind!r}")
    ids = prompt_ids(tokenizer, text)[: tokens + 1]
    if len(ids) < 3:
        raise HLAError(f"the text is too short: it has {len(ids) - 1} token, and at least 2 are needed")
    texts = ["<start>", *(str(tokenizer.decode([i])) for i in ids[1:])]
    name = f"{Path(folder).resolve().name} ({model.num_parameters() / 1e6:.1f}M parameters)"
    try:
        out.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost
        content = page(record(model, ids), ids, texts, name)
        path, draft = out / PAGE, out / f".{PAGE}"
        draft.write_text(content, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise HLAError(f"cannot write to the output folder {str(out)!r}: {error.strerror or error}") from error
    return path
