"""What holds for every test: shapes are checked, chance is fixed, and nothing leaks into the next test.

The import hook must be in place before anything imports natgrad, so it stands at the top of this file.
"""

from __future__ import annotations

from jaxtyping import install_import_hook

# Under pytest alone, every annotated function and dataclass of natgrad checks types and shapes at each call. An int
# passes for a float, as it does for a type checker (PEP 484's numeric tower): lr=1 is no error.
install_import_hook("natgrad", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import random  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# One thread: sums are added up in the same order on every machine, and small tensors are faster so.
torch.set_num_threads(1)


class _TorchRandom:
    """torch's generator in the form that hypothesis resets before each example, so that failures replay."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


_torch_random = _TorchRandom()  # hypothesis holds only a weak reference
hypothesis.register_random(_torch_random)

# The same examples on every run, and no time limit: a loaded machine fails no law.
hypothesis.settings.register_profile("natgrad", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("natgrad")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Seeds every test alike, and undoes what a test changed of torch's global state."""
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    torch.manual_seed(0)
    random.seed(0)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
