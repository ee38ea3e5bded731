"""A key is sent only to its own host."""

from __future__ import annotations

import pytest

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.systems.api_keys import key_of, variable_of
from lightning_mlc.evaluation.systems.system import require_address

OPENAI, OTHER = "https://api.openai.com/v1", "https://models.example.org/v1"
HERE, NEAR = "http://localhost:8000/v1", "http://gpu-node:8000/v1"


@pytest.fixture(autouse=True)
def _general(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (OPENAI, OTHER, HERE, NEAR):
        monkeypatch.delenv(variable_of(url), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "general")


@pytest.mark.parametrize(
    ("urls", "given"),
    [
        ([OPENAI], {OPENAI: "general"}),
        ([HERE], {HERE: "general"}),
        (["http://127.0.0.1:1/v1"], {"http://127.0.0.1:1/v1": "general"}),
        # Nor to this machine, where a server may only pass on what it receives.
        ([HERE, OPENAI], {HERE: None, OPENAI: "general"}),
        # Not in clear text over a network.
        ([NEAR], {NEAR: None}),
        ([NEAR, OPENAI], {NEAR: None, OPENAI: "general"}),
        # A model and a judge on one host.
        ([OPENAI, OPENAI], {OPENAI: "general"}),
    ],
)
def test_the_general_key_goes_to_one_host(urls: list[str], given: dict[str, str | None]) -> None:
    assert {url: key_of(url, urls) for url in urls} == given


def test_a_hosts_own_key_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY_GPU_NODE", "near")
    monkeypatch.setenv("OPENAI_API_KEY_MODELS_EXAMPLE_ORG", "other")
    urls = [OPENAI, OTHER, NEAR]
    assert [key_of(url, urls) for url in urls] == ["general", "other", "near"]


def test_a_key_that_could_be_for_either_is_sent_to_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="OPENAI_API_KEY_API_OPENAI_COM and OPENAI_API_KEY_MODELS_EXAMPLE_ORG"):
        key_of(OPENAI, [OPENAI, OTHER])
    monkeypatch.delenv("OPENAI_API_KEY")
    assert key_of(OPENAI, [OPENAI, OTHER]) is None


def test_white_space_around_a_key_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " sk-1\r\n")
    assert key_of(OPENAI, [OPENAI]) == "sk-1"


@pytest.mark.parametrize("key", ["sk-\n1", "sk-\u20181\u2019"])
def test_a_key_that_cannot_be_sent_is_named_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable_of(OPENAI), key)
    with pytest.raises(UserError, match=r"^OPENAI_API_KEY_API_OPENAI_COM: has a character that no key has") as told:
        key_of(OPENAI, [OPENAI])
    assert "sk-" not in str(told.value)


@pytest.mark.parametrize(
    "spec", ["http://me:sk-1@h/v1#m", "http://sk-1@h/v1#m", "https://h/v1?key=sk-1#m", "http://h:sk-1/v1#m"]
)
def test_a_key_in_an_address_is_refused_and_not_shown(spec: str) -> None:
    with pytest.raises(UserError, match="write an endpoint as http://HOST/v1#MODEL") as told:
        require_address(spec, "model")
    assert "sk-" not in str(told.value)
