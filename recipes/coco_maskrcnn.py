"""Mask R-CNN or Faster R-CNN with a feature pyramid on COCO, on a backbone that GradAug has trained, or with GradAug.

    accelerate launch recipes/coco_maskrcnn.py --coco_dir coco --backbone outputs/resnet50-gradaug-seed42
    accelerate launch recipes/coco_maskrcnn.py --coco_dir coco --backbone timm/resnet50.a1_in1k --gradaug
    accelerate launch recipes/coco_maskrcnn.py --coco_dir coco --do_train false --do_eval --model DIR

Prints COCO's average precision after the final epoch, and writes the detector, `results.json` and `detections.json` to
--output_dir. Any images with annotations in COCO's format do. The settings are those of torchvision's training in 12
epochs on 16 images a step, with batch norm that goes on learning its statistics.
Tested on 2 CPU cores, with small images and networks.
"""

from gradaug_hf.detection.experiment import run

SETTINGS = {
    "num_train_epochs": 12,
    "batch_size": 16,
    "learning_rate": 0.02,
    "lr_drops": [8 / 12, 11 / 12],
    "warmup_epochs": 0.15,
    "weight_decay": 1e-4,
    "num_subnets": 3,
    "min_width": 0.9,
    "per_device_eval_batch_size": 4,
}

if __name__ == "__main__":
    run(SETTINGS, __doc__)
