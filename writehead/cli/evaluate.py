"""`writehead evaluate MODEL DATA`: perplexity of decoders, accuracy of classifiers, BLEU of translations."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from writehead.convert.load import Loaded

TEXT, TRANSLATION, IMAGES = "Perplexity", "Translation", "Images"


def command(
    model: Annotated[str, typer.Argument(help="A model folder (a run's DIR/latest), smollm2 or FILE.gguf.")],
    data: Annotated[
        list[str], typer.Argument(help="Files or folders: text, JSONL, TSV (also .gz), images; or stdlib.")
    ],
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens that a call reads.", rich_help_panel=TEXT)
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens between windows; default the window.", rich_help_panel=TEXT),
    ] = None,
    carry: Annotated[
        bool, typer.Option("--carry", help="Windows go on from the state before.", rich_help_panel=TEXT)
    ] = False,
    num_beams: Annotated[int, typer.Option(min=1, help="1 is greedy.", rich_help_panel=TRANSLATION)] = 4,
    length_penalty: Annotated[
        float, typer.Option(help="Power of the length that divides a score.", rich_help_panel=TRANSLATION)
    ] = 1.0,
    lowercase: Annotated[
        bool, typer.Option("--lowercase", help="BLEU without case.", rich_help_panel=TRANSLATION)
    ] = False,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Images to count each pixel's levels in, for comparison; repeatable.", rich_help_panel=IMAGES
        ),
    ] = None,
    fields: Annotated[
        str | None, typer.Option(help="Keys of JSONL lines, such as text or source,target.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows computed together.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores that may be used.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on data of the kind that it was made for."""
    import torch

    from writehead.convert.load import load
    from writehead.core.system import available_memory, cores
    from writehead.model.decoder import Decoder
    from writehead.model.seq2seq import Seq2Seq
    from writehead.train.tokens import labels_of

    torch.set_num_threads(threads or cores())
    loaded = load(model, memory_bytes=available_memory())
    if baseline and loaded.config.pixels is None:
        raise typer.BadParameter("--baseline is for models of images")
    if loaded.config.pixels is not None:
        if window or stride or carry or fields:
            raise typer.BadParameter("--window, --stride, --carry and --fields are for texts, not for images")
        _show({"model": model, "data": data, **_bits(loaded, data, baseline or [], batch)}, as_json)
        return
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.source} has no tokenizer, so it can read no text")
    names = tuple(fields.split(",")) if fields else ()
    plain = isinstance(loaded.model, Decoder) and not labels_of(loaded.tokenizer)
    if names and len(names) != (1 if plain else 2):
        raise typer.BadParameter(f"--fields must name {1 if plain else 2}; got {fields!r}")
    if not plain and (window or stride or carry):
        raise typer.BadParameter("--window, --stride and --carry are for decoders of text")
    if plain:
        found = _perplexity(loaded, data, names, window=window, stride=stride, carry=carry, batch=batch)
    elif isinstance(loaded.model, Seq2Seq):
        found = _translation(
            loaded,
            data,
            names,
            num_beams=num_beams,
            length_penalty=length_penalty,
            lowercase=lowercase,
            batch=batch,
        )
    else:
        found = _accuracy(loaded, data, names, batch=batch)
    _show({"model": model, "data": data, **found}, as_json)


def _show(found: dict[str, Any], as_json: bool) -> None:
    from writehead.cli.output import console, print_json

    if as_json:
        from writehead.bench.machine import machine

        print_json({**found, "machine": machine()})
        return
    for name, value in found.items():
        shown = f"{value:.5g}" if isinstance(value, float) else value
        console().print(f"{name.replace('_', ' '):20} {shown}", soft_wrap=True)


def _bits(loaded: "Loaded", data: list[str], baseline: list[str], batch: int) -> dict[str, Any]:
    from writehead.evaluate.images import bits_per_dim

    r = bits_per_dim(loaded.model, tuple(data), counted=tuple(baseline), batch=batch)  # type: ignore[arg-type]
    beside = {} if r.baseline is None else {"baseline_bits_per_dim": r.baseline}
    return {
        "bits_per_dim": r.per_dim,
        **beside,
        "levels": r.levels,
        "images": r.images,
        "dims": r.dims,
        "nats_per_image": r.nll / r.images,
    }


def _perplexity(loaded: "Loaded", data: list[str], names: tuple[str, ...], **options: Any) -> dict[str, Any]:
    from writehead.evaluate.perplexity import perplexity

    assert loaded.tokenizer is not None
    field = names[0] if names else "text"
    r = perplexity(loaded.model, loaded.tokenizer, tuple(data), field=field, **options)  # type: ignore[arg-type]
    kind = "carried states" if r.carried else "sliding" if r.stride < r.window else "windows apart"
    return {
        "protocol": f"{kind}: window {r.window}, stride {r.stride}",
        "perplexity": r.per_token,
        "word_perplexity": r.per_word,
        "byte_perplexity": r.per_byte,
        "bits_per_byte": r.bits_per_byte,
        "tokens": r.tokens,
        "words": r.words,
        "bytes": r.bytes,
        "documents": r.documents,
    }


def _accuracy(loaded: "Loaded", data: list[str], names: tuple[str, ...], batch: int) -> dict[str, Any]:
    from writehead.evaluate.labels import accuracy

    assert loaded.tokenizer is not None
    keys = (names[0], names[1]) if names else None
    r = accuracy(loaded.model, loaded.tokenizer, tuple(data), batch=batch, fields=keys)  # type: ignore[arg-type]
    low, high = r.interval
    notes = {"notes": "; ".join(r.notes)} if r.notes else {}
    return {
        "accuracy": r.accuracy,
        "interval_95": f"{low:.4f} to {high:.4f}",
        "right": r.right,
        "texts": r.count,
        "nats": r.nll,
        **notes,
    }


def _translation(loaded: "Loaded", data: list[str], names: tuple[str, ...], **options: Any) -> dict[str, Any]:
    from writehead.evaluate.translation import translation

    assert loaded.tokenizer is not None
    keys = (names[0], names[1]) if names else None
    r = translation(loaded.model, loaded.tokenizer, tuple(data), fields=keys, **options)  # type: ignore[arg-type]
    return {
        "bleu": r.bleu,
        "signature": r.signature,
        "search": f"{options['num_beams']} beams, length_penalty {options['length_penalty']:g}",
        "ln_perplexity": r.nll,
        "perplexity": r.perplexity,
        "sentences": r.sentences,
    }
