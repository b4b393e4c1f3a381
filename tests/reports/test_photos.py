import numpy as np
import pytest
import torch

from gradaug_hf.reports.photos import as_photo, mistake_caption, plot_confusion, plot_photos, save_plot
from gradaug_hf.reports.predictions import Predictions
from tests.helpers.pictures import picture

pytest.importorskip("matplotlib")

FOUR = Predictions(np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]]), np.array([0, 1, 0, 1]), ["ant", "bee"])


def test_photos_have_their_captions_and_the_last_row_may_be_short():
    figure = plot_photos([picture(10)] * 5, list("abcde"), "five")
    assert [axes.get_title() for axes in figure.axes] == [*"abcde", "", "", ""]
    assert [len(axes.images) for axes in figure.axes] == [1] * 5 + [0] * 3


def test_no_photos_are_a_plot_with_its_title(tmp_path):
    save_plot(plot_photos([], [], "all 0 mistakes"), tmp_path / "plots" / "none.png")
    assert (tmp_path / "plots" / "none.png").stat().st_size > 0


def test_confusion_matrix_has_counts_classes_and_the_share_that_is_right():
    axes = plot_confusion(FOUR).axes[0]
    assert axes.get_title() == "75.0% of 4 images correct"
    assert [text.get_text() for text in axes.texts] == ["2", "0", "1", "1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ant\n2 of 2", "bee\n1 of 2"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[1, 0], [0.5, 0.5]])


@pytest.mark.parametrize("classes", [30, 100])
def test_confusion_matrix_of_many_classes_stays_readable(classes: int):
    axes = plot_confusion(Predictions(np.eye(classes), np.arange(classes), [f"c{n}" for n in range(classes)])).axes[0]
    assert not axes.texts and len(axes.get_yticklabels()) == (30 if classes == 30 else 0)


def test_a_mistake_says_what_was_predicted_and_what_it_is():
    assert mistake_caption(FOUR, 3, "folder/bee/7.jpg") == "predicted ant, 60%\nis bee: 7.jpg"
    assert mistake_caption(FOUR, 3, None) == "predicted ant, 60%\nis bee"


def test_a_photo_has_the_colours_of_before_it_was_normalised():
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    pixels = (torch.tensor([0.2, 0.6, 1.0]) - torch.tensor(mean)) / torch.tensor(std)
    np.testing.assert_allclose(as_photo(pixels[:, None, None], mean, std), [[[0.2, 0.6, 1.0]]], atol=1e-6)
