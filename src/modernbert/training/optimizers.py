"""Optimizers of the training recipes, and which parameters they get."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modernbert.engines.cpu.optimizer import Moments, adam, are_plain, norm_of
from modernbert.errors import InputError
from modernbert.training.distributed import like, whole
from modernbert.training.options import TrainingOptions
from modernbert.training.schedules import peak_rate


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, whose step is one pass over memory where our kernels serve.

    Args:
        params: parameters or groups of them.
        kwargs: of PyTorch's AdamW.

    Attributes:
        shrink: what the next step multiplies gradients by, as clipping them would; see `clip`.
    """

    shrink = 1.0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        groups = self.param_groups
        usual = not any(g["amsgrad"] or g["maximize"] or isinstance(g["lr"], Tensor) for g in groups)
        if closure is None and usual and not _stepped(self, groups, stable=False):
            return None
        _shrink(self)
        return super().step(closure)


class StableAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay whose step shrinks when gradients outgrow their running variance.

    The step of each tensor is divided by max(1, rms(gradient / sqrt(variance))), instead of clipping gradients.
    Source: arXiv:2304.13013; the optimizer that ModernBERT was trained with.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the running mean and of the running variance.
        eps: added to the root of the variance.
        weight_decay: decoupled; each step shrinks weights by lr * weight_decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 1e-5,
    ) -> None:
        self.shrink = 1.0  # what the next step multiplies gradients by, as clipping them would; see `clip`
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"lr {lr}, eps {eps}, weight_decay {weight_decay} and betas {betas} must not be negative")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if left := _stepped(self, [group for group in self.param_groups if not self._is_apart(group)], stable=True):
            _shrink(self)
        left += [(group, p) for group in self.param_groups if self._is_apart(group) for p in group["params"]]
        for group, parameter in left:
            if parameter.grad is not None:
                self._step_one(parameter, parameter.grad, group)
        return loss

    def _is_apart(self, group: dict[str, Any]) -> bool:
        """Whether a group is stepped by in another way."""
        return False

    def _step_one(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"])
        mean, variance = state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        mean.lerp_(grad, 1 - beta1)
        variance.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        spread = (variance / (1 - beta2**step)).sqrt_()
        squares = whole((grad / spread.clamp(min=group["eps"])).square_().sum())
        surprise = (squares / parameter.numel()).sqrt()
        lr = group["lr"] / max(1.0, float(surprise))
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.addcdiv_(mean, spread.add_(group["eps"]), value=-lr / (1 - beta1**step))


class Muon(StableAdamW):
    """Momentum whose update of each hidden matrix is made orthogonal; StableAdamW for everything else.

    Groups with "orthogonal": True hold matrices. Their update is scaled to the size that an Adam step has, so that
    one learning rate serves both kinds. PyTorch's own Muon orthogonalises in bfloat16, which CPUs without native
    support for it compute many times slower. Source: arXiv:2502.16982.

    Args:
        params: groups of parameters.
        lr: learning rate.
        momentum: decay of the running gradient of matrices.
        kwargs: of `StableAdamW`, for everything else.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95, **kwargs: Any) -> None:
        super().__init__(params, lr, **kwargs)
        self.momentum = momentum
        self._waiting: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; processes share the work of the matrices."""
        loss = super().step(closure)
        with torch.no_grad():
            for (parameter, _, group), update in zip(
                self._waiting, _orthogonal([ahead for _, ahead, _ in self._waiting]), strict=True
            ):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(like(update.flatten(0, 1).to(parameter.dtype), parameter), alpha=-group["lr"])
        self._waiting.clear()
        return loss

    def _is_apart(self, group: dict[str, Any]) -> bool:
        return bool(group.get("orthogonal"))

    def _step_one(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if not group.get("orthogonal"):
            super()._step_one(parameter, grad, group)
            return
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(grad, 1 - self.momentum)
        parts = group["parts"]  # a projection to q, k and v is three matrices
        ahead = whole(grad.lerp(average, self.momentum)).unflatten(0, (parts, -1))
        self._waiting.append((parameter, ahead, group))


def _stepped(
    optimizer: AdamW | StableAdamW, groups: list[dict[str, Any]], stable: bool
) -> list[tuple[dict[str, Any], Tensor]]:
    """Step by parameters of groups where our kernels serve all of them; those that are left, with their groups."""
    given = [(group, p) for group in groups for p in group["params"] if p.grad is not None]
    moments: dict[tuple[Any, ...], list[Moments]] = {}
    states = [optimizer.state[p] for _, p in given]
    tensors = [x for (_, p), state in zip(given, states, strict=True) for x in _tensors(p, state)]
    if not are_plain(tensors) or any("step" in state and state["step"].device.type != "cpu" for state in states):
        return given
    with torch.no_grad():
        for (_, parameter), state in zip(given, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        torch._foreach_add_([state["step"] for state in states], 1)
    for (group, parameter), state in zip(given, states, strict=True):
        beta1, beta2 = group["betas"]
        step = int(state["step"])
        moments.setdefault((beta1, beta2, group["eps"]), []).append(
            Moments(
                parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], float(group["lr"]),
                group["weight_decay"], (1 - beta1**step, 1 - beta2**step),
            )
        )  # fmt: skip
    for (beta1, beta2, eps), some in moments.items():
        adam(some, (beta1, beta2), eps, optimizer.shrink, stable)
    optimizer.shrink = 1.0
    return []


def _shrink(optimizer: AdamW | StableAdamW) -> None:
    """Multiply gradients by what the next step would multiply them by."""
    shrink, optimizer.shrink = optimizer.shrink, 1.0
    if shrink != 1.0:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(shrink)


def _tensors(parameter: Tensor, state: Mapping[str, Any]) -> list[Tensor]:
    assert parameter.grad is not None
    return [parameter, parameter.grad, *(state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)]


def clip(optimizer: torch.optim.Optimizer, most: float) -> float | None:
    """Have the next step of an optimizer clip its gradients to a norm, without a pass over them.

    Args:
        optimizer: of this module.
        most: the largest norm that gradients keep.

    Returns:
        The norm of all gradients together; None where they must be clipped one by one, and nothing is done.
    """
    if not isinstance(optimizer, AdamW | StableAdamW) or isinstance(optimizer, Muon):
        return None
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads or not are_plain(grads):
        return None
    norm = norm_of(grads)
    optimizer.shrink = min(1.0, most / (norm + 1e-6))  # as PyTorch's own clipping
    return norm


def _orthogonal(matrices: list[Tensor]) -> list[Tensor]:
    """Updates of the size of an Adam step; each process computes some of them and all get them."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    updates = [torch.zeros_like(matrix) for matrix in matrices] if processes > 1 else matrices
    loads = [0.0] * processes
    for i in sorted(range(len(matrices)), key=lambda i: -matrices[i].numel()):
        matrix = matrices[i]
        chosen = loads.index(min(loads))
        loads[chosen] += matrix.numel() * min(matrix.shape[-2:])
        if processes == 1 or chosen == dist.get_rank():
            updates[i] = orthogonalize(matrix) * (0.2 * math.sqrt(max(matrix.shape[-2:])))
    if processes > 1 and matrices:
        together = torch.cat([update.flatten() for update in updates])
        dist.all_reduce(together)
        parts = together.split([update.numel() for update in updates])
        updates = [part.view(update.shape) for part, update in zip(parts, updates, strict=True)]
    return updates


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of matrices (..., rows, columns) near 1 by Newton and Schulz's iteration."""
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):  # a quintic that lifts small singular values fast and keeps all between 0.7 and 1.2
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


OPTIMIZERS: dict[str, Any] = {"adamw": AdamW, "stableadamw": StableAdamW, "muon": Muon}


def parameter_groups(
    model: nn.Module, weight_decay: float, lr: float | None = None, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Weights of linear layers and embeddings decay; norms and biases do not.

    Matrices inside the layers are groups of their own, marked for `Muon`; other optimizers read nothing of that.

    Args:
        model: its trainable parameters are grouped.
        weight_decay: of what decays.
        lr: learning rate of the head; needed for a `layer_decay` under 1.
        layer_decay: learning rate of each layer as a share of that of the layer above it; the last one has the
            head's share of it, and the embeddings come below the first.

    Returns:
        Groups for an optimizer; "scale" of a group is its share of the learning rate.
    """
    layers = 1 + max((n for name, _ in model.named_parameters() if (n := _layer_of(name)) is not None), default=-1)
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = _layer_of(name)
        depth = 0 if "final_norm" in name else layers + 1 if "embeddings." in name else 0
        scale = layer_decay ** (depth if layer is None else layers - layer)
        orthogonal = layer is not None and parameter.dim() >= 2 and "lora_" not in name
        parts = 3 if orthogonal and "Wqkv" in name else 1
        decays = weight_decay if parameter.dim() >= 2 else 0.0
        group = groups.setdefault(
            (scale, orthogonal, parts, decays),
            {"params": [], "weight_decay": decays, "orthogonal": orthogonal, "parts": parts, "scale": scale},
        )
        if lr is not None:
            group["lr"] = lr * scale
        group["params"].append(parameter)
    return list(groups.values())


def _layer_of(name: str) -> int | None:
    _, found, rest = f".{name}".partition(".layers.")
    return int(rest.partition(".")[0]) if found else None


def make_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    lr = peak_rate(options, model)
    groups = parameter_groups(model, options.weight_decay, lr, options.layer_decay)
    if not groups:
        raise InputError(
            "every parameter is frozen, by freeze_layers or as optimize_for_inference leaves them; nothing is left to "
            "train"
        )
    fused = {"fused": True} if options.optimizer == "adamw" else {}
    settings = {"lr": lr, "betas": (options.beta1, options.beta2), "eps": options.eps, **fused}
    return cast(torch.optim.Optimizer, OPTIMIZERS[options.optimizer](groups, **settings))


def freeze(model: nn.Module, embeddings: bool, layers: int | str) -> None:
    """Leave the token embeddings out of training, with this many first layers, or with "all" that is below the head."""
    body: Any = next(m for m in model.modules() if hasattr(m, "layers") and hasattr(m, "embeddings"))
    if layers == "all":
        body.requires_grad_(False)
        return
    assert isinstance(layers, int)
    if layers > len(body.layers):
        raise InputError(f"freeze_layers is {layers}; the model has {len(body.layers)} layers")
    if embeddings or layers:
        body.embeddings.requires_grad_(False)
    for layer in body.layers[:layers]:
        layer.requires_grad_(False)
