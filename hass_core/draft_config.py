"""The draft's own settings (`draft.…`), and what its architecture decides of the training's."""

from typing import ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from hass_core.errors import TargetError
from hass_core.settings import Settings

CHAMPION = "champion"  # the alias of the draft in use


class DraftConfig(Settings):
    """The draft model's own choices; all else follows the target."""

    removed: ClassVar[dict[str, str]] = {
        "fc_bias": "is gone: vLLM cannot serve such a draft; one that has the bias keeps it where it is loaded",
    }

    architecture: Literal["eagle", "eagle3"] = Field(
        default="eagle",
        description="eagle: estimates the target's next feature, as EAGLE-2 and HASS; "
        "eagle3: EAGLE-3's layer over states of the target, with a trained head of its own",
    )
    taps: Literal["last", "three"] | tuple[int, ...] = Field(
        default="last",
        description="eagle3 only: the states of the target that it reads. last: the one that the head takes; "
        "three: fused, those after layers 2, N/2 and N-3 of N; or the numbers of the layers whose outputs are fused",
    )
    fc_norm: bool = Field(default=False, description="With `taps`: norm each state before they are fused (EAGLE-3.1)")
    norm_output: bool = Field(
        default=False, description="eagle3 only: the next row takes the state after the final norm (EAGLE-3.1)"
    )
    vocab_size: int | None = Field(
        default=None, ge=16, description="Draft only among this many most frequent tokens; None = the full vocabulary"
    )
    start: Literal["random", "least_squares"] = Field(
        default="least_squares",
        description="least_squares fits fc to the features in closed form before training; "
        "an eagle3 draft starts random but for its head, which is the target's. With `taps`, least_squares fits its fc "
        "to the last hidden state",
    )
    family: Literal["auto", "target", "llama"] = Field(
        default="auto",
        description="Shape of the layer: the target's own, or Llama's, which every engine builds; "
        "auto = the target's where vLLM and SGLang hold all of it; an eagle3 draft has Llama's",
    )
    warm_start: str | None = Field(
        default=None,
        description="Draft to continue from: a folder, or shipped (the package's own, for SmolLM2-135M-Instruct); in "
        "flows also champion; None = start as draft.start says",
    )

    @model_validator(mode="after")
    def _of_architecture(self) -> "DraftConfig":
        if self.architecture == "eagle":
            for name in ("norm_output", "fc_norm", "taps"):
                if getattr(self, name) not in (False, "last"):
                    raise ValueError(f'draft.{name} is a setting of draft.architecture = "eagle3"')
            return self
        if self.family == "target":
            raise ValueError('draft.family = "target": an eagle3 draft has the Llama layer that engines build for it')
        self._check_taps()
        if self.start == "least_squares" and self.taps == "last":
            if "start" in self.model_fields_set:
                raise ValueError(
                    'draft.start = "least_squares" fits fc, which an eagle3 draft has for draft.taps; leave it out'
                )
            object.__setattr__(self, "start", "random")  # frozen for everyone else
        return self

    def _check_taps(self) -> None:
        layers = self.taps if isinstance(self.taps, tuple) else (1,)
        if not layers or layers[0] < 1 or list(layers) != sorted(set(layers)):
            raise ValueError(f"draft.taps = {list(layers)}: give layers from 1 on, each once, ascending")
        if self.fc_norm and self.taps == "last":
            raise ValueError('draft.fc_norm norms the states that are fused: it needs draft.taps = "three", or a list')

    def tapped(self, layers: int) -> tuple[int, ...]:
        """The layers of a target of so many after which the draft reads states; none for the last hidden state.

        Raises TargetError for a target that has too few.
        """
        if self.taps == "last":
            return ()
        if self.taps == "three":
            return three_taps(layers)
        if self.taps[-1] >= layers:
            raise TargetError(
                f"draft.taps = {list(self.taps)}: the target has {layers} layers, and the state after the last of them "
                f'is read by draft.taps = "last"; give layers up to {layers - 1}'
            )
        return self.taps


def three_taps(layers: int) -> tuple[int, int, int]:
    """The three that engines take where a draft names none: of N layers those after 2, N/2 and N - 3.

    Raises TargetError where they collide.
    """
    if layers < 7:
        raise TargetError(
            f'draft.taps = "three": of {layers} layers those after 2, N/2 and N-3 are not three in order; name '
            "layers, as draft.taps = [1, 2, 3], or leave it out for a draft of the last state"
        )
    return 2, layers // 2, layers - 3


class Objectives(Protocol):
    """Of a training's settings those that a draft's architecture has a say in."""

    regression_weight: float
    detach_features: bool
    feature_noise: float
    model_fields_set: set[str]


def settle(draft: DraftConfig, training: Objectives) -> dict[str, float | bool]:
    """What the training's settings become where they are left out. An eagle3 draft estimates no feature, so none is
    compared, and only the gradient of later steps tells what a state is good for.

    Raises ValueError for a regression that there is nothing to compare for, and for noise on fused states.
    """
    if draft.architecture == "eagle":
        return {}
    if "regression_weight" in training.model_fields_set and training.regression_weight:
        raise ValueError(
            'training.regression_weight compares features, and draft.architecture = "eagle3" estimates none; leave it '
            "out"
        )
    if draft.taps != "last" and training.feature_noise:
        raise ValueError(
            "training.feature_noise is one width for numbers of the last hidden state's size; those of the states that "
            "draft.taps reads are of other sizes; leave it out"
        )
    kept = {} if "detach_features" in training.model_fields_set else {"detach_features": False}
    return {"regression_weight": 0.0} | kept
