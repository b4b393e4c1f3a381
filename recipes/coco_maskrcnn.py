"""Mask R-CNN or Faster R-CNN with a feature pyramid on COCO, on a backbone that GradAug has trained, or with GradAug.

    accelerate launch recipes/coco_maskrcnn.py --coco_dir coco --backbone outputs/resnet50-gradaug-seed42
    accelerate launch recipes/coco_maskrcnn.py --coco_dir coco --backbone timm/resnet50.a1_in1k --gradaug
    accelerate launch recipes/coco_maskrcnn.py --coco_dir coco --do_train false --do_eval --model DIR

Prints COCO's average precision after the final epoch, and writes the detector, `results.json` and `detections.json` to
--output_dir. Any images with annotations in COCO's format do. The settings are those of torchvision's training in 12
epochs on 16 images a step, with batch norm that goes on learning its statistics.
Tested on 2 CPU cores, with small images and models.
"""

from gradaug_hf.detection.experiment import run

if __name__ == "__main__":
    run()
