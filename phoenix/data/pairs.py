"""Preference pairs -> micro-batches in which the two answers to a prompt share it.

A pair stands in the stream as the tokens that both its sequences begin with (the prompt, and what the answers
have in common), the rest of the chosen answer, then the last common token once more and the rest of the
rejected answer: `AttentionLayout.shared_prefix`.  Nothing is tokenised here and nothing is cut.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phoenix.data.loader import Loader, nothing
from phoenix.data.packing import Plan
from phoenix.data.store import TokenStore
from phoenix.files import UserError
from phoenix.model.layout import IGNORE_INDEX, AttentionLayout, PackedBatch


@dataclass(frozen=True)
class PairBatch:
    """n pairs as one stream."""

    batch: PackedBatch
    pairs: np.ndarray  # [n], their numbers in the store
    parts: Tensor  # [3 n + 1] int64: rows of common tokens, of the chosen and the rejected rest; what is left
    weights: Tensor | None  # [t] fp32: what a label counts in log-probs; None: 1
    lengths: Tensor  # [n, 2] int64: labels of the chosen and of the rejected answer

    def to(self, device: torch.device | str) -> PairBatch:
        moved = {name: getattr(self, name).to(device) for name in ("batch", "parts", "lengths")}
        weights = None if self.weights is None else self.weights.to(device)
        return dataclasses.replace(self, **moved, weights=weights)

    def logps(self, label_logps: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of the stream's labels [t] -> of the chosen and the rejected answers, [n] each: sums."""
        return self.sums(label_logps if self.weights is None else label_logps * self.weights)

    def sums(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """A value a row [t], 0 where nothing is predicted -> its sums over the answers, [n] each.

        Of three parts each: what is common counts for both answers, once in the stream.
        """
        sums = torch.segment_reduce(values.double(), "sum", lengths=self.parts, initial=0, unsafe=True)[:-1]
        common, chosen, rejected = sums.to(values.dtype).view(-1, 3).unbind(1)
        return common + chosen, common + rejected


class PairLoader(Loader):
    """Batches of a store of kind "pairs"; a row of the plan is a pair.

    last_turn_only: of answers with several turns of the assistant only the last has a loss.
    ld_alpha: LD-DPO (arXiv 2409.06411); of the longer answer, labels beyond the length of the shorter one
    count ld_alpha.  shift: the prompt of a pair meets the answers of the pair so many places on, for what is
    estimated on answers that do not belong.  Raises UserError if a pair does not fit into a micro-batch.
    """

    def __init__(
        self, store: TokenStore, *, seed: int, global_batch_size: int, micro_batch_tokens: int,
        last_turn_only: bool = False, ld_alpha: float | None = None, shift: int = 0,
    ) -> None:  # fmt: skip
        self.store, self.last_turn_only, self.ld_alpha, self.shift = store, last_turn_only, ld_alpha, shift
        number = len(store) // 3
        self.prefix, self.digests = np.zeros(number, np.int64), []
        sizes, targets = np.zeros((2, number, 2), np.int64)
        for pair in range(number):  # nothing but counts and digests is kept of what is read
            sequences = self._sequences(pair)
            self.prefix[pair] = common_prefix(*sequences)
            sizes[pair] = [len(tokens) for tokens, _ in sequences]
            targets[pair] = [int(mask[1:].sum()) for _, mask in sequences]
            self.digests.append(self._digests(sequences, targets[pair]))
        ends = store.offsets[::3]
        row_tokens = sizes.sum(1) - self.prefix + 1
        plan = Plan(
            ends[:-1], ends[1:], np.arange(number + 1), row_tokens, targets.sum(1), int(sizes.max()), True
        )
        if shift:  # these go beside the real pairs, which say what memory there is
            micro_batch_tokens = max(micro_batch_tokens, int(row_tokens.max()))
        super().__init__(
            store, plan, seed=seed, global_batch_size=global_batch_size, micro_batch_tokens=micro_batch_tokens
        )

    def packed_batch(self, rows: np.ndarray) -> PairBatch:
        """These pairs as one stream; without any, one token that asks for nothing."""
        if not len(rows):
            none = torch.zeros(0, 2, dtype=torch.int64)
            return PairBatch(nothing(), rows, torch.tensor([1]), None, none)
        tokens, labels, layouts, parts, lengths, weights = [], [], [], [], [], []
        for row in rows:
            prefix, (chosen, rejected) = int(self.prefix[row]), self._sequences(row)
            rest = [len(sequence[0]) - prefix for sequence in (chosen, rejected)]
            tokens += [chosen[0], rejected[0][prefix - 1 :]]
            asked = [np.where(mask, ids, IGNORE_INDEX) for ids, mask in (chosen, rejected)]
            pair = [np.append(asked[0][1:], IGNORE_INDEX), np.append(asked[1][prefix:], IGNORE_INDEX)]
            labels += pair
            layouts.append(AttentionLayout.shared_prefix(prefix, rest))
            parts += [prefix - 1, rest[0] + 1, rest[1] + 1]
            counts = [int(mask[1:].sum()) for _, mask in (chosen, rejected)]
            lengths.append(counts)
            weights += [self._weights(pair[place], counts[place] - min(counts)) for place in range(2)]
        batch = PackedBatch(
            torch.from_numpy(np.concatenate(tokens)),
            torch.from_numpy(np.concatenate(labels)),
            AttentionLayout.join(layouts),
        )
        kept = None if self.ld_alpha is None else torch.from_numpy(np.concatenate(weights))
        return PairBatch(batch, rows, torch.tensor([*parts, 0]), kept, torch.tensor(lengths))

    def largest_micro_batch(self) -> PackedBatch:
        """For a trial of the memory: the largest pairs that fit together, at least as many tokens as any
        micro-batch has, less what no pair fills."""
        chosen, room = [], self.micro_batch_tokens
        for row in np.argsort(-self.plan.row_tokens, kind="stable"):
            if len(chosen) < self.global_batch_size and self.plan.row_tokens[row] <= room:
                chosen.append(row)
                room -= self.plan.row_tokens[row]
        return self.packed_batch(np.array(chosen)).batch

    def mismatched(self) -> PairLoader:
        """The same pairs in the same steps, each prompt with the answers of the next pair of the store."""
        return PairLoader(
            self.store, seed=self.seed, global_batch_size=self.global_batch_size,
            micro_batch_tokens=self.micro_batch_tokens, last_turn_only=self.last_turn_only,
            ld_alpha=self.ld_alpha, shift=1,
        )  # fmt: skip

    def _sequences(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, loss mask) of prompt + chosen and of prompt + rejected."""
        answers = (int(number) + self.shift) % (len(self.store) // 3)
        prompt = self.store.document(3 * int(number))
        sequences = []
        for tokens, mask in (self.store.document(3 * answers + part) for part in (1, 2)):
            if self.last_turn_only:
                mask = mask & (np.arange(len(mask)) >= _last_run(mask))
            mask = np.concatenate([np.zeros(len(prompt[0]), bool), mask])
            sequences.append((np.concatenate([prompt[0], tokens]).astype(np.int64), mask))
        return sequences

    def _digests(self, sequences: list, targets: np.ndarray) -> tuple[bytes, bytes]:
        """16 bytes for each answer: of its exact tokens, prompt included, its loss mask, and what ld_alpha
        makes of the other answer's length."""
        found = []
        for (tokens, mask), own in zip(sequences, targets.tolist()):
            content = tokens.tobytes() + np.packbits(mask).tobytes()
            if self.ld_alpha is not None:
                content += f"{float(self.ld_alpha)} {own - int(targets.min())}".encode()
            found.append(hashlib.blake2b(content, digest_size=16).digest())
        return tuple(found)

    def _weights(self, labels: np.ndarray, beyond: int) -> np.ndarray:
        """1 for a row, ld_alpha for those of the last `beyond` labels."""
        weights = np.ones(len(labels), np.float32)
        if beyond and self.ld_alpha is not None:
            weights[np.flatnonzero(labels != IGNORE_INDEX)[-beyond:]] = self.ld_alpha
        return weights


def common_prefix(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> int:
    """How many tokens (with equal loss masks) two sequences begin with, at least one short of each."""
    size = min(len(first[0]), len(second[0])) - 1
    differ = (first[0][:size] != second[0][:size]) | (first[1][:size] != second[1][:size])
    return int(differ.argmax()) if differ.any() else size


def require_pairs(folder: object, loader: PairLoader) -> None:
    """UserError if the two answers of every pair are equal: there is nothing to prefer."""
    if all(chosen == rejected for chosen, rejected in loader.digests):
        number = len(loader.digests)
        raise UserError(f"{folder}: the answers of all {number} pairs are equal; prepare other rows")


def _last_run(mask: np.ndarray) -> int:
    """Where the last run of True begins."""
    return int(np.flatnonzero(mask & ~np.append(False, mask[:-1]))[-1]) if mask.any() else 0
