"""Every form equals the golden vectors: float64 results of an independent program (plain loops, no compositions)."""

from pathlib import Path

import numpy as np
import pytest
import torch

import hla
from hla import reference
from hla.ops import dispatch
from hla.ops.checks import check_call
from tests.ops.cases import assert_close

VECTORS = np.load(Path(__file__).parent.parent / "golden" / "operators.npz")
INNER_QUERY = {0: "q", 1: "q", 2: "q", 3: "k", 6: "q", 7: "k"}  # the others have a tensor p
NORMALIZED = (6, 7)
OPS = {
    "linear_attn": {},
    "hla2": {},
    "ahla": {},
    "hla3": {},
    "hla_n4": dict(order=4),
    "hla_n5": dict(order=5),
    "ahla_order3": dict(order=3),
    "hla3_value": {},
}
CASES = [(n, name) for n in range(8) for name in OPS if f"case{n}.{name}" in VECTORS.files]


def load(n: int, field: str):
    x = torch.from_numpy(VECTORS[f"case{n}.{field}"])
    return x if x.dim() else float(x)


def test_there_are_golden_vectors_for_every_operator():
    assert {name for _, name in CASES} == set(OPS) and len(CASES) >= 50


@pytest.mark.parametrize("n,name", CASES)
def test_forms_equal_golden_vectors(n, name):
    op = {"hla_n4": "hla_n", "hla_n5": "hla_n", "ahla_order3": "ahla", "hla3_value": "hla3"}.get(name, name)
    kw = dict(normalize=n in NORMALIZED, **OPS[name])
    if f"case{n}.g" in VECTORS.files:
        kw["g"] = load(n, "g")
    if op != "linear_attn":
        ridge, gain = load(n, "ridge"), load(n, "gain")
        kw |= dict(p=INNER_QUERY[n] if n in INNER_QUERY else load(n, "p"), ridge=ridge, gain=gain)
        if name == "hla3_value":
            kw |= dict(value_ridge=ridge, value_gain=gain)
    q, k, v = (load(n, x) for x in "qkv")
    truth = load(n, name)
    assert_close(getattr(reference, op)(q, k, v, **kw), truth, 1e-12, "reference")
    assert_close(getattr(hla, op)(q, k, v, **kw)[0], truth, 1e-12, "chunk")
    recurrent = dispatch(op, "recurrent", "torch", q.device)
    assert_close(recurrent(check_call(op, q, k, v, **kw))[0], truth, 1e-12, "recurrent")
