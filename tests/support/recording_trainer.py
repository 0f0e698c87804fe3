"""A trainer that notes what it is given, and can be told to fail."""

from dataclasses import dataclass, field

import artaug as aa


@dataclass(frozen=True, kw_only=True)
class RecordingTrainer(aa.DifferentialLoRATrainer):
    """Trains as its class does; ``given`` gets the pairs of every training."""

    given: list = field(default_factory=list, repr=False, compare=False)
    fails_at: int | None = field(default=None, repr=False, compare=False)
    """The training, counted from 1, that is interrupted after its first step; None for none."""

    def train(self, pairs, synthesizer, **options):
        self.given.append(list(pairs))

        def on_step(_):
            if len(self.given) == self.fails_at:
                raise KeyboardInterrupt

        return super().train(pairs, synthesizer, on_step=on_step, **options)


def tiny_trainer(**options):
    """A trainer for laws, not for learning."""
    return RecordingTrainer(**{"rank": 2, "steps": 2, "batch_size": 2, "learning_rate": 1e-3, **options})


def same_lora(one, other):
    """Whether two LoRAs are the same to the bit."""
    return one.layers.keys() == other.layers.keys() and all(
        (layer.down == other.layers[name].down).all() and (layer.up == other.layers[name].up).all()
        for name, layer in one.layers.items()
    )
