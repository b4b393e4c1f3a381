"""Fine-tune a pretrained model on photos of your own with GradAug (arXiv 2006.07989).

    accelerate launch recipes/fine_tune.py --model timm/resnet50.a1_in1k --dataset_name PHOTOS
    accelerate launch recipes/fine_tune.py --model resnet50.a1_in1k --train_dir TRAIN --validation_dir VALIDATION
    accelerate launch recipes/fine_tune.py --model timm/resnet50.a1_in1k --dataset_name PHOTOS --preview
    python recipes/fine_tune.py --model timm/resnet50.a1_in1k --dataset_name PHOTOS --compare --seeds 3

PHOTOS has a folder of photos for each class, or is the id of a dataset on the Hub. Prints the accuracy after the final
epoch and of each class, and writes the model, `results.json`, `classes.csv` and plots to --output_dir. With --compare
it says whether GradAug helps: plain training, plain training at equal compute and GradAug, with several seeds.
Tested on 2 CPU cores.
"""

from gradaug_hf.experiments.fine_tuning import run

if __name__ == "__main__":
    run()
