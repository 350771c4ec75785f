import html.parser
import json
import re

import pytest

from phoenix import report
from phoenix.files import UserError

VOID = {"meta", "line", "circle", "polyline"}


class Page(html.parser.HTMLParser):
    """Tags that open and close in order, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def write_run(folder, rows, samples=()):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (folder / "config.toml").write_text('store = "<stores>"\n')


def points(page, number=0):
    lines = [attributes["points"] for tag, attributes in page.tags if tag == "polyline"]
    return [tuple(map(float, point.split(","))) for point in lines[number].split()]


def test_everything_is_escaped_and_nothing_comes_from_outside(tmp_path):
    evil = "<script src=\"http://x\">alert('&')</script>\n"
    sections = [
        report.heading(evil), report.paragraph(evil), report.table([evil], [[evil]]),
        report.side_by_side([evil], [[evil]]), report.curves(evil, {evil: [(0, 1), (1, 2)]}),
    ]  # fmt: skip
    path = report.write_report(tmp_path / "a" / "report.html", evil, sections)
    page = Page(path.read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe"})
    assert not any({"src", "href", "onload"} & attributes.keys() for _, attributes in page.tags)
    assert "".join(page.text).count(evil) == 10
    assert "prefers-color-scheme: dark" in "".join(page.text)


def test_cells():
    page = Page(
        report.table(("name", "value"), [("a", 0.123456), ("b", None), ("c", 1234567.0), ("d", 7), (1, True)])
    )
    assert [text for text in page.text if text.strip()] == [
        "name", "value", "a", "0.1235", "b", "–", "c", "1,234,567", "d", "7", "1", "True",
    ]  # fmt: skip
    assert sum(attributes.get("class") == "number" for _, attributes in page.tags) == 4


def test_a_curve_keeps_order_and_proportion():
    page = Page(report.curves("loss", {"a": [(0, 1.0), (5, 3.0), (10, 2.0)], "b": [(0, 0.0), (10, 4.0)]}))
    (x0, y0), (x1, y1), (x2, y2) = points(page)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y1 - y0 == pytest.approx(2 * (y1 - y2), abs=0.21)
    assert y1 < y2 < y0  # large values stand high
    (left, low), (right, high) = points(page, 1)
    assert (left, right) == (x0, x2)
    assert high < y1 and low > y0
    assert high >= 0 and low <= report.HEIGHT and left >= 0 and right <= report.WIDTH


@pytest.mark.parametrize("values", [[], [(1, None)], [(0, float("nan"))], [(0, float("inf"))]])
def test_no_point_no_chart(values):
    assert report.curves("empty", {"a": values}) == ""


@pytest.mark.parametrize("values", [[(3, 0.0)], [(3, 5.0)], [(1, -2.0), (2, -2.0)], [(0, 1e-9), (1, 2e-9)]])
def test_flat_and_tiny_curves_are_drawn(values):
    for x, y in points(Page(report.curves("flat", {"a": values}))):
        assert report.LEFT <= x <= report.WIDTH and report.TOP <= y <= report.HEIGHT - report.BOTTOM


def test_long_curves_are_averaged():
    values = [(step, float(step % 2)) for step in range(8_000)]
    page = Page(report.curves("long", {"a": [*values, (8_000, None)]}))
    assert 200 <= len(points(page)) <= report.MAX_POINTS
    assert len({y for _, y in points(page)}) == 1  # the mean of each bin is a half


@pytest.mark.parametrize(
    ("low", "high"), [(0.13, 0.94), (0, 1), (-3, 17), (1e-9, 2e-9), (0, 99_999), (5, 5.001)]
)
def test_ticks_are_few_and_inside(low, high):
    ticks = report._ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)


def test_training_report(tmp_path):
    rows = [{"step": 0, "eval_loss": 3.5}]
    rows += [
        {"step": step, "loss": 4.0 / step, "learning_rate": 1e-4, "grad_norm": None} for step in range(1, 9)
    ]
    rows += [{"step": 8, "eval_loss": 1.25}]
    samples = [
        {"step": step, "prompt": prompt, "reply": f"{prompt} {step} <b>"}
        for step in (0, 4, 8)
        for prompt in "PQ"
    ]
    write_run(tmp_path / "run", rows, samples)
    path = report.training_report(tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(re.findall("<figure>", text)) == 2  # loss with eval_loss, learning rate; no gradient norm
    assert len(points(page, 0)) == 8 and len(points(page, 1)) == 2
    for shown in ("P 0 <b>", "Q 0 <b>", "P 8 <b>", "Q 8 <b>", "1.25", 'store = "<stores>"\n'):
        assert shown in page.text
    assert not any("4 <b>" in part for part in page.text)


def test_preference_training_has_curves_of_its_own(tmp_path):
    both = ("rewards/margins", "rewards/accuracies", "chosen_fall")
    names = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    names += ("logits/chosen", "logits/rejected", "chosen_length", "rejected_length", *both)
    rows = [dict.fromkeys(names, step / 4) | {"step": step} for step in range(1, 5)]
    rows += [dict.fromkeys(("eval_loss", *(f"eval_{name}" for name in both)), 0.5) | {"step": 4}]
    write_run(tmp_path / "run", rows)
    text = report.training_report(tmp_path / "run").read_text(encoding="utf-8")
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    drawn = [name for caption in captions for name in re.findall("<span class=.*?>(.*?)</span>", caption)]
    assert sorted(drawn) == sorted((*names, "eval_loss", *(f"eval_{name}" for name in both)))
    assert len(captions) == 8  # chosen and rejected, or trained and held out, stand in one chart


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    write_run(tmp_path / "run", [{"step": 1, "loss": 2.0}])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert report.training_report(tmp_path / "run").exists()
    (tmp_path / "run" / "samples.jsonl").unlink()
    (tmp_path / "run" / "config.toml").unlink()
    assert report.training_report(tmp_path / "run").exists()


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: no row"):
        report.training_report(tmp_path)
