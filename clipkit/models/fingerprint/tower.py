"""What a tower really computes: the activations in it, and which positions its pooling reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.models.fingerprint.tokenizer import end_token, padded_row

if TYPE_CHECKING:
    from clipkit.modality import Modality
    from clipkit.models.backend import Backend
    from clipkit.models.processor import ImageSide, TextSide

_ACTIVATION = re.compile(r"(elu|relu6?|silu|swish|mish|tanh|sigmoid|activation|act)$", re.IGNORECASE)

_KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
}

NOT_MEASURED = "not measured"
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError)


def measure_towers(backend: Backend, part: Modality, side: Any) -> dict[str, Any]:
    """Return activation, attention heads, norm and pooling of a tower: measured, or else as its backend declares."""
    declared = backend.describe(part)
    activations = activation(backend, part) or str(declared.get("activation"))
    pooling = image_pooling(backend, side) if part == "image" else text_pooling(backend, side)
    modules = list(_modules(backend, part))
    heads = _settings(modules, ("num_heads", "num_attention_heads"))
    eps = _settings(modules, ("eps", "variance_epsilon"))
    return {
        "class": declared.get("class", type(backend).__name__),
        "head": declared.get("head", "its own"),
        "activation": activations,
        "pooling": str(declared.get("pooling", NOT_MEASURED)) if pooling == NOT_MEASURED else pooling,
        "attention_heads": _listed(heads),
        "norm_eps": _listed(eps),
    }


def _settings(modules: list[nn.Module], names: tuple[str, ...]) -> set[float]:
    """Return the numbers that modules have as attributes of these names."""
    values = (getattr(module, name, None) for module in modules for name in names)
    return {value for value in values if _is_number(value)}


def _listed(values: set[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values)) or "-"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _modules(backend: Backend, part: Modality, *, head: bool = False) -> Iterator[nn.Module]:
    return (
        m for name, m in backend.named_modules() if backend.belongs_to(part, name, head=head) and "pooler" not in name
    )


def activation(backend: Backend, part: Modality) -> str:
    """Return the activations among a tower's modules, named by what they do to numbers; empty if it has none."""
    names = {_name(module) for module in _modules(backend, part) if _is_activation(module)}
    return " + ".join(sorted(names))


def _is_activation(module: nn.Module) -> bool:
    plain = next(module.parameters(), None) is None and next(module.children(), None) is None
    return plain and _ACTIVATION.search(type(module).__name__) is not None


@torch.no_grad()
def _name(module: nn.Module) -> str:
    x = torch.linspace(-8, 8, 65)
    try:
        y = module(x.clone())
    except _FAILURES:
        return type(module).__name__
    for name, function in _KNOWN.items():
        if y.shape == x.shape and (y - function(x)).abs().max() < 1e-4:  # the two gelus differ by 5e-4
            return name
    return type(module).__name__


def image_pooling(backend: Backend, side: ImageSide) -> str:
    """Return what the embedding reads: `class token`, `mean of the patches`, `mean of all positions`, `attention`."""
    size = side.image_size
    device, dtype = _device_and_dtype(backend)
    channels = _channels(backend, size)
    pixels = torch.linspace(-2, 2, channels * size * size).sin().view(1, channels, size, size)

    def run() -> Tensor:
        return backend.project_image(backend.image_features(pixels.to(device, dtype)))

    weights = _read(backend, "image", run)
    if weights is None:
        return NOT_MEASURED
    read, even = _positions(weights)
    if read == [0]:
        return "class token"
    length = len(weights)
    if read == list(range(length)):
        return "mean of all positions" if even else "attention"
    if read == list(range(1, length)) and even:
        return "mean of the patches"
    return f"{len(read)} of {length} positions"


def text_pooling(backend: Backend, side: TextSide) -> str:
    """Return what the embedding reads: `end token`, `last position`, `first token`, `mean over the mask` ..."""
    inputs, count, left = padded_row(side)
    device, _ = _device_and_dtype(backend)
    inputs = {name: value.to(device) for name, value in inputs.items()}

    def read(changed: Tensor) -> tuple[list[int], bool, int] | None:
        given = {**inputs, "input_ids": changed}
        weights = _read(backend, "text", lambda: backend.embed_text(given.pop("input_ids"), _pop_mask(given), **given))
        return None if weights is None else (*_positions(weights), len(weights))

    ids = inputs["input_ids"]
    reading = read(ids)
    if reading is None:
        return NOT_MEASURED
    positions, even, length = reading
    if len(positions) != 1:
        return _several(positions, even, length, count, left)
    at = positions[0]
    last = length - 1
    end = length - 1 if left else count - 1
    if at == 0 and end != 0:
        return "first token"
    if at != end:
        return "last position" if at == last else f"position {at}"
    token = end_token(side)
    if token is None or left or end <= 1:
        return "last token"
    moved = read(_put(ids, 1, token))
    if moved is None or moved[0] != [1]:
        return "last position" if end == last else "last token"
    highest = _vocabulary(backend) - 1
    if highest > token and read(_put(ids, 1, highest)) == ([1], *reading[1:]):
        return "highest token id"
    return "end token"


def _several(positions: list[int], even: bool, length: int, count: int, left: bool) -> str:
    real = list(range(length - count, length) if left else range(count))
    reading = "mean" if even else "attention"
    if positions == list(range(length)) and length != count:
        return f"{reading} of all positions"
    return f"{reading} over the mask" if positions == real else f"{len(positions)} of {length} positions"


def _pop_mask(given: dict[str, Tensor]) -> Tensor | None:
    return given.pop("attention_mask", None)


def _put(ids: Tensor, position: int, token: int) -> Tensor:
    changed = ids.clone()
    changed[:, position] = token
    return changed


def _vocabulary(backend: Backend) -> int:
    sizes = [m.num_embeddings for m in _modules(backend, "text") if isinstance(m, nn.Embedding)]
    return max(sizes, default=0)


def _device_and_dtype(backend: Backend) -> tuple[torch.device, torch.dtype]:
    first = next(p for p in backend.parameters() if p.is_floating_point() and p.ndim > 1)
    return first.device, first.dtype


def _channels(backend: Backend, size: int) -> int:
    convolutions = (m for m in _modules(backend, "image") if isinstance(m, nn.Conv2d))
    return next((m.in_channels for m in convolutions), 3)


def _positions(weights: Tensor) -> tuple[list[int], bool]:
    """Return the positions with a gradient, and whether all have the same one. `weights`: (positions, width)."""
    size = weights.abs().amax(1)
    read = torch.nonzero(size > 1e-4 * size.max()).flatten().tolist()
    kept = weights[read]
    return read, bool(((kept - kept[0]).abs().max() < 0.02 * kept.abs().max()).item())


def _read(backend: Backend, part: Modality, run: Callable[[], Tensor]) -> Tensor | None:
    """Return the gradient (positions, width) of the embedding at the last hidden state before pooling, or None.

    Blocks after the first are skipped where they keep shapes: what is pooled does not depend on them.
    """
    for skipping in (True, False):
        tap = _Tap()
        try:
            with _eval(backend), tap.on(_modules(backend, part)), _skipped(backend, part, skipping):
                vector = run().float()
                weights = torch.arange(1, vector.shape[1] + 1, device=vector.device).sin()
                if tap.leaf is None or not vector.requires_grad:
                    return None
                (gradient,) = torch.autograd.grad((vector * weights).sum(), tap.leaf)
        except _FAILURES:
            continue
        flat = gradient[0].flatten(1).T if gradient.ndim == 4 else gradient[0]
        return flat.float().cpu() if bool(flat.abs().max() > 0) else None
    return None


class _Tap:
    """Cuts the graph at every hidden state (n, positions, width), so that the last one before pooling is kept."""

    def __init__(self) -> None:
        self.leaf: Tensor | None = None

    @contextmanager
    def on(self, modules: Iterator[nn.Module]) -> Iterator[None]:
        handles = [module.register_forward_hook(self._hook) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, module: nn.Module, given: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor) or not first.is_floating_point() or not _has_positions(first):
            return None
        self.leaf = first.detach().requires_grad_()
        again = self.leaf.clone()  # in-place activations may not touch a leaf
        return (again, *output[1:]) if isinstance(output, tuple) else again


def _has_positions(x: Tensor) -> bool:
    return (x.ndim == 3 and len(x) == 1 and x.shape[1] > 1) or (x.ndim == 4 and len(x) == 1 and x[0, 0].numel() > 1)


@contextmanager
def _eval(backend: Backend) -> Iterator[None]:
    modes = [(module, module.training) for module in backend.modules()]
    backend.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _skipped(backend: Backend, part: Modality, on: bool) -> Iterator[None]:
    """Make all blocks of a stack but the first return their input."""
    stacks = [m for m in _modules(backend, part) if isinstance(m, nn.ModuleList) and len(m) > 1]
    patched: list[tuple[nn.Module, Any]] = []
    for stack in stacks if on else []:
        if len({type(block) for block in stack}) == 1:
            memory: dict[str, Any] = {}
            for index, block in enumerate(stack):
                patched.append((block, block.__dict__.get("forward")))
                block.forward = _first(block.forward, memory) if index == 0 else _pass_on(block.forward, memory)
    try:
        yield
    finally:
        for block, own in patched:
            if own is None:
                del block.__dict__["forward"]
            else:
                block.forward = own


def _first(forward: Callable[..., Any], memory: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        first = output[0] if isinstance(output, tuple) else output
        same = args and isinstance(args[0], Tensor) and isinstance(first, Tensor) and first.shape == args[0].shape
        memory["output"] = output if same else None
        return output

    return run


def _pass_on(forward: Callable[..., Any], memory: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        output = memory.get("output")
        if output is None or not args:
            return forward(*args, **options)
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    return run
