"""The policy and its parts. Knows nothing of data sets."""

from vla.model.policy import VLAPolicy
from vla.model.spec import DatasetSpec, PolicyConfig

__all__ = ["DatasetSpec", "PolicyConfig", "VLAPolicy"]
