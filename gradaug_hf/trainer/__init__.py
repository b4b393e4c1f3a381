"""The Trainer of transformers with the GradAug objective, its settings, checks, callbacks and checkpoints."""
