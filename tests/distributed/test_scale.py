"""The formulas of docs/scale.md against parameters, bytes and memory of real runs; the page against its data."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from benchmarks.scale import __main__ as scale
from benchmarks.scale import counting, formulas
from benchmarks.scale.peers import ring_attention, ulysses_attention
from benchmarks.scale.times import Links, Rates, block_products, step
from hla.models import SIZES, HLAConfig, count_parameters
from tests.distributed.test_collectives import NUMBERS
from tests.ops.cases import assert_close

ROOT = Path(__file__).parents[2]
LARGE = formulas.config_of("large")


@pytest.mark.parametrize("config", [*map(formulas.config_of, SIZES), counting.TINY], ids=[*SIZES, "grouped"])
def test_parameters(config):
    assert formulas.parameters(config) == count_parameters(config)


def test_two_processes_send_and_keep_what_the_formulas_say():
    lines: list[str] = []
    assert counting.run(2, lines.append), "\n".join(lines)
    for what in ("layer", "model", "FSDP2", "activation checkpointing", "ring", "Ulysses", "block per token", "fold"):
        assert any(what in line and line.endswith("equal") for line in lines), what


def check_four(groups, rank):
    found = list(counting.all_checks(groups[4]))
    assert len(found) > 10
    for what, expected, counted in found:
        assert expected == counted, f"{what}: {counted}, by formula {expected}"


def test_four_processes(run):
    run(check_four)


def check_counter(groups, rank):
    """Each collective, of 3 numbers per rank."""
    group, four, twelve = groups[4], torch.zeros(3), torch.zeros(12)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    with counting.Counter(4) as counter:
        gather(twelve, four, group=group)
        dist.all_to_all_single(torch.zeros(12), twelve, group=group)
        scatter(four, twelve, group=group)
        dist.all_reduce(four, group=group)
        received = dist.irecv(torch.zeros(5), (rank - 1) % 4, group=group)
        dist.isend(torch.zeros(5), (rank + 1) % 4, group=group).wait()
        received.wait()
    assert counter.traffic == formulas.Traffic(36, 36, 36, 12, 20)
    with counting.Counter(4), pytest.raises(NotImplementedError, match="broadcast"):
        dist.broadcast(four, 0, group=group)


def test_the_counter_counts(run):
    run(check_counter)


def check_peers(groups, rank):
    whole = [x.requires_grad_() for x in counting._heads(torch.float32)]
    weights = torch.randn(2, 8, counting.TOKENS, 10, generator=torch.Generator().manual_seed(1))
    expected = F.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True)
    truth = torch.autograd.grad((expected * weights).sum(), whole)
    mine = lambda x: x.detach().chunk(4, 2)[rank]  # noqa: E731
    for attention in (ring_attention, ulysses_attention):
        pieces = [mine(x).clone().requires_grad_() for x in whole]
        o = attention(*pieces, groups[4])
        assert_close(o, mine(expected), 1e-5, f"output of {attention.__name__}")
        for name, dx, all_dx in zip("qkv", torch.autograd.grad((o * mine(weights)).sum(), pieces), truth, strict=True):
            assert_close(dx, mine(all_dx), 1e-5, f"gradient of {name} of {attention.__name__}")


def test_the_peers_are_softmax_attention(run):
    run(check_peers)


def test_numbers_of_a_summary():
    for name, expected in NUMBERS.items():
        op, order = ("ahla", 3) if name == "ahla3" else (name.removesuffix("4"), 2)
        assert formulas.summary_numbers(op, HKV=2, HP=4, K=3, V=5, order=order) == expected


def test_where_it_sends_less():
    """The crossings docs/scale.md names, for K = V = 128 and 16 heads, without halos."""
    summary = formulas.summary_bytes(LARGE) - 4 * 16
    K, sp = 128, 8
    for checkpointing, ring_at, ulysses_at in ((False, K, K), (True, 1.2 * K, K)):
        hla = (3 if checkpointing else 2) * (sp - 1) * summary
        # per local token, without the one hop that takes a ring's gradients home
        ring = formulas.ring_layer(LARGE, sp, sp * 1000, checkpointing=checkpointing).total / 1000
        ring -= 4 * 2 * K * 16
        assert hla / ring == pytest.approx(ring_at)
        ulysses = formulas.ulysses_layer(LARGE, sp, sp * 1000, checkpointing=checkpointing).total / 1000
        assert hla / ulysses == pytest.approx(ulysses_at * sp)
    assert formulas.ulysses_layer(LARGE, 32, 1 << 20) is None


def test_memory():
    whole = formulas.memory(LARGE, ranks=1, sp=1, tokens=1024, checkpointing=False, working_bytes=10)
    assert whole.sharded == 16 * formulas.parameters(LARGE) and whole.summaries == 0
    assert whole.activations == 24 * 1024 * formulas.activation_bytes(LARGE)
    assert whole.working == 10 * 1024 + formulas.LOSS_BYTES
    again = formulas.memory(LARGE, ranks=1, sp=1, tokens=1024, checkpointing=True, working_bytes=10)
    assert again.activations == 1024 * (24 * 2 * 2048 + formulas.activation_bytes(LARGE))
    cut = formulas.memory(LARGE, ranks=8, sp=4, tokens=1024, checkpointing=False, working_bytes=10)
    assert cut.activations == whole.activations / 4 and cut.summaries > 0
    assert whole.sharded / 8 <= cut.sharded < 1.001 * whole.sharded / 8


@pytest.mark.parametrize("change", [{"op": "hla2"}, {"tie_word_embeddings": False}, {"decay": "none"}])
def test_other_forms_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        formulas.parameters(HLAConfig(**change))


def test_rates_are_the_measured_ones():
    rates = Rates()
    rows = [r for r in csv.DictReader(open(ROOT / "benchmarks/results/ops_cuda.csv")) if r["T"] == "32768"]
    measured = {r["operator"]: (float(r["forward_ms"]) / 1e3, float(r["forward_backward_ms"]) / 1e3) for r in rows}
    assert rates.mixer("hla_q", LARGE, 32768) == pytest.approx(measured["hla_q default form"])
    longer = rates.mixer("hla_q", LARGE, 65536), rates.mixer("softmax", LARGE, 65536)
    assert longer[0][1] == pytest.approx(2 * measured["hla_q default form"][1])
    assert longer[1][1] == pytest.approx(4 * measured["sdpa cudnn"][1])
    peak = next(float(r["peak_mib"]) for r in rows if r["operator"] == "hla_q default form") * 2**20 / 32768
    assert rates.working_bytes(LARGE) == pytest.approx(peak)
    assert rates.working_bytes(formulas.config_of("medium")) == pytest.approx(peak / 2)
    for size in ("base", "medium", "large"):  # a prompt takes what it took
        config, (length, seconds) = formulas.config_of(size), rates.prompts[size]
        block = block_products(config) * length / rates.matmul + rates.mixer("hla_q", config, length)[0]
        block += rates.between(size, config) * length
        assert config.num_hidden_layers * block == pytest.approx(seconds) and rates.between(size, config) > 0


def test_links():
    links = Links(nvlink=100, network=10, node=8, latency=0)
    assert links.gather(700, 8) == links.exchange(700, 8) == links.ring(700, 8) == 7
    assert links.gather(1500, 16) == 15  # 8/15 of it through 8 adapters of 10: inside takes longer
    assert links.exchange(1500, 16) == 80  # the same through one
    assert links.ring(1500, 16) == 1500 / 80
    assert links.gather(1e9, 1) == links.exchange(1e9, 1) == links.ring(1e9, 1) == 0
    assert Links(latency=1).gather(0, 64) == 6 and Links(latency=1).ring(0, 64) == 63


def test_a_step():
    rates, links = Rates(), Links()
    at = lambda method, sp, again=False: step(  # noqa: E731
        method, "large", LARGE, rates, links, ranks=64, sp=sp, tokens=1 << 20, checkpointing=again
    )
    alone, spread = at("hla", 1), at("hla", 8)
    assert alone.summaries == alone.exposed == 0 and spread.summaries > 0 and spread.exposed > 0
    assert spread.products == pytest.approx(alone.products / 8) and spread.between == pytest.approx(alone.between / 8)
    assert at("ring", 8).products == spread.products and at("ring", 8).mixer > 10 * spread.mixer
    assert at("ulysses", 32) is None and at("ulysses", 8).exposed > 0
    assert at("hla", 8, True).between == pytest.approx(spread.between * 4 / 3)
    slow = step("hla", "large", LARGE, rates, Links(nvlink=1e9), ranks=64, sp=8, tokens=1 << 20, checkpointing=False)
    assert slow.exposed > 10 * spread.exposed


def committed():
    with open(ROOT / "benchmarks" / "results" / "scale.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_committed_bytes_are_those_of_the_formulas():
    rows = committed()
    keys = {(r["size"], int(r["gpus"]), int(r["tokens"])) for r in rows if r["layout"] == "all GPUs"}
    assert keys == {(s, g, t) for s in ("large", "medium") for g in scale.GPUS for t in scale.TOKENS}
    for r in rows:
        config, sp, tokens = formulas.config_of(r["size"]), int(r["sp"]), int(r["tokens"])
        again = r["checkpointing"] == "1"
        assert int(r["hla_bytes_per_layer"]) == formulas.hla_layer(config, sp, 1, again).total
        assert int(r["ring_bytes_per_layer"]) == formulas.ring_layer(config, sp, tokens, 1, again).total
        ulysses = formulas.ulysses_layer(config, sp, tokens, 1, again)
        assert r["ulysses_bytes_per_layer"] == ("" if ulysses is None else str(ulysses.total))
        assert int(r["fsdp_bytes"]) == formulas.fsdp_step(config, int(r["gpus"])).total


def test_the_page_has_the_committed_numbers(capsys):
    rows = [{name: _number(x) for name, x in row.items()} for row in committed()]
    scale.print_table(rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 40
    for line in lines:
        assert line in page, line


def test_the_page_has_the_formulas():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    written = dict(re.findall(r"^\| ([\w, ]+) \| (?:all-gather |all-reduce )?`([^`]+)`", page, re.MULTILINE))
    c, n = counting.TINY, 4
    names = {"D": 20, "I": 28, "H": 8, "G": 4, "K": 6, "V": 10, "conv_size": 3, "L": 3, "n": n, "R": 4, "t": 5}
    names |= {"C": formulas.channels(c), "P": formulas.parameters(c)}

    def value(row: str) -> float:
        formula = written[row].split(" = ")[-1].replace("^", "**")
        formula = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula)
        return eval(re.sub(r"\)\(", ") * (", formula), names)

    names |= {"m": value("summary"), "h": value("halo of the convolution")}
    assert (names["m"], names["h"]) == (formulas.summary_bytes(c), formulas.halo_bytes(c))
    assert value("activations, per token and layer") == formulas.activation_bytes(c)
    assert value("HLA, per layer") == formulas.hla_layer(c, n).all_gather
    assert value("Ulysses, per layer") == formulas.ulysses_layer(c, n, n * names["t"]).total
    assert value("ring attention, per layer") == formulas.ring_layer(c, n, n * names["t"]).total - 4 * n * 5 * 4 * 16
    matrices, others, root = (
        formulas.numbers(f(c), 4) for f in (formulas.layer_matrices, formulas.layer_others, formulas.root_shapes)
    )
    names |= {"M": matrices, "S": others, "P_root": root}  # padded
    assert value("FSDP2, per step") == formulas.fsdp_step(c, 4).all_gather
    assert value("summaries kept") == formulas.fold_bytes(c, n)
    assert value("parameters, gradients, AdamW") == 16 * formulas.parameters(c) / 4


def _number(text: str):
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text
