"""What a request says of speculation: off, left to the schedule, or by a drafter's name and width."""

from __future__ import annotations

from dataclasses import dataclass, field

from localspec.drafters import AUTO, DrafterSpec, Nothing
from localspec.errors import SettingError

OFF = "off"


@dataclass(frozen=True, slots=True)
class Speculation:
    """drafter: who guesses.  width: most guesses verified in a round; None leaves it to the drafter."""

    drafter: DrafterSpec = field(default_factory=lambda: DrafterSpec.parse(AUTO))
    width: int | None = None

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise SettingError("speculation width out of range", got=self.width, expected="at least 1; or say `off`")

    @classmethod
    def parse(cls, text: str, width: int | None = None) -> Speculation:
        """ "off", "auto" or a drafter as on the command line ("ngram:max=4"). Raises UnknownNameError, SettingError."""
        if text == OFF and width is not None:
            raise SettingError("speculation is off, so it has no width", got=width, fix="Leave one of them out.")
        return cls(DrafterSpec.parse(Nothing.name if text == OFF else text), width)

    @property
    def key(self) -> str:
        """The same for requests whose drafters are interchangeable."""
        return repr(self.drafter)
