"""The policy and its parts. Knows nothing of files or data sets."""

from vla.model.policy import DatasetSpec, PolicyConfig, VLAPolicy

__all__ = ["DatasetSpec", "PolicyConfig", "VLAPolicy"]
