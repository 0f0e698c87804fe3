"""The whole ArtAug loop on the playground: a tiny real FLUX learns better taste, in a few minutes on two CPU cores."""

import json
from dataclasses import asdict
from pathlib import Path

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.scorers import Chroma, Contrast, Exposure, MeanOf, Photometric, Sharpness


def main(folder: Path = Path("runs/quickstart")) -> None:
    """Run two rounds, compare base and rounds on held-out prompts, and leave the LoRA and a report in ``folder``.

    Stop it when you like: called again, it goes on where it was, and ends in seconds if it had finished.
    """
    synthesizer = playground.synthesizer(guide=aa.RegionalAttention())
    faithful = [playground.Accuracy(attribute) for attribute in ("color", "shape", "place")]
    keep = aa.Gain(Chroma(), at_least=0.03) & aa.Gain(Contrast(), at_least=0.01)
    for accuracy in faithful:
        keep &= aa.Floor(accuracy, at_least=1.0)
    held_out = playground.prompts(192, seed=1, held_out=True)

    result = aa.enhance(
        playground.prompts(96, seed=0),
        synthesizer=synthesizer,
        critic=PhotometricCritic(),
        planner=aa.GreedyPlanner(max_regions=3),
        keep=keep,
        trainer=aa.DifferentialLoRATrainer(
            objective=aa.PairedPreference(anchor=0.075), rank=8, steps=30, batch_size=32, learning_rate=2e-3
        ),
        fuser=aa.ConcatFuser(),
        rounds=2,
        stop=aa.StopRule(MeanOf((Exposure(), Sharpness())), held_out[:64]),
        seed=0,
        batch_size=32,
        store=folder / "run",
    )
    base = aa.CachedSynthesizer(synthesizer, folder=folder / "comparison")

    comparison = aa.compare(
        base,
        {f"round {finished.number}": base.with_lora(finished.lora) for finished in result.rounds},
        held_out[64:],
        scorers=[Photometric(), Exposure(), Sharpness(), Chroma(), Contrast(), *faithful],
        filtered_by=keep.scorers,
        batch_size=32,
    )

    print(comparison.table())
    result.lora.save(folder / "artaug.safetensors")
    aa.write_report(folder / "report.html", result=result, comparison=comparison, title="ArtAug on the playground")
    last_accepted = f"round {sum(finished.accepted for finished in result.rounds)}"
    final = {row.scorer: asdict(row) for row in comparison.rows if row.candidate == last_accepted}
    summary = result.summary() | {"comparison": final, "by_round": [asdict(row) for row in comparison.rows]}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    print(f"\n{result.stop_reason}. Look at {folder / 'report.html'}; the LoRA is {folder / 'artaug.safetensors'}")


if __name__ == "__main__":
    main()
