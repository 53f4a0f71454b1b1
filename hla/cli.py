"""The command ``hla``: train, tokenize, evaluate, generate, inspect.

Only this file prints and exits. A wrong input ends in one sentence on standard error and exit status 1 (2 for options
that do not parse), never in a traceback; HLA_DEBUG=1 shows the traceback too.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from hla.errors import HLAError
from hla.train_config import TrainConfig, resolve

DEFAULT = TrainConfig()
# Seconds that the other ranks leave to the one that says why all of them end, before torchrun ends it as well.
TIME_TO_TELL = 30
app = typer.Typer(
    name="hla",
    help="Language models with Higher-order Linear Attention: train, tokenize, evaluate, generate, inspect.",
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
    _tell(f"hla: {sentence}", error)
    raise typer.Exit(status)


def _tell(sentence: str, error: BaseException) -> None:
    """Print what ended a command; of several ranks that have the same error, on the first one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from hla.distributed.world import tells

        if not tells(error):
            if not isinstance(error, KeyboardInterrupt):
                _let_tell()
            return
    print(sentence, file=sys.stderr)


def _let_tell() -> None:
    """Wait to be ended by torchrun, which does that to all ranks when one of them ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(TIME_TO_TELL)


@app.command(name="train")
@_in_one_sentence
def train_command(
    context_: typer.Context,
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help='Text files, folders, globs, "-" (standard input), hf:NAME (a dataset from Hugging Face) or folders '
            "that hla tokenize made; nothing: the built-in speeches."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings in a TOML file; options given here win.", rich_help_panel="Run")
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder for the model, metrics and loss.png.", rich_help_panel="Run")
    ] = DEFAULT.out,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in that folder.", rich_help_panel="Run")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in that folder; begin it if there is none.", rich_help_panel="Run"
        ),
    ] = False,
    weights: Annotated[
        str,
        typer.Option(
            metavar="W,W,...",
            help="Mix the sources: how often rows come from each, e.g. 0.7,0.3.",
            rich_help_panel="Data",
        ),
    ] = "",
    size: Annotated[
        str, typer.Option(help="tiny, small, base, medium or large.", rich_help_panel="Model")
    ] = DEFAULT.size,
    attention: Annotated[
        str,
        typer.Option(
            help='"hla", "softmax", or a pattern repeated over the layers: "hla,hla,softmax".', rich_help_panel="Model"
        ),
    ] = DEFAULT.attention,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help='Model option, e.g. op=ahla or decay="token"; repeatable.',
            rich_help_panel="Model",
        ),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help='"bpe" (trained on the text) or "bytes".', rich_help_panel="Data")
    ] = DEFAULT.tokenizer,
    vocab_size: Annotated[int, typer.Option(help="Token ids of the BPE.", rich_help_panel="Data")] = DEFAULT.vocab_size,
    context: Annotated[int, typer.Option(help="Tokens per row.", rich_help_panel="Data")] = DEFAULT.context,
    batch_size: Annotated[
        int, typer.Option(help="Rows per batch.", rich_help_panel="Optimisation")
    ] = DEFAULT.batch_size,
    accumulate: Annotated[
        int, typer.Option(help="Batches per step.", rich_help_panel="Optimisation")
    ] = DEFAULT.accumulate,
    lr: Annotated[
        float, typer.Option(help="Peak learning rate of AdamW.", rich_help_panel="Optimisation")
    ] = DEFAULT.lr,
    steps: Annotated[
        int | None,
        typer.Option(help="Steps to train (1000 unless --minutes is given).", rich_help_panel="Optimisation"),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Time to train; the schedule follows the clock. With --steps too: whichever ends first.",
            rich_help_panel="Optimisation",
        ),
    ] = None,
    warmup: Annotated[
        float,
        typer.Option(help="Warm-up: below 1 a share of the run, from 1 on steps.", rich_help_panel="Optimisation"),
    ] = DEFAULT.warmup,
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay, on matrices only.", rich_help_panel="Optimisation")
    ] = DEFAULT.weight_decay,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.", rich_help_panel="Optimisation")] = DEFAULT.clip,
    eval_every: Annotated[
        int, typer.Option(help="Steps between validations.", rich_help_panel="Run")
    ] = DEFAULT.eval_every,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints.", rich_help_panel="Run")
    ] = DEFAULT.save_every,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep, the newest.", rich_help_panel="Run")] = DEFAULT.keep,
    max_skipped: Annotated[
        int,
        typer.Option(
            help="End after so many steps in a row whose loss or gradient is not finite.",
            rich_help_panel="Optimisation",
        ),
    ] = DEFAULT.max_skipped,
    telemetry_every: Annotated[
        int,
        typer.Option(help="Steps between measurements of the states and outputs of all layers.", rich_help_panel="Run"),
    ] = DEFAULT.telemetry_every,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute/--no-recompute",
            help="Recompute activations: less memory, a third more time.",
            rich_help_panel="Scale",
        ),
    ] = DEFAULT.recompute,
    compile: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Compile the model with torch.compile.", rich_help_panel="Scale"),
    ] = DEFAULT.compile,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Replay forward and backward passes as CUDA graphs (default: where a GPU has the whole model, without "
            "--compile).",
            rich_help_panel="Scale",
        ),
    ] = DEFAULT.cuda_graphs,
    seed: Annotated[
        int, typer.Option(help="Seed of the split, the weights and the order.", rich_help_panel="Run")
    ] = DEFAULT.seed,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel="Run")] = DEFAULT.device,
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 on a GPU), float32 or bfloat16.", rich_help_panel="Scale")
    ] = DEFAULT.dtype,
    dp: Annotated[
        int | None,
        typer.Option(
            help="Under torchrun: ranks that share the rows of a batch (default: all that are left).",
            rich_help_panel="Scale",
        ),
    ] = None,
    sp: Annotated[
        int, typer.Option(help="Under torchrun: ranks that share each sequence.", rich_help_panel="Scale")
    ] = DEFAULT.sp,
    tp: Annotated[
        int, typer.Option(help="Under torchrun: ranks that share the heads of each layer.", rich_help_panel="Scale")
    ] = DEFAULT.tp,
    shard: Annotated[
        bool | None,
        typer.Option(
            "--shard/--no-shard",
            help="Ranks of --dp and --sp share weights, gradients and moments, or each has all of them (default: the "
            "latter without --tp on GPUs where they are small, which is faster).",
            rich_help_panel="Scale",
        ),
    ] = DEFAULT.shard,
) -> None:
    """Train a model on text and save it as a Hugging Face model folder. Ctrl-C saves and ends."""
    from hla.distributed.world import before_meeting
    from hla.train import train

    with before_meeting():
        given = {name: value for name, value in context_.params.items() if _is_given(context_, name)}
        given.pop("config", None)
        if "data" in given:
            given["data"] = tuple(given["data"])
        if "weights" in given:
            given["weights"] = _numbers("--weights", weights)
        if "set_" in given:
            given["model"] = dict(_setting(text) for text in given.pop("set_"))
        settings = resolve(given, config)
    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    result = train(settings, console)
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    rate = result.tokens / max(result.seconds, 1e-9)
    say(f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.0f} s ({rate:,.0f} tokens/s).")
    if result.stopped_by is not None:
        what = f"the model is in {settings.out!r}" if result.steps else "before the first step; no model was saved"
        say(f"Stopped by {result.stopped_by.name}: {what}. --resume goes on.")
        raise typer.Exit(128 + result.stopped_by)
    say(f"The model is in {settings.out!r}, its loss curve in {str(Path(settings.out) / 'loss.png')!r}.")


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option or argument stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise HLAError(f"{option} takes numbers with commas between them, not {text!r}") from error


@app.command(name="tokenize")
@_in_one_sentence
def tokenize_command(
    data: Annotated[list[str], typer.Argument(help="Text files, folders, globs or hf:NAME.")],
    out: Annotated[Path, typer.Option(help="Folder to make, for hla train.")],
    tokenizer: Annotated[
        str, typer.Option(help='"bpe" (trained on the text), "bytes", or a folder that has one.')
    ] = DEFAULT.tokenizer,
    vocab_size: Annotated[int, typer.Option(help="Token ids of the BPE.")] = DEFAULT.vocab_size,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = DEFAULT.seed,
) -> None:
    """Tokenize text of any size once, into a folder that training maps into memory."""
    from hla.token_files import build_tokens

    console = Console(stderr=True)
    built = build_tokens(data, out, tokenizer=tokenizer, vocab_size=vocab_size, seed=seed, console=console)
    for line in (built.description, f"The tokens are in {str(out)!r}: hla train {out}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


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
    from hla.devices import choose_device
    from hla.evaluate import compressors, evaluate, held_out_documents, read_reference

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
    prompt: Annotated[
        str | None,
        typer.Argument(
            help='Text to go on from; "-" or nothing: standard input (with --load-state nothing is no text).'
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write (0, with --save-state: only read).")] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that hold this share.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")] = False,
    seed: Annotated[int | None, typer.Option(help="Makes the draw repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; repeatable.")] = None,
    load_state: Annotated[
        Path | None, typer.Option(help="Go on from this state: the prompt, if any, follows what the state has read.")
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option(help="Save the state after everything read and written to this file.")
    ] = None,
    snapshots: Annotated[
        int | None, typer.Option(help="Also save it at every so many tokens, to files named FILE.000004096.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (that of the state; else bfloat16 on a GPU), float32 or bfloat16.")
    ] = "auto",
) -> None:
    """Write text that goes on from a prompt, token by token."""
    import torch

    from hla.checkpoint import load_model
    from hla.devices import choose_device, choose_dtype
    from hla.generate import Snapshots, TextDecoder, check_sampling, prompt_ids, read, stream
    from hla.models import HLACache, HLAPreTrainedModel
    from hla.models.state_file import check_writable, read_state

    sampling: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": 0.0 if greedy else temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    only_read = max_tokens == 0 and save_state is not None
    no_prompt = load_state is not None and prompt is None and file is None
    check_sampling(**{**sampling, "max_tokens": 1} if only_read else sampling)
    if snapshots is not None and save_state is None:
        raise HLAError("--snapshots needs --save-state, which names their files")
    if snapshots is not None and snapshots < 1:
        raise HLAError(f"--snapshots must be at least 1, not {snapshots}")
    if no_prompt and only_read:
        raise HLAError("--load-state with --max-tokens 0 and no prompt does nothing")
    if save_state is not None:
        check_writable(save_state)
    text = "" if no_prompt else _prompt(prompt, file)

    where = choose_device(device)
    precision = choose_dtype(dtype, where)
    if load_state is not None and dtype == "auto":  # which belongs to a model of one dtype
        with suppress(HLAError):  # (what is wrong with it is told when the model is known)
            precision = getattr(torch, read_state(load_state)[1].dtype, precision)
    loaded, tokenizer, _ = load_model(model, where, precision)
    config: Any = loaded.config
    cache: Any = None
    if (load_state or save_state) and not isinstance(loaded, HLAPreTrainedModel):
        raise HLAError(f"only HLA models have states in files; the model in {model!r} is of another kind")
    if load_state is not None:
        cache = HLACache.load(load_state, loaded)
        if no_prompt and cache.next_logits is None:
            raise HLAError(f"the state file {str(load_state)!r} does not say what comes next: give a prompt")
    elif save_state is not None:
        cache = HLACache(config)
    ids = [] if no_prompt else prompt_ids(tokenizer, text, begins=load_state is None)
    decoder = TextDecoder(tokenizer, stop or ())
    kept = None if snapshots is None else Snapshots(snapshots, keep=None, files=save_state)
    begin = time.monotonic()
    token = last = None
    count = 0
    with _reading(len(ids)) as progress:
        if only_read:
            read(loaded, ids, cache=cache, snapshots=kept, progress=progress)
        else:
            if progress is None:  # a bar needs the line for itself
                _write(text)
            tokens = stream(loaded, ids, seed=seed, cache=cache, snapshots=kept, progress=progress, **sampling)
            token = next(tokens)
    first = time.monotonic()
    if progress is not None and not only_read:
        _write(text)
    while token is not None:
        count, last = count + 1, token
        _write(decoder.feed(token))
        token = None if decoder.stopped else next(tokens, None)
    if not only_read:
        _write(decoder.close() + "\n")
    now = time.monotonic()
    rate = f", then {(count - 1) / (now - first):,.1f} tokens/s" if count > 1 else ""
    print(f"[{len(ids)} prompt tokens in {first - begin:.2f} s{rate}; {count} tokens]", file=sys.stderr)
    if save_state is not None:
        if last is not None:
            read(loaded, [last], cache=cache, snapshots=kept)
        cache.save(save_state, loaded)
        seen, size = int(cache.get_seq_length()), save_state.stat().st_size
        print(f"[state after {seen:,} tokens in {str(save_state)!r}, {size:,} bytes]", file=sys.stderr)


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
    from hla.devices import choose_device
    from hla.inspect import inspect_model

    content = read_documents([text])[0].text
    path = inspect_model(model, content, out, tokens=tokens, device=choose_device(device))
    print(f"The page is in {str(path)!r}; any browser shows it.", file=sys.stderr)


@contextmanager
def _reading(tokens: int) -> Iterator[Callable[[int], None] | None]:
    """A bar on standard error while a long prompt is read; None for a short one, or where nobody watches."""
    from hla.generate import PIECE

    if tokens <= 2 * PIECE or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("reading"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=tokens)
        yield lambda done: bar.update(task, completed=done)


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
        if os.environ.get("LOCAL_RANK", "0") != "0":
            _let_tell()
        else:
            context = getattr(error, "ctx", None)
            command = f"hla {context.info_name}" if context is not None and context.parent is not None else "hla"
            print(f"hla: {error.format_message()} (see {command} --help)", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
