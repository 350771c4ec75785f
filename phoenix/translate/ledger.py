"""What a run of translation did and cost, and what the same text costs elsewhere (section 3.1 of the paper).

Characters are code points, as translation services count them.  Only what was sent counts: each segment once,
in sent_characters and the price as often as it was asked, with marks in place of protected spans; blanks and
what is never translated are left out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from phoenix.translate.pipeline import Record

DEEPL_CHARACTER = 0.00002  # EUR; DeepL API Pro, section 3.1: "over 30.000 Euros" for 1.5 billion
# A rented A100: with 1,000 tokens/s of ALMA-13B, 2.9 characters a token and 1.16 German characters for an
# English one, 1.5 billion characters cost 333 EUR; the paper paid about 300.
GPU_HOUR, GPU_CHARACTERS = 2.0, 1000 * 2.9 / 1.16  # EUR; characters of source a second
EXAMPLES = 8  # of each flag in the report
RATIO_STEP, MAX_RATIO = 0.1, 4.0  # of the histogram of lengths


@dataclass(frozen=True)
class Prices:
    """What a run is charged, in EUR: for an hour of a GPU; by an API for a character or a million tokens."""

    gpus: float = 0.0  # that one process keeps busy
    gpu_hour: float = 0.0
    api_character: float = 0.0
    api_million_tokens: tuple[float, float] = (0.0, 0.0)  # of prompt, of reply


@dataclass
class Ledger:
    """Sums over segments.  loading: seconds of each loading of an engine, which all GPUs wait for."""

    prices: Prices
    loading: list[float] = field(default_factory=list)
    segments: int = 0
    failed: int = 0
    characters: int = 0
    sent_characters: int = 0
    translated_characters: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0  # of the engines of all processes
    flags: Counter = field(default_factory=Counter)
    attempts: Counter = field(default_factory=Counter)
    ratios: Counter = field(default_factory=Counter)  # characters of a translation / of its source, rounded
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, records: Mapping[str, Record]) -> None:
        for source, record in records.items():
            self.segments += 1
            self.failed += record.failed
            self.characters += len(source)
            self.sent_characters += len(source) * (record.attempt + 1)
            self.translated_characters += len(record.text)
            self.prompt_tokens += record.prompt_tokens
            self.completion_tokens += record.completion_tokens
            self.seconds += record.seconds
            self.flags.update(record.flags)
            self.attempts[str(record.attempt + 1)] += 1
            self.ratios[min(round(len(record.text) / len(source) / RATIO_STEP) * RATIO_STEP, MAX_RATIO)] += 1
            for flag in record.flags or ("no flag",):
                shown = self.examples.setdefault(flag, [])
                if len(shown) < EXAMPLES:
                    shown.append((source, record.text))

    def gpu_hours(self, share: float = 1.0) -> float:
        """Of so many times this text; engines are loaded once."""
        return (share * self.seconds + sum(self.loading)) * self.prices.gpus / 3600

    def cost(self, share: float = 1.0) -> float:
        """In EUR, of so many times this text."""
        prompt, reply = self.prices.api_million_tokens
        tokens = self.prompt_tokens * prompt + self.completion_tokens * reply
        api = self.sent_characters * self.prices.api_character + tokens / 1e6
        return share * api + self.gpu_hours(share) * self.prices.gpu_hour

    def totals(self) -> dict[str, Any]:
        """For ledger.json; all that is time, or follows from it, stands under "time_and_money"."""
        names = (
            "segments failed characters sent_characters translated_characters prompt_tokens completion_tokens"
        )
        counts = {name: getattr(self, name) for name in names.split()}
        counts |= {name: dict(sorted(getattr(self, name).items())) for name in ("flags", "attempts")}
        spent = {"engines_loaded": len(self.loading)}
        for name, seconds in (("", self.seconds), ("loading_", sum(self.loading))):
            spent[f"{name}seconds"] = round(seconds, 3)
            spent[f"{name}gpu_seconds"] = round(seconds * self.prices.gpus, 3)
        spent["characters_per_second"] = round(self.characters / self.seconds, 1) if self.seconds else None
        spent |= {"eur": round(self.cost(), 6), "comparison": self.comparison()}
        return {**counts, "time_and_money": spent}

    def comparison(self, characters: int | None = None) -> list[dict[str, Any]]:
        """The paper's comparison for so many characters, at this run's rate; none: for those that it had."""
        characters = self.characters if characters is None else characters
        share = characters / self.characters if self.characters else 0.0
        if self.seconds * self.prices.gpus:
            hours, rate = self.gpu_hours(share), "at the rate of this run"
        else:
            hours, rate = characters / GPU_CHARACTERS / 3600, "at the paper's rate"
        rented = f"{hours:.3g} h at {GPU_HOUR:.2f} EUR, {rate}"
        return [
            {"way": "this run", "basis": self._basis(share), "eur": round(self.cost(share), 4)},
            {"way": "rented GPU", "basis": rented, "eur": round(hours * GPU_HOUR, 4)},
            {
                "way": "DeepL API Pro", "basis": f"{characters:,} characters at {DEEPL_CHARACTER:.5f} EUR",
                "eur": round(characters * DEEPL_CHARACTER, 4),
            },
        ]  # fmt: skip

    def _basis(self, share: float) -> str:
        hours = self.gpu_hours(share)
        parts = [f"{hours:.3g} GPU hours at {self.prices.gpu_hour:.2f} EUR"] if hours else []
        if self.prices.api_character:
            parts.append(f"characters at {self.prices.api_character:.3g} EUR")
        if any(self.prices.api_million_tokens):
            parts.append("a million tokens at {} and {} EUR".format(*self.prices.api_million_tokens))
        return ", ".join(parts) or f"{share * self.seconds:.3g} s of a processor, no price set"


class Progress:
    """A bar on stderr over the segments of the whole run; without a terminal a line a minute.

    What other processes finished shows as soon as this one looks for its next shard.
    """

    def __init__(self, manifest: Mapping[str, Any], prices: Prices, *, show: bool) -> None:
        self.rows, self.ledger, self.sizes = manifest["rows"], Ledger(prices), manifest["shards"]
        terminal = os.isatty(2)
        self.bar = tqdm(
            total=manifest["unique"], disable=not show, dynamic_ncols=terminal, unit="segment", smoothing=0.1,
            mininterval=0.5 if terminal else 60, maxinterval=10 if terminal else 60, ascii=not terminal,
        )  # fmt: skip

    def add(self, records: Mapping[str, Record]) -> None:
        """A batch of this process is safe."""
        self.ledger.add(records)
        self.bar.update(len(records))
        rate = self.ledger.characters / max(self.ledger.seconds, 1e-9)
        self.bar.set_postfix_str(
            f"about {self.rows * self.bar.n // max(self.bar.total, 1)} of {self.rows} rows, "
            f"{rate:.0f} characters/s, {sum(self.ledger.flags.values())} flags, {self.ledger.cost():.2f} EUR",
            refresh=False,
        )

    def see_done(self, open_shards: list[int]) -> None:
        """At least this much of the run is done, whoever did it."""
        done = sum(self.sizes) - sum(self.sizes[number] for number in open_shards)
        if done > self.bar.n:
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        self.bar.close()
