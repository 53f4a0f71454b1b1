"""Forward and backward pass of a micro-batch as a CUDA graph: captured once per shape, replayed with one launch.

In eager mode Python launches about a hundred kernels per layer, and where that takes longer than they run the GPU waits
for it. A replay launches the same kernels, all at once. What is around them (clipping, the optimizer, checks of the
numbers, validation) stays eager. The pattern is that of whole-network capture in PyTorch's notes on CUDA graphs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hla.errors import HLAError
from hla.loss import mean_loss

EAGER = 2  # calls of a shape before its capture: kernels compile and libraries allocate in them, which a capture cannot
GRAPHS = 32  # at most: a shape has one or two, each takes some megabytes for itself, and what is left runs eagerly


@dataclass(frozen=True)
class Pool:
    """Memory that graphs which never run at the same time share: that of the largest. It is freed with the last one.

    What a graph leaves there, the next one may write over. (So gradients are elsewhere, unless a `Graphed` has a pool
    of its own.)

    Attributes:
        stream: of captures and of the calls before them, so that libraries have their workspaces for it already.
        handle: PyTorch's name of the memory.
    """

    device: torch.device
    stream: Any
    handle: Any

    @classmethod
    def on(cls, device: torch.device) -> Pool:
        """A new one on a CUDA device."""
        return cls(device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle())


class _Captured(NamedTuple):
    replay: Callable[[], None]
    inputs: dict[str, Tensor]  # static: what the graph reads
    loss: Tensor  # static: what it writes


class Graphed:
    """``loss(**inputs)`` and its backward pass: eager at first, then a graph for each shape. On a CPU always eager.

    Gradients are added in place to tensors that must stay: clear them with `zero_grad`, or with
    ``optimizer.zero_grad(set_to_none=False)``. A parameter that the loss does not reach has a gradient of zeros, not
    None. Between calls the graphs hold the memory of one call's activations. Calls must not overlap.

    A shape has two graphs: of the first call after `zero_grad`, which writes the gradients, and of those that add to
    them. Writing saves clearing, adding, and reading what was there.

    Args:
        loss: takes tensors and numbers by name and returns a scalar with gradient. On a GPU it must not wait for the
            device (``item()``, a branch on a tensor's value), autocast inside must have ``cache_enabled=False`` (the
            cache would keep casts of one call for the next), and checkpoints ``preserve_rng_state=False``.
        parameters: whose ``.grad`` it is about; those that need none are left out. All on one device.
        pool: to share the memory with other objects; by default one of its own.
    """

    def __init__(self, loss: Callable[..., Tensor], parameters: Iterable[nn.Parameter], pool: Pool | None = None):
        self._loss = loss
        self._parameters = [p for p in parameters if p.requires_grad]
        device = self._parameters[0].device
        self.pool = Pool.on(device) if pool is None and device.type == "cuda" else pool
        self._own = pool is None
        self._pool_ended = False  # of one whose graphs are gone and gradients may be there, which takes no more graphs
        self._held: list[tuple[nn.Parameter, Tensor, int]] = []  # gradients and addresses that graphs have written down
        self._given = pool is not None  # whether gradients are to stay where they are: from outside, or a shared pool
        self._cleared = False  # whether gradients count as zero, whatever is in them
        self._calls: dict[Any, int] = {}
        self._captured: dict[Any, _Captured] = {}  # by shape, and whether gradients are written

    def __call__(self, **inputs: Tensor | float) -> Tensor:
        """The loss, a scalar without gradient of its own; that of the parameters is added to their ``.grad``.

        Args:
            inputs: tensors on the device of the parameters, read when the call runs; numbers, which with the shapes
                and dtypes of the tensors make the key of a graph.

        Raises:
            HLAError: the graph cannot be captured or does not fit into memory, or weights or gradients are no longer
                the tensors that it knows.
        """
        if self.pool is None:
            return self.eager(**inputs)
        if self._pool_ended and self.pool.device.type == "cuda":
            self.pool = Pool.on(self.pool.device)
        self._pool_ended = False
        self._hold_gradients()
        key = tuple((n, x.shape, x.dtype) if isinstance(x, Tensor) else (n, x) for n, x in inputs.items())
        full = len(self._captured) == GRAPHS
        if full and (key, True) not in self._captured and (key, False) in self._captured:
            self.settle()  # and add to zeros
        if (key, self._cleared) not in self._captured:
            calls = self._calls[key] = self._calls.get(key, 0) + 1
            if calls <= EAGER:
                return self._beside(self.pool, inputs)
            if full:
                return self.eager(**inputs)
            self._captured[key, self._cleared] = self._capture(self.pool, inputs)
        captured = self._captured[key, self._cleared]
        for name, static in captured.inputs.items():
            static.copy_(inputs[name])  # type: ignore[arg-type]
        captured.replay()
        self._cleared = False
        return captured.loss.clone()

    def eager(self, **inputs: Tensor | float) -> Tensor:
        """The same without a graph, whatever the shape; also for inputs for which the loss must wait for the device."""
        self.settle()
        return self._run(inputs)

    def zero_grad(self) -> None:
        """Gradients are None until the next call, which may write them, or `settle`."""
        self._hold_gradients()
        self._cleared = True
        for p in self._parameters:  # so that nobody adds to what is still in them
            p.grad = None

    def settle(self) -> None:
        """Sees to it that there are gradients: zeros, if they were cleared and no call has come since."""
        self._hold_gradients()
        if self._cleared:
            for _, grad, _ in self._held:
                grad.zero_()
        self._cleared = False

    def release(self) -> None:
        """Forgets all graphs; calls that follow begin anew. To be called before a process group ends whose collectives
        are in them: NCCL would wait for them there, for ever.
        """
        self._captured.clear()
        self._calls.clear()
        self._pool_ended = self._own

    def _run(self, inputs: Mapping[str, Tensor | float]) -> Tensor:
        # The loss with its history ends here: a node of it that lived on would keep the stream of this call.
        loss = self._loss(**inputs)
        loss.backward()
        return loss.detach()

    def _run_for_graph(self, inputs: Mapping[str, Tensor | float]) -> Tensor:
        """What is captured. The first graph, if it writes gradients, also makes them, in its memory."""
        if not self._cleared:
            return self._run(inputs)
        if not self._captured and not self._given:
            self._held = []  # (their memory is free again)
        try:
            for p in self._parameters:
                p.grad = None
            loss = self._run(inputs)
            if not self._held:
                self._held = [(p, _gradient(p), p.data_ptr()) for p in self._parameters]
            elif reached := [(held, p.grad) for p, held, _ in self._held if p.grad is not None]:
                torch._foreach_copy_([held for held, _ in reached], [grad for _, grad in reached])
            for held in (held for p, held, _ in self._held if p.grad is None):
                held.zero_()
        finally:  # (also if there was no memory for it)
            for p, held, _ in self._held:
                p.grad = held
        return loss

    def _hold_gradients(self) -> None:
        """Makes gradients before autograd does; once there is a graph sees that it knows them."""
        if self._cleared:  # what somebody else has added since, by a backward pass of their own, counts
            added = any(p.grad is not None and p.grad is not grad for p, grad, _ in self._held)
            for p, grad, _ in self._held:
                if added:
                    grad.zero_() if p.grad is None else grad.copy_(p.grad)
                p.grad = grad
            self._cleared = not added
        if not self._captured:
            mine = {id(grad) for _, grad, _ in self._held}
            self._given |= any(p.grad is not None and id(p.grad) not in mine for p in self._parameters)
            for p in self._parameters:
                p.grad = _gradient(p)
            self._held = [(p, p.grad, p.data_ptr()) for p in self._parameters if p.grad is not None]
        elif any(p.grad is not grad or p.data_ptr() != place for p, grad, place in self._held):
            raise HLAError(
                "a weight or its gradient is no longer the tensor that the CUDA graph was captured with: weights must "
                "be changed in place, and gradients cleared with zero_grad(set_to_none=False)"
            )

    def _beside(self, pool: Pool, inputs: Mapping[str, Tensor | float]) -> Tensor:
        """Eagerly on the stream of captures."""
        self.settle()
        here = torch.cuda.current_stream(pool.device)
        pool.stream.wait_stream(here)
        with torch.cuda.stream(pool.stream):
            loss = self._run(inputs)
        here.wait_stream(pool.stream)
        return loss

    def _capture(self, pool: Pool, inputs: Mapping[str, Tensor | float]) -> _Captured:
        static = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # what is left of earlier calls in cycles keeps their streams, too
        try:
            # The stream twice: a capture that fails does not give back the one that it had set.
            with torch.cuda.device(pool.device), torch.cuda.stream(pool.stream):
                with torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode=_capture_mode()):
                    loss = self._run_for_graph(static)
        except BaseException as error:
            with suppress(RuntimeError):
                graph.reset()  # (or collectives in it would be waited for, see `release`)
            if isinstance(error, RuntimeError):
                raise _refusal(error) from error
            raise
        return _Captured(graph.replay, {n: x for n, x in static.items() if isinstance(x, Tensor)}, loss)


def _capture_mode() -> str:
    """Of which threads a capture minds what it cannot have. Collectives have one that asks the device for events."""
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    return "thread_local" if ranks else "global"


def _gradient(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _refusal(error: RuntimeError) -> HLAError:
    """What is to be said of a capture that failed. Its first error counts, not that of the end of the capture."""
    first = error.__context__ or error
    if isinstance(first, torch.OutOfMemoryError) or isinstance(error, torch.OutOfMemoryError):
        return HLAError(
            "there is no memory for the CUDA graph of a micro-batch, which keeps its activations between steps: take a "
            "smaller --batch-size (with more --accumulate), --recompute or --no-cuda-graphs"
        )
    reason = (str(first).strip() or type(first).__name__).splitlines()[0]
    return HLAError(f"a micro-batch cannot be captured as a CUDA graph ({reason}): --no-cuda-graphs trains without")


class GraphedTraining:
    """`hla.loss.mean_loss` of a model and its backward pass, in graphs.

    Packed batches have another number of documents each time. So that they need only a few graphs, empty documents are
    put behind the last one, up to a power of two: no number changes by that. Softmax layers read the borders of packed
    documents on the host; such batches run eagerly.

    Args:
        model: an `HLAForCausalLM` in training mode, all of it in this process.
        dtype: bfloat16 means autocast.
        captures: False means eager on GPUs, too.
        pieces: of a sequence spread over as many ranks, each of which has one.
    """

    def __init__(self, model: Any, dtype: torch.dtype, captures: bool = True, pieces: int = 1) -> None:
        def loss(total: int, targets: Tensor, **inputs: Tensor) -> Tensor:
            return mean_loss(model, inputs, targets, total, dtype)

        self.graphed = Graphed(loss, model.parameters())
        self._waits = "full_attention" in model.config.layer_types
        self._captures, self._pieces = captures, pieces

    def __call__(self, inputs: Mapping[str, Tensor], targets: Tensor, total: int) -> Tensor:
        """The loss; see `mean_loss` for the arguments and `Graphed` for errors."""
        borders = inputs.get("cu_seq_lens_q")
        if not self._captures or (borders is not None and self._waits):
            return self.graphed.eager(total=total, targets=targets, **inputs)
        if borders is not None and self.graphed.pool is not None:
            inputs = {**inputs, "cu_seq_lens_q": with_empty_documents(borders, targets.numel() * self._pieces)}
        return self.graphed(total=total, targets=targets, **inputs)

    def zero_grad(self) -> None:
        """See `Graphed.zero_grad`."""
        self.graphed.zero_grad()

    def settle(self) -> None:
        """See `Graphed.settle`."""
        self.graphed.settle()

    def release(self) -> None:
        """See `Graphed.release`."""
        self.graphed.release()


def with_empty_documents(borders: Tensor, length: int) -> Tensor:
    """``[N + 1]`` borders of documents packed into ``length`` tokens, with N raised to a power of two, at least 16."""
    documents = borders.numel() - 1
    return F.pad(borders, (0, max(16, 1 << (documents - 1).bit_length()) - documents), value=length)
