"""What the study of guided dropout consists of: tasks, arms, seeds, amounts of training; the README says why."""

from typing import NamedTuple

CANDIDATES = ("sst2", "trec", "subj", "cola", "ag_news", "sib200")
RATES = (1.5e-4, 5e-4)
PRIMARY, SECONDARY, EXPLORATORY = ("guided", "shuffled"), ("usual", "uniform", "none"), ("reversed", "type")
SEEDS, EXPLORATORY_SEEDS = 10, 5
TOGETHER = (("primary", "secondary"), ("all rows",), ("exploratory",), ("longer",))  # stages whose runs are compared
ON_DEV = ("select", "tune", "pilot")


class Amount(NamedTuple):
    """How much a run trains on: a share of the pool's rows, so many times."""

    share: float = 0.25
    epochs: int = 3


SHORT, ALL = Amount(), Amount(share=1.0)


class Job(NamedTuple):
    """One run."""

    stage: str
    task: str
    arm: str
    lr: float
    seed: int
    amount: Amount = SHORT

    def columns(self) -> dict:
        return {key: value for key, value in self._asdict().items() if key != "amount"} | self.amount._asdict()

    def is_row(self, row: dict) -> bool:
        return all(row[name] == value for name, value in self.columns().items())


LONGER = (Amount(epochs=15), Amount(share=0.05, epochs=30))
PILOT_SEEDS, ENOUGH = (100, 101, 102), 0.01  # what *usual* has to be above *none* on dev
