"""The Fisher information of any model on any data, and the geometry that it makes."""

from natgrad.information.fisher import fisher
from natgrad.information.geometry import Divergence, kl, length
from natgrad.information.hessian import ggn, hessian

__all__ = ["Divergence", "fisher", "ggn", "hessian", "kl", "length"]
