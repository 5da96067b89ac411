"""Merging adapters into a checkpoint on disk, from safetensors to safetensors, without building the model."""

from .report import CheckpointReport
from .run import merge_checkpoint

__all__ = ["CheckpointReport", "merge_checkpoint"]
