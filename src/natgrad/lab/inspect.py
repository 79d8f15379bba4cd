"""`natgrad inspect`: what the natural gradient would do with a model, told without training it.

The costs are arithmetic on layer shapes, in floating-point operations of one step (a multiplication and an addition
are two). They leave out what is not a matrix product, so they compare steps; they don't predict seconds.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import ConfigError, EmptyError
from natgrad.lab.extras import require
from natgrad.lab.formats import number, operations, size
from natgrad.lab.problems import REGISTRY, call_factory, load_problem
from natgrad.metrics import KFAC
from natgrad.metrics.factorestimate import LOOKUP
from natgrad.tape.tape import Tape

REMAINDER = "a diagonal of squared gradients"


@dataclass(frozen=True)
class LayerShape:
    """What the cost of a block depends on.

    Attributes:
        inputs, outputs: features read and written within a group.
        bias: whether the homogeneous coordinate is there.
        groups: each has its own pair of factors.
        positions: rows of the map per example: 1 for a plain linear layer, pixels for a convolution, tokens; uses of
            a shared weight add up.
        first: the block reads the data, so nothing is propagated behind it.
    """

    inputs: int
    outputs: int
    bias: bool = True
    groups: int = 1
    positions: int = 1
    first: bool = False

    @property
    def columns(self) -> int:
        """The side of the input factor A."""
        return self.inputs + self.bias

    @property
    def sides(self) -> tuple[tuple[int, bool], tuple[int, bool]]:
        """The sides of A and G, and whether K-FAC keeps the diagonal of it alone, as of a large vocabulary."""
        columns, outputs = (
            (n, self.groups == 1 and KFAC.largest is not None and n > KFAC.largest)
            for n in (self.columns, self.outputs)
        )
        return columns, outputs

    @property
    def factor_elements(self) -> int:
        """Numbers in A and G together."""
        return self.groups * sum(n if alone else n**2 for n, alone in self.sides)


@dataclass(frozen=True)
class Schedule:
    """How often the parts of a K-FAC step are done.

    Attributes:
        name: what the table calls it.
        factors_every, inverses_every: steps between refreshes.
        tangents: directions of the quadratic model (0 with a given learning rate).
        tangents_share: share of the batch that they are pushed through.
    """

    name: str
    factors_every: int = 1
    inverses_every: int = 5
    tangents: int = 2
    tangents_share: float = 0.15


START = Schedule("no learning rate, at the start: factors and inverses each step", inverses_every=1)
SETTLED = Schedule("no learning rate, settled: factors every 5 steps, inverses every 10", 5, 10)
FIXED = Schedule("lr= given, factors every 10 steps, inverses every 20", 10, 20, tangents=0)
SCHEDULES = (START, SETTLED, FIXED)  # natgrad adapts its periods between the first two


def product_flops(layer: LayerShape, examples: int) -> float:
    """One pass of a batch through the map: 2 · rows · inputs · outputs, for each group."""
    return 2.0 * examples * layer.positions * layer.groups * layer.inputs * layer.outputs


def sgd_flops(layer: LayerShape, examples: int) -> float:
    """Forward pass, weight gradient, and the signal to the layer before, if there is one."""
    return product_flops(layer, examples) * (2 if layer.first else 3)


def signal_flops(layer: LayerShape, examples: int) -> float:
    """The extra backward pass of sampled signals: no weight gradients."""
    return 0.0 if layer.first else product_flops(layer, examples)


def factor_flops(layer: LayerShape, examples: int) -> float:
    """A = mean ã ãᵀ and G = Σ g gᵀ over the rows, by a symmetric kernel: half of a full product."""
    return 1.0 * examples * layer.positions * layer.factor_elements


def inverse_flops(layer: LayerShape) -> float:
    """Cholesky factorisation and inverse of both factors: n³ each, but for a diagonal."""
    return float(layer.groups * sum(n if alone else n**3 for n, alone in layer.sides))


def precondition_flops(layer: LayerShape) -> float:
    """G⁻¹ V A⁻¹ for one gradient V."""
    entries = layer.outputs * layer.columns
    return 2.0 * layer.groups * sum(entries * (1 if alone else n) for n, alone in layer.sides)


def tangent_flops(layer: LayerShape, examples: float, directions: int) -> float:
    """Forward-mode derivatives: W ȧ + Ẇ a for every direction."""
    return directions * product_flops(layer, 1) * examples * (1 if layer.first else 2)


def kfac_flops(layer: LayerShape, examples: int, schedule: Schedule) -> float:
    """One amortised step of natgrad beside the forward and backward pass that SGD does too."""
    statistics = signal_flops(layer, examples) + factor_flops(layer, examples)
    return (
        sgd_flops(layer, examples)
        + statistics / schedule.factors_every
        + inverse_flops(layer) / schedule.inverses_every
        + precondition_flops(layer)
        + tangent_flops(layer, examples * schedule.tangents_share, schedule.tangents)
    )


@dataclass(frozen=True)
class Row:
    """One parameter: its shape, the rule that covers it, and its block's factors where it is the block's weight."""

    name: str
    shape: tuple[int, ...]
    rule: str
    factors: str
    memory: int
    layer: LayerShape | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found.

    Attributes:
        title: what was inspected.
        examples: batch size of the costs.
        rows: one for each parameter, in the model's order.
        element: bytes of a number.
        notes: what a reader should know.
    """

    title: str
    examples: int
    rows: tuple[Row, ...]
    element: int
    notes: tuple[str, ...]

    @property
    def layers(self) -> list[LayerShape]:
        """The shapes of all covered blocks."""
        return [row.layer for row in self.rows if row.layer is not None]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(torch.Size(row.shape).numel() for row in self.rows)

    def sgd(self) -> float:
        """Operations of a step of SGD."""
        return sum(sgd_flops(layer, self.examples) for layer in self.layers)

    def ratio(self, schedule: Schedule) -> float:
        """Operations of natgrad's step ÷ SGD's."""
        return sum(kfac_flops(layer, self.examples, schedule) for layer in self.layers) / self.sgd()


def inspect_model(path: str, batch_size: int | None = None) -> Inspection:
    """Inspects the model of ``module:factory`` or of a registered problem.

    The factory gives a model, or a tuple (model, loss_fn, example_input). The example is needed to see how each
    parameter acts; for a bare model whose first layer is an `nn.Linear` one is made up.

    Raises:
        ConfigError: the factory can't be used, or gives something else, or the model fails on the example.
        UnknownNameError: no such problem.
        EmptyError: the model has no trainable parameter.
    """
    if ":" not in path or path in REGISTRY:
        found: object = load_problem(path)
    else:
        found = call_factory(path)
    if hasattr(found, "make_model") and hasattr(found, "train"):
        problem: Any = found
        size = batch_size or problem.batch_size
        return inspect_module(problem.build(0), problem.train[0][: min(size, 8)], path, size)
    model, example = _model_and_example(path, found)
    return inspect_module(model, example, path, batch_size)


def inspect_module(
    model: nn.Module, example: Any, title: str = "model", batch_size: int | None = None
) -> Inspection:
    """Runs one forward pass under the tape and puts together what it saw.

    Args:
        model: left as it was, training mode and random state included.
        example: a batch of inputs: a tensor, a tuple of positional or a dict of named arguments.
        title: for the report.
        batch_size: batch size of the costs; the example's own by default.

    Raises:
        EmptyError: no trainable parameter.
        ConfigError: the model fails on the example, or gives no tensor.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise EmptyError("the model has no trainable parameter")
    count, shapes, tape = _listen(model, example, parameters)
    weights = {block.weight: block for block, _ in shapes.values()}
    owner = {name: block for block, _ in shapes.values() for name in block.names}
    rows = []
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        each = parameter.element_size()
        if name in tape.uncovered:
            rows.append(Row(name, shape, f"none ({tape.uncovered[name]}): {REMAINDER}", "–", 0, None))
        elif name in weights:
            block, layer = shapes[name]
            sides = " and ".join(f"a diagonal of {n}" if alone else f"{n}²" for n, alone in layer.sides)
            text = sides if layer.groups == 1 else f"{layer.groups} × ({sides})"
            memory = 2 * layer.factor_elements * each  # the averages and their inverses
            rule = f"{block.rule} and {tape.elements[name]}" if name in tape.elements else block.rule
            rows.append(Row(name, shape, rule, text, memory, layer))
        elif name in owner:
            rows.append(Row(name, shape, owner[name].rule, f"in {owner[name].weight}", 0, None))
        elif tape.elements.get(name) == LOOKUP and len(shape) == 2:
            words, features = shape
            memory = 2 * (features**2 + words) * each
            rows.append(Row(name, shape, LOOKUP, f"{features}² and a diagonal", memory, None))
        elif name in tape.elements:
            rows.append(Row(name, shape, tape.elements[name], "a diagonal", parameter.numel() * each, None))
        else:
            rows.append(Row(name, shape, f"not used on this example: {REMAINDER}", "–", 0, None))
    notes = []
    bare = [row.name for row in rows if row.layer is None and row.factors == "–"]
    if bare:
        share = sum(parameters[n].numel() for n in bare) / sum(p.numel() for p in parameters.values())
        notes.append(f"{len(bare)} of {len(rows)} parameters ({share:.1%} of the numbers) have no rule.")
    frozen = sum(1 for p in model.parameters() if not p.requires_grad)
    if frozen:
        notes.append(f"{frozen} frozen parameters are left alone.")
    element = next(iter(parameters.values())).element_size()
    return Inspection(title, batch_size or count, tuple(rows), element, tuple(notes))


def _listen(
    model: nn.Module, example: Any, parameters: Mapping[str, nn.Parameter]
) -> tuple[int, dict[str, tuple[Any, LayerShape]], Tape]:
    """Batch size of the example; weight name → (block, shape); the tape, which says what the others did."""
    tensors = list(_tensors(example))
    if not tensors:
        raise ConfigError("the example input holds no tensor")
    count = len(tensors[0]) if tensors[0].dim() else 1
    data = {t.untyped_storage().data_ptr() for t in tensors}
    tape = Tape(parameters)
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]), tape.recording():
            model.eval()  # batch norm must not take the example into its averages
            outputs = [z for z in _tensors(_called(model, example)) if z.is_floating_point()]
    except Exception as error:
        raise ConfigError(f"the model fails on the example input: {type(error).__name__}: {error}") from error
    finally:
        model.train(training)
    if not outputs:
        raise ConfigError("the model's output holds no floating-point tensor")
    shapes: dict[str, tuple[Any, LayerShape]] = {}
    for record in tape.records(outputs, [torch.zeros_like(z) for z in outputs], count):
        block = record.block
        rows = record.raw_signals.numel() // (block.groups * block.outputs)
        before = shapes[block.weight][1].positions if block.weight in shapes else 0
        first = record.raw_inputs.untyped_storage().data_ptr() in data
        shape = LayerShape(
            block.inputs, block.outputs, block.bias is not None, block.groups,
            before + max(1, rows // count), first,
        )  # fmt: skip
        shapes[block.weight] = (block, shape)
    tape.clear()
    return count, shapes, tape


def _model_and_example(path: str, found: object) -> tuple[nn.Module, Any]:
    if isinstance(found, (tuple, list)) and len(found) == 3 and isinstance(found[0], nn.Module):
        return found[0], found[2]
    if not isinstance(found, nn.Module):
        raise ConfigError(
            f"{path} gave a {type(found).__name__}; it must give a model or (model, loss_fn, example_input)"
        )
    first = next((m for m in found.modules() if not list(m.children()) and list(m.parameters())), None)
    if not isinstance(first, nn.Linear):
        raise ConfigError(
            f"{path} gave a model alone; give (model, loss_fn, example_input), to see how it is called"
        )
    return found, torch.zeros(1, first.in_features, dtype=first.weight.dtype)


def _called(model: Callable[..., Any], example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


# ---------------------------------------------------------------------------------------------- as a table


def render(inspection: Inspection, width: int | None = None) -> str:
    """The inspection as a table for a terminal of the given width (the terminal's own by default)."""
    console_of = require("rich.console", "the table")
    table_of = require("rich.table", "the table").Table
    box = require("rich.box", "the table")
    sgd = inspection.sgd()
    table = table_of(
        box=box.SIMPLE_HEAD,
        title=inspection.title,
        title_justify="left",
        title_style="bold",
        show_footer=True,
    )
    memory = sum(row.memory for row in inspection.rows)
    total = inspection.parameters
    table.add_column("parameter", f"{total:,} parameters")
    table.add_column("shape")
    table.add_column("rule")
    table.add_column("factors A and G")
    table.add_column("memory", size(memory), justify="right")
    table.add_column("step ÷ SGD's", _ratio(inspection.ratio(SETTLED)) if sgd else "–", justify="right")
    for row in inspection.rows:
        cost = "" if row.layer is None else _ratio(
            kfac_flops(row.layer, inspection.examples, SETTLED) / sgd_flops(row.layer, inspection.examples)
        )  # fmt: skip
        style = "yellow" if row.factors == "–" else None
        shape = " × ".join(map(str, row.shape)) or "scalar"
        table.add_row(
            row.name, shape, row.rule, row.factors, size(row.memory) if row.memory else "", cost, style=style
        )
    lines = [
        f"Memory of factors and inverses: {size(memory)}, {memory / (total * inspection.element):.1f}× the parameters.",
    ]
    if sgd:
        lines.append(
            f"A step on {inspection.examples:,} examples, in matrix products: SGD {operations(sgd)}; natgrad"
        )
        lines += [
            f"    {_ratio(inspection.ratio(s)):>6}  {s.name}{' (the column above)' if s is SETTLED else ''}"
            for s in SCHEDULES
        ]
    lines += inspection.notes
    stream = io.StringIO()
    columns = width or shutil.get_terminal_size((110, 30)).columns
    console = console_of.Console(file=stream, width=columns, highlight=False)
    console.print(table)
    console.print("\n".join(lines), soft_wrap=True)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _ratio(value: float) -> str:
    return f"{value:.2f}×" if value < 100 else f"{number(value)}×"
