"""The shares that the benchmark states, and the rows that it asks."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import translate_overhead

from phoenix.translate.segments import Piece, split


def test_a_share_is_that_of_the_same_round():
    speeds = [(100, 95, 90), (200, 180, 120), (50, 60, 50)]
    rounds = [
        {
            name: {"tokens_per_second": speed, "own_cpu_seconds": 1.0}
            for name, speed in zip(("bare", "engine", "recipe"), each)
        }
        for each in speeds
    ]
    result = translate_overhead.summarise(rounds)
    assert result["share_of_bare"] == {"engine": 0.95, "recipe": 0.9}
    assert result["lowest_share"] == {"engine": 0.9, "recipe": 0.6}
    assert result["tokens_per_second"] == {"bare": 100, "engine": 95, "recipe": 90}


def test_every_row_is_one_piece_and_the_same_for_all_sides(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = translate_overhead.write_rows(translate_overhead.ROWS, path, 1000)
    assert len(lines) == len(set(lines)) > 160
    assert [json.loads(row)["text"] for row in path.read_text().split("\n") if row] == lines
    assert all([part.source for part in split(line) if isinstance(part, Piece)] == [line] for line in lines)
