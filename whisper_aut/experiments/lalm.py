"""The LALM probe: what a small language model learns through frozen encoders, and at what cost.

The form is XARES-LLM's (https://github.com/xiaomi-research/xares-llm). A linear projector and
low-rank updates of the language model are trained jointly on all tasks, with one prompt per task,
and the generated answers are scored. Tasks, language model and prompts differ from the benchmark,
so scores cannot be compared with its published ones; `export.adapters.xares_llm` runs the benchmark
itself. A probe is an experiment (`experiments.grid`) whose arms are encoders.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from whisper_aut.config import Settings, compose, dump_settings
from whisper_aut.data.annotation import TEXT_FIELDS
from whisper_aut.data.targets import MetricName
from whisper_aut.errors import Problems, UserError
from whisper_aut.inference.encoder import split_padding, trained_padding
from whisper_aut.loading import RANDOM_PREFIX, encoder_names
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.probes.metrics import Answer
from whisper_aut.probes.tasks import ProbeTask, open_parts
from whisper_aut.schema import build
from whisper_aut.training.run_dir import RunDirectory
from whisper_aut.utils import write_text

# Kind of answer → metric of the generated texts, and the prompt of tasks that have none.
ASKED: dict[Answer, tuple[MetricName, str]] = {
    "class": ("exact", "{title}: name the class."),
    "classes": ("tags", "{title}: list the classes."),
    "captions": ("caption", "{title}: describe the audio."),
    "text": ("words", "{title}: transcribe the speech."),
}
# The longest generated answer: names of classes are short, and texts have XARES-LLM's limit.
MAX_CLASS_TOKENS, MAX_TEXT_TOKENS = 32, 150


def write_lalm_probe(
    encoders: Sequence[str],
    tasks: Sequence[ProbeTask],
    out: Path,
    *,
    root: str,
    seeds: int,
    losses: Sequence[float] = (),
    overrides: Sequence[str] = (),
) -> Path:
    """Write the config of the training (`lalm.yaml`) and the experiment (`experiment.yaml`).

    The config by itself trains with the first encoder.

    Args:
        encoders: Whispers: runs, directories or hub ids, with an optional padding mode, or
            `random:NAME`. The first one is the reference of all comparisons.
        tasks: The tasks of the joint training. All are drawn equally often. A task with folds is
            tested on the last one and validated on the one before.
        out: Folder for the two files, the training runs and the results.
        root: Replaces `{root}` in the tasks' folders.
        seeds: Number of trainings of each encoder.
        losses: Validation losses at which costs are compared.
        overrides: `key=value` for `conf/lalm.yaml`.

    Returns:
        The path of the experiment, for `load_experiment`.

    Raises:
        UserError: Lists all encoders and tasks that cannot be used, or problems of the config.
    """
    problems, arms = Problems(), {}
    for task in tasks:
        for problem in _task_problems(task):
            problems.add(f"Probe task {task.name!r}: {problem}.")
        open_parts(task, root, problems)
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            problems.add(f"Two probe tasks have the name {name!r}. Give each its own.")
    with problems.gather():
        for name, label in encoder_names(encoders).items():
            with problems.gather("The LALM probe takes Whispers: "):
                arms[label] = {"title": label, "set": {"model": _model_settings(name)}}
    values = compose("lalm", overrides)
    if values["decoder"]["name"] != "causal_lm":
        problems.add("The LALM probe needs a decoder with name: causal_lm.")
    problems.raise_if_any("The LALM probe")

    reference = next(iter(arms))
    values["model"] |= arms[reference]["set"]["model"]
    values["decoder"]["instructions"] = {task.name: _instruction(task) for task in tasks}
    parts = [(task, *task_folders(task, root)) for task in tasks]

    def source(path: str, task: ProbeTask) -> dict[str, Any]:
        # As in the other probes, the domain is that of the task, whatever its clips state.
        own = {"domain": task.domain, "task": task.name, "fields": {"domain": ""}}
        return {"path": path, **own}

    values["data"] |= {
        "train": [
            source(path, task) | {"weight": 1 / len(train)}
            for task, train, _, _ in parts
            for path in train
        ],
        "valid": [source(path, task) for task, _, valid, _ in parts for path in valid],
        "domains": dict(Counter(task.domain for task in tasks)),
    }
    if losses and not values["data"]["valid"]:
        raise UserError("No task has a validation part, so no cost to reach a loss can be given.")
    settings = build(Settings, values, "conf/lalm.yaml")
    _, decoder = check_decoder(settings.decoder)
    language_model = Path(decoder.language_model).name
    has_texts = any(task.answer in ("captions", "text") for task in tasks)
    out = out.resolve()
    experiment = {
        "name": "lalm",
        "title": f"LALM probe: XARES-LLM form, {language_model}",
        "question": "What does a language model learn through each frozen encoder, and at what "
        f"cost? {len(tasks)} tasks, one joint training of a linear projector and low-rank updates. "
        "Not comparable with published scores of XARES-LLM.",
        "config": str(out / "lalm.yaml"),
        "runs": str(out),
        "seeds": list(range(seeds)),
        "axes": {"encoder": arms},
        "reference": reference,
        "answers": {
            "tasks": {task.name: test for task, _, _, test in parts},
            "max_new_tokens": MAX_TEXT_TOKENS if has_texts else MAX_CLASS_TOKENS,
        },
        "thresholds": list(losses),
        "figure": {"x": "encoder", "curves": True, "ordered": False},
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "lalm.yaml", dump_settings(settings))
    write_text(out / "experiment.yaml", yaml.safe_dump(experiment, sort_keys=False))
    return out / "experiment.yaml"


def task_folders(task: ProbeTask, root: str) -> tuple[list[str], list[str], list[str]]:
    """Return the folders that a task is trained, validated and tested on."""
    folders = [task.folders(part, root) for part in task.parts]
    if not task.folded:
        train, valid, test = folders
        return train, valid, test
    names = [name for fold in folders for name in fold]
    return (names[:-2], names[-2:-1], names[-1:]) if len(names) > 2 else (names[:1], [], names[1:])


def _instruction(task: ProbeTask) -> dict[str, Any]:
    metric, prompt = ASKED[task.answer]
    is_text = task.answer == "captions" or (task.answer == "text" and task.label in TEXT_FIELDS)
    return {
        "prompts": [task.prompt or prompt.format(title=task.title)],
        "answer": "{text}" if is_text else f"{{{task.label}:words}}",
        "tasks": [task.name],
        "metric": metric,
    }


def _task_problems(task: ProbeTask) -> Iterator[str]:
    if task.answer not in ASKED:
        yield f"a language model is not asked for {task.answer}"
    if task.select:
        yield "trainings cannot `select` clips; write shards without the others"
    if task.separator not in ("", ",", ";"):
        yield f"labels must be separated by a comma or semicolon, not {task.separator!r}"


def _model_settings(name: str) -> dict[str, Any]:
    """Return the `model` settings of an encoder, by its name on the command line."""
    path, padding = split_padding(name)
    random_init, path = path.startswith(RANDOM_PREFIX), path.removeprefix(RANDOM_PREFIX)
    exported = RunDirectory(Path(path)).export("encoder")
    path = str(exported if exported.is_dir() else path)
    padding = padding or trained_padding(PretrainedWhisper(path).config)
    return {"path": path, "padding": padding, "random_init": random_init}
