"""The playground as workers of a cluster build it. By itself: workers that draw swatches need no diffusers."""

from functools import partial

import artaug as aa
from artaug import playground

build_playground = partial(playground.synthesizer, guide=aa.OutputMix(), steps=2)
