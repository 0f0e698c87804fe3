"""The student: which layers learn, the exported LoRA, and predictions at several scales."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from artaug.diffusion import Flux
from artaug.errors import LoRAMismatchError, ModelError
from artaug.lora.lora import LoRA, LowRank
from artaug.training import ATTENTION_AND_MLP, Bipolar, PairBatch, PairedDifference
from artaug.training.injection import find_target_layers, inject_adapter
from support.family_laws import family_of, picture
from support.tiny_flux import tiny_flux
from support.training_steps import batch_of, frozen_prediction, gradients, perturb, student_of


def filled_lora(module, *, scale=0.1):
    generator = torch.Generator().manual_seed(5)
    return LoRA(
        {
            name: LowRank(
                scale * torch.randn(2, layer.in_features, generator=generator),
                torch.randn(layer.out_features, 2, generator=generator),
            )
            for name, layer in find_target_layers(module, "blocks").items()
        }
    )


def test_an_applied_lora_counts_in_wrapped_layers_as_if_its_update_were_in_the_weights(make_model, two_pairs):
    hooked, added = make_model(), make_model()
    applied = filled_lora(hooked.module)
    for name, layer in applied.layers.items():
        added.module.get_submodule(name).weight.data += layer.delta()
    inputs = (
        hooked.encode_images([pair.before for pair in two_pairs]),
        torch.tensor([0.3, 0.7]),
        hooked.encode_prompts([pair.prompt for pair in two_pairs]),
    )
    predictions = []
    for model in (hooked, added):
        generator = torch.Generator().manual_seed(0)
        with inject_adapter(model, rank=4, targets="blocks", generator=generator) as student:
            for factor in student.parameters():
                factor.data += 0.1 * torch.randn(factor.shape, generator=generator)
            if model is hooked:
                with applied.applied_to(hooked_base(model)):
                    predictions.append((student.predict(*inputs), student.teacher_predict(*inputs)))
            else:
                predictions.append((student.predict(*inputs), student.teacher_predict(*inputs)))
    torch.testing.assert_close(predictions[0], predictions[1], rtol=1e-4, atol=1e-4)


def hooked_base(model):
    """The model's module, as one whose wrapped layers carry the names of the plain ones."""
    bare = torch.nn.Module()
    for name, layer in model.module.named_modules():
        if name.endswith(".base_layer"):
            _place(bare, name.removesuffix(".base_layer"), layer)
    return bare


def _place(root, path, leaf):
    *parents, last = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, torch.nn.Module())
        root = getattr(root, part)
    root.add_module(last, leaf)


def test_the_lora_does_what_the_model_in_training_did(tiny_model):
    inputs = (torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.8]), tiny_model.encode_prompts(["a", "b"]))
    generator = torch.Generator().manual_seed(0)
    with inject_adapter(tiny_model, rank=4, targets="blocks", generator=generator) as student:
        for factor in student.parameters():
            factor.data += 0.1 * torch.randn(factor.shape, generator=generator)
        learned, lora = student.predict(*inputs), student.to_lora()
    with lora.applied_to(tiny_model.module.eval()):
        torch.testing.assert_close(tiny_model.predict(*inputs), learned)


def test_targets_that_select_nothing_name_what_there_is(tiny_model):
    with pytest.raises(
        LoRAMismatchError, match=r"'to_q' select none of the 11 linear layers of TinyDenoiser; .*'blocks\."
    ):
        find_target_layers(tiny_model.module, "to_q")


def test_a_model_that_carries_peft_adapters_is_refused(tiny_model):
    with (
        inject_adapter(tiny_model, rank=2, targets="attn", generator=torch.Generator()),
        pytest.raises(ModelError, match=r"carries PEFT adapters already \(artaug\)"),
        inject_adapter(tiny_model, rank=2, targets="mlp", generator=torch.Generator()),
    ):
        pytest.fail("the block ran")


def test_attention_and_mlps_of_flux_learn_by_default():
    chosen = set(find_target_layers(tiny_flux().transformer, ATTENTION_AND_MLP))
    assert {
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_add_out",
        "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.0.ff_context.net.2",
        "single_transformer_blocks.1.attn.to_v",
        "single_transformer_blocks.1.proj_mlp",
        "single_transformer_blocks.1.proj_out",
    } <= chosen
    assert not [name for name in chosen if "norm" in name or name in {"proj_out", "x_embedder", "context_embedder"}]


def saved_by_autograd(student, inputs):
    """The tensors a prediction saves for its backward pass, but for weights."""
    weights = {parameter.data_ptr() for parameter in student.model.module.parameters()}
    saved = {}

    def note(tensor):
        if tensor.data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        prediction = student.predict(*inputs)
    return prediction, list(saved.values())


def test_a_factor_keeps_its_layers_own_input_and_no_copy_of_it(make_model):
    model, width, rows = make_model(dtype=torch.bfloat16), 64, 256
    inputs = (torch.randn(rows, 3, 4, 4), torch.full((rows,), 0.5), model.encode_prompts(["a"] * rows))
    with inject_adapter(model, rank=2, targets="attn|mlp", generator=torch.Generator()) as student:
        _, saved = saved_by_autograd(student, inputs)
    wide = [tensor for tensor in saved if tensor.numel() >= rows * width]
    assert {tensor.dtype for tensor in wide} == {torch.bfloat16}
    # A block keeps what its norm is given and gives, what attn gives, and the two ends of the non-linearity.
    assert sum(tensor.numel() for tensor in wide) <= 3 * (1 + 1 + 1 + 2 + 2) * rows * width


def test_factors_on_a_bfloat16_model_learn_as_on_a_float32_model(make_model):
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(dtype=torch.bfloat16)  # the same weights, rounded
        model.module.to(dtype)
        model.dtype = dtype
        inputs = (torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.8]), model.encode_prompts(["a", "b"]))
        with inject_adapter(model, rank=4, targets="blocks", generator=torch.Generator().manual_seed(0)) as student:
            for factor in student.parameters():
                factor.data += 0.1
                assert factor.dtype == torch.float32
            student.predict(torch.ones_like(inputs[0]), *inputs[1:]).square().mean().backward()
            gradients.append([factor.grad for factor in student.parameters()])
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() < 0.05 * exact.norm()  # the model itself computes in eight bits


# Predictions at several scales of the LoRA, in forward passes and under gradient checkpointing


def checkpointed(model, **options):
    """Compute the blocks of a tiny model again in the backward pass."""
    for block in model.module.blocks:
        block.forward = partial(checkpoint, block.forward, **options)
    return model


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.25, 1.0, 4.0])
def test_a_prediction_at_a_scale_is_that_of_the_scaled_update_in_the_weights(make_model, two_pairs, scale):
    wrapped, plain = make_model(), make_model()
    batch = batch_of(wrapped, two_pairs)
    with student_of(wrapped) as student:
        perturb(student)
        prediction = student.predict(batch.before, batch.sigmas, batch.conditioning, scale=scale)
        lora = student.to_lora()
    for name, layer in lora.layers.items():
        plain.module.get_submodule(name).weight.data += scale * layer.delta()
    plain.module.eval()
    torch.testing.assert_close(prediction, frozen_prediction(plain, batch.before, batch), rtol=1e-4, atol=1e-5)


def test_a_scale_ends_with_its_prediction_and_with_an_exception(tiny_model, two_pairs):
    batch = batch_of(tiny_model, two_pairs)
    with student_of(tiny_model) as student:
        perturb(student)
        predict = partial(student.predict, batch.before, batch.sigmas, batch.conditioning)
        plain = predict()
        scaled = predict(scale=-0.5)
        assert torch.equal(predict(), plain)
        scaled.sum().backward()
        assert torch.equal(frozen_prediction(tiny_model, batch.before, batch), plain)
        with pytest.raises(KeyError, match="embeds"):
            student.predict(batch.before, batch.sigmas, {}, scale=-0.5)
        assert torch.equal(frozen_prediction(tiny_model, batch.before, batch), plain)


def mixed_loss(student, batch):
    """Predictions at several scales in one loss that does not split into a term for each."""
    predict = partial(student.predict, sigmas=batch.sigmas, conditioning=batch.conditioning)
    first, second, third = predict(batch.before), predict(batch.after, scale=-1.0), predict(batch.before, scale=0.25)
    return (first * second).mean() + (third - first.detach()).square().mean()


@pytest.mark.parametrize(
    ("loss", "reentrant"),
    [(mixed_loss, False), (mixed_loss, True), (Bipolar().loss, False)],
    ids=["mixed", "mixed, reentrant", "Bipolar"],
)
def test_recomputed_layers_use_the_scale_of_their_forward_pass(make_model, two_pairs, loss, reentrant):
    found = []
    for model in (make_model(), checkpointed(make_model(), use_reentrant=reentrant)):
        batch = batch_of(model, two_pairs)
        with student_of(model, targets="blocks|proj_in") as student:
            perturb(student)
            loss(student, batch).backward()
            found.append(gradients(student))
            assert {layer.scaling["artaug"] for layer in student.wrapped.values()} == {1.0}
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-8)


def flux_gradients(*, checkpoints, sequential):
    flux = family_of(Flux, tiny_flux())
    if checkpoints:
        flux.module.enable_gradient_checkpointing()
    before, after = flux.encode_images([picture(1), picture(2)]).split(1)
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    prompt, sigmas = flux.encode_prompts(["a red barn"]), torch.tensor([0.6])
    with student_of(flux, targets=r"blocks.*(attn|ff)") as student:
        perturb(student)
        if sequential:
            objective = PairedDifference()
            batch = PairBatch(before=before, after=after, conditioning=prompt, noise=noise, sigmas=sigmas)
            reversed_batch = PairBatch(before=after, after=before, conditioning=prompt, noise=noise, sigmas=sigmas)
            for direction, scale in ((batch, 1.0), (reversed_batch, -1.0)):
                (objective.loss(ScaledStudent(student, scale), direction) / 2).backward()
        else:
            batch = PairBatch(before=before, after=after, conditioning=prompt, noise=noise, sigmas=sigmas)
            Bipolar().loss(student, batch).backward()
        return gradients(student)


class ScaledStudent:
    """A student at a scale, with which one backward pass is done before the next prediction begins."""

    def __init__(self, student, scale):
        self.noise_schedule, self.teacher_predict = student.noise_schedule, student.teacher_predict
        self.predict = partial(student.predict, scale=scale)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_real_transformer_has_the_gradient_of_both_directions(checkpoints):
    expected = flux_gradients(checkpoints=False, sequential=True)
    gradient = flux_gradients(checkpoints=checkpoints, sequential=False)
    assert any(layer.count_nonzero() for layer in expected)
    for layer, other in zip(expected, gradient, strict=True):
        torch.testing.assert_close(other, layer, rtol=1e-4, atol=1e-7)
