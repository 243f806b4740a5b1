"""`whisper-aut demo`: a local page to try a run or an encoder on."""

import argparse

from rich.console import Console

from whisper_aut.commands import add_encoder_options, whole_number


def demo(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.pipeline import open_listener
    from whisper_aut.report.demo import build_page, launch_page

    listener = open_listener(
        options.encoder,
        options.against,
        options.padding,
        device=options.device,
        dtype=options.dtype,
    )
    if options.index:
        with console.status("Embedding the clips to search among"):
            listener.index(options.index, options.batch_seconds)
    page = build_page(listener, f"whisper-aut · {options.encoder}")
    folders = [options.index] if options.index else []
    address = launch_page(page, port=options.port, folders=folders, wait=False)
    console.print(f"Open {address} (Ctrl-C ends it). Only this machine can.")
    page.block_thread()


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "demo", help="a local page: spectrogram, what the decoder writes, nearest clips"
    )
    command.add_argument(
        "encoder",
        metavar="RUN_OR_ENCODER",
        help="a run, which has a decoder and a start to compare with, or an encoder alone",
    )
    command.add_argument(
        "--index", metavar="FOLDER", default="", help="clips to search among: files or shards"
    )
    command.add_argument(
        "--against", default="", help="the encoder before; by default what the run started from"
    )
    add_encoder_options(command)
    command.add_argument(
        "--port", type=whole_number(1, 65_535), default=7860, help="of the page (default: 7860)"
    )
    command.set_defaults(run=demo)
