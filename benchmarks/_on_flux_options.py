"""The command line of the protocol: what the options are, and what becomes of them."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import artaug as aa
from artaug._internal.prompts import check_disjoint
from benchmarks._on_flux_models import Sources
from benchmarks._on_flux_protocol import Protocol, Training

PAPER_PROMPTS = 5_000
"""Pairs that the paper makes in a round, before its filters (reviews of its submission; docs/evidence.md)."""
_STOP_PROMPTS = 64


def parser(description: str | None) -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="the folder: runs/on_flux, of a dry run runs/on_flux_dry_run")
    how = made.add_argument_group("instead of a run")
    how.add_argument("--dry-run", "--quick", action="store_true", help="all of it on tiny models, in two minutes")
    how.add_argument("--plan", action="store_true", help="estimate pictures, passes, hours, memory and disk, and end")
    how.add_argument("--measure", action="store_true", help="with --plan --train: measure on a few prompts, on the GPU")
    how.add_argument("--price", type=float, help="of a GPU hour, for --plan")
    compared = made.add_argument_group("what is compared")
    compared.add_argument("--base", default=Sources.base, help="a folder, or a name on the Hub")
    compared.add_argument("--lora", action="append", default=[], metavar="NAME=FILE", help="a candidate; once for each")
    compared.add_argument("--prompts", type=Path, help="PartiPrompts, DrawBench, HPD or .txt; without it artaug's 48")
    compared.add_argument("--count", type=int, help="so many of these prompts, drawn by --seed")
    compared.add_argument("--seeds", type=int, default=2, help="pictures a prompt, at least 2")
    compared.add_argument("--seed", type=int, default=Protocol.seed, help="of the pictures")
    compared.add_argument("--size", type=int, default=Protocol.size_px, help="pixels a side")
    compared.add_argument("--steps", type=int, default=Protocol.steps, help="denoising steps")
    compared.add_argument("--batch-size", type=int, default=Protocol.batch_size, help="pictures drawn at a time")
    compared.add_argument(
        "--one-at-a-time", action="store_true", help="hold one model on the GPU, the others beside it"
    )
    judged = made.add_argument_group("by what")
    judged.add_argument("--judge", help="a multimodal model: which of two pictures is better, asked in both orders")
    judged.add_argument("--judge-url", help="of a server that has it")
    judged.add_argument("--without-judge", action="store_true", help="do without win rates")
    judged.add_argument("--aesthetic", help="LAION's head in safetensors")
    judged.add_argument("--hps", help="HPS v2.1 in safetensors")
    judged.add_argument("--image-reward", help="ImageReward in safetensors")
    trained = made.add_argument_group("a training before")
    trained.add_argument("--train", action="store_true", help="run the rounds first; their LoRAs are candidates")
    trained.add_argument("--critic", help="a multimodal model that says what to improve, and where")
    trained.add_argument("--critic-url", help="of a server that has it")
    trained.add_argument("--train-prompts", type=Path, help="as --prompts; the last 64 are held out for the stop rule")
    trained.add_argument("--train-count", type=int, help="so many of these prompts")
    trained.add_argument("--rounds", type=int, default=Training.rounds, help="at most")
    trained.add_argument("--guide", choices=("regional-attention", "output-mix"), default="regional-attention")
    return made


def sources_of(options: argparse.Namespace) -> Sources:
    """Where the models are.

    Raises:
        InvalidValueError: for a --lora that is not NAME=FILE.
    """
    loras: dict[str, str] = {}
    for given in options.lora:
        name, separator, path = given.partition("=")
        if not (name and separator and path) or name in loras:
            raise aa.InvalidValueError(f"--lora {given}: expected NAME=FILE, and another name for each")
        loras[name] = path
    return Sources(
        base=options.base,
        loras=loras,
        judge=options.judge,
        judge_url=options.judge_url,
        critic=options.critic,
        critic_url=options.critic_url,
        aesthetic=options.aesthetic,
        hps=options.hps,
        image_reward=options.image_reward,
        device="cpu" if options.one_at_a_time else "auto",
    )


def protocol_of(options: argparse.Namespace) -> Protocol:
    """What is drawn.

    Raises:
        PromptError: for a file that holds no prompts.
        InvalidValueError: for more prompts than a file holds, or a training without a file.
        FileNotFoundError: if there is no such file.
    """
    prompts = _prompt_set(options.prompts, options.count, seed=options.seed)
    return Protocol(
        prompt_set="artaug's everyday prompts" if options.prompts is None else options.prompts.name,
        prompts=tuple(prompts),
        images_per_prompt=options.seeds,
        size_px=options.size,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        training=_training(options),
        one_at_a_time=options.one_at_a_time,
        guide=aa.OutputMix() if options.guide == "output-mix" else aa.RegionalAttention(),
    )


def _prompt_set(path: Path | None, count: int | None, *, seed: int) -> aa.PromptSet:
    everything = aa.PromptSet.everyday() if path is None else aa.PromptSet.read(path)
    return everything if count is None else everything.sample(count, seed=seed)


def _training(options: argparse.Namespace) -> Training | None:
    """The rounds, where they are asked for; an estimate without a file takes as many prompts as the paper."""
    if not options.train:
        return None
    if options.train_prompts is None and options.plan and not options.measure:
        prompts = tuple(f"prompt {number}" for number in range((options.train_count or PAPER_PROMPTS) + _STOP_PROMPTS))
    elif options.train_prompts is None:
        raise aa.InvalidValueError("--train needs prompts to learn from: --train-prompts FILE, one a line")
    else:
        prompts = tuple(_prompt_set(options.train_prompts, options.train_count, seed=Training.seed))
    if len(prompts) <= _STOP_PROMPTS:
        raise aa.InvalidValueError(
            f"--train-prompts has {len(prompts)} prompts: need more than {_STOP_PROMPTS}, which the stop rule holds out"
        )
    return Training(prompts=prompts[:-_STOP_PROMPTS], held_out=prompts[-_STOP_PROMPTS:], rounds=options.rounds)


def protocol_problems(protocol: Protocol) -> Iterator[str]:
    """What is wrong with what is to be drawn, one sentence each."""
    if protocol.images_per_prompt < 2:
        yield f"--seeds {protocol.images_per_prompt}: diversity is measured on at least 2 pictures of a prompt"
    if protocol.training is None:
        return
    learned = [*protocol.training.prompts, *protocol.training.held_out]
    try:
        check_disjoint(
            protocol.prompts, learned, owner="--prompts", are="learned from", why="A model is judged on other prompts."
        )
    except aa.PromptError as error:
        yield str(error)
