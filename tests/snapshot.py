"""Everything of a model that must be as before once adapters are gone, as values that can be compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def raw(tensor: Tensor) -> bytes:
    """Returns the bytes of a tensor's elements, or of all its parts, so that NaN and -0.0 compare too."""
    if hasattr(tensor, "__tensor_flatten__"):
        return b"".join(raw(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def address(tensor: Tensor) -> int:
    """Returns where the elements are, or the first part of a tensor that has parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        return address(getattr(tensor, tensor.__tensor_flatten__()[0][0]))
    return tensor.data_ptr()


def values(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Returns dtype, shape, strides and bytes of every entry of the state dict, in order."""
    return {k: (t.dtype, tuple(t.shape), t.stride(), raw(t)) for k, t in model.state_dict().items()}


def snapshot(model: nn.Module) -> dict[str, object]:
    """Returns all that the design promises to leave as it was: see section 6, points 5 and 6."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "values": list(values(model).items()),
        "modules": [(path, id(module), type(module)) for path, module in modules.items()],
        "parameters": [(path, id(p), type(p), p.requires_grad, address(p)) for path, p in parameters.items()],
        "empty": [(path, name) for path, m in modules.items() for name, p in m._parameters.items() if p is None],
        "training": [(path, module.training) for path, module in modules.items()],
        "hooks": [(path, name, list(getattr(m, name).items())) for path, m in modules.items() for name in HOOKS],
        "attributes": [(path, list(m.__dict__)) for path, m in modules.items() if "adapters" not in path.split(".")],
    }


def assert_same(before: dict[str, object], model: nn.Module) -> None:
    """Asserts that the model is what it was, and says in which respect it is not."""
    after = snapshot(model)
    for aspect, value in before.items():
        assert after[aspect] == value, f"{aspect} changed"
