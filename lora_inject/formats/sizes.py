"""How large the tensors of an adapter can be: what could fit no model's weights is refused before it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from ..errors import MismatchError

SMALL = 2**22
"""How many elements are read whatever the model: less than what any check of them would cost."""
GENEROUS = 4
"""How many times the model's own elements: both factors of full rank have twice as many, packed weights half."""


def check_sizes(shapes: Mapping[str, Sequence[int]], model: nn.Module | None, where: object) -> None:
    """Refuses tensors that are larger than any that the model could use, one by one and together.

    A factor of a weight, up to full rank, has at most as many elements as the weight. So refusing a file never costs
    more than loading the largest one that fits. Without a model there is nothing to compare with.

    Raises:
        MismatchError: there are such tensors; names the largest.
    """
    if model is None or not shapes:
        return
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    have = [tensor.numel() for tensors in (model.parameters(), model.buffers()) for tensor in tensors]
    largest, total = max(sizes, key=lambda name: sizes[name]), sum(sizes.values())
    if sizes[largest] > GENEROUS * max(have, default=0) + SMALL or total > GENEROUS * sum(have) + SMALL:
        raise MismatchError(
            f"{where}: {total} numbers in all, of which {largest[:200]} {tuple(shapes[largest])} has most: "
            f"more than any adapter of this model with its {sum(have)} needs: it was made for another model"
        )
