"""Train the playground from scratch: `python tools/train_playground.py --out DIR --seed 0`.

First the autoencoder, then the transformer with its text encoders, then a measurement. A run that was
stopped goes on from its last checkpoint. `DIR/weights` is what ships in `artaug/playground/weights`.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from diffusers import FluxPipeline

from playground_flux import train_flux
from playground_measure import measure
from playground_vae import polish_decoder, train_autoencoder
from playground_workers import Job, launch

_logger = logging.getLogger("playground")


def main() -> None:
    """Parse the command line and run the stages that are not done yet."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = _parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for stage, steps in ((train_autoencoder, args.vae_steps), (polish_decoder, args.polish_steps)):
        done = args.out / f"{stage.__name__}.done"
        if not done.exists():
            launch(stage, Job(out=args.out, seed=args.seed, steps=steps, batch_size=16, workers=args.workers))
            done.touch()
    launch(
        train_flux,
        Job(
            out=args.out,
            seed=args.seed,
            steps=args.steps,
            batch_size=64,
            workers=args.workers,
            compiled=args.compile,
        ),
    )
    torch.set_num_threads(args.workers)
    pipeline = FluxPipeline.from_pretrained(args.out / "weights")
    metrics = measure(pipeline, count=256, steps=args.draw_steps, seed=0)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _logger.info("%s", metrics)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, weights and metrics.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=2700)
    parser.add_argument("--polish-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=7000, help="flow matching steps of 64 pictures")
    parser.add_argument("--draw-steps", type=int, default=12, help="sampling steps of the final measurement")
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes, one a core")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser


if __name__ == "__main__":
    main()
