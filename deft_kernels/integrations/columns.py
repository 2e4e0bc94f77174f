"""Columns of a data set that a trainer's loss needs: `Columns`, the `columns=` of the integrations."""

from ._shared.columns import Columns

__all__ = ["Columns"]
