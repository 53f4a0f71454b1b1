"""The command ``hla``: train, evaluate, generate, inspect.

Only this file prints and exits. A wrong input ends in one sentence on standard error and exit status 1 (2 for options
that do not parse), never in a traceback; HLA_DEBUG=1 shows the traceback too.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hla.errors import HLAError

app = typer.Typer(
    name="hla",
    help="Language models with Higher-order Linear Attention: train, evaluate, generate, inspect.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _in_one_sentence(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into a sentence and an exit status."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except HLAError as error:
            _fail(str(error), error)
        except KeyboardInterrupt as error:
            _fail("interrupted", error, status=130)
        except BrokenPipeError:  # the reader of our output has gone: nothing is left to say, nor anyone to say it to
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except MemoryError as error:
            _fail("out of memory: try a smaller --batch-size, --context or --size", error)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            _fail(f"{error.strerror or error}{where}", error)

    return wrapped


def _fail(sentence: str, error: BaseException, status: int = 1) -> None:
    if os.environ.get("HLA_DEBUG"):
        raise error
    print(f"hla: {sentence}", file=sys.stderr)
    raise typer.Exit(status)


@app.command(name="train")
@_in_one_sentence
def train_command(
    data: Annotated[
        list[str] | None,
        typer.Argument(help='Text files, folders, globs or "-" (standard input); nothing: the built-in speeches.'),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder for the model, metrics and loss.png.")] = "runs/hla",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in that folder.")] = False,
    size: Annotated[str, typer.Option(help="tiny, small, base, medium or large.")] = "tiny",
    attention: Annotated[
        str, typer.Option(help='"hla", "softmax", or a pattern repeated over the layers: "hla,hla,softmax".')
    ] = "hla",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help='Model option, e.g. op=ahla or decay="token"; repeatable.'),
    ] = None,
    tokenizer: Annotated[str, typer.Option(help='"bpe" (trained on the text) or "bytes".')] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Token ids of the BPE.")] = 2048,
    context: Annotated[int, typer.Option(help="Tokens per row.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Rows per batch.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 5e-3,
    steps: Annotated[int | None, typer.Option(help="Steps to train (1000 unless --minutes is given).")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time to train; the schedule follows the clock.")] = None,
    warmup: Annotated[float, typer.Option(help="Warm-up: below 1 a share of the run, from 1 on steps.")] = 0.02,
    weight_decay: Annotated[float, typer.Option(help="Weight decay, on matrices only.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    eval_every: Annotated[int, typer.Option(help="Steps between validations.")] = 200,
    save_every: Annotated[int, typer.Option(help="Steps between saves.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the split, the weights and the order.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32 or bfloat16.")] = "auto",
) -> None:
    """Train a model on text and save it as a Hugging Face model folder. Ctrl-C saves and ends."""
    from hla.train import TrainConfig, train

    config = TrainConfig(
        data=tuple(data or ()),
        out=out,
        overwrite=overwrite,
        size=size,
        attention=attention,
        model=dict(_setting(text) for text in set_ or ()),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        context=context,
        batch_size=batch_size,
        accumulate=accumulate,
        lr=lr,
        steps=steps,
        minutes=minutes,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        eval_every=eval_every,
        save_every=save_every,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    console = Console(stderr=True)
    result = train(config, console)
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    rate = result.tokens / max(result.seconds, 1e-9)
    say(f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.0f} s ({rate:,.0f} tokens/s).")
    if result.stopped_by is not None:
        what = f"the model is in {out!r}" if result.steps else "before the first step; no model was saved"
        say(f"Stopped by {result.stopped_by.name}: {what}.")
        raise typer.Exit(128 + result.stopped_by)
    say(f"The model is in {out!r}, its loss curve in {str(Path(out) / 'loss.png')!r}.")


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value as JSON if it is some, else as the text it is."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise HLAError(f"--set takes NAME=VALUE, not {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@app.command(name="evaluate")
@_in_one_sentence
def evaluate_command(
    model: Annotated[str, typer.Argument(help="Model folder.")],
    data: Annotated[
        list[str] | None, typer.Argument(help="Text to score; nothing: what was held out when the model was trained.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Window in tokens (default: the model's own).")] = None,
    reference: Annotated[
        list[Path] | None, typer.Option(help="Results of other models on the same text (--json) to show; repeatable.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
    name: Annotated[str, typer.Option(help="What to call the model in the table.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Bits per byte of a model on text, beside what compressors make of the same bytes."""
    from hla.checkpoint import load_model
    from hla.data import encode_documents, fingerprint, read_documents, token_bytes
    from hla.evaluate import compressors, evaluate, held_out_documents, read_reference
    from hla.train import choose_device

    if context is not None and context < 1:
        raise HLAError(f"context must be at least 1, not {context}")
    loaded, tokenizer, training = load_model(model, choose_device(device))
    documents = read_documents(data) if data else held_out_documents(training, model)
    digest = fingerprint(documents)
    references = [read_reference(path, digest) for path in reference or ()]
    begin = time.monotonic()
    result = evaluate(
        loaded,
        encode_documents(tokenizer, documents),
        [len(text) for text in token_bytes(tokenizer)],
        context=context or loaded.config.max_position_embeddings,
    )
    seconds = time.monotonic() - begin

    kind = "hla" if "linear_attention" in loaded.config.layer_types else "softmax"
    label = name or f"{kind}, {loaded.num_parameters() / 1e6:.1f}M parameters"
    table = Table(title=f"{len(documents)} documents, {result.bytes:,} bytes{'' if data else ', held out'}")
    table.add_column("coded by")
    table.add_column("bits per byte", justify="right")
    table.add_column("trained on", justify="right")
    rows = [(label, result.bits_per_byte, training.get("tokens")), *references]
    for text, value, tokens in rows:
        table.add_row(text, f"{value:.3f}", f"{tokens:,} tokens" if tokens else "")
    for text, value in compressors(documents).items():
        table.add_row(text, f"{value:.3f}", "nothing")
    console = Console()
    console.print(table)
    console.print(
        f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, {result.tokens:,} tokens scored "
        f"in {seconds:.0f} s.",
        highlight=False,
        soft_wrap=True,
    )
    if json_ is not None:
        report = {
            "name": label,
            **result.as_dict(),
            "text_sha256": digest,
            "parameters": loaded.num_parameters(),
            "trained": {key: training.get(key) for key in ("steps", "tokens", "seconds", "config", "versions")},
        }
        json_.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@app.command(name="generate")
@_in_one_sentence
def generate_command(
    model: Annotated[str, typer.Argument(help="Model folder.")],
    prompt: Annotated[str | None, typer.Argument(help='Text to go on from; "-" or nothing: standard input.')] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that hold this share.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")] = False,
    seed: Annotated[int | None, typer.Option(help="Makes the draw repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Write text that goes on from a prompt, token by token."""
    from hla.checkpoint import load_model
    from hla.generate import TextDecoder, check_sampling, prompt_ids, stream
    from hla.train import choose_device

    sampling: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": 0.0 if greedy else temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    check_sampling(**sampling)
    text = _prompt(prompt, file)
    loaded, tokenizer, _ = load_model(model, choose_device(device))
    ids = prompt_ids(tokenizer, text)
    decoder = TextDecoder(tokenizer, stop or ())
    _write(text)
    begin = time.monotonic()
    first, count = begin, 0
    for token in stream(loaded, ids, seed=seed, **sampling):
        count += 1
        first = time.monotonic() if count == 1 else first
        _write(decoder.feed(token))
        if decoder.stopped:
            break
    _write(decoder.close() + "\n")
    now = time.monotonic()
    rate = f", then {(count - 1) / (now - first):,.1f} tokens/s" if count > 1 else ""
    print(f"[{len(ids)} prompt tokens in {first - begin:.2f} s{rate}; {count} tokens]", file=sys.stderr)


@app.command(name="inspect")
@_in_one_sentence
def inspect_command(
    model: Annotated[str, typer.Argument(help="Model folder.")],
    text: Annotated[str, typer.Option(help='Text file to run the model on; "-": standard input.')],
    out: Annotated[Path, typer.Option(help="Folder for inspect.html.")] = Path("runs/inspect"),
    tokens: Annotated[int, typer.Option(help="Use the first so many tokens of the text (2 to 512).")] = 96,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Show what every head of a model reads in a text: attention maps, spectra and gates on one HTML page."""
    from hla.data import read_documents
    from hla.inspect import inspect_model
    from hla.train import choose_device

    content = read_documents([text])[0].text
    path = inspect_model(model, content, out, tokens=tokens, device=choose_device(device))
    print(f"The page is in {str(path)!r}; any browser shows it.", file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, a file or standard input (there without the line end of the last line)."""
    if file is not None:
        if prompt is not None:
            raise HLAError("give the prompt as an argument or with --file, not both")
        try:
            text = file.read_bytes().decode("utf-8").removesuffix("\n")
        except OSError as error:
            raise HLAError(f"cannot read the prompt file {str(file)!r}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise HLAError(f"the prompt file {str(file)!r} is not UTF-8 text") from error
    elif prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise HLAError("give a prompt: as an argument, with --file, or on standard input")
        try:
            text = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise HLAError("the prompt on standard input is not UTF-8 text") from error
    else:
        text = prompt
    if not text:
        raise HLAError("the prompt is empty")
    return text


def main() -> None:
    """Entry point of the command ``hla``."""
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        status = 130
    except Exception as error:
        # Typer's own usage errors, which it would print as a box; its class has moved between releases.
        if not hasattr(error, "format_message"):
            raise
        print(f"hla: {error.format_message()} (see hla --help)", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
