"""Measurements of models, kept in a JSON file as they are made, so that an interrupted run goes on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gradaug_hf.experiments.results import run_context
from gradaug_hf.utils.environment import public_settings


class Measurements:
    """Measurements of each model, by name of the measurement.

    Args:
        file: JSON file; what it holds of the same settings and weights is taken over.
        settings: on which the measurements depend, by name.
        weights: model -> digest of its weights.
        device: on which is measured.
        writes: whether this process writes the file.

    Raises:
        ValueError: the file cannot be read, or holds measurements with other settings.
    """

    def __init__(
        self,
        file: Path,
        settings: Mapping[str, Any],
        weights: Mapping[str, str],
        device: torch.device,
        writes: bool = True,
    ):
        self.file = file
        self.device = device
        self.settings = public_settings(settings)
        self.weights = dict(weights)
        self._writes = writes
        self._models = _read(file, self.settings) if file.exists() else {}
        for model, digest in weights.items():
            if self._models.get(model, {}).get("weights") != digest:
                self._models[model] = {"weights": digest, "measured": {}}

    def of(self, model: str) -> dict[str, Any]:
        """Return the measurements of a model."""
        return self._models[model]["measured"]

    def without(self, name: str) -> list[str]:
        """Return the models that lack a measurement."""
        return [model for model in self.weights if name not in self.of(model)]

    def add(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep a measurement of some models."""
        for model, value in values.items():
            self.of(model)[name] = value
        self.write()

    def write(self, **summary: Any) -> None:
        """Write the file anew, in one piece."""
        if not self._writes:
            return
        content = {**run_context(self.settings, self.device), "models": self._models, **summary}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(f"{self.file.name}.part")
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, self.file)


def _read(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found, models = content["settings"], content["models"]
        known = {model: (entry["weights"], entry["measured"].items()) for model, entry in models.items()}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not hold measurements to go on with: {error!r}; remove it") from error
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"{file} holds measurements with {name} {found.get(name)!r}, not {value!r}; give another output_dir"
            )
    return {model: models[model] for model in known}
