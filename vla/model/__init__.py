"""The policy and its parts. Knows nothing of files or data sets."""

from vla.model.policy import PolicyConfig, VLAPolicy

__all__ = ["PolicyConfig", "VLAPolicy"]
