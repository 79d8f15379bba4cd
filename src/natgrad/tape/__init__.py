"""What each parameter did in one forward and backward pass."""

from natgrad.tape.jacobian import Batch, evaluate, jacobian_products
from natgrad.tape.records import Block, LayerRecord
from natgrad.tape.tape import Tape

__all__ = ["Batch", "Block", "LayerRecord", "Tape", "evaluate", "jacobian_products"]
