"""What learns in a training: a student and its companion, and which of the two predicts and learns at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from artaug.errors import ModelError
from artaug.lora.lora import LoRA
from artaug.plan import Plan
from artaug.regional.denoiser import Conditioning
from artaug.regional.guide import Guide
from artaug.training.adapters import Adapter, AdapterTensors, LayerWeights
from artaug.training.model import Predictor, as_decoder
from artaug.training.noise_schedule import DecodedPictures, Latents, NoiseSchedule, Sigmas
from artaug.training.steering import Steering
from artaug.training.teacher_cache import TeacherCache

Role: TypeAlias = Literal["student", "teacher", "companion"]
"""Whose prediction it is: that with the adapter in training, with none, or with the companion's."""


class LoRALayer(Protocol):
    """The part of PEFT's wrapper of a layer that is used here, typed since PEFT is imported only when training begins."""

    lora_A: nn.ModuleDict  # noqa: N815 - PEFT's name
    lora_B: nn.ModuleDict  # noqa: N815 - likewise
    lora_magnitude_vector: nn.ModuleDict
    cast_input_dtype_enabled: bool

    def enable_adapters(self, enabled: bool) -> None:
        """Let the wrapper add its update, or be the plain layer."""

    def set_adapter(self, adapter_names: str) -> None:
        """Let the wrapper add the update of this adapter alone."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply an adapter's update, beside its alpha over rank."""

    def get_base_layer(self) -> nn.Module:
        """The layer that is wrapped."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """Parameters that one optimizer trains."""

    trained: Mapping[str, Mapping[str, nn.Parameter]]
    """The trained parameters, by layer and name: float32."""

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, in the order of the model's layers."""
        return [parameter for parameters in self.trained.values() for parameter in parameters.values()]

    def tensors(self) -> dict[str, AdapterTensors]:
        """The trained parameters as they are now, by layer: float32 copies on the CPU."""
        return self.group_by_layer(self.parameters())

    def group_by_layer(self, tensors: Iterable[Tensor]) -> dict[str, AdapterTensors]:
        """Copies of tensors in the order of `parameters`, by layer, on the CPU."""
        values = iter(tensors)
        return {
            layer: {name: next(values).detach().cpu().clone() for name in parameters}
            for layer, parameters in self.trained.items()
        }

    @torch.no_grad()
    def load(self, layers: Mapping[str, AdapterTensors]) -> None:
        """Set all trained parameters to what `tensors` returned."""
        for layer, parameters in self.trained.items():
            for name, parameter in parameters.items():
                parameter.copy_(layers[layer][name])


@dataclass(frozen=True, kw_only=True, eq=False)
class CompanionLearner(Learner):
    """A companion: its adapter on the student's layers, its head, or both."""

    has_adapter: bool
    head: nn.Module | None
    features: Mapping[str, nn.Module]
    """The layers whose outputs the head reads, by name."""


class Roles:
    """Which adapter acts in a prediction, and whose parameters a backward pass reaches: the student's, but for a while."""

    def __init__(
        self,
        layers: Mapping[str, LoRALayer],
        adapters: Mapping[Role, str],
        parameters: Mapping[Role, list[nn.Parameter]],
    ) -> None:
        """Switch these layers, which have an adapter of PEFT for the student and may have one for the companion."""
        self._layers = layers
        self._adapters = adapters
        self._parameters = parameters
        self._acting: Role = "student"
        self._scales = dict.fromkeys(adapters.values(), 1.0)
        self.learner: Role = "student"

    def act(self, role: Role, scale: float = 1.0) -> None:
        """Let predictions be of this role, with ``scale`` times its update, from now on."""
        adapter = self._adapters.get(role)
        if role != self._acting:
            for layer in self._layers.values():
                layer.enable_adapters(enabled=adapter is not None)
                if adapter is not None and len(self._adapters) > 1:
                    layer.set_adapter(adapter)
            self._acting = role
            self._let_learn()
        if adapter is not None and scale != self._scales[adapter]:
            for layer in self._layers.values():
                layer.set_scale(adapter, scale)
            self._scales[adapter] = scale

    def _let_learn(self) -> None:
        """PEFT lets whatever acts learn, so that is set again."""
        for owner, parameters in self._parameters.items():
            for parameter in parameters:
                parameter.requires_grad = owner == self.learner

    @contextmanager
    def acting(self, role: Role, scale: float = 1.0) -> Iterator[None]:
        """Let predictions in a ``with`` block be of this role; after it they are the student's."""
        self.act(role, scale)
        try:
            yield
        finally:
            self.act("student")

    @contextmanager
    def learning(self, role: Role) -> Iterator[None]:
        """Let backward passes in a ``with`` block reach the parameters of this role alone; after it the student's."""
        self.learner = role
        self._let_learn()
        try:
            yield
        finally:
            self.learner = "student"
            self._let_learn()


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterStudent(Learner):
    """A frozen model with one adapter in training: the `Student` that objectives get."""

    model: Predictor
    adapter: Adapter
    wrapped: Mapping[str, LoRALayer]
    """PEFT's LoRA layers by the path of the layer they wrap."""
    roles: Roles
    companion: CompanionLearner | None = None
    """What learns beside it."""
    teacher_cache: TeacherCache | None = None
    """Predictions of the teacher, if batches are used several times."""
    steering: Steering = field(default_factory=Steering)
    """The guides of its predictions."""

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """How the model's pictures are noised, and what it predicts."""
        return self.model.noise_schedule

    def predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float = 1.0) -> Latents:
        """The prediction with ``scale`` times the update: float32, with gradient.

        Raises:
            ModelError: if the adapter's update cannot be scaled, as DoRA's, and ``scale`` is not 1; or if the prediction
                depends on no layer in training.
        """
        with self.steering.unguided():
            return self._predict(noisy, sigmas, conditioning, scale=scale)

    def predict_guided(
        self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, guide: Guide, plans: Sequence[Plan]
    ) -> Latents:
        """The prediction with the update under a guide: float32, with gradient.

        Raises:
            ModelError: if there is not a plan for each row, the model cannot be guided, or the guide reads regions.
        """
        if len(plans) != len(sigmas):
            raise ModelError(
                f"a prediction of {len(sigmas)} rows under {type(guide).__name__} came with {len(plans)} plans. Expected one for "
                "each row, such as batch.plans of a batch that a trainer has made."
            )
        with self.steering.guided(self.model, guide, plans, conditioning):
            return self._predict(noisy, sigmas, conditioning, scale=1.0)

    def _predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float) -> Latents:
        if scale != 1 and self.adapter.use_dora:
            raise ModelError(
                f"the objective asks for {scale:g} times the update, and {type(self.adapter).__name__} rotates weights "
                "instead of adding to them, so its update has no scale. Train a PlainLoRA or a LoKr."
            )
        prediction = self._predict_as("student", noisy, sigmas, conditioning, scale=scale)
        if torch.is_grad_enabled() and self.roles.learner == "student" and not prediction.requires_grad:
            raise ModelError(
                f"the prediction of {type(self.model.module).__name__} depends on none of the {len(self.wrapped)} layers in "
                f"training ({next(iter(self.wrapped))!r} is one): the model does not call them. If its projections are "
                "fused, call unfuse_qkv_projections() first; else choose other targets."
            )
        return prediction

    def _predict_as(
        self, role: Role, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, scale: float = 1.0
    ) -> Latents:
        """The prediction in a role: float32, with gradient where the role learns, or ``noisy`` has one."""
        with self.roles.acting(role, scale):
            prediction = self.model.predict(noisy, sigmas, conditioning).float()
        return backward_as(prediction, self.roles, role, scale)

    def teacher_predict(
        self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning, *, with_gradient: bool = False
    ) -> Latents:
        """The prediction without the update: float32, without gradient unless ``with_gradient``."""
        if with_gradient:
            with self.steering.unguided():
                return self._predict_as("teacher", noisy, sigmas, conditioning)
        if self.teacher_cache is None:
            return self._predict_without_adapter(noisy, sigmas, conditioning).float()
        inputs = {"noisy": noisy, "sigmas": sigmas, **{f"text.{name}": text for name, text in conditioning.items()}}
        return self.teacher_cache.get_or_compute(
            inputs, lambda: self._predict_without_adapter(noisy, sigmas, conditioning)
        ).float()

    @torch.no_grad()
    def _predict_without_adapter(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Latents:
        with self.roles.acting("teacher"), self.steering.unguided():
            return self.model.predict(noisy, sigmas, conditioning)

    def companion_predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Latents:
        """The prediction with the companion's adapter: float32, with gradient to ``noisy`` and, where it learns, to the companion.

        Raises:
            ModelError: if there is no companion, or it has no adapter.
        """
        companion = self._companion()
        if not companion.has_adapter:
            raise ModelError(
                "companion_predict was called, and the companion has no adapter, so that it would predict what the teacher does. "
                "Give the Companion an adapter, or call teacher_predict."
            )
        with self.steering.unguided():
            return self._predict_as("companion", noisy, sigmas, conditioning)

    def companion_head(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Tensor:
        """What the companion's head makes of the features of its prediction.

        Raises:
            ModelError: if there is no companion, it has no head, or the model did not call a layer whose output the head reads.
        """
        companion = self._companion()
        if companion.head is None:
            raise ModelError("companion_head was called, and the companion has no head. Give the Companion one.")
        role: Role = "companion" if companion.has_adapter else "teacher"
        outputs: dict[str, Tensor] = {}
        with ExitStack() as hooks, self.steering.unguided():
            for name, layer in companion.features.items():
                hooks.enter_context(layer.register_forward_hook(partial(_keep_output, outputs, name)))
            with self.roles.acting(role):
                self.model.predict(noisy, sigmas, conditioning)
        if missing := [name for name in companion.features if name not in outputs]:
            raise ModelError(
                f"the companion's head reads the output of {missing[0]!r}, and the model does not call that layer."
            )
        features = [backward_as(outputs[name].float(), self.roles, role, 1.0) for name in companion.features]
        judged: Tensor = companion.head(features)
        return judged

    def _companion(self) -> CompanionLearner:
        if self.companion is None:
            raise ModelError(
                "the loss asks a companion, and there is none. Expected an objective whose `companion` says what learns beside the "
                "student, or a Stage that has it."
            )
        return self.companion

    def decode(self, latents: Latents) -> DecodedPictures:
        """Pictures of clean latents: float32, in [0, 1], with gradient to the latents.

        Raises:
            ModelError: if the model does not decode latents.
        """
        return as_decoder(self.model).decode_latents(latents)

    def to_lora(self, layers: Mapping[str, AdapterTensors] | None = None) -> LoRA:
        """The current parameters, or ``layers`` in the form of `tensors`, as a LoRA."""
        return self.adapter.to_lora(self.tensors() if layers is None else layers, self.layer_weights)

    def with_model(self, model: Predictor) -> "AdapterStudent":
        """The same student for pictures of another size: ``model`` has the same denoiser."""
        return self if model is self.model else replace(self, model=model)

    @torch.no_grad()
    def layer_weights(self, name: str) -> LayerWeights:
        """The weights of a frozen layer. Applied LoRAs are hooks, so their sum is read off the layer's outputs."""
        from peft.utils.integrations import dequantize_module_weight  # noqa: PLC0415 - loads transformers

        layer: Any = self.wrapped[name].get_base_layer()
        stored: Tensor = dequantize_module_weight(layer)
        # For y = x W^T + b: the rows of the identity give W^T + b, and a zero row gives b.
        identity = torch.eye(layer.in_features, device=stored.device, dtype=stored.dtype)
        used: Tensor = layer(identity) - layer(torch.zeros_like(identity[:1]))
        return LayerWeights(stored.float(), used.float().T)


def backward_as(prediction: Latents, roles: Roles, role: Role, scale: float) -> Latents:
    """The same prediction, whose backward pass is computed in the role and at the scale that it was made in.

    Gradient checkpointing throws activations away and runs the layers again in the backward pass, long after the
    forward pass has handed the layers back to the student at scale 1: without this, a prediction at -1 would get the gradient of one
    at +1, and one of the companion that of the student, without an error. Autograd starts with the last prediction, and finishes
    it before it turns to the one before: so what is set where the gradient enters a prediction holds until all of it is computed.
    A model whose layers are spread over several devices is worked on by several threads, and gives no such promise.

    Args:
        prediction: what the model predicted.
        roles: of its layers; the student acts after the backward pass.
        role: whose prediction it is.
        scale: of the update in it.
    """
    return cast("Tensor", _BackwardAs.apply(prediction, roles, role, scale))  # type: ignore[no-untyped-call]


class _BackwardAs(Function):
    """The identity, whose backward pass sets role and scale before the layers below are computed again."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, roles: Roles, role: Role, scale: float) -> Tensor:  # noqa: ANN401
        ctx.roles, ctx.role, ctx.scale = roles, role, scale
        return prediction.view_as(prediction)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        ctx.roles.act(ctx.role, ctx.scale)
        engine = torch.autograd.Variable._execution_engine  # noqa: SLF001 - as DistributedDataParallel does
        engine.queue_callback(lambda: ctx.roles.act("student"))  # when the backward pass is over
        return gradient, None, None, None


def _keep_output(outputs: dict[str, Tensor], name: str, _layer: nn.Module, _inputs: object, output: Tensor) -> None:
    outputs.setdefault(name, output)  # not what is computed again in a backward pass
