"""`whisper-aut embed`, `search` and `demo`: run an encoder on a user's own clips."""

import argparse
from collections import Counter
from pathlib import Path

from rich.console import Console

from whisper_aut.commands import (
    Commands,
    add_device_options,
    add_encoder_options,
    add_pooling_options,
    whole_number,
)


def embed(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.errors import Interrupted
    from whisper_aut.inference.embed import check_suffix, count_clips, embed_paths
    from whisper_aut.inference.encoder import load_encoder
    from whisper_aut.utils import progress_bar

    out = Path(options.out)
    check_suffix(out, frames=options.frames)
    clips = count_clips(options.audio)
    encoder = load_encoder(
        options.encoder, padding=options.padding, device=options.device, dtype=options.dtype
    )
    try:
        with progress_bar() as bar:
            task = bar.add_task("embed", total=clips)
            vectors = embed_paths(
                encoder,
                options.audio,
                name=options.encoder,
                pooling=None if options.frames else options.pooling,
                layers=options.layers,
                batch_seconds=options.batch_seconds,
                on_clip=lambda: bar.advance(task),
            )
    except KeyboardInterrupt:
        raise Interrupted(f"{out} was not written. Run the same command again.") from None
    vectors.save(out)
    shape = " × ".join(map(str, vectors.values.shape))
    minutes = sum(vectors.seconds) / 60
    console.print(
        f"Wrote {out}: {len(vectors)} clips, {minutes:.1f} min of audio, {shape} numbers.",
        highlight=False,
    )
    if vectors.skipped:
        counts = Counter(reason.partition(":")[0] for reason in vectors.skipped.values())
        reasons = ", ".join(f"{count} × {reason}" for reason, count in counts.most_common())
        console.print(f"Clips skipped: {len(vectors.skipped)} ({reasons}).", highlight=False)
        for name, reason in list(vectors.skipped.items())[:5]:
            console.print(f"  {name}: {reason}", highlight=False)


def search(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.inference.embed import Vectors
    from whisper_aut.inference.search import SearchIndex

    index = SearchIndex(Vectors.load(Path(options.index)))
    encoder = index.open_encoder(
        path=options.encoder, device=options.device, dtype=options.dtype or ""
    )
    found = index.embed(encoder, options.audio, batch_seconds=options.batch_seconds)
    for query, vector in zip(options.audio, found, strict=True):
        if len(options.audio) > 1:
            console.print(query, style="bold", highlight=False)
        for neighbour in index.nearest(vector, options.k):
            console.print(f"{neighbour.similarity:7.4f}  {neighbour.name}", highlight=False)


def demo(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.inference.demo import build_page, launch_page
    from whisper_aut.loading import open_demo_models

    precision = {"device": options.device, "dtype": options.dtype}
    models = open_demo_models(options.encoder, options.against, options.padding, **precision)
    if options.index:
        with console.status("Embedding the clips of the index"):
            models.index(*options.index, batch_seconds=options.batch_seconds)
    page = build_page(models, f"whisper-aut · {options.encoder}")
    address = launch_page(page, port=options.port, folders=options.index)
    console.print(f"Open {address} on this machine. Ctrl-C stops the server.")
    page.block_thread()


def add_parsers(commands: Commands) -> None:
    command = commands.add_parser("embed", help="embed audio files, folders or shards")
    add = command.add_argument
    add("encoder", help="a directory, a run, or a hub id; NAME@30s or NAME@none sets the padding")
    add("audio", nargs="+", help="files, folders of files, tars, or folders or URLs of shards")
    add("--out", required=True, help="output file: .safetensors or .parquet")
    add("--frames", action="store_true", help="write all frames instead of one vector per clip")
    add_pooling_options(command)
    add_encoder_options(command)
    command.set_defaults(run=embed)

    command = commands.add_parser(
        "search", help="find the embedded clips that sound most like a given clip"
    )
    add = command.add_argument
    add("index", help="a file written by `embed`")
    add("audio", nargs="+", help="query audio files")
    add("-k", type=whole_number(1), default=5, help="number of neighbours to list (default: 5)")
    add("--encoder", default="", help="path of the encoder of the index, if it was moved")
    add_device_options(command, dtype=None)
    command.set_defaults(run=search)

    command = commands.add_parser(
        "demo", help="serve a local page with spectrogram, decoder output and nearest clips"
    )
    add = command.add_argument
    encoder = "a run, shown with its decoder and its pretrained checkpoint, or an encoder"
    add("encoder", metavar="RUN_OR_ENCODER", help=encoder)
    index = "clips to search and to map: folders of files or shards"
    add("--index", metavar="FOLDER", nargs="+", default=[], help=index)
    against = "encoder to compare with (default: the pretrained checkpoint of the run)"
    add("--against", default="", help=against)
    add_encoder_options(command)
    port = "port of the page (default: 7860)"
    add("--port", type=whole_number(1, 65_535), default=7860, help=port)
    command.set_defaults(run=demo)
