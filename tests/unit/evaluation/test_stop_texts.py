"""Stop texts against their definition: the shortest prefix of tokens whose text contains one."""

from hypothesis import given
from hypothesis import strategies as st

from onpolicy_skd.evaluation.stop_texts import before_stop, stop_length
from onpolicy_skd.models.loading import load_tokenizer

TOKENIZER = load_tokenizer("bundled:demo_student")
TEXTS = st.lists(st.sampled_from(["a", "Question:", "Quest", "ion:", "\n", "12", "é"]), max_size=12).map("".join)


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@given(TEXTS, st.lists(st.sampled_from(["Question:", "\n\n", "é", "zzz"]), min_size=1, max_size=2))
def test_a_response_ends_at_the_first_token_that_completes_a_stop_text(text, stop):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    lengths = [n for n in range(1, len(ids) + 1) if any(s in decode(ids[:n]) for s in stop)]
    assert stop_length(ids, stop, decode) == min(lengths, default=None)
    if lengths:
        assert stop_length(ids, stop, decode, known=lengths[0] - 1) == lengths[0]


def test_the_answer_is_what_precedes_the_first_stop_text():
    assert before_stop("18\nQuestion: and\n\nQ", ["\n\n", "Question:"]) == "18\n"
    assert before_stop("18", ["Question:"]) == "18"
    assert before_stop("18", []) == "18"
