r"""The paper's protocol on FLUX.1-dev, for whoever has the weights: rounds, scorers, win rates by a multimodal judge.

``python -m benchmarks.on_flux --plan`` says what it takes. ``--dry-run`` runs all of it on tiny models in two minutes, and
downloads nothing; its numbers mean nothing. With a GPU of 80 GB::

    python -m benchmarks.on_flux --lora "round 1=round-1.safetensors" --lora "round 2=round-2.safetensors" \
        --judge Qwen/Qwen3-VL-8B-Instruct --prompts PartiPrompts.tsv --count 256 --hps HPS_v2.1.safetensors
    python -m benchmarks.on_flux --train --train-prompts prompts.txt --critic Qwen/Qwen3-VL-8B-Instruct \
        --judge Qwen/Qwen3-VL-8B-Instruct --aesthetic sac+logos+ava1-l14-linearMSE.safetensors

All arms draw the same prompts with the same seeds. A call that is stopped goes on where it was: called again with the same
options, it draws nothing twice. OUT then has ``on_flux.json``, ``report.html``, ``on_flux.png``, and the LoRAs of a training.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

import artaug as aa
from artaug.report import plots
from benchmarks import _on_flux_models as models
from benchmarks import _on_flux_plan as planning
from benchmarks import _on_flux_protocol as protocols
from benchmarks import _record as record
from benchmarks._on_flux_dry_run import dry_run
from benchmarks._on_flux_models import Sources
from benchmarks._on_flux_options import parser, protocol_of, protocol_problems, sources_of
from benchmarks._on_flux_protocol import Evaluation, Protocol

DRY_RUN_TITLE = "DRY RUN on tiny models: these numbers mean nothing"


def main(arguments: Sequence[str]) -> int:
    """Check everything, then plan, or run and write."""
    options = parser(__doc__).parse_args(arguments)
    out: Path = options.out or Path("runs/on_flux_dry_run" if options.dry_run else "runs/on_flux")
    mpl.use("Agg")
    if options.dry_run:
        protocol, sources = dry_run(out)
    else:
        try:
            protocol, sources = protocol_of(options), sources_of(options)
        except (aa.ArtAugError, OSError) as error:
            return _refuse([str(error)])
    if options.plan and not options.measure:
        print(_planned(protocol, sources, without_judge=options.without_judge, hourly_price=options.price))
        return 0
    training = protocol.training is not None
    found = [
        *protocol_problems(protocol),
        *models.problems(
            sources, training=training, without_judge=options.without_judge, on_gpu=not protocol.is_dry_run
        ),
    ]
    if options.plan and not training:
        found.append("--measure measures the rounds of a training: give --train, too")
    if found:
        return _refuse(found)
    try:
        loaded = models.load(
            sources,
            size_px=protocol.size_px,
            steps=protocol.steps,
            guide=protocol.guide,
            training=training,
            tokens=protocol.tokens,
            answers=out / "answers",
        )
    except aa.ArtAugError as error:
        return _refuse([str(error)])
    plan = protocols.plan(protocol, loaded, out) if protocol.training else None
    if options.plan:
        print(plan)
        return 0
    result = protocols.train(protocol, loaded, out) if protocol.training else None
    rounds = {f"round {finished.number}": finished.lora for finished in result.rounds} if result else {}
    loras = {**loaded.loras, **rounds}
    evaluation = protocols.evaluate(protocol, loaded, loras, out)
    write(out, protocol, sources, loaded, evaluation, result=result, plan=plan)
    print(evaluation.comparison.table())
    print(f"\n{record.table(evaluation.judged)}\n\n{record.table(evaluation.drift)}")
    print(f"\nLook at {out / 'report.html'}; all numbers are in {out / 'on_flux.json'}.")
    return 0


def write(
    out: Path,
    protocol: Protocol,
    sources: Sources,
    loaded: models.Models,
    evaluation: Evaluation,
    *,
    result: aa.Enhancement | None,
    plan: aa.RunPlan | None,
) -> None:
    """Write on_flux.json, report.html and on_flux.png."""
    summary = {
        "dry_run": protocol.is_dry_run,
        "prompts": {"from": protocol.prompt_set, "different": len(set(protocol.prompts))},
        "protocol": repr(protocol),
        "sources": repr(sources),
        "not_measured": dict(loaded.not_measured),
        "training": result.summary() if result else None,
        "plan": plan.to_dict() if plan else None,
        "comparison": evaluation.comparison.to_dict(),
    }
    environment = record.environment() | {"quick": protocol.is_dry_run}
    record.write(out / "on_flux.json", environment, evaluation.rows, summary)
    plots.intervals(evaluation.comparison).savefig(out / "on_flux.png", dpi=150, bbox_inches="tight")
    about: dict[str, object] = {
        "prompts": f"{len(protocol.prompts)} of {protocol.prompt_set}, {protocol.images_per_prompt} seeds each",
        **{
            f"drift of {row['candidate']}": (
                f"{row['drift']:.3g} ({row['ci_low']:.3g} to {row['ci_high']:.3g}) by {row['by']}: 1 less the similarity of its "
                f"pictures and the base's of the same seed; two draws of the base differ by {_yardstick(row)}"
            )
            for row in evaluation.drift
        },
        **{f"not measured: {name}": why for name, why in loaded.not_measured.items()},
    }
    if loaded.judge is not None:
        about["judge"] = loaded.judge
    if loaded.critic is not None and protocol.training is not None:
        about |= {"critic": loaded.critic, "filter": protocols.pair_filter(protocol.training, loaded)}
        about |= {"trainer": protocol.training.trainer}
    aa.write_report(
        out / "report.html",
        result=result,
        comparison=evaluation.comparison,
        plan=plan,
        title=DRY_RUN_TITLE if protocol.is_dry_run else "What FLUX.1-dev learned",
        about=about,
    )


def _yardstick(row: record.Row) -> str:
    return f"{row['drift'] / row['of_two_draws']:.3g}" if row["of_two_draws"] else "nothing"


def _planned(protocol: Protocol, sources: Sources, *, without_judge: bool, hourly_price: float | None) -> str:
    """The estimate, without any model."""
    training = protocol.training
    candidates = len(sources.loras) + (training.rounds if training else 0) or 1
    scorers = 2 + sum(map(bool, (sources.aesthetic, sources.hps, sources.image_reward)))
    rows = list(
        planning.plan_rows(
            protocol,
            candidates=candidates,
            scorers=scorers,
            judged=not without_judge,
            known=planning.rates(),
        )
    )
    models_here = {None if without_judge or sources.judge_url else sources.judge or "judge"}
    if training is not None and not sources.critic_url:
        models_here.add(sources.critic or "judge")  # unless they are named, one model is both
    sizes = planning.flux_sizes(protocol)
    rounds = f"{training.rounds} rounds of {len(training.prompts):,} prompts, then " if training else ""
    return planning.text(
        rows,
        list(planning.memory_rows(protocol, sizes, local_models=len(models_here - {None}))),
        planning.disk_bytes(protocol, sizes, candidates=candidates),
        hourly_price=hourly_price,
        what=(
            f"{rounds}{candidates} candidate(s) and the base on {len(protocol.prompts)} prompts with "
            f"{protocol.images_per_prompt} seeds, {scorers} scorers, at {protocol.size_px} px and {protocol.steps} steps"
        ),
    )


def _refuse(found: Sequence[str]) -> int:
    """Print all that is wrong, and return the exit status for it."""
    print("This cannot run:", file=sys.stderr)
    for number, problem in enumerate(found, start=1):
        print(f"{number}. {problem}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
