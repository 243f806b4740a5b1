"""The configs of `conf/` load, and all mistakes of a config are reported at once."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.support import REPOSITORY
from whisper_aut.config import compose, dump_settings, first_model, load_settings
from whisper_aut.errors import UserError
from whisper_aut.experiments.grid import load_experiment
from whisper_aut.models.decoders import check_decoder
from whisper_aut.probes.tasks import expand_suites, load_task

CONF = REPOSITORY / "conf"
RUN_CONFIGS = sorted(CONF.glob("*.yaml"))
EXPERIMENTS = sorted((CONF / "experiments").glob("e[0-9]*.yaml"))
GROUP_FILES = sorted(path for path in CONF.glob("*/*.yaml") if path.parent.name != "experiments")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
@pytest.mark.parametrize("data", ["demo", "recordings"])
def test_every_run_of_every_experiment_loads(path: Path, data: str):
    loaded = load_experiment(path, [f"data={data}"])
    experiment, runs = loaded.settings, loaded.runs
    assert experiment.name == path.stem + ("" if data == "demo" else f"_{data}")
    assert len(experiment.seeds) >= 3
    for run in runs[: len(runs) // len(experiment.seeds)]:  # seeds differ in nothing else
        settings = load_settings(run.config, run.overrides)
        check_decoder(settings.decoder)
        assert (settings.name, settings.probe.tasks) == (run.name, [])
    assert len({run.name for run in runs}) == len(runs)
    for probes in experiment.probes:
        for name in probes.tasks:
            load_task(name, CONF / "probe_tasks")


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_its_dump_is_equal(path: Path, tmp_path: Path):
    settings = load_settings(path)
    check_decoder(settings.decoder)
    for name in settings.probe.tasks:
        load_task(name, CONF / "probe_tasks")
    if settings.model.after:
        assert (CONF / settings.model.after).exists()
    (tmp_path / "dumped.yaml").write_text(dump_settings(settings))
    assert load_settings(tmp_path / "dumped.yaml") == settings


def test_recipes_fit_on_a_screen():
    long = {path.name for path in RUN_CONFIGS if len(path.read_text().splitlines()) > 40}
    assert long == {"speech_real_small.yaml"}  # it lists the columns of three manifests


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_choice_of_a_group_can_be_picked(path: Path):
    if path.parent.name == "probe_tasks":
        assert load_task(path.stem, path.parent).name == path.stem
        return
    if path.parent.name == "suites":
        for task in expand_suites([path.stem], path.parent):
            load_task(task, CONF / "probe_tasks")
        return
    if path.parent.name == "instructions":  # chosen by a decoder, whose own `defaults` pick them
        entries = load_settings(CONF / "uniwhisper.yaml").decoder["instructions"]
        assert set(yaml.safe_load(path.read_text())) <= set(entries)
        return
    settings = load_settings(
        CONF / "aut.yaml",
        [f"{path.parent.name}={path.stem}", "data.domains={speech: 1, sound: 0, music: 0}"],
    )
    chosen = getattr(settings, path.parent.name)
    values = yaml.safe_load(path.read_text())
    check_decoder(settings.decoder)
    for key, value in values.items():
        if isinstance(value, (int, str)) and "$" not in str(value):
            assert (chosen[key] if isinstance(chosen, dict) else getattr(chosen, key)) == value


def test_aut_has_the_numbers_of_the_paper():
    settings = load_settings(CONF / "aut.yaml")
    assert settings.model.path == "openai/whisper-large-v3"
    assert settings.data.domains == {"speech": 0.8, "sound": 0.1, "music": 0.1}
    assert (settings.data.samples_per_epoch, settings.trainer.max_epochs) == (20_000_000, 2)
    assert (settings.strategy.name, settings.hardware.devices, settings.hardware.precision) == (
        "deepspeed_stage_2",
        8,
        "bf16-mixed",
    )


def test_uniwhisper_has_the_models_of_the_paper():
    settings = load_settings(CONF / "uniwhisper.yaml")
    assert settings.model.path == "openai/whisper-large-v3"
    assert (settings.decoder["language_model"], settings.decoder["train"]) == (
        "Qwen/Qwen3-0.6B",
        "frozen",
    )
    swapped = load_settings(CONF / "uniwhisper.yaml", ["decoder=whisper"])
    assert check_decoder(swapped.decoder)[1].name == "whisper"
    assert replace(swapped, decoder=settings.decoder) == settings


def test_a_group_file_may_pick_files_of_other_groups(tmp_path: Path):
    (tmp_path / "decoder").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.yaml").write_text("x: {n: 1}\ny: {n: 2}")
    (tmp_path / "words" / "b.yaml").write_text("y: {n: 3}")
    (tmp_path / "decoder" / "d.yaml").write_text(
        "defaults: [/words: [a, b], _self_]\nname: d\nwords: {x: {m: 4}}"
    )
    (tmp_path / "run.yaml").write_text("defaults: [decoder: d, _self_]")
    found = compose(tmp_path / "run.yaml", ["decoder.words.y.n=5"])
    assert found == {"decoder": {"name": "d", "words": {"x": {"n": 1, "m": 4}, "y": {"n": 5}}}}
    (tmp_path / "decoder" / "d.yaml").write_text("defaults: [/words: c, _self_]")
    with pytest.raises(UserError, match="Could not find 'words/c'"):
        compose(tmp_path / "run.yaml")


def test_overrides_win_over_files_and_groups():
    settings = load_settings(
        CONF / "aut_tiny.yaml",
        [
            "optim.lr=3e-4",
            "strategy=ddp",
            "data.domains.speech=0.5",
            "model.after=",
            "model.path=x/y",
        ],
    )
    assert (settings.optim.lr, settings.strategy.name, settings.data.domains["speech"]) == (
        3e-4,
        "ddp",
        0.5,
    )
    assert (settings.model.after, settings.model.path) == ("", "x/y")


def test_all_problems_are_reported_at_once_with_the_nearest_name():
    with pytest.raises(UserError) as caught:
        load_settings(
            CONF / "aut_tiny.yaml",
            ["trainer.max_stepz=3", "optim.lr=fast", "model.padding=60s", "data.batch_clips=two"],
        )
    message = str(caught.value)
    assert "4 problems" in message
    assert "trainer.max_stepz: unknown key. Did you mean 'max_steps'?" in message
    assert "optim.lr: must be a valid number, got 'fast'" in message
    assert "model.padding: must be 'none' or '30s', got '60s'. Did you mean '30s'?" in message
    assert "data.batch_clips: must be a whole number, got 'two'" in message


@pytest.mark.parametrize(
    "value",
    ["a=b/c=d", "a,b", "a b/c d", "s3://b/k?x=1&y=2", "it's", "x#y", "(a)", "a\\b", "~/x"],
)
def test_override_values_may_be_any_path(value: str):
    assert load_settings("aut_tiny", [f"data.exclude={value}"]).data.exclude == value


def test_configs_in_folders_with_special_characters_are_composed(tmp_path: Path):
    folder = tmp_path / "a b,c=d's"
    folder.mkdir()
    (folder / "run.0.yaml").write_text("defaults: [smoke, override strategy: ddp, _self_]\nname: x")
    settings = load_settings(folder / "run.0.yaml", ["hardware=1xgpu", "data.exclude=a=b,c d"])
    assert (settings.strategy.name, settings.hardware.accelerator) == ("ddp", "gpu")


def test_a_group_that_a_config_has_no_default_for_can_be_picked(tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(dump_settings(load_settings("aut_tiny")))
    assert load_settings(config, ["hardware=8xgpu"]).hardware.devices == 8


def test_numbers_are_accepted_as_names_and_nothing_as_an_empty_name():
    settings = load_settings("aut_tiny", ["name=2026", "model.revision=", "optim.lr=1"])
    assert (settings.name, settings.model.revision, settings.optim.lr) == ("2026", "", 1.0)


@pytest.mark.parametrize("text", ["1e3", "010", "null", "12:30", "2026-01-01", "a: b", " x "])
def test_text_that_looks_like_something_else_is_equal_after_a_dump(text: str, tmp_path: Path):
    settings = load_settings("aut_tiny", [f"data.exclude='{text}'"])
    assert settings.data.exclude == text
    (tmp_path / "dumped.yaml").write_text(dump_settings(settings))
    assert load_settings(tmp_path / "dumped.yaml") == settings


@pytest.mark.parametrize("text", ["${name}", r"a\${name", r"b\\${x.y}\c", "$${HOME}", r"d\e"])
def test_text_that_looks_like_an_interpolation_is_equal_after_a_dump(text: str, tmp_path: Path):
    settings = load_settings("aut_tiny")
    settings.data.exclude = text
    settings.data.train[0].path = text
    settings.strategy.deepspeed = {"a": {"b": [text]}}
    settings.strategy.name = "deepspeed_stage_2"
    (tmp_path / "dumped.yaml").write_text(dump_settings(settings))
    assert load_settings(tmp_path / "dumped.yaml") == settings
    escaped = load_settings("aut_tiny", [r"data.exclude=\${name}"])
    assert escaped.data.exclude == "${name}"


def test_an_unknown_name_is_compared_with_the_configs_of_all_folders(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".hidden.yaml").touch()
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(UserError, match=r"config aut_tny\. Did you mean 'aut_tiny'.* aut,.* mine,"):
        load_settings("aut_tny")
    with pytest.raises(
        UserError, match=r"e4_mix\. Did you mean 'e4_mixture'\? Known configs: base,"
    ):
        load_experiment("e4_mix")
    with pytest.raises(UserError, match=r"There is no config \."):
        load_settings(".")


def test_a_chain_of_configs_that_leads_back_to_its_end_is_an_error(tmp_path: Path):
    for name, after in (("a", "b"), ("b", "a"), ("c", CONF / "aut_tiny")):
        content = f"defaults: [smoke, _self_]\nname: {name}\nmodel: {{after: {after}.yaml}}"
        (tmp_path / f"{name}.yaml").write_text(content)
    with pytest.raises(UserError, match=r"model\.after: .*a\.yaml would be trained before itself"):
        first_model(load_settings(tmp_path / "a.yaml").model, tmp_path / "a.yaml")
    assert first_model(load_settings(tmp_path / "c.yaml").model, tmp_path / "c.yaml").scratch


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yml", b"name: x", "the name of a config must end in .yaml"),
        ("a.yaml", b"name: \xe9", "not readable as YAML: 'utf-8' codec"),
        ("a.yaml", b"name: x\nname: y", "(?s)not readable as YAML.*duplicate key name"),
        ("a.yaml", b"null: x", "Incompatible key type"),
        ("a.yaml", b"- x", "must be a DictConfig"),
        ("a.yaml", b"", "decoder: missing"),
        ("a.yaml", b"defaults: [smoke]\nname: ..", "name: '..' cannot be"),  # without `_self_`
    ],
)
def test_a_file_that_is_no_config_is_an_error(
    name: str, content: bytes, message: str, tmp_path: Path
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_settings(tmp_path / name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.domains={noise: 1}"],
            "data.domains.noise: has a weight but no source in data.train",
        ),
        (["data.domains={'No ise': 1}"], "'No ise' is not a name in lower case"),
        (
            ["data.valid=[{path: x, domain: soud}]"],
            "'soud', the domain of a source or of `schedule`. Did you mean 'sound'?",
        ),
        (["decoder.prompts={noise: {}}"], "decoder.prompts: 'noise' is not one of speech, sound"),
        (
            ["data.schedule=[{after_clips: 9, domains: {noise: 1}}]"],
            "data.domains: has no weight for 'noise', the domain of a source or of `schedule`",
        ),
        (
            ["data.schedule=[{after_clips: 9, domains: {}}, {after_clips: 9, domains: {}}]"],
            "data.schedule: after_clips must increase",
        ),
        (
            ["data.schedule=[{after_clips: 9, domains: {}}]", "data.mode=epochs"],
            "data.schedule: must be empty with mode=epochs",
        ),
        (["distillation.domains=[musik]"], "distillation.domains: 'musik' is not one of"),
        (
            ["data.valid=[{path: x, domain: sound, text: a, fields: {text: b}}]"],
            "fields.text is given too",
        ),
        (
            ["data.valid=[{path: x, domain: sound, fields: {licence: b}}]"],
            "data.valid.0.fields",
        ),
        (["data.domains={speech: 0, sound: 0, music: 0}"], "at least one weight must be positive"),
        (["data.domains.sound=-1"], "domains.sound: must be greater than or equal to 0, got -1"),
        (["data=demo_speech", "data.domains={speech: 1, sound: 1}"], "has a weight but no source"),
        (["data.max_seconds=60"], "data.max_seconds: must be less than or equal to 30, got 60"),
        (["data.min_seconds=5", "data.max_seconds=3"], "data.min_seconds: must be at most max_sec"),
        (["data.batch_clips=0"], "data.batch_clips: must be greater than 0, got 0"),
        (["data.batch_clips=true"], "data.batch_clips: must be a whole number, got True"),
        (["model.compile=1"], "model.compile: must be true or false, got 1"),
        (["data.augment=3"], "data.augment: must be keys and values, got 3"),
        (["data.train=x"], "data.train: must be a valid list, got 'x'"),
        (["optim.lr=0"], "optim.lr: must be greater than 0, got 0"),
        (
            ["data.max_skipped_fraction=2"],
            r"max_skipped_fraction: must be less than or equal to 1, got 2",
        ),
        (["strategy.deepspeed={zero_optimization: {}}"], r"strategy.name is 'auto', which is not"),
        (
            [
                "strategy=deepspeed_stage_2",
                "strategy.deepspeed={gradient_clipping: 1, bf16: {enabled: true}}",
            ],
            r"(?s)deepspeed.gradient_clipping: set optim.gradient_clip .*"
            r"bf16.enabled: set hardware.pre",
        ),
        (
            ["strategy=deepspeed_stage_2", "strategy.deepspeed.zero_optimization.stage=3"],
            r"deepspeed.zero_optimization.stage: set strategy.name instead",
        ),
        (
            [
                "strategy=deepspeed_stage_2",
                "strategy.deepspeed.zero_optimization.offload_optimizer={device: cpu}",
            ],
            r"offload_optimizer: needs a strategy.name that ends in _offload",
        ),
        (["name=../x"], r"name: '\.\./x' cannot be the name of a folder"),
        (["name="], "name: '' cannot be"),
        (["name=.."], r"name: '\.\.' cannot be"),
        (["corpora.demo.scale=0"], r"corpora\.demo\.scale: must be greater than 0, got 0"),
        (["data.train.0.path=x"], r"inside a list.*data\.train=\["),
        (["seed=-1"], "seed: must be greater than or equal to 0, got -1"),
        (["hardware.threads=-1"], r"hardware\.threads: must be greater than or equal to 0"),
        (["optim.betas=[0.9]"], r"optim\.betas\.1: missing"),
        (["optim.betas=[0.9, 1]"], r"optim\.betas\.1: must be less than 1, got 1"),
        (["trainer.max_steps=0"], r"trainer\.max_steps: must be greater than 0, got 0"),
        (["hardware.devices=0"], r"hardware\.devices: must be greater than 0 or 'auto', got 0"),
        (
            ["hardware.devices=all"],
            r"hardware\.devices: must be a whole number or 'auto', got 'all'",
        ),
        (["model.path=a/b"], "exactly one of path, scratch, after"),
        (["decoder=whsper"], "Did you mean 'whisper'"),
        (["trainer.max_steps"], "written key=value"),
        (["data.train=[]"], "has a weight but no source"),
        (
            ["data.valid=[{path: x, domain: sound, text: '{a!r}'}]"],
            r"data\.valid\.0\.text: '\{a!r\}' is not a template",
        ),
        (["name=${nothing.there}"], "nothing"),
        (["name=!!binary aGk="], "bytes is not"),
        (["decoder.x=.nan"], "decoder: all numbers must be finite"),
        (
            ["strategy=deepspeed_stage_2", "strategy.deepspeed={x: [.inf]}"],
            "strategy.deepspeed: all numbers must be finite",
        ),
        (["data.augment.speeds=[]"], "speeds: must have at least 1 item, not 0"),
    ],
)
def test_each_mistake_is_explained(overrides: list[str], message: str):
    with pytest.raises(UserError, match=message):
        load_settings(CONF / "aut_tiny.yaml", overrides)


def test_missing_and_broken_files(tmp_path: Path):
    with pytest.raises(UserError, match=r"Did you mean 'aut_tiny'"):
        load_settings(CONF / "aut_tinny.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "circle.yaml").write_text("defaults: [circle, _self_]\n")
    for name, message in (
        ("list", "must be a DictConfig"),
        ("broken", "not readable as YAML"),
        ("circle", "leads back to the config itself"),
    ):
        with pytest.raises(UserError, match=message):
            load_settings(tmp_path / f"{name}.yaml")


def test_a_folder_without_configs_is_no_group(tmp_path: Path):
    (tmp_path / "runs" / "smoke").mkdir(parents=True)
    config = tmp_path / "config.yaml"
    config.write_text(dump_settings(load_settings(REPOSITORY / "conf" / "smoke.yaml")))
    assert load_settings(config, [f"runs={tmp_path / 'runs'}"]).runs == str(tmp_path / "runs")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["2", "null", "1"], "have a weight, but not speech/1. Give one to all sources"),
        (["null", "1", "null"], "have a weight, but not speech/0, speech/2"),
        (["-1", "1", "1"], r"data\.train\.0\.weight: must be greater than 0, got -1"),
        (["0", "1", "1"], r"data\.train\.0\.weight: must be greater than 0, got 0"),
        ([".nan", "1", "1"], r"data\.train\.0\.weight: must be a finite number, got nan"),
        ([".inf", "1", "1"], r"data\.train\.0\.weight: must be a finite number, got inf"),
    ],
)
def test_all_sources_of_a_domain_have_a_weight_or_none_has(weights: list[str], message: str):
    sources = ", ".join(
        f"{{path: speech/{number}, domain: speech, weight: {weight}}}"
        for number, weight in enumerate(weights)
    )
    domains = "data.domains={speech: 1, sound: 0, music: 0}"
    with pytest.raises(UserError, match=message):
        load_settings(CONF / "aut.yaml", [f"data.train=[{sources}]", domains])


def test_domains_with_and_without_weights_can_be_mixed():
    speech = "{path: a, domain: speech, weight: 2}, {path: b, domain: speech, weight: 0.5}"
    train = f"data.train=[{speech}, {{path: c, domain: sound}}]"
    domains = "data.domains={speech: 1, sound: 1, music: 0}"
    loaded = load_settings(CONF / "aut.yaml", [train, domains])
    assert [source.weight for source in loaded.data.train] == [2, 0.5, None]


@pytest.mark.parametrize(
    "name", ["optim.lr", "data.temperature", "data.max_skipped_fraction", "data.domains.speech"]
)
def test_numbers_must_be_finite(name: str):
    with pytest.raises(UserError, match=f"{name}: must be a finite number, got nan"):
        load_settings(CONF / "aut.yaml", [f"{name}=.nan"])
