"""`writehead generate`: continue a prompt with a model, token by token."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from writehead.decode.generate import Stream
    from writehead.decode.options import Options
    from writehead.decode.result import Generation, Timings
    from writehead.engines import Opened
    from writehead.solo import Solo, SoloStream

CHOICE, SEARCH, MACHINE = "Which token comes next", "Beams and speculation", "Model and machine"
COMPILE = (
    "Let inductor compile projections and feed-forward layers: 20 to 70 seconds before the first token on "
    "two cores, and little gain in float32; the tokens are the same."
)
DTYPES = ("float32", "bfloat16", "int8", "int4")
ENGINES = ("auto", "native", "torch")
CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")


def command(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - or nothing reads standard input.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask it as a user, by the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: what the system says first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 256,
    min_new_tokens: Annotated[int, typer.Option(help="The text may not end before.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    temperature: Annotated[
        float, typer.Option(help="Above 0 samples; 0 is greedy.", rich_help_panel=CHOICE)
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k best; 0 is off.", rich_help_panel=CHOICE)] = 0,
    top_p: Annotated[float, typer.Option(help="Keep this share of mass.", rich_help_panel=CHOICE)] = 1.0,
    min_p: Annotated[float, typer.Option(help="Least share of the best.", rich_help_panel=CHOICE)] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 avoids what was said.", rich_help_panel=CHOICE)
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Of sampling; default a fresh one.", rich_help_panel=CHOICE)
    ] = None,
    num_return_sequences: Annotated[
        int, typer.Option(help="Texts to give: samples, or the best beams.", rich_help_panel=CHOICE)
    ] = 1,
    num_beams: Annotated[int, typer.Option(help="Beams; 1 is no search.", rich_help_panel=SEARCH)] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="Power of the length that divides a score.", rich_help_panel=SEARCH)
    ] = 1.0,
    early_stopping: Annotated[
        bool, typer.Option("--early-stopping", help="Stop at num-beams ended texts.", rich_help_panel=SEARCH)
    ] = False,
    prompt_lookup: Annotated[
        int, typer.Option(help="Draft so many tokens from the text itself; 0 is off.", rich_help_panel=SEARCH)
    ] = 0,
    model: Annotated[
        str, typer.Option(help="smollm2, a model folder or a FILE.gguf.", rich_help_panel=MACHINE)
    ] = "smollm2",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, int8 or int4; default what a converted folder holds, else float32.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="auto, native or torch; auto is native where it can be.", rich_help_panel=MACHINE),
    ] = "auto",
    cache_dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or int8.", rich_help_panel=MACHINE)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: the cores that may be used.", rich_help_panel=MACHINE)
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help=COMPILE, rich_help_panel=MACHINE)] = False,
    roofline: Annotated[
        bool,
        typer.Option(
            "--roofline", help="Measure the memory first, report the share.", rich_help_panel=MACHINE
        ),
    ] = False,
) -> None:
    """Continue a prompt: the text goes to standard output as it comes, its speeds to standard error."""
    if system is not None and not chat:
        raise typer.BadParameter("--system belongs to a chat: give --chat too")
    text = _text(prompt)
    check("--dtype", dtype or "float32", DTYPES)
    check("--cache-dtype", cache_dtype or "float32", CACHE_DTYPES)
    check("--engine", engine, ENGINES)
    options = _options(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stop_strings=tuple(stop or ()),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        num_return_sequences=num_return_sequences,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping or "never",
        prompt_lookup_num_tokens=prompt_lookup,
        cache_dtype=_dtype(cache_dtype),
    )
    solo = None if engine == "torch" or compile else _solo(model, dtype, threads, options)
    opened = solo or _opened(model, dtype, engine, threads, compile, options)
    ids = _ids(opened, text, chat, system)
    with _warnings():
        run = _stream(opened, ids, options)
        limit = _bandwidth(run.timings.weight_bytes, threads) if roofline else None
        whole = _follow(run, options, stream=not as_json)
    if as_json:
        _print_json(model, opened, len(ids), run.generations, run.timings, limit)
    else:
        typer.echo(f"{_report(run.timings, limit)} ({opened.why})", err=True)
    if not whole:
        raise KeyboardInterrupt


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    return getattr(torch, name)


def _solo(model: str, dtype: str | None, threads: int | None, options: "Options") -> "Solo | None":
    """The model if this text needs no PyTorch, whose import takes longer than a short text."""
    from writehead.solo import open_solo, plain

    return open_solo(model, dtype=dtype, threads=threads) if plain(options) else None


def _opened(
    model: str, dtype: str | None, engine: str, threads: int | None, compile: bool, options: "Options"
) -> "Opened":
    import torch

    from writehead.core.system import available_memory, cores
    from writehead.engines import open_engine

    torch.set_num_threads(threads or cores())
    opened = open_engine(
        model,
        dtype=dtype,
        engine=engine,
        cache_dtype=options.cache_dtype,
        threads=threads,
        compile=compile,
        memory_bytes=available_memory(),
    )
    if opened.engine.name == "native":
        torch.set_num_threads(1)  # torch's own threads would fight with the engine's
    return opened


def _text(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give a PROMPT, or pipe one to standard input")
    return sys.stdin.read().removesuffix("\n")


def check(option: str, given: str, accepted: tuple[str, ...]) -> None:
    """Raise, as typer wishes, unless an option has one of its values."""
    from writehead.core.shapes import check_choice

    try:
        check_choice(option, given, accepted)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _options(**values: Any) -> "Options":
    from writehead.decode.options import Options

    try:
        return Options(**values)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _ids(loaded: "Opened | Solo", text: str, chat: bool, system: str | None) -> list[int]:
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.source} has no tokenizer, so it can read no text")
    if not chat:
        return loaded.tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return loaded.tokenizer.encode(loaded.tokenizer.chat(messages), bos=False)


def _bandwidth(weights: int, threads: int | None) -> float:
    """Bytes per second that this machine reads of a working set as large as the weights."""
    from writehead.bench.machine import WORKING_SETS, read_bandwidth
    from writehead.core.system import cores

    return read_bandwidth(min(max(weights, WORKING_SETS[0]), WORKING_SETS[-1]), threads or cores())


@contextmanager
def _warnings() -> Iterator[None]:
    """Show warnings as lines of standard error."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
        yield


def _stream(opened: "Opened | Solo", ids: list[int], options: "Options") -> "Stream | SoloStream":
    from writehead.solo import Solo, SoloStream

    if isinstance(opened, Solo):
        return SoloStream(opened, ids, options)
    from dataclasses import replace

    from writehead.cli.models import decoder_start
    from writehead.decode.generate import Stream

    if opened.engine.reads_source and opened.tokenizer is not None:
        options = replace(options, decoder_start_token_id=decoder_start(opened.source, opened.tokenizer.pad))
    return Stream(opened.engine, [ids], options, opened.tokenizer, beams=True)


def _follow(run: "Stream | SoloStream", options: "Options", stream: bool) -> bool:
    """Decode, with one text as it comes; did it come to its end?"""
    alone, whole = options.num_return_sequences == 1 and options.num_beams == 1, True
    try:
        for event in run:
            if stream and alone and event.text:
                sys.stdout.write(event.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        whole = False
    if stream:
        _print_texts(run.generations, alone)
    return whole


def _print_texts(generations: list["Generation"], alone: bool) -> None:
    """End the streamed text's line, or print all texts."""
    if alone:
        sys.stdout.write("\n")
    for number, one in enumerate([] if alone else generations, 1):
        score = "" if one.score is None else f" (score {one.score:.4f})"
        head = f"--- {number}{score}\n" if len(generations) > 1 else ""
        sys.stdout.write(f"{head}{one.text}\n")
    sys.stdout.flush()


def _report(t: "Timings", limit: float | None) -> str:
    from writehead.cli.output import size

    parts = [f"prefill {t.prefill_tokens} tokens, {t.prefill_rate:.1f} tokens/s"]
    if t.decode_tokens:
        parts.append(f"decode {t.decode_tokens} tokens, {t.decode_rate:.1f} tokens/s")
        parts.append(f"{size(t.bytes_per_token)} a token")
        if limit:
            parts.append(f"{t.bandwidth / limit:.0%} of the {size(limit)}/s that this machine reads")
    if t.drafted_tokens:
        parts.append(f"{t.accepted_tokens} of {t.drafted_tokens} drafted tokens held")
    return "; ".join([*parts, f"engine {t.engine}"])


def _print_json(
    model: str,
    opened: "Opened | Solo",
    prompt: int,
    generations: list["Generation"],
    t: "Timings",
    limit: float | None,
) -> None:
    from writehead.cli.output import print_json
    from writehead.core.system import peak_memory

    print_json(
        {
            "model": model,
            "dtype": opened.dtype,
            "engine": t.engine,
            "engine_why": opened.why,
            "prompt_tokens": prompt,
            "generations": [
                {
                    "text": one.text,
                    "token_ids": one.tokens,
                    "logprobs": one.logprobs,
                    "finish_reason": one.finish_reason or "interrupted",
                    "score": one.score,
                }
                for one in generations
            ],
            "prefill": {
                "tokens": t.prefill_tokens,
                "seconds": t.prefill_seconds,
                "tokens_per_second": t.prefill_rate,
            },
            "decode": {
                "tokens": t.decode_tokens,
                "steps": t.decode_steps,
                "seconds": t.decode_seconds,
                "tokens_per_second": t.decode_rate,
                "bytes_per_token": t.bytes_per_token,
                "drafted_tokens": t.drafted_tokens,
                "accepted_tokens": t.accepted_tokens,
            },
            "bandwidth": {
                "bytes_per_second": t.bandwidth,
                "machine_bytes_per_second": limit,
                "share": t.bandwidth / limit if limit else None,
            },
            "memory": {"weight_bytes": t.weight_bytes, "peak_bytes": peak_memory()},
        }
    )
