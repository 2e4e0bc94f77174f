"""What a trainer's logs show: `RunningStatistics`, the `record=` of the integrations."""

from ._shared.running import RunningStatistics

__all__ = ["RunningStatistics"]
