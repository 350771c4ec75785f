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
    parts: list[int]  # 3 n: rows of the stream that predict common tokens, the chosen rest, the rejected rest
    lengths: Tensor  # [n, 2] int64: labels of the chosen and of the rejected answer

    def to(self, device: torch.device | str) -> PairBatch:
        return dataclasses.replace(self, batch=self.batch.to(device), lengths=self.lengths.to(device))

    def logps(self, label_logps: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of the stream's labels [t] -> of the chosen and the rejected answers, [n] each: sums."""
        sums = torch.stack([part.sum() for part in label_logps.split(self.parts)])
        common, chosen, rejected = sums.view(-1, 3)[: len(self.pairs)].unbind(1)
        return common + chosen, common + rejected


class PairLoader(Loader):
    """Batches of a store of kind "pairs"; a row of the plan is a pair.

    last_turn_only: of answers with several turns of the assistant only the last has a loss.  Raises UserError
    if a pair does not fit into a micro-batch.
    """

    def __init__(
        self, store: TokenStore, *, seed: int, global_batch_size: int, micro_batch_tokens: int,
        last_turn_only: bool = False,
    ) -> None:  # fmt: skip
        self.last_turn_only = last_turn_only
        self.store = store
        pairs = [self._sequences(store, number) for number in range(len(store) // 3)]
        prefix = [common_prefix(*pair) for pair in pairs]
        self.prefix = np.array(prefix, np.int64)
        sizes = np.array([[len(tokens) for tokens, _ in pair] for pair in pairs], np.int64)
        targets = np.array([sum(int(mask[1:].sum()) for _, mask in pair) for pair in pairs], np.int64)
        ends = store.offsets[::3]
        row_tokens = sizes.sum(1) - self.prefix + 1
        longest = int(sizes.max())
        plan = Plan(ends[:-1], ends[1:], np.arange(len(pairs) + 1), row_tokens, targets, longest, True)
        super().__init__(
            store, plan, seed=seed, global_batch_size=global_batch_size, micro_batch_tokens=micro_batch_tokens
        )

    def packed_batch(self, rows: np.ndarray) -> PairBatch:
        """These pairs as one stream; without any, one token that asks for nothing."""
        if not len(rows):
            return PairBatch(nothing(), rows, [0, 0, 1], torch.zeros(0, 2, dtype=torch.int64))
        tokens, labels, layouts, parts, lengths = [], [], [], [], []
        for row in rows:
            prefix, (chosen, rejected) = int(self.prefix[row]), self._sequences(self.store, row)
            rest = [len(sequence[0]) - prefix for sequence in (chosen, rejected)]
            tokens += [chosen[0], rejected[0][prefix - 1 :]]
            asked = [np.where(mask, ids, IGNORE_INDEX) for ids, mask in (chosen, rejected)]
            labels += [np.append(asked[0][1:], IGNORE_INDEX), np.append(asked[1][prefix:], IGNORE_INDEX)]
            layouts.append(AttentionLayout.shared_prefix(prefix, rest))
            parts += [prefix - 1, rest[0] + 1, rest[1] + 1]
            lengths.append([int(mask[1:].sum()) for _, mask in (chosen, rejected)])
        batch = PackedBatch(
            torch.from_numpy(np.concatenate(tokens)),
            torch.from_numpy(np.concatenate(labels)),
            AttentionLayout.join(layouts),
        )
        return PairBatch(batch, rows, parts, torch.tensor(lengths))

    def largest_micro_batch(self) -> PackedBatch:
        """For a trial of the memory: the pairs with the most tokens, as many as fit."""
        largest = np.argsort(-self.plan.row_tokens, kind="stable")[: self.global_batch_size]
        return self.packed_batch(self.cut(largest)[0]).batch

    def digests(self) -> list[tuple[bytes, bytes]]:
        """16 bytes for each answer of each pair: of its exact tokens, prompt included, and its loss mask."""
        return [
            tuple(
                hashlib.blake2b(tokens.tobytes() + np.packbits(mask).tobytes(), digest_size=16).digest()
                for tokens, mask in self._sequences(self.store, number)
            )
            for number in range(len(self.plan))
        ]

    def _sequences(self, store: TokenStore, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, loss mask) of prompt + chosen and of prompt + rejected."""
        prompt, *answers = (store.document(3 * int(number) + part) for part in range(3))
        sequences = []
        for tokens, mask in answers:
            if self.last_turn_only:
                mask = mask & (np.arange(len(mask)) >= _last_run(mask))
            mask = np.concatenate([np.zeros(len(prompt[0]), bool), mask])
            sequences.append((np.concatenate([prompt[0], tokens]).astype(np.int64), mask))
        return sequences


def common_prefix(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> int:
    """How many tokens (with equal loss masks) two sequences begin with, at least one short of each."""
    size = min(len(first[0]), len(second[0])) - 1
    differ = (first[0][:size] != second[0][:size]) | (first[1][:size] != second[1][:size])
    return int(differ.argmax()) if differ.any() else size


def require_pairs(folder: object, loader: PairLoader) -> None:
    """UserError if the two answers of every pair are equal: there is nothing to prefer."""
    digests = loader.digests()
    if all(chosen == rejected for chosen, rejected in digests):
        raise UserError(f"{folder}: the answers of all {len(digests)} pairs are equal; prepare other rows")


def _last_run(mask: np.ndarray) -> int:
    """Where the last run of True begins."""
    return int(np.flatnonzero(mask & ~np.append(False, mask[:-1]))[-1]) if mask.any() else 0
