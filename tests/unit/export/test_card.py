"""Model cards, and pushing an export to a hub, which is a local server here."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.support.downloads import serve
from whisper_aut import load_encoder
from whisper_aut.cli import main
from whisper_aut.errors import UserError
from whisper_aut.export.card import write_card
from whisper_aut.export.hf import MARKER, push

RUN = Path("runs/aut_tiny/latest")


def test_the_card_of_an_export(pipeline_run: Path):
    run = pipeline_run / RUN
    card = (run / "export" / "encoder" / "README.md").read_text()
    data = ModelCard(card).data  # as the hub reads it
    assert data.library_name == "transformers"
    assert data.pipeline_tag is None  # no pipeline gives frames of audio
    assert data.license == "unknown"
    assert data.datasets == ["speech", "sound", "music"]
    assert data.metrics == ["accuracy"]
    (result,) = data.eval_results
    assert (data.model_name, result.dataset_name, result.metric_type) == (
        "aut_tiny",
        "Tones",
        "accuracy",
    )
    assert 0 <= result.metric_value <= 1
    assert set(result.metric_args) == {"test_clips", "final_fit", "interval_95"}
    assert "protocol strict, clips at their own length" in result.metric_name
    # The hub's own functions read the block back to the same results, without a warning.
    index = yaml.safe_load(card.split("---")[1])["model-index"]
    assert model_index_to_eval_results(index) == ("aut_tiny", data.eval_results)
    assert eval_results_to_model_index("aut_tiny", data.eval_results) == index
    assert metadata_load(run / "export" / "encoder" / "README.md") == data.to_dict()
    for section in (
        "Use",
        "Recipe",
        "Training data",
        "Overlap with the probe sets",
        "Probes",
        "Intended use and limits",
    ):
        assert f"\n## {section}\n" in card
    for source, share in (
        ("speech | speech | 80.0% | 23", "CC0-1.0"),
        ("sound | sound | 10.0% | 11", "CC-BY-3.0"),
        ("music", "–"),
    ):
        assert any(source in line and share in line for line in card.splitlines()), source
    assert "10% of the training data states no licence" in card
    assert "Not audited" in card
    assert "fitted on the full split `train`" in card
    assert " ± " not in card, "linear probes are fitted once"
    scores = json.loads((run / "scores.json").read_text())
    mine = next(entry for entry in scores["entries"] if entry["encoder"] == "aut_tiny")
    mean = sum(mine["scores"]) / len(mine["scores"])
    low, high = mine["interval"]
    assert f" {100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}] |" in card
    assert "Brackets contain the 95 % interval" in card
    table = "| log-mel statistics | random@none | tiny@30s | **aut_tiny@none** |"
    assert f"| task | metric | probe {table}" in card
    assert re.search(r"\| Tones \| linear \| aut_tiny@none \| tiny@30s \| [+-]\d", card)
    assert "random@none | tiny@30s | +" not in card.partition("Differences")[2]
    assert re.search(r"- time: 0.0\d hours on 1 × CPU with \d+ cores", card)
    assert "arXiv:2604.10438" in card
    assert "- pretrained checkpoint: tiny\n" in card
    assert str(pipeline_run.parent) not in card
    whisper = (run / "export" / "whisper" / "README.md").read_text()
    assert "automatic-speech-recognition" in whisper
    assert "fluent and wrong" in whisper


def test_sources_are_named_without_the_folders_that_they_share(pipeline_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(pipeline_run / RUN, run)
    environment = json.loads((run / "environment.json").read_text())
    roots = ("/data/kathleen/train", "/data/us8k/train", "/data/us8k/more")
    for source, root in zip(environment["data"], roots, strict=True):
        source["root"] = root
    (run / "environment.json").write_text(json.dumps(environment))
    card = write_card(run, tmp_path, "encoder").read_text()
    assert ModelCard(card).data.datasets == ["kathleen", "us8k"]
    assert all(f"| {root.removeprefix('/data/')} |" in card for root in roots)

    for roots in (
        ["/home/ann/us8k/train", "sounds/gm/train", "s3://bucket/esc50/train"],
        ["/home/ann/us8k/train-*.tar", "/mnt/sounds/gm", "/data/esc50/"],
    ):
        for source, root in zip(environment["data"], roots, strict=True):
            source["root"] = root
        (run / "environment.json").write_text(json.dumps(environment))
        card = write_card(run, tmp_path, "encoder").read_text()
        assert ModelCard(card).data.datasets == ["us8k", "gm", "esc50"]
        assert "/home" not in card
        assert "/mnt" not in card

    environment["data"] = environment["data"][:1]
    for root in ("/data/kathleen/train", "/data/kathleen/train-*.tar"):  # not a dataset `train`
        environment["data"][0]["root"] = root
        (run / "environment.json").write_text(json.dumps(environment))
        card = write_card(run, tmp_path, "encoder").read_text()
        assert ModelCard(card).data.datasets == ["kathleen"]


def test_the_card_of_a_run_with_less_and_with_more(pipeline_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    config = yaml.safe_load((pipeline_run / RUN / "config.yaml").read_text())
    config["model"] |= {"path": "openai/whisper-tiny", "padding": "30s"}
    del config["model"]["interpolate"]  # a config of an earlier release
    config["model"]["lora_rank"], config["optim"]["encoder_lr"] = 16, 3e-4
    config["data"]["batch_seconds"], config["trainer"]["accumulate"] = 80.0, 2
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    out.mkdir()
    card = write_card(run, out, "qwen2-audio", "bf16").read_text()
    for text in (
        "Not probed.",
        "Not audited",
        "The run did not record its training data",
        "was not finished",
        "audio tower of qwen2-audio",
        "weights in bf16",
        "\n- encoder: trained with LoRA of rank 16, merged into the weights\n- optimizer: AdamW",
        "(0.0003 for the encoder)",
        "of at most 160 s of audio per rank",
    ):
        assert text in card
    assert ModelCard(card).data.base_model == "openai/whisper-tiny"
    assert 'padding="30s"' in card
    (run / "audit.json").write_text(
        json.dumps({"counts": {"train_clips": 40, "pairs_by_evidence": {"sound": 3}}})
    )
    card = write_card(run, out, "encoder").read_text()
    assert "- train clips: 40\n- pairs by evidence sound: 3\n- clips excluded" in card
    assert "Not audited" not in card
    scores = (pipeline_run / RUN / "scores.json").read_text()
    (run / "scores.json").write_text(scores.replace('"Tones"', '"Tones | high"'))
    assert "\n| Tones \\| high | accuracy | linear |" in write_card(run, out, "encoder").read_text()


def scores_of(run: Path, name: str, padding: str, kind: str = "linear") -> str:
    """The run's scores as those of a later `whisper-aut probe`."""
    scores = json.loads((run / "scores.json").read_text())
    scores["entries"] = [one for one in scores["entries"] if one["encoder"] == "aut_tiny"]
    scores["entries"][0] |= {"encoder": name, "padding": padding, "kind": kind}
    scores["comparisons"] = []
    return json.dumps(scores)


def test_later_scores_of_both_paddings_are_added_to_a_card(
    pipeline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, out = pipeline_run / RUN, tmp_path / "elsewhere"
    shutil.copytree(run / "export" / "encoder", out)
    card = out / "README.md"
    text = card.read_text().replace("license: unknown", "license: mit")
    card.write_text(text.replace("## Use\n", "## Use\nSee our paper.\n"))
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "scores.json").write_text(scores_of(run, "aut_tiny", "none"))
    for name, args in {
        "padded": ("aut_tiny@30s", "30s"),
        "knn": ("aut_tiny", "none", "knn"),
        "base": ("tiny", "30s"),
        "base_knn": ("tiny", "30s", "knn"),
    }.items():
        (tmp_path / f"{name}.json").write_text(scores_of(run, *args))
    audit = {"counts": {"train_clips": 40, "train_clips_that_overlap": 2}}
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    files = [tmp_path / name for name in ("probe", "padded.json", "knn.json", "base.json")]
    files.append(tmp_path / "base_knn.json")
    command = ["card", str(out), *map(str, files), "--against", "tiny"]
    assert main([*command, "--audit", str(tmp_path / "audit.json")]) == 0
    written = card.read_text()
    assert "| probe | **aut_tiny@none** | **aut_tiny@30s** | tiny@30s |" in written
    assert re.search(r"\| Tones \| accuracy \| knn \| [\d.]+ \[.*\] \| – \| ", written)
    assert "| Tones | linear | aut_tiny@30s | tiny@30s | +0.0 |" in written
    assert "- train clips that overlap: 2\n" in written
    assert "Not audited" not in written
    data = ModelCard(written).data
    assert data.license == "mit"
    names = [result.metric_name for result in data.eval_results]
    assert [name.partition("strict, ")[2] for name in names] == [
        *("clips at their own length", "clips padded to 30 s", "clips at their own length")
    ]
    for kept in ("## Use\nSee our paper.\n", "## Recipe", "## Compute", "## Citation"):
        assert kept in written
    assert main(command) == 0
    assert card.read_text() == written  # once more changes nothing
    assert main(["card", str(out), str(tmp_path / "base.json")]) == 1
    assert "scores are of tiny, not of aut_tiny" in capsys.readouterr().err
    assert main(["card", str(out), str(tmp_path / "base.json"), "--encoder", "tiny"]) == 0
    assert "**tiny@30s**" in card.read_text()
    for arguments, message in (
        ([str(out)], "Give files of scores"),
        ([str(tmp_path), str(tmp_path / "base.json")], "has no model card"),
        ([str(out), str(tmp_path / "audit.json")], "are not probe scores"),
    ):
        assert main(["card", *arguments]) == 1
        assert message in capsys.readouterr().err
    card.write_text(written.replace("## Probes", "## Scores"))
    assert main(["card", str(out), str(tmp_path / "padded.json")]) == 1
    assert "has no section '## Probes'" in capsys.readouterr().err


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP API as an upload of small files needs."""

    created: ClassVar[list[dict]] = []
    files: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        host = f"http://{self.headers['Host']}"
        if not self._known():
            return
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self._answer({"url": f"{host}/org/name", "name": "org/name", "id": "1"})
        elif "/preupload/" in self.path:
            listed = json.loads(body)["files"]
            self._answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in listed
                    ]
                }
            )
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer(
                {"commitUrl": f"{host}/org/name/commit/0123", "commitOid": "0123", "success": True}
            )
        else:
            self._answer({})

    def do_GET(self) -> None:
        if self._known():
            self._answer({"id": "org/name", "sha": "0" * 40, "siblings": [], "private": False})

    def _known(self) -> bool:
        known = self.headers.get("Authorization") == "Bearer hf_stub"
        if not known:
            self._answer({"error": "no"}, 401)
        return known

    def _answer(self, value: dict, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    serve(server)
    monkeypatch.setattr(_Hub, "created", [])
    monkeypatch.setattr(_Hub, "files", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_push_sends_every_file(pipeline_run: Path, hub: str):
    folder = pipeline_run / RUN / "export" / "encoder"
    url = push(folder, "org/name", private=True, api=HfApi(endpoint=hub, token="hf_stub"))
    assert url == f"{hub}/org/name/commit/0123"
    assert _Hub.created[0]["name"] == "name"
    assert _Hub.created[0]["organization"] == "org"
    assert {name: (folder / name).read_bytes() for name in _Hub.files} == _Hub.files
    assert set(_Hub.files) == {path.name for path in folder.iterdir()} - {MARKER}
    assert {"README.md", "model.safetensors", "config.json", "preprocessor_config.json"} <= set(
        _Hub.files
    )


def test_a_dry_run_lists_what_a_push_would_send(
    in_pipeline_run: Path, tmp_path: Path, hub: str, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    command = ["export", str(RUN), "--out", str(out), "--dry-run"]
    assert main([*command, "--push", "org/name", "--private"]) == 0
    shown = capsys.readouterr().out
    assert "B to org/name (private if it is new):\n" in shown
    rows = [line.rpartition("  ")[2] for line in shown.splitlines()]
    assert {path.name for path in out.iterdir()} - {MARKER} < set(rows)
    assert MARKER not in rows
    assert not _Hub.created
    shutil.rmtree(out)
    assert main([*command, "--push", "or g/na"]) == 1
    assert not out.exists(), "the name is checked before the export"
    assert "not a valid repository name" in capsys.readouterr().err
    assert main(command) == 1
    assert "Give --push ORG/NAME too" in capsys.readouterr().err


def test_a_failed_push_is_a_user_error(pipeline_run: Path, hub: str):
    folder = pipeline_run / RUN / "export" / "encoder"
    with pytest.raises(UserError, match=r"answered 401.*hf auth login"):
        push(folder, "org/name", api=HfApi(endpoint=hub, token="wrong"))
    with pytest.raises(UserError, match="ORG/NAME, not 'name'"):
        push(folder, "name")
    with pytest.raises(UserError, match="not a valid repository name"):
        push(folder, "or g/na me", api=HfApi(endpoint=hub, token="hf_stub"))
    with pytest.raises(UserError, match="cannot be reached"):
        push(folder, "org/name", api=HfApi(endpoint="http://127.0.0.1:9", token="hf_stub"))


def test_a_bug_during_a_push_is_not_a_network_error(pipeline_run: Path):
    class Broken(HfApi):
        def create_repo(self, *_: object, **__: object):
            raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        push(pipeline_run / RUN / "export" / "encoder", "org/name", api=Broken())


def test_the_command_exports_and_says_how_to_load_the_export(
    in_pipeline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "export"
    assert main(["export", str(RUN), "--out", str(out), "--dtype", "fp16"]) == 0
    assert f"whisper_aut.load_encoder('{out}')" in capsys.readouterr().out
    assert "weights in fp16" in (out / "README.md").read_text()
    assert main(["export", str(RUN), "--out", str(in_pipeline_run / "clips")]) == 1
    assert "would be lost" in capsys.readouterr().err
    assert sorted(path.name for path in (in_pipeline_run / "clips").iterdir()) == [
        "220.flac",
        "440.flac",
        "880.flac",
    ]


@pytest.mark.parametrize("start", [{"random_init": True}, {"scratch": {}, "path": ""}])
def test_random_weights_are_no_pretrained_ones(
    start: dict[str, object], in_pipeline_run: Path, tmp_path: Path, capsys: Any
):
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= start
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for mixed in (["--interpolate", "0.5"], ["--format", "whisper", "--decoder", "pretrained"]):
        assert main(["export", str(run), "--out", str(tmp_path / "out"), *mixed]) == 1
        assert "started from random weights" in " ".join("".join(capsys.readouterr()).split())


def test_a_card_of_interpolated_weights_has_no_scores_of_the_trained_ones(
    in_pipeline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cards = []
    for fraction in ("1", "0.7"):
        out = tmp_path / fraction
        assert main(["export", str(RUN), "--out", str(out), "--interpolate", fraction]) == 0
        cards.append((out / "README.md").read_text())
    assert "model-index" in cards[0]
    assert "WiSE-FT" not in cards[0]
    assert "model-index" not in cards[1]
    assert "0.7 × the trained and 0.3 × the pretrained weights" in cards[1]
    run, configured = tmp_path / "run", tmp_path / "configured"
    shutil.copytree(RUN, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["interpolate"] = 0.7
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["export", str(run), "--out", str(configured)]) == 0
    card = (configured / "README.md").read_text()
    assert "model-index" in card
    assert "0.7 × the trained" in card
    mixed, same = (load_file(out / "model.safetensors") for out in (tmp_path / "0.7", configured))
    for name, weight in same.items():
        assert_close(mixed[name], weight, atol=0, rtol=0, msg=name)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["export", str(RUN), "--out", str(tmp_path / "2"), "--interpolate", "2"])
    assert "'2' is not a number from 0 to 1" in capsys.readouterr().err


def test_a_card_of_an_earlier_checkpoint_has_no_metrics_of_the_last(
    in_pipeline_run: Path, tmp_path: Path
):
    run = tmp_path / "aut_tiny" / "run"
    shutil.copytree(RUN, run, symlinks=True)
    last = run / "checkpoints" / "step-0000002.ckpt"
    copy = shutil.copytree if last.is_dir() else shutil.copy
    copy(last, last.with_name("step-0000001.ckpt"))
    cards = []
    for name in ("step-0000001", "step-0000002", "last"):
        path, out = last.with_name(f"{name}.ckpt"), tmp_path / name
        assert main(["export", str(path), "--out", str(out)]) == 0
        cards.append((out / "README.md").read_text())
    assert "- steps: 1, before the end of the run, of 4 clips" in cards[0]
    for text in ("model-index", "- validation loss", "| Tones"):
        assert [text in card for card in cards] == [False, True, True]


def test_a_card_names_the_pretrained_decoder(
    in_pipeline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pretrained = ["export", str(RUN), "--out", str(tmp_path / "out"), "--decoder", "pretrained"]
    assert main(pretrained) == 1
    assert "encoder has no decoder" in capsys.readouterr().err
    assert main([*pretrained, "--format", "whisper"]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "The decoder is not trained. It needs clips padded" in card
    assert f'`padding="{load_encoder(tmp_path / "out").padding}"`), as `load_encoder` does' in card
    assert "encoder: trained with" not in card
