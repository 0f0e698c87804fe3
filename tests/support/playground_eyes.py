"""The playground's own detector as a detector of suites: shapes with colours."""

from artaug import playground
from artaug.evaluation.suites import Detection, Detector


class PlaygroundEyes(Detector):
    def detect(self, image, labels):
        return [Detection(label=one.shape, box=one.box, colour=one.color) for one in playground.detect(image)]
