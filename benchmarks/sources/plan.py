"""What is run: sources, targets, rows, seeds. The README says why."""

from collections.abc import Iterator
from dataclasses import dataclass, field

SOURCES = [
    "acl_arc",
    "ag_news",
    "atis",
    "chemprot",
    "clinc150",
    "cola",
    "goemotions",
    "hate_davidson",
    "mpqa",
    "mr",
    "mrpc",
    "newsgroups20",
    "paper_field_mag",
    "query_wellformed",
    "rte",
    "scierc_relation",
    "snips",
    "sst2",
    "sst5",
    "subj",
    "trec",
    "tweeteval_emoji",
    "tweeteval_emotion",
    "tweeteval_hate",
    "tweeteval_offensive",
    "tweeteval_sentiment",
    "tweeteval_stance_abortion",
    "tweeteval_stance_atheism",
    "tweeteval_stance_climate",
    "wnli",
]
TARGETS = ["tweeteval_emotion", "trec", "sst5", "acl_arc", "query_wellformed", "mpqa"]
# sets that share sentences, as the data pack's index says
SHARED = [{"sst2", "sst5", "mr"}, {"mr", "subj"}]
MAPS = {
    "linear": {"architecture": "linear"},
    "rank8": {"architecture": "identity_low_rank", "rank": 8},
    "rank32": {"architecture": "identity_low_rank", "rank": 32},
}


def usable(source: str, target: str) -> bool:
    """Whether a source is another task than the target and shares no sentences with it."""
    return source != target and not any({source, target} <= group for group in SHARED)


@dataclass(frozen=True)
class Plan:
    """A study; cells are ordered so that one that is stopped is worth most: by seed."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    source_rows: int
    source_epochs: float
    target_rows: tuple[int, ...]
    target_epochs: dict[int, float]
    seeds: dict[int, tuple[int, ...]]
    test_rows: int
    maps: dict[str, dict] = field(default_factory=lambda: MAPS)

    def model_folder(self) -> str:
        from tasks import shipped_model

        return shipped_model()

    def usable(self, target: str) -> list[str]:
        return [source for source in self.sources if usable(source, target)]

    def cells(self) -> Iterator[str]:
        for seed in sorted({seed for seeds in self.seeds.values() for seed in seeds}):
            for count in (count for count in self.target_rows if seed in self.seeds[count]):
                for target in self.targets:
                    for source in ["none", *self.usable(target)]:
                        yield f"cell/{target}/{count}/{seed}/{source}"


PLAN = Plan(
    sources=tuple(SOURCES),
    targets=tuple(TARGETS),
    source_rows=2000,
    source_epochs=1.0,
    target_rows=(200, 500),
    target_epochs={200: 2.5, 500: 1.5},
    seeds={200: (0, 1, 2), 500: (0, 1)},
    test_rows=400,
)
SMOKE = Plan(
    sources=("snips", "cola"),
    targets=("trec",),
    source_rows=64,
    source_epochs=1.0,
    target_rows=(48,),
    target_epochs={48: 1.0},
    seeds={48: (0, 1)},
    test_rows=64,
)
