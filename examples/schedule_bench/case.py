"""A schedule with its stages, as one writes it: `zb-v@4,4.5,4,3.5`."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.config import Config
from megalite.pipeline.trace import FIRST_STEP

RECORDED = 2
"""Steps of a case that are recorded, from `FIRST_STEP` on."""

FIRST_TIMED = FIRST_STEP + RECORDED + 1
"""The recorded steps wait for the GPU; the one after them settles, and those from here on count."""

ALONE = "one-rank"
"""The case in which the first rank trains the whole model while the others wait."""


@dataclass(frozen=True)
class Case:
    """What one row measures.

    Attributes:
        schedule: as for `--schedule`, or `one-rank`.
        chunks: stages of a rank; 0: the schedule's default.
        layers: of each stage; empty: balanced.
    """

    schedule: str
    chunks: int = 0
    layers: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case of NAME, NAME/CHUNKS, NAME@LAYERS or NAME/CHUNKS@LAYERS.

        Raises:
            ValueError: the text is none.
        """
        name, _, layers = text.partition("@")
        name, _, chunks = name.partition("/")
        try:
            counts = tuple(float(count) for count in layers.split(",")) if layers else ()
            return cls(name, int(chunks or 0), counts)
        except ValueError:
            raise ValueError(
                f"--cases {text}: it is NAME[/CHUNKS][@LAYERS], for instance interleaved/2 or "
                "1f1b@8.5,7.5"
            ) from None

    def __str__(self) -> str:
        chunks = f"/{self.chunks}" if self.chunks else ""
        layers = f"@{','.join(f'{count:g}' for count in self.layers)}" if self.layers else ""
        return f"{self.schedule}{chunks}{layers}"

    def of(self, config: Config) -> Config:
        """A run of the case.

        Args:
            config: of the layout.
        """
        if self.schedule == ALONE:
            return config.replace(pp=1, schedule="1f1b", chunks=0, pp_layers=())
        return config.replace(schedule=self.schedule, chunks=self.chunks, pp_layers=self.layers)
