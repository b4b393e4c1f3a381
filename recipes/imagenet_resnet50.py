"""ResNet-50 on ImageNet with GradAug (arXiv 2006.07989), or with another method of its table.

    accelerate launch recipes/imagenet_resnet50.py
    accelerate launch recipes/imagenet_resnet50.py --method gradaug_cutmix --streaming --bf16
    accelerate launch recipes/imagenet_resnet50.py run.yaml
    accelerate launch recipes/imagenet_resnet50.py --do_train false --do_eval --model timm/resnet50.a1_in1k

Prints the accuracy after the final epoch, and writes the model and `results.json` to --output_dir. The images are
those of the Hub's ILSVRC/imagenet-1k, whose terms have to be accepted there first; `hf auth login` signs in.
Tested on 2 CPU cores, for a few steps.
"""

from gradaug_hf.experiments.recipes import IMAGENET_RESNET50 as RECIPE
from gradaug_hf.experiments.run import run

if __name__ == "__main__":
    run(RECIPE)
