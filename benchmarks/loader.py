"""Images per second of the recipes' data loader alone: decoding, augmentation and collation.

    python benchmarks/loader.py --workers 8

The images are JPEGs of 500x375 pixels made here for 224 pixels, with the transform of ImageNet, and PNGs of 32x32 for
32 pixels with that of CIFAR.
"""

import argparse
import io
import time

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from gradaug_hf.data.decoding import with_pixels
from gradaug_hf.data.transforms import cifar_transform, imagenet_transform

NUM_IMAGES = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    for side in (224, 32):
        rate = images_per_second(side, args.batch_size, args.workers)
        print(f"{side} pixels, {args.workers} workers: {rate:.0f} images/s")


def images_per_second(side: int, batch_size: int, workers: int) -> float:
    """Images per second once the workers have started.

    Args:
        side: 224 or 32, in pixels.
        batch_size: images in a batch.
        workers: processes that load.
    """
    transform = cifar_transform(True) if side == 32 else imagenet_transform(True)
    data = with_pixels(make_images(side), transform)
    loader = DataLoader(data, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    rates = []
    for _ in range(3):  # the first starts the workers
        start = time.perf_counter()
        seen = sum(len(batch["labels"]) for batch in loader)
        rates.append(seen / (time.perf_counter() - start))
    return max(rates[1:])


def make_images(side: int) -> Dataset:
    """Smooth random images, encoded."""
    rng = np.random.default_rng(0)
    size, kind = ((32, 32), "PNG") if side == 32 else ((500, 375), "JPEG")
    rows = []
    for row in range(NUM_IMAGES):
        pixels = PILImage.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(size)
        file = io.BytesIO()
        pixels.save(file, kind)
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": row % 10, "row": row})
    features = Features({"image": Image(), "label": ClassLabel(10), "row": Value("int64")})
    return Dataset.from_list(rows, features=features)


if __name__ == "__main__":
    main()
