"""Charts of scores and logs."""

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from whisper_aut.errors import UserError
from whisper_aut.report import plots
from whisper_aut.report.plots import plot_losses, plot_scores, project, read_metrics

HEAD = "epoch,step,train/loss,valid/loss,valid/loss_speech,lr\n"


def test_bars_are_drawn_at_page_width(two_encoders, tmp_path):
    image = imread(plot_scores(two_encoders, tmp_path / "deep" / "scores.png", baseline="base"))
    assert image.shape[1] == 1200
    colours = {
        tuple((pixel[:3] * 255).round().astype(int))
        for pixel in image[::4, ::4].reshape(-1, image.shape[2])
    }
    assert (0, 0x72, 0xB2) in colours  # ours
    assert (0xE6, 0x9F, 0) not in colours  # the baseline is a line, no second kind of bars


def test_an_encoder_may_lack_a_task_or_have_one_seed(two_encoders, tmp_path):
    plot_scores(
        replace(two_encoders, entries=two_encoders.entries[:3]), tmp_path / "a.png", baseline="base"
    )
    one = tuple(
        replace(e, seeds=(), scores=e.scores[:1], record=e.record[:1]) for e in two_encoders.entries
    )
    plot_scores(replace(two_encoders, entries=one, seeds=(0,)), tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 5_000
    assert (tmp_path / "b.png").stat().st_size > 5_000


def test_dollar_signs_in_names_are_not_mathematics(two_encoders, tmp_path):
    named = tuple(replace(e, title=r"$\price$") for e in two_encoders.entries)
    assert plot_scores(replace(two_encoders, entries=named), tmp_path / "a.png").exists()


def test_nothing_but_a_baseline_is_no_chart(two_encoders, tmp_path):
    with pytest.raises(UserError, match="besides the baseline"):
        plot_scores(
            replace(two_encoders, entries=two_encoders.entries[1:2]),
            tmp_path / "a.png",
            baseline="base",
        )


def test_blanks_and_values_that_are_not_finite_are_skipped(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text(
        HEAD
        + "0,20,3.0,,,1e-4\n0,10,5.0,,,1e-4\n0,20,,4.0,2.5,\n"
        + "0,30,nan,,,\n0,40,inf,oops,,\n0,,1.0,,,\n"
    )
    assert read_metrics(log) == {
        "train/loss": [(10, 5.0), (20, 3.0)],
        "valid/loss": [(20, 4.0)],
        "valid/loss_speech": [(20, 2.5)],
        "lr": [(10, 1e-4), (20, 1e-4)],
    }


def test_losses_are_drawn(tmp_path):
    log = tmp_path / "metrics.csv"
    rows = [
        f"0,{step},{2 + math.exp(-step / 50)},,,\n0,{step},,{3 + math.exp(-step / 50)},2.0,\n"
        for step in range(0, 300, 10)
    ]
    log.write_text(HEAD + "".join(rows))
    image = imread(plot_losses(log, tmp_path / "losses.png"))
    assert image.shape[1] == 1200
    assert image[..., :3].std() > 0.05


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", HEAD, "step,lr\n1,0.1\n"])
def test_a_log_without_losses_is_a_user_error(tmp_path, text):
    log = tmp_path / "metrics.csv"
    log.write_text(text)
    with pytest.raises(UserError, match=r"metrics\.csv"):
        plot_losses(log, tmp_path / "losses.png")
    with pytest.raises(UserError, match="Cannot read"):
        plot_losses(tmp_path / "none.csv", tmp_path / "losses.png")


def test_a_row_with_too_many_fields_is_read(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,2.0,3.0\n2,1.5\n")
    found = read_metrics(tmp_path / "metrics.csv")
    assert found == {"train/loss": [(1.0, 2.0), (2.0, 1.5)]}


def test_domains_with_similar_names_have_their_own_lines(tmp_path, monkeypatch):
    labels = []
    draw = plots._plot_series

    def plot(*series, **options):
        labels.append(options["label"])
        draw(*series, **options)

    monkeypatch.setattr(plots, "_plot_series", plot)
    (tmp_path / "m.csv").write_text("step,valid/loss_sound,valid/loss_soundscape\n1,2.0,3.0\n")
    plot_losses(tmp_path / "m.csv", tmp_path / "losses.png")
    assert labels == ["sound", "soundscape"]


def test_parts_of_a_log_are_read_in_their_order(tmp_path):
    for number in range(12):  # every part repeated step 1
        (tmp_path / f"metrics.{number}.csv").write_text(
            f"step,train/loss\n1,{number}\n{number + 2},0.5\n"
        )
    (tmp_path / "metrics.csv").write_text("step,train/loss\n20,0.1\n")
    series = read_metrics(tmp_path / "metrics.csv")["train/loss"]
    assert series[0] == (1, 11)
    assert [step for step, _ in series] == [1, *range(2, 14), 20]


def test_a_map_of_equal_clips_is_one_point():
    same = np.full((40, 8), 0.3, dtype=np.float32)
    assert project(same).tolist() == [[0.0, 0.0]] * 40
    different = np.concatenate([same, same + 1])
    assert len(np.unique(project(different).round(3), axis=0)) > 1
