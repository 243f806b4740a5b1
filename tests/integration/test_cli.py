"""The command line: exit codes, messages, and no traceback for a user's mistake."""

import argparse
import io
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from tests.support import REPOSITORY
from tests.support.audio import encode_audio, tone
from whisper_aut import commands
from whisper_aut.audio import windows
from whisper_aut.cli import _console, _parser, main
from whisper_aut.inference.encoder import DTYPES
from whisper_aut.models import encoder
from whisper_aut.probes.fit import PROBES
from whisper_aut.probes.results import Scores

CONF = REPOSITORY / "conf"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "conf/nothing.yaml"], "There is no config"),
        (["train", str(CONF / "aut_tiny.yaml"), "optim.lrr=1"], "Did you mean 'lr'"),
        (["data", "build", "nothing.csv", "--out", "x"], "There is no manifest"),
        (
            ["data", "build", "foldr", "--out", "x"],
            "foldr is neither a manifest nor the name of a corpus. Did you mean 'folder'?",
        ),
        (
            ["data", "build", "foldr", "here", "--out", "x"],
            "foldr is not the name of a corpus, so no folder can follow it. Did you mean 'folder'?",
        ),
        (
            ["data", "build", ".", "--out", "x"],
            ". is a folder: whisper-aut data build folder . --out x",
        ),
        (["data", "inspect", "a:-1:b"], "no shards at a:-1:b"),
        (["data", "inspect", "nowhere"], "no shards at nowhere"),
        (["data", "build", "a.csv", "--out", "x", "--where", "fold"], "COLUMN=VALUE"),
        (["export", "nowhere", "--out", "x"], "neither a run directory"),
        (
            ["probe", "nowhere", "--tasks", "esc10", "--conf", str(CONF)],
            "There is no model directory nowhere",
        ),
        (["probe", "logmel", "--tasks", "esc11", "--conf", str(CONF)], "esc10"),
        (
            ["probe", "logmel", "--tasks", "esc10", "--conf", str(CONF), "--root", "nowhere"],
            "There are no shards at nowhere",
        ),
        (["report", "nowhere", "--out", "x"], "There is no scores.json"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_status_1(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "bounds"),
    [
        (
            ["data", "build", "a.csv", "--out", "x", "--workers", "-3"],
            "-3 is below 1",
        ),
        (["evaluate", "run", "shards", "--limit", "0"], "0 is below 1"),
        (["chat", "run", "a.wav", "--max-new-tokens", "many"], "'many' is not a whole number"),
        (["demo", "run", "--port", "99999"], "99999 is above 65535"),
        (["data", "demo", "--scale", "nan"], "'nan' is not a number above 0"),
        (["data", "build", "a", "--max-skipped-fraction", "nan"], "not a number from 0 to 1"),
    ],
)
def test_numbers_out_of_range_are_errors_of_usage(
    arguments: list[str], bounds: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert bounds in capsys.readouterr().err


def parsers() -> Iterator[argparse.ArgumentParser]:
    """Every parser of a command, without those that only hold commands."""

    def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
        subcommands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in subcommands:
            for below in action.choices.values():
                yield from walk(below)
        if not subcommands:
            yield parser

    return walk(_parser())


@pytest.mark.parametrize("parser", parsers(), ids=lambda parser: parser.prog)
def test_every_argument_of_every_command_has_a_help_text(parser: argparse.ArgumentParser):
    lacking = [action.dest for action in parser._actions if not (action.help or "").strip()]
    assert not lacking


@pytest.mark.parametrize("name", ["probe", "embed", "search", "demo", "chat", "evaluate"])
def test_commands_that_run_an_encoder_take_device_and_precision(name: str):
    parser = next(parser for parser in parsers() if parser.prog == f"whisper-aut {name}")
    options = {
        action.option_strings[-1]: action for action in parser._actions if action.option_strings
    }
    assert options["--device"].default == "auto"
    assert tuple(options["--dtype"].choices or ()) == tuple(DTYPES)
    if name != "chat":  # one clip
        assert options["--batch-seconds"].default == windows.BATCH_SECONDS


def test_choices_are_the_keys_of_their_registries():
    assert tuple(PROBES) == commands.PROBE_KINDS
    assert tuple(windows.POOLINGS) == commands.POOLINGS
    assert commands.PADDINGS == encoder.PADDINGS
    assert tuple(DTYPES) == commands.DTYPES
    assert commands.BATCH_SECONDS == windows.BATCH_SECONDS


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        (["--kind", "liner"], "'liner' is not one of linear, knn, mlp"),
        (["--pooling", "mean-std"], "not one of mean, mean_std. Did you mean 'mean_std'?"),
        (["--padding", "30"], "not one of none, 30s. Did you mean '30s'?"),
        (["--dtype", "bf61"], "not one of fp32, bf16, fp16. Did you mean 'bf16'?"),
        (["--batch-seconds", "0"], "'0' is not a number above 0"),
    ],
)
def test_an_unknown_choice_is_an_error_with_the_nearest_one(
    option: list[str], meant: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["probe", "logmel", "--tasks", "esc10", *option])
    assert meant in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        (
            ["probe", "--tasks", "esc10", "fsdd", "runs/aut/latest"],
            "arguments are required: encoder. --tasks and --layers take all words that follow. "
            "Write whisper-aut probe ENCODER --tasks …",
        ),
        (
            [
                "embed",
                "--layers",
                "0",
                "2",
                "runs/aut/latest",
                "clip.wav",
                "--out",
                "x.safetensors",
            ],
            "--layers takes all words that follow. "
            "Write whisper-aut embed ENCODER AUDIO --layers …",
        ),
        (
            ["data", "audit", "--against", "esc10", "data/train"],
            "Write whisper-aut data audit TRAIN --against …",
        ),
        (["evaluate", "--tasks", "asr", "runs/x", "shards"], "evaluate MODEL SHARDS --tasks"),
    ],
)
def test_errors_of_options_with_several_values_show_the_right_order(
    arguments: list[str], order: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert order in capsys.readouterr().err


def test_all_problems_of_a_probe_are_reported_before_embedding(
    tmp_path: Path, tiny_whisper: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "probe"
    command = ["probe", f"{tiny_whisper}@3s", "--against", "logmel", "--against", "./nowhere"]
    command += ["--against", str(tiny_whisper), "--layers", "0", "7", "--kind", "knn"]
    command += ["--tasks", "esc11", "xares_clotho", "fsdd", "--root", "nowhere", "--out", str(out)]
    assert main(command) == 1
    reported = capsys.readouterr().err
    for problem in (
        "There is no probe task 'esc11'. Did you mean 'esc10'?",
        "not '3s'. Did you mean '30s'?",
        "There is no model directory ./nowhere",
        "'xares_clotho' is scored by recall@1, which a knn probe does not support",
        "nowhere/clotho holds no clotho_development*.tar",
        "no shards at nowhere/fsdd/train",
        "no shards at nowhere/fsdd/test",
        "log-mel statistics: LogMelBaseline returns no single layers",
        "tiny: The encoder has layers 0 (the input of the first layer) to 2; requested: 0, 7",
    ):
        assert problem in reported, problem
    assert not out.exists()


def test_suites_and_tasks_are_listed_with_what_stops_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["probe", "--list", "--root", str(tmp_path)]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    for part in ("headline", "esc50 gtzan_filtered", "xares_clotho", "recall@1", "no shards at"):
        assert part in listed
    command = ["probe", "--list", "--tasks", "fsdd", "xares_clotho", "--kind", "knn"]
    assert main([*command, "--root", str(tmp_path)]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert "esc50 │" not in listed
    assert "a knn probe" in listed


def test_a_probe_with_layers_few_clips_and_leaderboard(
    in_pipeline_run: Path, tiny_whisper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "probe"
    command = ["probe", f"{tiny_whisper}@none", "--tasks", "tones.yaml", "fsdd", "--root", "data"]
    command += ["--skip-unavailable", "--layers", "all", "--shots", "2,1,2", "--seeds", "2"]
    assert main([*command, "--out", str(out)]) == 0
    assert "Left out: fsdd: There are no shards at data/fsdd/train" in capsys.readouterr().out
    layers, few = (Scores.load(out / f"{name}.json") for name in ("layers", "few_shot"))
    assert layers.encoders == ["tiny@none#0", "tiny@none#1", "tiny@none#2"]
    assert few.encoders == ["tiny@none, 1 a class", "tiny@none, 2 a class"]
    assert len(Scores.load(out / "layer_weights.json").entries[0].layer_weights) == 3
    page = (out / "report.html").read_text()
    for part in (
        "Layers and few clips",
        "recall of each class",
        "Scores of linear probes on each layer",
    ):
        assert part in page
    assert {"layers.png", "few_shot.png"} <= {path.name for path in out.iterdir()}
    board = tmp_path / "board"
    assert main(["leaderboard", str(out), str(out / "layers.json"), "--out", str(board)]) == 0
    assert "tiny@none#1" in (board / "leaderboard.csv").read_text()
    capsys.readouterr()
    assert main(["leaderboard", str(out), "--out", str(board), "--recipe", "tiny"]) == 1
    assert "--recipe needs --against" in capsys.readouterr().err
    assert main(["probe", "logmel", *command[2:], "--out", str(out)]) == 1
    assert "LogMelBaseline returns no single layers" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_an_error(
    in_pipeline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    command = ["probe", "logmel", "--tasks", "tones.yaml", "--root", "data"]
    assert main([*command, "--out", str(tmp_path / "file" / "x")]) == 1
    assert "file/x: Not a directory." in capsys.readouterr().err


def test_chat_reads_questions_up_to_the_end_of_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("whisper_aut.loading.open_run", lambda path, device, dtype: path)
    monkeypatch.setattr(
        "whisper_aut.inference.chat.answer",
        lambda module, audio, question, max_new_tokens: question.upper(),
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\nwho?\n"))
    assert main(["chat", "run", "clip.wav"]) == 0
    shown = capsys.readouterr().out
    assert "WHAT?" in shown
    assert "WHO?" in shown


def test_data_build_and_inspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        Path(f"{number}.flac").write_bytes(encode_audio(tone(0.5 + number / 10)))
    Path("bad.wav").write_text("not audio")
    rows = [f"{number}.flac,dog_bark,{number % 2}" for number in range(4)] + [
        "bad.wav,rain,1",
        "gone.wav,rain,1",
    ]
    Path("clips.csv").write_text("\n".join(["path,category,fold", *rows]))
    build = [
        "data",
        "build",
        "clips.csv",
        "--out",
        "shards",
        "--domain",
        "sound",
        "--text",
        "the sound of a {category:words}",
    ]
    assert main([*build, "--label", "category"]) == 0
    assert "4 clips" in capsys.readouterr().out
    assert main(["data", "inspect", "shards"]) == 0
    shown = capsys.readouterr().out
    assert "the sound of a dog bark" in shown
    assert main(["data", "inspect", "shards", "--json"]) == 0
    assert '"sound": 4' in capsys.readouterr().out


def test_tables_in_files_are_wide_unless_columns_is_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["data", "list"]) == 0
    whole = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "70")
    assert main(["data", "list"]) == 0
    cut = capsys.readouterr().out
    assert "by clip: CC0, CC BY, CC BY-NC, CC Sampling+ " in whole
    assert len(whole.splitlines()) < len(cut.splitlines())
    assert max(map(len, cut.splitlines())) <= 70


def test_print_config_prints_what_would_run(capsys: pytest.CaptureFixture[str]):
    assert main(["train", str(CONF / "aut.yaml"), "optim.lr=5e-5", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert "lr: 5.0e-05" in shown
    assert "path: openai/whisper-large-v3" in shown


def test_options_of_the_decoder_are_checked_before_a_config_is_printed(
    capsys: pytest.CaptureFixture[str],
):
    for option in ("decoder.max_tokens=0", "decoder.adapter.name=stak"):
        for command in (["train", "--print-config"], ["plan"]):
            name, *flags = command
            config = str(CONF / "uniwhisper.yaml")
            assert main([name, config, "model.path=openai/whisper-tiny", option, *flags]) == 1
            shown = capsys.readouterr()
            assert option.split("=")[0].removeprefix("decoder.") in shown.err
            assert not shown.out


def test_a_wrong_path_to_resume_from_is_found_before_corpora_are_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    demo = [f"corpora.demo.out={tmp_path / 'demo'}", f"runs={tmp_path / 'runs'}"]
    resume = ["--resume", str(tmp_path / "nothing.ckpt")]
    assert main(["train", str(CONF / "aut_tiny.yaml"), *demo, *resume]) == 1
    assert "nothing.ckpt does not exist" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("model.path=nowhere/whisper model.after=", "nowhere/whisper"),
        ("decoder=causal_lm decoder.language_model=nowhere/lm", "nowhere/lm"),
        ("trainer.loggers=[csv,wandb]", "pip install"),
        ("hardware.accelerator=cuda", "sees no such device"),
    ],
)
def test_what_training_needs_is_checked_before_corpora_are_built(
    override: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    demo = [f"corpora.demo.out={tmp_path / 'demo'}", f"runs={tmp_path / 'runs'}"]
    assert main(["train", str(CONF / "aut_tiny.yaml"), *demo, *override.split()]) == 1
    assert error in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_overrides_may_follow_options(capsys: pytest.CaptureFixture[str]):
    assert main(["train", str(CONF / "aut.yaml"), "seed=3", "--print-config", "optim.lr=5e-5"]) == 0
    shown = capsys.readouterr().out
    assert "lr: 5.0e-05" in shown
    assert "seed: 3" in shown
    with pytest.raises(SystemExit):
        main(["train", str(CONF / "aut.yaml"), "--print-konfig"])


def test_help_does_not_import_torch():
    code = (
        "import sys; from whisper_aut.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    started = time.monotonic()
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode
        == 0
    )
    assert time.monotonic() - started < 60


def test_brackets_in_names_are_printed_and_not_markup(capsys: pytest.CaptureFixture[str]):
    """A folder `set [2024]` would otherwise be printed without its year, in lines as in tables."""
    table = Table("[b]", title="set [2024]")
    table.add_row("[laughs] yes")
    for thing in ("into set [2024]", table, Text.assemble(("Warning:", "bold"), " [x]")):
        _console().print(thing)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("into set [2024]", "[b]", "[laughs]", "Warning: [x]"))
