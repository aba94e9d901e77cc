"""The dropout rates of a recipe."""

from typing import Any, Literal

from pydantic import Field, model_validator

from graftlm.recipe_adapter import Count, Part, Share, Source

MOST_TEXTS = 2000  # behind guided dropout


class Dropout(Part):
    """The arguments of `graftlm.GuidedDropout`; the name of a schedule alone is short for them.

    A key of the schedule that is null is as in the file `rates`, or without one as described.
    """

    schedule: Literal["guided", "uniform", "shuffled", "reversed", "type"] | None = Field(
        None, description="null: that of `rates`, else guided"
    )
    rates: str | None = Field(None, description="file of GuidedDropout.save; null: measured before the training")
    texts: Source | None = Field(None, description="text to measure on; null: the training split's")
    text: str = Field("text", description="the text column of `texts`")
    max_examples: Count | None = Field(
        None,
        description=f"texts to measure on at most, fewer once the ranking is settled; null: {MOST_TEXTS}",
    )
    upper: Share | None = Field(None, description="null: that of `rates`, else 0.1")
    lower: Share | None = Field(None, description="null: that of `rates`, else 0")
    mean: Share | None = Field(None, description="mean rate to hold; null: that of `rates`, else as it comes")
    linear_in: Literal["rank", "score"] | None = Field(None, description="null: that of `rates`, else rank")
    within_type: bool | None = Field(None, description="null: that of `rates`, else false")
    noise: Literal["bernoulli", "gaussian"] | None = Field(None, description="null: that of `rates`, else bernoulli")
    target: Literal["auto", "model", "adapters"] = Field("auto", description="whose dropouts are set")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"schedule": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _measured_once(self) -> "Dropout":
        idle = [key for key in ("texts", "max_examples") if getattr(self, key) is not None]
        if self.rates is not None and idle:
            raise ValueError(
                f"rates: these are measured already; delete {' and '.join(idle)}, or rates to measure anew"
            )
        return self
