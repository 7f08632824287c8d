"""report.html: what it says, that answers are told cycle by cycle, and that text from outside stays text."""

from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from hass_core.config import TreeConfig
from hass_core.evaluation.benchmarks import Question
from hass_core.evaluation.examples import choose_examples
from hass_core.evaluation.figures import curves_of, figures_of
from hass_core.evaluation.lossless import Certificate
from hass_core.evaluation.metrics import Measurement
from hass_core.evaluation.page import Part, page, verdict_words
from hass_core.evaluation.report import Estimator, Report
from hass_core.sampling import DRAWS_VERSION

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>$\\frac{$ & "\' {{ 7*7 }}'
TRAINING = [{"step": s, "train/loss": 3 - s / 10, "val/loss": 2.0, "val/accuracy_step_1": s / 40} for s in (0, 5, 10)]


def letters(token_ids: list[int]) -> str:
    return "".join(map(chr, token_ids))


def measured(method: str, name: str, answer: str, accepted: list[int], seconds: float) -> Measurement:
    return Measurement(
        benchmark=name, question=f"{name}/1", category="c", temperature=0.0, method=method, prompt_tokens=3,
        new_tokens=len(answer), seconds=seconds, decode_seconds=seconds, accepted=accepted,
        drafted_depth=[4 if method == "hass" else 0] * len(accepted), ranks=[0] * sum(accepted),
        offered=[2] * sum(accepted), token_ids=[[ord(letter) for letter in answer]],
    )  # fmt: skip


def report_of(measurements: list[Measurement], target: str = "tiny", identical: bool = True) -> Report:
    estimator = Estimator(measurements, resamples=100, seed=0)
    certificate = Certificate(dtype="float32", questions=1, tokens=12, identical=identical, differences=[])
    return Report(
        target=target, target_fingerprint="0", draft={}, device="a machine", dtype="float32", tree=TreeConfig(),
        plan=None, max_new_tokens=12, repeats=1, benchmarks={m.benchmark: 1 for m in measurements},
        scores=estimator.scores(), comparisons=[], n_alpha=[], tree_use=estimator.tree_use("hass"),
        lossless=certificate, same_precision=None, generate_tokens_per_second=1.0, leak_checked=True,
        draws=DRAWS_VERSION,
    )  # fmt: skip


@pytest.fixture
def drafted() -> list[Measurement]:
    """A plain and a drafted answer `abcdefghij`: one token with the prompt, then cycles of 3, 1 and 4 draft tokens."""
    answer = "abcdefghij"
    return [measured("plain", "mine", answer, [0] * 9, 2.0), measured("hass", "mine", answer, [3, 1, 4], 1.0)]


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_an_answer_is_told_as_its_cycles_made_it(drafted):
    question = Question("mine", "mine/1", "c", ({"role": "user", "content": "Spell."},))
    (example,) = choose_examples(drafted, [question], "hass", letters)
    (turn,) = example.turns
    assert turn.asked == "Spell."
    told = [(cycle.number, cycle.drafted, cycle.own) for cycle in turn.cycles]
    assert told == [(0, "", "a"), (1, "bcd", "e"), (2, "f", "g"), (3, "hij", "")]  # the last one was cut by the limit
    assert example.tau == pytest.approx(1 + 8 / 3)


def test_half_a_character_waits_for_its_other_half():
    def decode(token_ids: list[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    whole = list("aé!".encode())
    rows = [measured("hass", "mine", "", [1, 0], 1.0).model_copy(update={"token_ids": [whole]})]
    question = Question("mine", "mine/1", "c", ({"role": "user", "content": "?"},))
    (turn,) = choose_examples(rows, [question], "hass", decode)[0].turns
    assert [(cycle.drafted, cycle.own) for cycle in turn.cycles] == [("", "a"), ("", "é"), ("", "!")]


def test_text_from_outside_stays_text(drafted):
    odd = [m.model_copy(update={"benchmark": HOSTILE, "question": HOSTILE}) for m in drafted]
    question = Question(HOSTILE, HOSTILE, "c", ({"role": "user", "content": HOSTILE},))
    examples = choose_examples(odd, [question], "hass", lambda ids: HOSTILE[: len(ids)])
    part = Part(HOSTILE, HOSTILE, (HOSTILE,), ((HOSTILE,),), (HOSTILE,), (HOSTILE,))
    found = Tags(page(report_of(odd, target=HOSTILE), examples, TRAINING, [part], HOSTILE))
    assert not {tag for tag, _ in found.tags} & {"script", "img", "link", "iframe"}
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert found.text.count(HOSTILE) >= 6
    assert "49" not in found.text.partition("Tables")[0].replace(HOSTILE, "")


def test_a_page_needs_nothing_beside_it(drafted):
    found = Tags(page(report_of(drafted), [], TRAINING))
    links = [value for _, attributes in found.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links == []
    assert [a.get("name") for tag, a in found.tags if tag == "meta"] == [None, "viewport"]


def test_figures_are_drawn_as_vectors_in_the_pages_own_ink(drafted):
    pictures = figures_of(report_of(drafted)) + curves_of(TRAINING)
    assert len(pictures) == 6  # four of the report; loss and step accuracy
    titles = []
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert len(texts) > 4
        titles.append(" ".join(texts))
        assert "currentColor" in picture
        assert "#24292f" not in picture
    assert "Acceptance by depth" in titles[2]


@pytest.mark.parametrize(
    ("seconds", "identical", "says"),
    [
        (1.0, True, "With this draft tiny is 2.00 times as fast as plain decoding"),
        (4.0, True, "This draft slows tiny down: 0.50 times"),
        (2.0, True, "No gain could be measured"),
        (1.0, False, "Not usable: this draft changes the output of tiny"),
    ],
)
def test_the_verdict_is_one_sentence(drafted, seconds, identical, says):
    plain, hass = drafted
    report = report_of([plain, hass.model_copy(update={"seconds": seconds})], identical=identical)
    assert says in verdict_words(report)
    assert f'<p class="verdict">{says}' in page(report, [], [])
