"""The playground's own detector as a `Detector` of suites: shapes with colours."""

from artaug import playground
from artaug.evaluation.suites import Detection, Detector


class PlaygroundEyes(Detector):
    def detect(self, image, labels):
        return [Detection(label=thing.shape, box=thing.box, color=thing.color) for thing in playground.detect(image)]
