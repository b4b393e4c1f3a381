"""Folders that timm and transformers load: written, described, loaded, pushed and pulled."""
