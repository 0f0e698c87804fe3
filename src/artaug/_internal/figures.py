"""Figures of matplotlib that a notebook shows, whether or not pyplot has been imported."""

import io

from matplotlib.figure import Figure

_SHOWN_PX_PER_INCH = 96


class NotebookFigure(Figure):
    """A figure that displays itself.

    Notebooks show other figures only once pyplot has been imported, which changes global state.
    """

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The picture in the figure's own resolution, and its size on the page."""
        png = io.BytesIO()
        self.savefig(png, format="png")
        width, height = (round(float(side) * _SHOWN_PX_PER_INCH) for side in self.get_size_inches())
        return png.getvalue(), {"width": width, "height": height}
