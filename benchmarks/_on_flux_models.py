"""The models of the protocol: where they are, what is wrong with that before anything is loaded, and how they are loaded."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache

import artaug as aa
from artaug.critics import Conversation, Coordinates, OpenAICritic, VLMCritic
from artaug.diffusion import DiffusersSynthesizer
from artaug.errors import LoRAError
from artaug.hub.errors import translate_errors
from artaug.judges import OpenAIJudge, VLMJudge
from artaug.scorers import (
    AestheticScore,
    ClipScore,
    DualEncoder,
    HPSv2,
    ImageEncoder,
    ImageReward,
    LoadOptions,
    PickScore,
)
from artaug.scorers.aesthetic import linear_head
from artaug.scorers.loading import load_weights
from artaug.scorers.pickscore import CLIP_H
from benchmarks._on_flux_judge import KeptJudge

_CONVERT = "It is published as a pickle, which can run code: docs/scorers.md says how to convert it once."


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where every model is: a folder, a file, a name on the Hub, or a name on a server."""

    base: str = "black-forest-labs/FLUX.1-dev"
    loras: Mapping[str, str] = field(default_factory=dict)
    """Files of candidates, by their names in the tables."""
    judge: str | None = None
    """The multimodal model that says which of two pictures is better."""
    judge_url: str | None = None
    """The server that has it; None to load it here."""
    critic: str | None = None
    """The multimodal model that says what to improve, for a training."""
    critic_url: str | None = None
    aesthetic: str | None = None
    """A file of LAION's head, for vectors of ``clip``; without it there is no aesthetic score."""
    hps: str | None = None
    """A file of HPS v2.1."""
    image_reward: str | None = None
    """A file of ImageReward."""
    clip: str = "openai/clip-vit-large-patch14"
    clip_h: str = CLIP_H
    """What PickScore and HPS were tuned from."""
    pickscore: str = "yuvalkirstain/PickScore_v1"
    similarity: str = "facebook/dinov2-base"
    """What drift and diversity are measured with."""
    bert: str = "google-bert/bert-base-uncased"
    """ImageReward's tokenizer."""
    coordinates: Coordinates | None = None
    """How the critic writes boxes; None for what its family is known to do."""
    constrained: bool = True
    """Whether the replies of models that are loaded here are constrained to JSON."""
    device: str = "auto"
    """Where models are loaded; on the CPU if each comes to the GPU in its turn."""

    @property
    def options(self) -> LoadOptions:
        """Of the scorers."""
        return LoadOptions(device=self.device)

    @property
    def not_measured(self) -> dict[str, str]:
        """Metrics of the paper and of its reviewers that this run leaves out, and why."""
        missing = {
            "LAION aesthetic": (self.aesthetic, "no --aesthetic FILE was given"),
            "HPSv2.1": (self.hps, "no --hps FILE was given"),
            "ImageReward": (self.image_reward, "no --image-reward FILE was given"),
            "win rates by a multimodal model": (self.judge, "--without-judge"),
            "MPS": (None, "its weights are published as a pickled module, which artaug does not read"),
            "FID": (None, "needs thousands of real pictures, and measures another question"),
            "people's choices": (None, "artaug.review shows pairs to people; their votes are no part of this script"),
        }
        return {name: why for name, (given, why) in missing.items() if given is None}


def problems(sources: Sources, *, training: bool, without_judge: bool, on_gpu: bool = True) -> Iterator[str]:
    """Everything that would stop the run later, one sentence each with what to do; nothing is loaded but LoRA files."""
    if on_gpu and not torch.accelerator.is_available():
        yield "torch sees no GPU here: run it where there is one of 80 GB, or try --dry-run (tiny models) or --plan (costs)"
    for package, extra in (("jinja2", "report"), ("matplotlib", "report")):
        if find_spec(package) is None:
            yield f'{package} is not installed: run pip install "artaug[{extra}]"'
    yield from _model_problems(sources, training=training, without_judge=without_judge)
    yield from _file_problems(sources)
    yield from _access_problems(_fetched(sources, training=training))


def _fetched(sources: Sources, *, training: bool) -> dict[str, str]:
    """What the Hub has to give unless it is a folder, with the option that names it."""
    names = dict.fromkeys((sources.pickscore, sources.clip, sources.clip_h, sources.similarity), "")
    if sources.image_reward:
        names[sources.bert] = ""
    if sources.judge and not sources.judge_url:
        names[sources.judge] = "--judge"
    if training and sources.critic and not sources.critic_url:
        names[sources.critic] = "--critic"
    return {sources.base: "--base", **names}


def _model_problems(sources: Sources, *, training: bool, without_judge: bool) -> Iterator[str]:
    if sources.judge is None and not without_judge:
        yield (
            "there is no multimodal judge, whose choices are the measure that no scorer gives: --judge NAME (a model to load, "
            "such as Qwen/Qwen3-VL-8B-Instruct), with --judge-url URL where a server has it; or say --without-judge"
        )
    if training and sources.critic is None:
        yield (
            "--train needs a critic, a multimodal model: --critic NAME (such as Qwen/Qwen3-VL-8B-Instruct), with --critic-url "
            "URL where a server has it"
        )
    if training and sources.aesthetic is None:
        yield f"--train filters pairs by the aesthetic score, as the paper does: --aesthetic FILE. {_CONVERT}"
    if not training and not sources.loras:
        yield "there is nothing to compare with the base: give --lora NAME=FILE, once for each round, or --train"
    if sources.judge and sources.judge_url:
        yield from _refusal("--judge-url", lambda: _served_judge(sources))
    if training and sources.critic and sources.critic_url:
        yield from _refusal("--critic-url", lambda: _critic(sources))
    local = [
        model
        for model, url in ((sources.judge, sources.judge_url), (sources.critic, sources.critic_url))
        if model and not url
    ]
    if local and sources.constrained and find_spec("llguidance") is None:
        yield 'llguidance, which constrains the replies of models that are loaded here, is not installed: run pip install "artaug[vlm]"'


def _refusal(option: str, build: Callable[[], object]) -> Iterator[str]:
    """Why something cannot be made, which loads nothing and sends nothing."""
    try:
        build()
    except aa.InvalidValueError as error:
        yield f"{option}: {error}".removesuffix(".")


def _file_problems(sources: Sources) -> Iterator[str]:
    for option, file in (
        ("--aesthetic", sources.aesthetic),
        ("--hps", sources.hps),
        ("--image-reward", sources.image_reward),
    ):
        if file is not None and not file.endswith(".safetensors"):
            yield f"{option} {file} is no safetensors file. {_CONVERT}"
        elif file is not None and not Path(file).is_file():
            yield f"{option} {file}: there is no such file"
    if "base" in sources.loras:
        yield "--lora base=...: the model without a LoRA has that name, choose another"
    for name, path in sources.loras.items():
        try:
            aa.LoRA.load(path)
        except LoRAError as error:
            yield f"--lora {name}={path}: {error}"


def _access_problems(names: Mapping[str, str]) -> Iterator[str]:
    """Why models could not be fetched; those in a folder, or fetched before, are not asked for."""
    api = HfApi()
    for source, option in names.items():
        cached = (try_to_load_from_cache(source, name) for name in ("model_index.json", "config.json"))
        if Path(source).is_dir() or any(isinstance(file, str) for file in cached):
            continue
        try:
            with translate_errors(
                f"{option} {source}: asking the Hub".lstrip(), api, default_advice="Is there a network?"
            ):
                api.auth_check(source)
        except aa.HubError as error:
            licence = f" Accept its licence at https://huggingface.co/{source}, then run hf auth login, or set HF_TOKEN"
            yield f"{error}{licence if error.status in {401, 403} else ''}".removesuffix(".")
            if error.status is None:  # nor would the Hub answer about the others
                return


@dataclass(frozen=True, kw_only=True)
class Models:
    """All models of a run, loaded."""

    base: DiffusersSynthesizer
    loras: Mapping[str, aa.LoRA]
    """From files, each of which fits the base."""
    scorers: tuple[aa.Scorer, ...]
    """Those that there are files for; CLIP and PickScore always."""
    similarity: aa.EmbeddingSimilarity
    critic: aa.Critic | None
    judge: aa.PairwiseJudge | None
    not_measured: Mapping[str, str]

    def scorer(self, kind: type[aa.Scorer]) -> aa.Scorer:
        """The scorer of a class; `problems` has seen to it that there is one."""
        return next(scorer for scorer in self.scorers if isinstance(scorer, kind))


def load(
    sources: Sources,
    *,
    size_px: int,
    steps: int,
    guide: aa.Guide,
    training: bool,
    tokens: int | None = None,
    answers: Path,
) -> Models:
    """Load everything, the base first: it is the largest.

    Args:
        sources: where everything is.
        size_px: of the pictures.
        steps: of a drawing.
        guide: of regions.
        training: whether there will be one, which needs the critic.
        tokens: of a prompt; None for as many as the model's family reads.
        answers: the folder of the judge's answers.

    Raises:
        LoRAMismatchError: for a LoRA of another model.
        ModelError: for what cannot be loaded.
    """
    base = DiffusersSynthesizer.from_pretrained(
        sources.base,
        guide=guide,
        device=sources.device,
        width=size_px,
        height=size_px,
        steps=steps,
        max_sequence_length=tokens,
    )
    loras = {name: aa.LoRA.load(path) for name, path in sources.loras.items()}
    for lora in loras.values():
        base.with_lora(lora)  # raises now what would be raised after a training of days
    critic = _critic(sources) if training else None
    return Models(
        base=base,
        loras=loras,
        scorers=tuple(_scorers(sources)),
        similarity=aa.EmbeddingSimilarity(ImageEncoder.from_pretrained(sources.similarity, options=sources.options)),
        critic=critic,
        judge=_judge(sources, critic, answers),
        not_measured=sources.not_measured,
    )


def _scorers(sources: Sources) -> Iterator[aa.Scorer]:
    options = sources.options
    clip = DualEncoder.from_pretrained(sources.clip, options=options)
    yield PickScore.from_pretrained(sources.pickscore, processor=sources.clip_h, options=options)
    if sources.hps:
        yield HPSv2.from_pretrained(sources.hps, clip=sources.clip_h, options=options)
    if sources.image_reward:
        yield ImageReward.from_pretrained(sources.image_reward, tokenizer=sources.bert, options=options)
    if sources.aesthetic:
        head = linear_head(load_weights(sources.aesthetic), source=sources.aesthetic)
        yield AestheticScore(encoder=clip, head=head)  # on the vectors of one CLIP, which ClipScore shares
    yield ClipScore(encoder=clip)


def _critic(sources: Sources) -> aa.Critic:
    if sources.critic is None:
        raise aa.InvalidValueError("a training needs a critic: see problems().")
    if sources.critic_url is None:
        return VLMCritic.from_pretrained(
            sources.critic, coordinates=sources.coordinates, constrained=sources.constrained, device=sources.device
        )
    conversation = Conversation(coordinates=sources.coordinates) if sources.coordinates else None
    return OpenAICritic(
        base_url=sources.critic_url,
        model=sources.critic,
        conversation=conversation,
    )


def _judge(sources: Sources, critic: aa.Critic | None, answers: Path) -> aa.PairwiseJudge | None:
    """The judge, which shares the weights of a critic that is the same model, loaded here."""
    if sources.judge is None:
        return None
    judge: aa.PairwiseJudge
    if sources.judge_url is not None:
        judge = _served_judge(sources)
    elif isinstance(critic, VLMCritic) and sources.judge == sources.critic:
        judge = VLMJudge(model=critic.model, processor=critic.processor)
    else:
        judge = VLMJudge.from_pretrained(sources.judge, options=sources.options)
    return KeptJudge(judge, answers)


def _served_judge(sources: Sources) -> OpenAIJudge:
    return OpenAIJudge(base_url=sources.judge_url or "", model=sources.judge or "")
