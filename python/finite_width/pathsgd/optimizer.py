"""Path-SGD as a torch.optim.Optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import _check, _library
from .._interrupts import Uninterrupted, ends_its_contexts, grad_mode
from .arguments import DTYPES, number, path_power
from .batches import BatchDeviations
from .chain import UNSCALED, Given, Norm, PathVectors, Rates, Scaling, find_chain, no_update
from .convolution import ConvolutionMass
from .dense_chain import KNOWS_BACKWARD, KNOWS_FORWARD, DenseChain, fits, is_remote
from .kept import Kept, KeptVectors, loaded, saved
from .layered_chain import LayeredChain
from .masses import Masses, masses
from .operations import BATCHNORMS
from .ops import path_update
from .spread import check_spread
from .structure import trace


class PathSGD(Optimizer):
    """Stochastic gradient descent in the geometry of paths, which rescaling hidden units does not change.

    w_e ← w_e − lr · g_e / γ_p(w, e),   γ_p(w, e) = (Σ over input-output paths through e of Π_{e' ≠ e} |w_e'|^p)^(2/p).

    Chains of Linear, BatchNorm and ReLU-like layers cost as many passes over the weights as plain SGD; other
    structures take one batch-1 pass of the |w|^p network per step. Dropout is the identity in γ. An edge without a
    path has no step. Momentum acts on g/γ, and weight decay is decoupled (w ← (1 − lr · weight_decay) w): both keep
    the invariance, which gradient clipping by the global norm or an L2 term in the loss would break.

    Args:
        model: what is trained; it tells the structure. In DistributedDataParallel, pass the wrapped module.
        lr: learning rate, at least 0; a one-element tensor is read at each step, on the device where it is there.
        params: parameters or parameter groups as in torch.optim, all inside model; all of model's if left out. The
            others are frozen, and still carry paths.
        p: 1, 2 or any p ≥ 1; inf for chains.
        momentum, nesterov: as in torch.optim.SGD without dampening.
        weight_decay: decoupled decay.
        update_every: γ is kept for this many steps.
        input_shape: one input's shape without the batch axis; inferred where the first layer is a Linear.
        shared: "kappa1", or "kappa", which adds κ2 for weights that a path passes more than once (recurrent ones).
        batchnorm: "batch": BatchNorm in training mode counts with σ of the batches that fed the step;
            "running": with its running statistics.
        maximize: ascend.
        master_weights: keep a float32 copy of bfloat16 parameters, which takes the updates.
        capturable: allow steps to be captured in a CUDA graph, after a first one outside; where the kernels for
            CUDA are in force.
        foreach, fused, differentiable: as torch.optim names them; the step is always fused, the others are refused.

    Raises:
        TypeError, ValueError: values that make no sense, an operation without paths (with the module's qualified
            name), a parameter outside model, input_shape missing where it is needed.

    Source: Neyshabur, Salakhutdinov, Srebro, "Path-SGD: Path-Normalized Optimization in Deep Neural Networks" (2015),
    equation 8; shared weights: Neyshabur et al., "Path-Normalized Optimization of Recurrent Neural Networks with ReLU
    Activations" (2016).

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> optimizer = fw.pathsgd.PathSGD(model, lr=0.01, momentum=0.9)
        >>> model(torch.ones(2, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        *,
        params: Iterable[Any] | None = None,
        p: float = 2,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        update_every: int = 1,
        input_shape: Sequence[int] | None = None,
        shared: str = "kappa1",
        batchnorm: str = "batch",
        maximize: bool = False,
        master_weights: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        self._p = path_power(p)
        _check.positive_int("update_every", update_every)
        _check.one_of("shared", shared, ("kappa1", "kappa"))
        _check.one_of("batchnorm", batchnorm, ("batch", "running"))
        _check.boolean("master_weights", master_weights)
        for name, value in (("differentiable", differentiable), ("foreach", foreach)):
            if value:
                raise ValueError(f"{name}=True is not supported by PathSGD; leave it out (the step is always fused)")
        self._update_every, self._shared = update_every, shared
        self._batchnorm, self._master_weights = batchnorm, master_weights
        self._structure = trace(model, input_shape)
        named = self._structure.module.named_parameters()
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in named}
        self._find_device(capturable)
        self._find_paths()
        self._seen: list[tuple[int, int]] = []  # `_versions` after the last step
        self._chain: DenseChain | LayeredChain | None = None
        self._warned = 0
        self._lrs: dict[int, Tensor] = {}  # parameter group -> lr and keep on the device
        self._steps = 0
        self._forget()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(self._structure.module.parameters() if params is None else params, defaults)
        self._batches = BatchDeviations(
            self._structure.calls_of(BATCHNORMS) if batchnorm == "batch" else {},
            distributed=isinstance(model, nn.parallel.DistributedDataParallel),
        )

    def _find_device(self, capturable: bool) -> None:
        """Where the parameters are, and which kernels are in force there."""
        # On a device with kernels of its own, a step reads nothing on the host, and takes what a GradScaler knows.
        device = next(iter(self._names)).device
        self._has_step_kernel = _library.has_kernel("path_step", device)
        self._on_device = self._has_step_kernel and is_remote(device)
        self._step_supports_amp_scaling = self._on_device
        if capturable and not self._on_device:
            raise ValueError(
                f"capturable=True is not supported by PathSGD for parameters on {device}: it needs the kernels for "
                f"CUDA (see build_info()['cuda_kernels']); leave it out"
            )
        if capturable and self._update_every > 1:
            raise ValueError("capturable=True needs update_every=1: a replay does not count steps")
        self._capturable = capturable

    def _find_paths(self) -> None:
        """Whether the model is a chain, and which parameters no path passes."""
        self._stages = find_chain(self._structure)
        if self._stages is None and math.isinf(self._p):
            raise ValueError("p = ∞ is defined for chains of Linear layers alone; use p = 1 or 2 for this model")
        if self._stages is None and self._structure.input_shape is None:
            raise ValueError(
                "input_shape is needed for this model: one input's shape without the batch axis, such as (3, 32, 32)"
            )
        self._read: list[Tensor] = []  # what a chain's sweeps read, frozen parameters as well
        self._norms: list[Any] = []  # BatchNorms whose running statistics stand in F and B
        self._vectors = None if self._stages is None else PathVectors(self._stages, self._p)
        if self._vectors is not None:
            self._vectors.stored = self._target
            self._norms += [stage.module for stage in self._vectors.stages if isinstance(stage, Norm)]
            read = [each for stage in self._vectors.stages for each in (stage.weight, stage.bias)]
            self._read = [each for each in read if each is not None]
            with_paths = {*self._read}
        else:  # a structure that cannot run fails here, by name
            with_paths = {*masses(self._structure, self._p, self._probe(), self._shared).of}
        self._pathless = self._names.keys() - with_paths

    def _probe(self) -> dict[Any, Tensor]:
        """σ = 1 for every BatchNorm."""
        norms = [m for m in self._structure.module.modules() if isinstance(m, BATCHNORMS)]
        return {m: torch.ones(m.num_features, device=next(iter(self._names)).device) for m in norms}

    def __repr__(self) -> str:
        how = "chain, fused sweeps" if self._vectors else "|w|^p network"
        text = super().__repr__()
        return f"{text[:-2]}\n    p: {self._p:g}, update_every: {self._update_every}, structure: {how}\n)"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a PathSGD cannot be copied or pickled; make one for the copied or loaded model, and pass state_dict() of "
            "this one to its load_state_dict"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, whose parameters must be inside the model."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        lr, momentum, decay = (number(name, group[name]) for name in ("lr", "momentum", "weight_decay"))
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr must be at least 0 and finite, got {lr}")
        if not 0 <= momentum < math.inf:
            raise ValueError(f"momentum must be at least 0 and finite, got {momentum}")
        if not 0 <= decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {decay}")
        _check.boolean("nesterov", group["nesterov"])
        _check.boolean("maximize", group["maximize"])
        if group["nesterov"] and momentum <= 0:
            raise ValueError("nesterov needs a momentum above 0")
        for parameter in group["params"]:
            if parameter not in self._names:
                raise ValueError(f"params holds a parameter of shape {list(parameter.shape)} that is not inside model")
            self._check_dtype(parameter)

    def _check_dtype(self, parameter: Tensor) -> None:
        if parameter.dtype not in DTYPES:
            raise TypeError(f"{self._names[parameter]} must be float32, float64 or bfloat16, got {parameter.dtype}")

    @ends_its_contexts
    def refresh(self) -> None:
        """Rebuild F and B from the weights as they are now, after edits that the optimizer cannot see.

        Copies kept by master_weights take over what was written into the parameters.

        On a GPU that is done at once, since a captured step that is replayed next would not know of it.
        """
        self._forget()
        with grad_mode(False):
            self._renew_masters()
            if self._chain is not None and self._on_device:
                self._chain.step(no_update, UNSCALED, KNOWS_BACKWARD)
                self._ready, self._seen = True, self._versions()

    def _forget(self) -> None:
        self._ready = False  # whether the vectors that the next sweep needs are of the weights as they are
        self._seen = []
        self._kept: Kept | None = None  # with update_every > 1: what γ is computed from
        self._age = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer.zero_grad; the batches that made the gradients no longer feed a step."""
        self._batches.gradients_dropped()
        super().zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: recomputes the loss and its gradients.

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: a sparse gradient; a BatchNorm in training mode that saw no batch since the last step.
            TypeError: a parameter that is float16 by now.
            ValueError: a gradient of a parameter that no path passes; a model of which parts were replaced; a
                BatchNorm in training mode that a forward calls more than once; p > 8 and units too far apart for it.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self._without_gradients(closure)
        return self._without_gradients(closure)

    def _without_gradients(self, closure: Callable[[], Any] | None) -> Any:
        before = torch.is_grad_enabled()
        try:  # as `grad_mode` has it, which takes as long as a small network's sweep where the caches are cold
            torch._C._set_grad_enabled(False)
            return self._step(closure)
        finally:
            torch._C._set_grad_enabled(before)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._structure.check_unchanged()
        self._check_capture()
        self._renew_masters()
        given = self._gradients()
        if not given:
            return loss
        sigma = self._batches.deviations()
        if not (self._on_device and _capturing(next(iter(self._names)))):  # it reads values on the host
            check_spread(self._structure, self._p, sigma)
        scaling = (getattr(self, "grad_scale", None), getattr(self, "found_inf", None)) if self._on_device else UNSCALED
        with Uninterrupted():
            if self._update_every > 1:
                self._step_with_kept(given, sigma, scaling)
            elif self._vectors is None:
                self._apply(self._masses(sigma), given, scaling)
            elif sigma or (self._on_device and not fits(self._vectors)):
                self._ready = False
                self._vectors.run(True, no_update, sigma)
                self._vectors.run(False, given.get, sigma, scaling)
            else:
                self._alternate(self._vectors, given, scaling)
            self._steps += 1
            self._publish(given)
            self._batches.clear()
        return loss

    def _alternate(self, vectors: PathVectors, given: dict[Tensor, Given], scaling: Scaling) -> None:
        """The three-pass step: forward and backward sweeps in turn, each with what the one before has left."""
        kind = DenseChain if self._has_step_kernel and fits(vectors) else LayeredChain
        if not isinstance(self._chain, kind):
            self._chain, self._ready, self._warned = kind(vectors), False, 0
        rebuild = 0
        if not self._ready or self._seen != self._versions():
            rebuild = KNOWS_FORWARD if self._steps % 2 else KNOWS_BACKWARD
        self._ready = False
        self._chain.step(given.get, scaling, rebuild)
        if not self._on_device:
            self._ready, surprises = self._chain.outcome()
            self._warn_of(surprises)
            return
        assert isinstance(self._chain, DenseChain)
        self._ready = True
        if not _capturing(self._chain.state):
            self._warn_of(self._chain.surprises_so_far(), "some steps ago: the step after that")

    def _warn_of(self, surprises: int, when: str = "before this step, which") -> None:
        """Warn where more steps than before met weights that had been changed without a trace."""
        if surprises <= self._warned:
            return
        self._warned = surprises
        # At p = ∞ the maxima pass over NaN, and Φ stays finite: there the weights themselves are asked.
        if math.isinf(self._p) and not all(bool(torch.isfinite(each).all()) for each in self._names):
            return
        warnings.warn(
            f"weights were changed outside the optimizer without a trace (a write through .data), {when} used the γ of "
            "the weights before; call refresh() after such writes",
            stacklevel=7,  # the line that called step()
        )

    def _check_capture(self) -> None:
        """Raise where a step is being captured that a replay would not repeat rightly."""
        if not (self._on_device and _capturing(next(iter(self._names)))):
            return
        if not self._capturable:
            raise RuntimeError(
                "step() is being captured in a CUDA graph by an optimizer with capturable=False; "
                "make it with capturable=True"
            )
        if not self._seen:
            raise RuntimeError("take a step before the capture: it makes what a captured step continues from")
        if self._chain is not None and (not self._ready or self._seen != self._versions()):
            raise RuntimeError("the weights were changed since the last step; call refresh() before the capture")

    def _step_with_kept(self, given: dict[Tensor, Given], sigma: dict[Any, Tensor], scaling: Scaling) -> None:
        if self._kept is None or self._age >= self._update_every:
            self._age = 0
            if self._vectors is None:
                self._kept = self._masses(sigma)
            else:
                self._vectors.run(True, no_update, sigma)
                forward = [vector.clone() for vector in self._vectors.forward]
                self._vectors.run(False, no_update, sigma)
                self._kept = KeptVectors(forward, [vector.clone() for vector in self._vectors.backward], dict(sigma))
        self._age += 1
        if isinstance(self._kept, Masses):
            self._apply(self._kept, given, scaling)
        else:
            assert self._vectors is not None
            self._vectors.step_with(self._kept.forward, self._kept.backward, given.get, self._kept.sigma, scaling)

    def _masses(self, sigma: dict[Any, Tensor]) -> Masses:
        return masses(self._structure, self._p, sigma, self._shared, fused=True, on_device=self._on_device)

    def _apply(self, found: Masses, given: dict[Tensor, Given], scaling: Scaling) -> None:
        def on_device(exponent: int | Tensor) -> Tensor:
            if isinstance(exponent, Tensor):
                return exponent
            return torch.full((), float(exponent), dtype=torch.float64, device=found.total.value.device)

        common = on_device(found.exponent)
        for parameter, (grad, momentum, rates, lr) in given.items():
            target = self._target(parameter)
            mass = found.of.get(parameter)
            own = found.own_exponents.get(parameter)
            exponent = common if own is None else on_device(own)
            if isinstance(mass, ConvolutionMass):
                mass.update(target.detach(), grad, momentum, exponent, self._p, rates, *scaling, lr)
                continue
            mass = torch.zeros_like(target, dtype=torch.float64) if mass is None else mass
            path_update(target.detach(), grad, momentum, mass, exponent, self._p, rates, *scaling, lr)

    def _target(self, parameter: Tensor) -> Tensor:
        """What takes the updates: the parameter, or its float32 copy."""
        if not self._master_weights:
            return parameter
        master: Tensor = self.state.get(parameter, {}).get("master_weight", parameter)
        return master

    def _gradients(self) -> dict[Tensor, Given]:
        """Parameter -> gradient, momentum buffer, rates, lr; checked before anything is written."""
        for parameter in self._read:
            if parameter.dtype not in DTYPES:
                self._check_dtype(parameter)
        rows: list[tuple[Tensor, Tensor, Rates, Tensor | None]] = []
        for index, group in enumerate(self.param_groups):
            lr, keep, now = self._lr_of(index, group)
            rates = (lr, float(group["momentum"]), float(group["nesterov"]), keep, -1.0 if group["maximize"] else 1.0)
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is not None:
                    self._check_gradient(parameter, grad)
                    rows.append((parameter, grad, rates, now))
        given: dict[Tensor, Given] = {}
        for parameter, grad, rates, now in rows:
            if self._master_weights and parameter.dtype == torch.bfloat16:
                state = self.state[parameter]
                if "master_weight" not in state:
                    state["master_weight"] = parameter.detach().float()
            dtype = (self._target(parameter) if self._master_weights else parameter).dtype
            if grad.dtype != dtype:  # gradients may have a dtype of their own (grad_dtype)
                grad = grad.to(dtype)
            given[parameter] = (grad, self._momentum_of(parameter) if rates[1] else None, rates, now)
        return given

    def _check_gradient(self, parameter: Tensor, grad: Tensor) -> None:
        if parameter.dtype not in DTYPES:
            self._check_dtype(parameter)
        if grad.layout is not torch.strided:
            raise RuntimeError(f"PathSGD does not support sparse gradients; {self._names[parameter]} has one")
        if self._pathless and parameter in self._pathless and bool(grad.any()):
            raise ValueError(
                f"{self._names[parameter]} has a gradient, but no path through model passes it; leave it out of "
                "params, or check input_shape (an RNN's recurrent weights need more than one step)"
            )

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        """Its momentum buffer, in the dtype that the model has now."""
        target, state = self._target(parameter).detach(), self.state[parameter]
        buffer: Tensor | None = state.get("momentum_buffer")
        # The model may have been converted since, by `model.double()` for one.
        buffer = torch.zeros_like(target) if buffer is None else buffer.to(target.dtype)
        state["momentum_buffer"] = buffer
        return buffer

    def _lr_of(self, index: int, group: dict[str, Any]) -> tuple[float, float, Tensor | None]:
        """lr and keep = 1 − lr · decay of a group; in a tensor where lr stands on the device and is not to be read."""
        lr, decay = group["lr"], float(group["weight_decay"])
        if not (self._on_device and isinstance(lr, Tensor)):
            return float(lr), 1 - float(lr) * decay, None
        if index not in self._lrs:
            device = next(iter(self._names)).device
            self._lrs[index] = torch.ones(2, dtype=torch.float64, device=device)
        now = self._lrs[index]
        now[:1].copy_(lr.reshape(1))
        if decay:
            now[1:].copy_(1 - now[:1] * decay)
        return 0.0, 1.0, now

    def _renew_masters(self) -> None:
        """Take over into the float32 copies what was changed outside in the parameters: what they do not round to."""
        if not self._master_weights or (self._seen and self._seen == self._versions()):
            return
        for parameter in self._names:
            master = self.state.get(parameter, {}).get("master_weight")
            if master is not None:
                kept = master.to(parameter.dtype) == parameter
                master.copy_(torch.where(kept, master, parameter))

    def _versions(self) -> list[tuple[int, int]]:
        """The addresses and versions of what F and B are made of: parameters, and running statistics in a chain."""
        seen = [(parameter.data_ptr(), parameter._version) for parameter in self._names]
        for norm in self._norms:  # a forward in training mode leaves a trace in num_batches_tracked alone
            seen += [(each.data_ptr(), each._version) for each in norm._buffers.values() if each is not None]
        return seen

    def _publish(self, given: dict[Tensor, Given]) -> None:
        """Tell autograd that the parameters changed, and remember them as they are."""
        for parameter in given if self._master_weights else ():
            target = self._target(parameter)
            if target is not parameter:
                parameter.copy_(target)
        torch.autograd.graph.increment_version(list(given))
        self._seen = self._versions()

    def state_dict(self) -> dict[str, Any]:
        """torch's state, and under "path" what a bit-for-bit continuation needs."""
        state = super().state_dict()
        state["path"] = {
            "structure": self._structure.fingerprint(),
            "p": self._p,
            "shared": self._shared,
            "batchnorm": self._batchnorm,
            "steps": self._parity(),
            "age": self._age,
            "kept": saved(self._kept, self._structure.module),
            "batches": self._batches.state(self._structure.module),
        }
        return state

    def _parity(self) -> int:
        """The steps so far, even where the next sweep goes forward: replays of a graph are not counted here."""
        if self._chain is None or not self._ready:
            return self._steps
        return self._steps + (self._steps % 2 != self._chain.knows_forward())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a saved optimizer stood; raises ValueError, before any change, for another structure."""
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict must be a dict, as state_dict() returns it, got {type(state_dict).__name__}")
        path = state_dict.get("path")
        if path is None:
            raise ValueError('state_dict has no entry "path": it was not made by PathSGD.state_dict()')
        if path["structure"] != self._structure.fingerprint():
            raise ValueError(
                "state_dict belongs to a model of another structure (operations, their settings, input_shape or "
                "parameter shapes)"
            )
        if path["p"] != self._p:
            raise ValueError(f"state_dict was made with p = {path['p']:g}, this optimizer has p = {self._p:g}")
        for setting, value in (("shared", self._shared), ("batchnorm", self._batchnorm)):
            if path[setting] != value:
                raise ValueError(
                    f"state_dict was made with {setting}={path[setting]!r}, this optimizer has {setting}={value!r}"
                )
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, own, strict=True):  # torch has cast these to the parameter's dtype
            raw = state_dict["state"].get(index, {})
            if "master_weight" in raw:
                for name in ("master_weight", "momentum_buffer"):
                    if raw.get(name) is not None:
                        self.state[parameter][name] = raw[name].to(parameter.device).clone()
        self._forget()
        self._steps, self._age = path["steps"], path["age"]
        self._kept = loaded(path["kept"], self._structure.module)
        self._batches.load(path["batches"], self._structure.module)


def _capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured where the tensor is."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
