"""Sequences as rows: padded on either side, or packed."""

from __future__ import annotations

from lightning_mlc.data.rows import CHOSEN, NO_RESPONSE, REJECTED, TokenRows, TokenSequence

PAIR = [TokenSequence([1, 2], [3], 0, 0, CHOSEN), TokenSequence([1, 2], [5, 6, 7], 0, 0, REJECTED, leads=False)]
PROMPT = TokenSequence([4, 5, 6, 7], [], 1, 2, NO_RESPONSE)


def test_left_padding() -> None:
    rows = TokenRows.pad(PAIR, pad_id=9, side="left")
    assert rows.input_ids.tolist() == [[9, 9, 1, 2, 3], [1, 2, 5, 6, 7]]
    assert rows.attention_mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert rows.position_ids.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert rows.prompt_end.tolist() == [3, 6]
    assert rows.response.tolist() == [4, 7, 8, 9]
    assert rows.predictor.tolist() == [3, 6, 7, 8]
    assert rows.response_cell.tolist() == [0, 3, 4, 5]
    assert rows.response_tokens.tolist() == [1, 3]
    assert (rows.longest_response, rows.num_tokens, rows.packing) == (3, 8, None)
    assert rows.leads.tolist() == [True, False]


def test_right_padding() -> None:
    rows = TokenRows.pad([PAIR[0], PROMPT], 9)
    assert rows.input_ids.tolist() == [[1, 2, 3, 9], [4, 5, 6, 7]]
    assert rows.prompt_end.tolist() == [1, 7]
    assert (rows.response.tolist(), rows.predictor.tolist()) == ([2], [1])
    assert rows.language.tolist() == [0, 2]
    assert rows.example.tolist() == [0, 1]
    assert rows.kind.tolist() == [CHOSEN, NO_RESPONSE]


def test_prompts_alone_have_no_response() -> None:
    rows = TokenRows.pad([PROMPT], 0)
    assert (rows.longest_response, rows.response.tolist(), rows.response_tokens.tolist()) == (0, [], [0])


def test_packed_responses_follow_the_prompt_that_they_share() -> None:
    rows = TokenRows.pack([[PAIR], [[PROMPT], [PAIR[0]]]], pad_id=9)
    assert rows.input_ids.tolist() == [[1, 2, 3, 5, 6, 7, 9], [4, 5, 6, 7, 1, 2, 3]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 2, 3, 4, 0], [0, 1, 2, 3, 0, 1, 2]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1, 0], [1] * 7]
    assert len(rows) == 4
    assert rows.prompt_end.tolist() == [1, 1, 10, 12]
    assert rows.response.tolist() == [2, 3, 4, 5, 13]
    assert rows.predictor.tolist() == [1, 1, 3, 4, 12]  # the first token of both responses follows the prompt
    assert rows.response_cell.tolist() == [0, 3, 4, 5, 9]
    assert rows.packing is not None
    segment, prompt = rows.packing.segment.tolist(), rows.packing.prompt.tolist()
    assert [len(set(row)) for row in segment] == [4, 3]  # prompt, two responses, padding; prompt, prompt, response
    assert segment[0][6] == prompt[0][6] == -1
    assert prompt[0][:6] == [segment[0][0]] * 6
    assert prompt[1] == [segment[1][0]] * 4 + [segment[1][4]] * 3
    assert rows.packing.longest == 5
