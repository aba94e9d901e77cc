"""What the FLARE study consists of: languages, folds, seeds, arms, and its runs in the order in which they are done."""

from dataclasses import dataclass, replace
from typing import NamedTuple

LANGUAGES = {"ces": "ces_Latn", "dan": "dan_Latn"}
SOURCE, ALONE = "eng", "dan"
PARTS = 5
TUNED = 1  # the fold on whose dev, with seed 0, the learning rates are chosen

LORA = {"method": "lora", "r": 8, "alpha": 16}
FLARE = LORA | {"method": "flare"}
RIVALS = {
    "LoRA on target rows": ("target", LORA, "english"),
    "translate-test, trained as long": ("source", LORA, "english"),
    "input-level fusion": ("both", LORA, "english"),
}
STEP_1 = "step 1"
# name → (what is read, the adapter, the column of the source)
EXPLORED = {
    **{f: ("fused", FLARE | {"fusion": f}, "english") for f in ("add", "mul", "mul_relu", "cross_attention")},
    "same layer": ("fused", FLARE | {"source_layer": "same"}, "english"),
    **{a: ("fused", FLARE | {"align": a}, "english") for a in ("relative", "pooled", "attention")},
}
PRIMARY = {"FLARE": ("fused", FLARE, "english"), **RIVALS}
SETS = {
    "primary": PRIMARY,
    "gloss": {
        "FLARE": ("fused", FLARE, "gloss"),
        "LoRA on target rows": RIVALS["LoRA on target rows"],
        "translate-test, trained as long": ("source", LORA, "gloss"),
        "input-level fusion": ("both", LORA, "gloss"),
    },
    "controls": {
        "FLARE": PRIMARY["FLARE"],
        "LoRA on target rows": RIVALS["LoRA on target rows"],
        "another sentence as source": ("fused", FLARE, "shuffled"),
        "target as source": ("fused", FLARE, "itself"),
    },
    "exploratory": {"FLARE": PRIMARY["FLARE"], **EXPLORED},
}
SEEDS = {"gloss": 2, "controls": 2, "exploratory": 1}


def dev_part(fold: int) -> int:
    """The part after that of the test; fold k tests on part k."""
    return fold % PARTS + 1


@dataclass(frozen=True)
class Scale:
    """How much of the study is done."""

    languages: tuple[str, ...] = tuple(LANGUAGES)
    folds: tuple[int, ...] = (1, 3, 5)
    seeds: int = 5
    rates: tuple[float, ...] = (1e-3, 3e-3)
    epochs: int = 4
    rows: int | None = None  # of train, and a quarter of it of dev and test; None: all
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if TUNED not in self.folds or dev_part(TUNED) in self.folds:
            raise ValueError(f"rates are chosen on part {dev_part(TUNED)}, which no fold of {self.folds} may test on")

    def of(self, which: str) -> "Scale":
        """What a set does of it: the primary one all, the others one fold and language."""
        if which == "primary":
            return self
        return replace(self, languages=(ALONE,), folds=(TUNED,), seeds=min(self.seeds, SEEDS[which]))


STUDY = Scale()
SCALES = {
    "study": STUDY,
    # exploratory: are rates above those of the study better? On a processor without bf16 instructions.
    "steeper": Scale((ALONE,), folds=(TUNED,), seeds=1, rates=(1e-2, 3e-2), precision="float32"),
    "smoke": Scale((ALONE,), folds=(TUNED,), seeds=1, rates=(1e-3,), epochs=1, rows=64),
}


class Job(NamedTuple):
    """One run; without a rate it takes the one that was chosen."""

    arm: str
    parts: tuple | None  # None: step 1
    tag: str
    fold: int
    seed: int
    rate: float | None = None


def step_1(fold: int, seed: int) -> Job:
    """The run whose model is the base of all arms of this fold and seed."""
    return Job(STEP_1, None, SOURCE, fold, seed)


def tag_of(parts: tuple, tag: str) -> str:
    """Gold English alone is the same in every language."""
    return ALONE if parts[0] == "source" and parts[2] == "english" else tag


def languages_of(parts: tuple, scale: Scale) -> list[str]:
    """The languages in which an arm is a run of its own."""
    return list(dict.fromkeys(tag_of(parts, tag) for tag in scale.languages))


def tuned_as(parts: tuple) -> tuple:
    """The primary arm that reads as this one does: its rate is taken."""
    return next(one for one in PRIMARY.values() if one[0] == parts[0])


def jobs(which: str, scale: Scale = STUDY) -> list[Job]:
    """The runs of a set: those that choose the rates, then seed by seed, so that a part of a study is whole seeds."""
    size, arms = scale.of(which), SETS[which]
    tuned = [(arm, one) for arm, one in PRIMARY.items() if one in map(tuned_as, arms.values())]
    found = [
        Job(arm, parts, tag, TUNED, 0, rate)
        for arm, parts in tuned
        for tag in languages_of(parts, size)
        for rate in scale.rates
    ]
    for seed in range(size.seeds):
        for fold in size.folds:
            found.append(step_1(fold, seed))
            for arm, parts in arms.items():
                if (fold, seed) != (TUNED, 0) or parts != tuned_as(parts):  # the choice is one of the above
                    found += [Job(arm, parts, tag, fold, seed) for tag in languages_of(parts, size)]
    return found


def name_of(parts: tuple | None, tag: str, fold: int, seed: int, rate: float | None) -> str:
    """A run's name says all of it, so that sets share runs."""
    if parts is None:
        return f"{tag}.fold{fold}.seed{seed}"
    read, adapter, column = parts
    settings = "-".join(str(adapter[key]) for key in ("fusion", "source_layer", "align") if key in adapter)
    return ".".join(filter(None, [read, settings, column, tag, f"fold{fold}", f"seed{seed}", f"rate{rate:g}"]))
