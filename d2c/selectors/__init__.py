"""Selectors: which images of a class, as an order of choice. They differ in what they optimise."""

from d2c.selectors.base import Candidates, Objective, Rows, Selector
from d2c.selectors.registry import METHODS, Method

__all__ = ["METHODS", "Candidates", "Method", "Objective", "Rows", "Selector"]
