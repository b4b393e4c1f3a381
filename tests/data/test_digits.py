import io

import numpy as np
import PIL.Image
from sklearn.datasets import load_digits

from gradaug_hf.data.digits import load_digits_data


def test_digits_are_those_of_scikit_learn():
    data = load_digits_data(size=8)
    digits = load_digits()
    assert (len(data["train"]), len(data["eval"])) == (898, 899)
    assert [*data["train"]["label"], *data["eval"]["label"]] == digits.target.tolist()
    images = [PIL.Image.open(io.BytesIO(row["image"]["bytes"])) for row in data["eval"].select(range(20))]
    assert {image.mode for image in images} == {"RGB"}
    for image, expected in zip(images, digits.images[898:], strict=False):
        assert np.abs(np.asarray(image)[..., 0] - expected * 255 / 16).max() <= 0.5
    assert PIL.Image.open(io.BytesIO(load_digits_data()["train"][0]["image"]["bytes"])).size == (32, 32)
