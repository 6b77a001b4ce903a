"""Replaces parts of a loaded transformers model by faster ones that compute the same, for fp32 on CPU.

Parts are found by structure, whatever the model is called, and each replacement is compared with the module it is
to replace on random input; where they disagree by more than fp32 reassociation explains, the original stays.
"""

from __future__ import annotations

import inspect
import logging
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tandem.engine.backends.cpu.layer import FusedLayer, fused_layer, is_layer
from tandem.engine.backends.cpu.modules import FusedRMSNorm, PackedGatedMLP, PackedLinear, fused_rotary
from tandem.engine.backends.cpu.probe import REPEATS, TOLERANCE, RefusedError, random_rows, require_same, trial

log = logging.getLogger(__name__)

# A weight that an embedding shares must stay plain for the look-up, so packing it makes a second copy. That doubles
# the speed of the output matrix at small batches, which is worth this much memory and no more.
MAX_TIED_COPY_BYTES = 1 << 30

_ROTARY = "apply_rotary_pos_emb"
# oneDNN's name of an activation and of its algorithm, with what it must equal.
_ACTIVATIONS: tuple[tuple[tuple[str, str], Callable[[Tensor], Tensor]], ...] = (
    (("swish", ""), F.silu),
    (("gelu", "none"), F.gelu),
    (("gelu", "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    (("relu", ""), F.relu),
)


@dataclass(frozen=True)
class FusionReport:
    """What `fuse_for_cpu` did: modules replaced, and modules of a kind it knows that it left alone."""

    # How many of each kind: linear, gated_mlp, rms_norm, rotary, layer.
    fused: dict[str, int]
    # Why not, by the module's name.
    left_alone: dict[str, str]
    # Memory of the second copies that tied weights needed.
    copied_bytes: int


def fuse_for_cpu(model: nn.Module) -> FusionReport:
    """Fuse `model` in place; call once, after loading, with the weights in their final dtype.

    Memory: packed weights replace the plain ones, one module at a time; only weights tied to an embedding are held
    twice, up to `MAX_TIED_COPY_BYTES` each. The model can no longer be trained, saved or moved. Anything but fp32 on
    CPU is left as it is: in bf16 another order of summation changes results by more than the tolerance.
    """
    fusion = _Fusion(model)
    # `no_grad`, not `inference_mode`: the packed weights must be usable in both.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fusion.replace("gated_mlp", _is_gated_mlp, _gated_mlp)
        fusion.replace("linear", _is_linear, _linear)
        fusion.replace("rms_norm", _is_rms_norm, _rms_norm)
        fusion.replace_rotary()
        fusion.replace_layers()
    reasons = Counter(fusion.left_alone.values())
    log.info("fused for CPU: %s; left alone: %s", dict(fusion.fused), dict(reasons))
    return FusionReport(dict(fusion.fused), fusion.left_alone, fusion.copied_bytes)


def unfuse_layers(model: nn.Module) -> int:
    """Layers compute as their class does again, of parts that stay fused. How many there were."""
    fused = [module for module in model.modules() if isinstance(vars(module).get("forward"), FusedLayer)]
    for module in fused:
        del module.forward
    return len(fused)


class _Fusion:
    """One walk over a model; keeps the books for the report."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.fused: Counter[str] = Counter()
        self.left_alone: dict[str, str] = {}
        self.copied_bytes = 0
        parameters = (p for _, p in model.named_parameters(remove_duplicate=False))
        self._uses = Counter(id(p) for p in parameters)

    def replace(self, kind: str, is_kind: Callable[[nn.Module], bool], build: Callable[[nn.Module], nn.Module]) -> None:
        """Replace every module of a kind that `build` can build anew and that then computes the same."""
        for parent_name, parent in list(self.model.named_modules()):
            for child_name, child in list(parent.named_children()):
                name = f"{parent_name}.{child_name}".lstrip(".")
                try:
                    with trial():
                        if not is_kind(child):
                            continue
                        copied_bytes = self._check_replaceable(child)
                        replacement = build(child).eval()
                        _check_same(child, replacement, _probe(child))
                except RefusedError as refused:
                    self.left_alone[name] = str(refused)
                    continue
                setattr(parent, child_name, replacement)
                self.fused[kind] += 1
                self.copied_bytes += copied_bytes

    def _check_replaceable(self, module: nn.Module) -> int:
        """Bytes of the module's weights that something else holds too; refuses what must stay."""
        if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in module.modules()):
            raise RefusedError("has hooks")
        copied_bytes = 0
        for parameter in module.parameters():
            if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
                raise RefusedError(f"is {parameter.dtype} on {parameter.device.type}, not float32 on cpu")
            copied_bytes += parameter.nbytes if self._uses[id(parameter)] > 1 else 0
        if copied_bytes > MAX_TIED_COPY_BYTES:
            raise RefusedError("is tied, and a copy would be too large")
        return copied_bytes

    def replace_rotary(self) -> None:
        """Give every attention module a `forward` that sees a faster `apply_rotary_pos_emb`.

        The function is a global of the model's modeling file, which other models in this process share. So nothing
        global is changed: the instance gets a copy of its class's `forward` with globals of its own.
        """
        namespaces: dict[Any, dict[str, Any] | str] = {}
        for name, module in self.model.named_modules():
            forward = type(module).forward
            if not _calls_rotary(module, forward):
                continue
            key = (forward, module.head_dim)
            if key not in namespaces:
                try:
                    with trial():
                        namespaces[key] = _rotary_namespace(forward.__globals__, int(module.head_dim))
                except RefusedError as refused:
                    namespaces[key] = str(refused)
            namespace = namespaces[key]
            if isinstance(namespace, str):
                self.left_alone[name] = namespace
                continue
            module.forward = types.MethodType(_with_globals(forward, namespace), module)
            self.fused["rotary"] += 1

    def replace_layers(self) -> None:
        """Give every decoder layer whose parts are fused, and of the usual form, a `forward` of our own."""
        for name, module in self.model.named_modules():
            if not is_layer(module):
                continue
            try:
                with trial():
                    module.forward = fused_layer(module)
            except RefusedError as refused:
                self.left_alone[name] = str(refused)
                continue
            self.fused["layer"] += 1


def _probe(module: nn.Module) -> Tensor:
    """Random rows of the width that the module takes."""
    part: Any = next(m for m in module.modules() if _is_linear(m) or _is_rms_norm(m))
    return random_rows(part.weight.shape[0 if isinstance(part, Conv1D) else -1])


def _check_same(original: nn.Module, replacement: nn.Module, probe: Tensor) -> None:
    for repeats in REPEATS:
        x = probe.repeat(repeats, 1)
        require_same(original(x), replacement(x))


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D)


def _linear(module: Any) -> PackedLinear:
    weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    return PackedLinear(weight, module.bias)


def _is_gated_mlp(module: nn.Module) -> bool:
    children = dict(module.named_children())
    linear = {name for name, child in children.items() if type(child) is nn.Linear}
    known = linear in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
    return known and len(children) == len(linear) + 1 and _takes_rows_alone(module)


def _takes_rows_alone(module: nn.Module) -> bool:
    """Not a gate beside them, for one."""
    return len(inspect.signature(module.forward).parameters) == 1


def _gated_mlp(module: Any) -> PackedGatedMLP:
    activation = _activation_name(next(m for m in module.children() if type(m) is not nn.Linear))
    if hasattr(module, "gate_up_proj"):
        gate_weight, up_weight = module.gate_up_proj.weight.chunk(2)
        biases = module.gate_up_proj.bias
        gate_bias, up_bias = (None, None) if biases is None else biases.chunk(2)
        gate, up = PackedLinear(gate_weight, gate_bias), PackedLinear(up_weight, up_bias)
    else:
        gate, up = _linear(module.gate_proj), _linear(module.up_proj)
    return PackedGatedMLP(gate, up, _linear(module.down_proj), activation)


def _activation_name(activation: nn.Module) -> tuple[str, str]:
    x = torch.linspace(-12, 12, 4001)
    for name, function in _ACTIVATIONS:
        if torch.allclose(activation(x), function(x), rtol=1e-6, atol=1e-7):
            return name
    raise RefusedError("has an activation that oneDNN does not know")


def _is_rms_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    known = list(parameters) == ["weight"] and parameters["weight"].dim() == 1 and "RMSNorm" in type(module).__name__
    return known and _takes_rows_alone(module)


def _rms_norm(module: Any) -> FusedRMSNorm:
    """The form, of those in use (weight, and Gemma's 1 + weight), that computes what the module computes."""
    epsilon = next((getattr(module, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), None)
    if not isinstance(epsilon, float):
        raise RefusedError("has no epsilon")
    plain = FusedRMSNorm(module.weight, epsilon)
    try:
        _check_same(module, plain, _probe(module))
    except RefusedError:
        return FusedRMSNorm(1.0 + module.weight, epsilon)
    return plain


def _calls_rotary(module: nn.Module, forward: Any) -> bool:
    return (
        isinstance(forward, types.FunctionType)
        and _ROTARY in forward.__code__.co_names
        and _ROTARY in forward.__globals__
        and hasattr(module, "head_dim")
        and "forward" not in vars(module)
    )


def _rotary_namespace(namespace: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """A copy of a modeling file's globals with a faster rotary in it. Raises RefusedError."""
    original = namespace[_ROTARY]
    fast = fused_rotary(original)
    query, key = (torch.randn(1, 5, heads, head_dim).transpose(1, 2) for heads in (4, 2))
    cos, sin = torch.randn(1, 5, head_dim), torch.randn(1, 5, head_dim)
    want, got = original(query, key, cos, sin), fast(query, key, cos, sin)
    if not all(torch.allclose(w, g, rtol=TOLERANCE, atol=TOLERANCE) for w, g in zip(want, got, strict=True)):
        raise RefusedError("rotary computes something else")
    return {**namespace, _ROTARY: fast}


def _with_globals(function: types.FunctionType, namespace: dict[str, Any]) -> types.FunctionType:
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
