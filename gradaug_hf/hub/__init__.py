"""Checkpoint folders that timm and transformers load: written, checked, loaded, pushed and pulled."""
