"""Plain training and GradAug from the same start, on a few labelled images.

    accelerate launch recipes/quickstart.py
    accelerate launch recipes/quickstart.py --dataset_name uoft-cs/cifar10 --labels_per_class 100 --epochs 60

Without --dataset_name it trains on scikit-learn's handwritten digits. It prints a table, writes the checkpoints
`plain` and `gradaug`, `results.json` and `curves.png` to --output_dir, and loads the GradAug checkpoint with timm in a
new process to measure its accuracy again. Tested on 2 CPU cores.
"""

from gradaug_hf.experiments.quickstart import main

if __name__ == "__main__":
    main(__doc__)
