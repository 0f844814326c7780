import json

from onpolicy_skd.report.timeline import write_timeline
from onpolicy_skd.tracing import Span, Spans, within


def test_spans_are_remembered_until_they_are_drained():
    spans = Spans()
    with spans("outer"), spans("inner"):
        pass
    inner, outer = spans.drain()
    assert (inner.name, outer.name) == ("inner", "outer")
    assert outer.start <= inner.start <= inner.end <= outer.end
    assert spans.drain() == []


def test_only_the_spans_of_a_step_are_shown(tmp_path):
    spans = {"teacher": [Span("encode", 1.0, 3.0), Span("rows", 9.0, 10.0)], "learner": [Span("backbone", 2.5, 2.75)]}
    shown = within(spans, 2.0, 5.0)
    assert shown == {"teacher": [Span("encode", 2.0, 3.0)], "learner": [Span("backbone", 2.5, 2.75)]}
    write_timeline(tmp_path, shown, 7)
    trace = json.loads((tmp_path / "timeline.json").read_text())
    events = [(e["name"], e["pid"], e["ts"], e["dur"]) for e in trace["traceEvents"] if e["ph"] == "X"]
    assert events == [("encode", 0, 0, 1_000_000), ("backbone", 1, 500_000, 250_000)]  # microseconds
    assert trace["otherData"] == {"step": 7}
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
