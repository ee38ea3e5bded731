"""From files to batches: options, splits, cache, loaders."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import example_rows, labelled_rows, save_model, translated_rows, write_jsonl
from lightning.pytorch import Trainer

from lightning_mlc.data.batches import Batch
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.reading import read_several
from lightning_mlc.data.row_plan import RowPlan
from lightning_mlc.errors import UserError


def ready(model: Path, path: Path | str, **options: Any) -> MultilingualData:
    data = MultilingualData(train_path=str(path), name_or_path=str(model), **options)
    data.prepare_data()
    data.setup("fit")
    return data


def ids(loader: Iterable[Batch]) -> list[str]:
    return [name for batch in loader for name in batch.ids]


def test_batches_have_all_rows_once(tiny_model: Path, pairs_file: Path) -> None:
    data = ready(tiny_model, pairs_file, val_share=0.25, batch_size=2, val_batch_size=2)
    train, val = ids(data.train_dataloader()), ids(data.val_dataloader())
    assert len(val) == 3
    assert sorted(train + val) == sorted(f"r{i}" for i in range(12))
    assert data.languages == ("en", "sw", "zh")
    assert data.kind == "pairs"
    (batch, *_) = data.train_dataloader()
    assert batch.languages == data.languages
    assert batch.normalizers.examples == 2
    assert batch.normalizers.groups == 2
    assert batch.normalizers.chosen == batch.normalizers.rejected == 2


def mixed(model: Path, paths: list[Path | str], **options: Any) -> MultilingualData:
    data = MultilingualData(train_path=[str(path) for path in paths], name_or_path=str(model), val_share=0, **options)
    data.setup("fit")
    return data


def test_several_files_are_mixed_each_in_its_own_layout(tiny_model: Path, tmp_path: Path, pairs_file: Path) -> None:
    answers = {"kind": "ordinary", "chosen": "Gently.", "rejected": "No."}
    columns = [{"prompt": f"How do I wash bag {i}?", "prompt_sw": f"Ninafuaje begi {i}?", **answers} for i in range(3)]
    ordinary = write_jsonl(tmp_path / "ordinary.jsonl", columns)
    data = mixed(tiny_model, [pairs_file, ordinary], batch_size=4)
    batches = list(data.train_dataloader())
    assert sorted(ids(batches)) == sorted([f"r{i}" for i in range(12)] + [f"ordinary.jsonl row {i}" for i in (1, 2, 3)])
    kinds = {name: flag for batch in batches for name, flag in zip(batch.ids, batch.is_ordinary.tolist(), strict=True)}
    assert [name for name, flag in sorted(kinds.items()) if flag] == [f"ordinary.jsonl row {i}" for i in (1, 2, 3)]
    assert data.fingerprint("train") != ready(tiny_model, pairs_file).fingerprint("train")


def test_files_with_one_name_are_told_apart_by_their_folders(tiny_model: Path, tmp_path: Path) -> None:
    paths: list[Path | str] = []
    for folder in ("harmful", "ordinary"):
        (tmp_path / folder).mkdir()
        rows = [{**row, "id": None, "prompt": {"en": folder + row["prompt"]["en"]}} for row in example_rows(2)]
        paths.append(write_jsonl(tmp_path / folder / "train.jsonl", rows))
    found = ids(mixed(tiny_model, paths).train_dataloader())
    assert sorted(found) == sorted(f"{path} row {number}" for path in paths for number in (1, 2))


def test_the_sample_and_a_file_of_its_name_are_told_apart(tmp_path: Path) -> None:
    own = str(write_jsonl(tmp_path / "sample.jsonl", [{"prompt": "Hello", "response": "Hello."}]))
    places = [place for place, _ in read_several(["sample", own], "data.train_path")]
    assert places[0] == "sample row 1"
    assert places[-1] == f"{own} row 1"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            example_rows(12)[10:],
            r"second\.jsonl row 1: the id 'r10' is taken by pairs\.jsonl row 11; ids must be unique",
        ),
        (
            [{**row, "id": f"x{i}"} for i, row in enumerate(example_rows(2, pairs=False))],
            r"second\.jsonl row 1: has a response without a label, the rows before it have a chosen and a rejected",
        ),
    ],
)
def test_files_that_do_not_go_together_are_refused(
    second: list[Any], message: str, tiny_model: Path, tmp_path: Path, pairs_file: Path
) -> None:
    with pytest.raises(UserError, match=message):
        mixed(tiny_model, [pairs_file, write_jsonl(tmp_path / "second.jsonl", second)])


def test_a_file_that_is_named_twice_is_refused(tiny_model: Path, pairs_file: Path) -> None:
    for again in (pairs_file, f"{pairs_file.parent}/./pairs.jsonl"):
        with pytest.raises(UserError, match=r"data\.train_path: names .*pairs\.jsonl twice"):
            mixed(tiny_model, [pairs_file, again])


def test_a_file_under_two_names_is_refused(
    tiny_model: Path, tmp_path: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without an id would be trained on twice, and held out while their copies are trained on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(pairs_file)
    for second in ("./pairs.jsonl", "link.jsonl", str(pairs_file)):
        with pytest.raises(UserError, match=r"data\.train_path: names pairs\.jsonl twice"):
            mixed(tiny_model, ["pairs.jsonl", second])


def test_paths_of_python_are_paths(tiny_model: Path, pairs_file: Path) -> None:
    one, several = (
        MultilingualData(train_path=given, name_or_path=str(tiny_model)) for given in (pairs_file, [pairs_file])
    )  # type: ignore[arg-type]
    for data in (one, several):
        data.setup("fit")
        assert len(ids(data.train_dataloader())) == 11


@pytest.mark.parametrize("given", [["a.jsonl", None], ["a.jsonl", ["b.jsonl"]], [3], [""], "", 3, {"a.jsonl": 1}])
def test_what_is_no_list_of_paths_is_refused(given: Any) -> None:
    with pytest.raises(UserError, match=r"data\.val_path: must be a path, a list of paths or null, got "):
        MultilingualData(val_path=given)


def test_an_empty_list_is_not_null(pairs_file: Path) -> None:
    """Null holds out training rows instead; a list that a script left empty must not mean that."""
    with pytest.raises(UserError, match=r"data\.val_path: is an empty list; name a file, or give null"):
        MultilingualData(train_path=str(pairs_file), val_path=[])


def test_a_second_command_has_the_same_split(tiny_model: Path, pairs_file: Path) -> None:
    data = ready(tiny_model, pairs_file, val_share=0.25)
    before = [ids(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader())]
    for stage in ("validate", "predict", "fit"):
        data.setup(stage)
        loaders = data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()
        assert [ids(loader) for loader in loaders] == before
    assert [len(found) for found in before] == [9, 3, 3]


def test_split_follows_the_seed(tiny_model: Path, pairs_file: Path) -> None:
    held_out = [ids(ready(tiny_model, pairs_file, val_share=0.5, seed=seed).val_dataloader()) for seed in (1, 1, 2)]
    assert held_out[0] == held_out[1]
    assert held_out[0] != held_out[2]


def test_equal_prompts_stay_on_one_side(tiny_model: Path, tmp_path: Path) -> None:
    rows = example_rows(12)
    for i, row in enumerate(rows):
        row["prompt"] = example_rows(4)[i % 4]["prompt"]
    data = ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", rows), val_share=0.2)
    sides = [{int(name[1:]) % 4 for name in ids(loader)} for loader in (data.train_dataloader(), data.val_dataloader())]
    assert sides[0] | sides[1] == {0, 1, 2, 3}
    assert not sides[0] & sides[1]


def test_own_validation_file_and_no_validation(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "val.jsonl", [row | {"id": f"v{i}"} for i, row in enumerate(example_rows(2))])
    data = ready(tiny_model, pairs_file, val_path=str(own))
    assert ids(data.val_dataloader()) == ["v0", "v1"]
    assert len(ids(data.train_dataloader())) == 12
    assert ready(tiny_model, pairs_file, val_share=0.0).val_dataloader() == []


def test_languages_can_be_chosen(tiny_model: Path, pairs_file: Path) -> None:
    data = ready(tiny_model, pairs_file, languages=["zh", "EN"])
    assert data.languages == ("en", "zh")
    for batch in data.train_dataloader():
        assert {int(i) for rows in batch.prompts for i in rows.language} == {1}
    swahili = ready(tiny_model, pairs_file, source_language="sw")
    assert swahili.languages[0] == "sw"


def test_rows_without_translations_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    rows = example_rows(3)
    rows[0]["prompt"] = {"en": "Alone"}
    rows[1]["prompt"]["zh"] = None
    data = ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", rows), val_share=0, batch_size=3)
    (batch,) = data.train_dataloader()
    assert len(batch) == 3
    assert batch.normalizers.groups == 2
    assert sum(len(rows) for rows in batch.prompts) == 3


def test_responses_in_other_languages_reach_the_batch(tiny_model: Path, tmp_path: Path) -> None:
    """Even if the first rows have no responses, so that the table cannot infer their type."""
    rows = [*example_rows(1001), translated_rows(1)[0] | {"id": "last"}]
    data = ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", rows), val_share=0)
    table = data._tables["train"]
    assert table["translated"][:1001] == [[]] * 1001
    assert table["translated"][1001] == [1, 2]
    chosen, rejected = (
        [_text(data, ids) for ids in table[name][1001]] for name in ("translated_chosen", "translated_rejected")
    )
    assert chosen == ["Hapana, bag 0 si yako.<|end|>", "不，bag 0 不是你的。<|end|>"]
    assert rejected == ["Ndiyo, chukua bag 0.<|end|>", "好，拿走 bag 0 吧。<|end|>"]


def _text(data: MultilingualData, ids: list[int]) -> str:
    return str(data._chat_tokenizer().tokenizer.decode(ids))


def test_workers_give_the_same_batches(tiny_model: Path, pairs_file: Path) -> None:
    alone, helped = (ready(tiny_model, pairs_file, batch_size=2, num_workers=n).train_dataloader() for n in (0, 2))
    assert ids(alone) == ids(helped)


def test_tables_are_cached_until_something_changes(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def tables() -> set[Path]:
        return {path for path in (cache / "tokenised").iterdir() if not path.name.startswith(".")}

    ready(tiny_model, pairs_file, cache_dir=str(cache))
    (first,) = tables()
    stamp = first.stat().st_mtime_ns
    ready(tiny_model, pairs_file, cache_dir=str(cache))
    assert tables() == {first}
    assert first.stat().st_mtime_ns == stamp
    for options in ({"max_prompt_length": 30}, {"languages": ["en", "sw"]}, {"max_response_length": 9}):
        before = tables()
        ready(tiny_model, pairs_file, cache_dir=str(cache), **options)
        assert len(tables() - before) == 1, options
    before = tables()
    rows = [json.loads(line) for line in pairs_file.read_text(encoding="utf-8").splitlines()]
    rows[3]["prompt"]["sw"] += "?"
    ready(tiny_model, write_jsonl(pairs_file, rows), cache_dir=str(cache))
    other = save_model(tmp_path / "other", template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    ready(other, pairs_file, cache_dir=str(cache))
    assert len(tables() - before) == 2


def test_a_broken_cache_is_built_again(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    ready(tiny_model, pairs_file, cache_dir=str(tmp_path))
    (table,) = (tmp_path / "tokenised").iterdir()
    written = (table / "table.arrow").read_bytes()
    (table / "table.arrow").write_bytes(written[: len(written) // 2])
    assert len(ids(ready(tiny_model, pairs_file, val_share=0, cache_dir=str(tmp_path)).train_dataloader())) == 12


def test_remarks_name_rows_and_show_no_text(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = example_rows(3)
    rows[1]["prompt"]["sw"] = "SECRET " * 20
    rows[2]["chosen"] = ""
    with caplog.at_level(logging.WARNING, logger="lightning_mlc"):
        ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", rows), max_prompt_length=100)
    assert "a.jsonl row 2 (sw)" in caplog.text
    assert "empty response" in caplog.text
    assert "a.jsonl row 3" in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size: must be at least 1"),
        ({"val_share": 1.0}, "data.val_share: must be from 0"),
        ({"languages": ["en", "xx"]}, "data.languages: 'xx' is not a language code"),
        ({"languages": ["en", "sw", "SW"]}, "data.languages: language 'sw' is given twice"),
        ({"languages": ["sw", "zh"]}, "data.languages: lacks the source language 'en'"),
        ({"source_language": "english"}, "data.source_language: 'english' is not a language code"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MultilingualData(**options)


def test_a_language_that_no_row_has(tiny_model: Path, pairs_file: Path) -> None:
    with pytest.raises(UserError, match="no row has a prompt in 'fr'"):
        ready(tiny_model, pairs_file, languages=["en", "fr"])


def test_a_wrong_file_is_told_before_the_tokenizer_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        ready(tmp_path / "no-such-model", tmp_path / "no-such-file.jsonl")
    with pytest.raises(UserError, match="row 1: is not JSON"):
        ready(tmp_path / "no-such-model", write_jsonl(tmp_path / "a.jsonl", []).parent / _broken(tmp_path))


def _broken(folder: Path) -> str:
    (folder / "broken.jsonl").write_text("{\n")
    return "broken.jsonl"


def test_too_few_rows_to_split(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too few different prompts"):
        ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", example_rows(1)))


def test_data_of_two_kinds(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    single = write_jsonl(tmp_path / "val.jsonl", example_rows(2, pairs=False))
    with pytest.raises(UserError, match=r"data\.val_path: .* has a response without a label, the other data a"):
        ready(tiny_model, pairs_file, val_path=str(single))


def test_totals_of_labelled_responses(tiny_model: Path, tmp_path: Path) -> None:
    data = ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", labelled_rows(9)), val_share=0, batch_size=9)
    assert data.kind == "unpaired"
    (batch,) = data.train_dataloader()
    found = batch.normalizers
    assert (found.examples, found.chosen, found.rejected, found.responses) == (9, 6, 3, 9)
    # "No, bag N is not yours." and the end token, one token per byte
    assert found.response_tokens == 6 * 24


@pytest.mark.parametrize("cut", [(1, 0), (3, 1)])
def test_mismatched_responses_are_of_another_row_whatever_the_batch(
    tiny_model: Path, pairs_file: Path, cut: tuple[int, int]
) -> None:
    data = ready(tiny_model, pairs_file, val_share=0.25, batch_size=cut[0], seed=cut[1])
    assert all(batch.mismatched == () for batch in data.train_dataloader())
    data.plan_rows(RowPlan(mismatched=True))
    tokenizer = data._chat_tokenizer().tokenizer
    seen = set()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            for rows in batch.mismatched:
                for example, language, ids in zip(rows.example, rows.language, rows.input_ids, strict=True):
                    key = int(batch.keys[example])
                    text = tokenizer.decode(ids, skip_special_tokens=True)
                    other = (key + 1) % 12
                    answer = f"No, bag {other} is not yours." if key % 2 == 0 else f"Sure, take bag {other}."
                    assert text == f"How do I take the bag {key} that is not mine?\n{answer}"
                    assert int(language) == 0
                    seen.add(key)
    assert seen == set(range(12))


def test_data_without_mismatched_responses(tiny_model: Path, tmp_path: Path) -> None:
    rows = labelled_rows(4)
    for row in rows:
        row["prompt"] = rows[0]["prompt"]
    data = ready(tiny_model, write_jsonl(tmp_path / "a.jsonl", rows), val_share=0)
    with pytest.raises(UserError, match=r"^data\.train_path: each row needs another one with a different prompt"):
        data.plan_rows(RowPlan(mismatched=True))


def test_lightnings_own_sampler_is_refused_with_several_processes(tiny_model: Path, pairs_file: Path) -> None:
    """It would divide the examples once more. With one process it changes nothing, and it is Lightning's default."""
    one, two = (Trainer(accelerator="cpu", devices=n, strategy="ddp", logger=False) for n in (1, 2))
    data = MultilingualData(str(pairs_file), name_or_path=str(tiny_model), num_proc=1)
    data.trainer = two
    with pytest.raises(UserError, match="already divided among the processes; set it to false"):
        data.setup("fit")
    data.trainer = one
    data.setup("fit")


def test_ordinary_rows_are_known_in_each_batch(tiny_model: Path, tmp_path: Path) -> None:
    rows = example_rows(6)
    rows[1]["kind"], rows[2]["kind"], rows[4]["kind"] = "ordinary", "harmful", "ordinary"
    rows[4]["prompt"] = {"en": rows[4]["prompt"]["en"]}
    data = ready(tiny_model, write_jsonl(tmp_path / "rows.jsonl", rows), val_share=0.0)
    sizes = data.sizes("train")
    assert (sizes.groups.tolist(), sizes.ordinary_groups.tolist()) == ([1, 1, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0])
    rows[3]["kind"] = "ordinry"
    with pytest.raises(UserError, match=r"wrong\.jsonl row 4: 'kind' must be harmful or ordinary, or must be left out"):
        ready(tiny_model, write_jsonl(tmp_path / "wrong.jsonl", rows))
