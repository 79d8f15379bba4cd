"""All rules: importing this makes them known."""

from natgrad.pde import arithmetic, composed, elementwise, shapes
from natgrad.pde.jet import RULES

__all__ = ["RULES", "arithmetic", "composed", "elementwise", "shapes"]
