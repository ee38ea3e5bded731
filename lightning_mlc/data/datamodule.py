"""The LightningDataModule: files in, batches out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import torch
import torch.utils.data
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_only
from pyarrow.compute import greater, list_value_length
from torch.utils.data import DataLoader

from lightning_mlc.data.batches import Batch
from lightning_mlc.data.collation import Collator, ResponsesIn
from lightning_mlc.data.costs import EXPENSIVE, TokenCounts, highest_token
from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.languages import canonical_language, canonical_languages
from lightning_mlc.data.mismatches import Mismatches, mismatches
from lightning_mlc.data.reading import locate, read_rows
from lightning_mlc.data.records import KIND_NAMES, DataKind
from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.sampling import (
    EvaluationBatches,
    MicroBatch,
    Sizes,
    TrainingBatches,
    plan_epoch,
)
from lightning_mlc.data.scratch import scratch_folder
from lightning_mlc.data.spool import Spool
from lightning_mlc.data.tables import default_cache_dir, table_fingerprint, tokenised_table
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.data.windows import ByExamples, ByTokens, Cut, Division
from lightning_mlc.errors import UserError
from lightning_mlc.files.paths import expanded
from lightning_mlc.processes import DataParallel

logger = logging.getLogger("lightning_mlc")

Split = Literal["train", "val", "test", "predict"]

SOME = 5
"""Rows that a message names at most."""
SCORING_EXAMPLES = 32
"""Training examples of a batch that is only scored; its rows are run in blocks of ``EVALUATION_TOKENS`` tokens."""


class MultilingualData(LightningDataModule):
    """Prompts in several languages, with responses in one of them.

    Args:
        train_path: Training data: a JSONL, JSON, CSV or Parquet file, a folder of ``datasets.save_to_disk``,
            ``hf://owner/name?split=train``, or ``sample`` for the data that ships with the package.
        val_path: Validation data; null holds out a share of the training rows.
        test_path: Data for ``test``.
        predict_path: Data for ``predict``; null takes the validation rows.
        languages: BCP-47 codes of the languages to use; null takes all that the training data has.
        source_language: Language of the responses.
        val_share: Share of the training rows held out where there is no ``val_path``; 0 holds out none.
        batch_size: Examples per micro-batch and process; null takes 1, or what ``tokens_per_batch`` holds.
        tokens_per_batch: Instead of ``batch_size``: tokens per micro-batch and process, at most. Counted are the
            responses, each with its prompt, and the translations, where steps run any.
        val_batch_size: Examples per batch of validation, test and prediction, each in all languages.
        max_prompt_length: Longest prompt in tokens, its chat template included.
        max_response_length: Longest response in tokens; what is longer is cut.
        on_long_prompt: ``cut`` shortens the user's last message until the prompt fits, ``error`` refuses it.
        num_workers: Worker processes that prepare batches; 0 does it in the training process.
        num_proc: Processes that tokenise, before training starts; null takes one per core, and fewer for few rows.
            The batches do not depend on it.
        cache_dir: Where tokenised tables are kept; null takes ``~/.cache/lightning_mlc``.
        seed: Seed of the held-out split and of the order of the examples.
        name_or_path: Where the tokenizer is. This and what follows are options of the model.
        gguf_file: GGUF file inside that folder or repository.
        revision: Revision of a hub model.
        trust_remote_code: Run Python code that the repository carries.
    """

    def __init__(
        self,
        train_path: str | None = None,
        val_path: str | None = None,
        test_path: str | None = None,
        predict_path: str | None = None,
        languages: list[str] | None = None,
        source_language: str = "en",
        val_share: float = 0.1,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        val_batch_size: int = 2,
        max_prompt_length: int = 512,
        max_response_length: int = 512,
        on_long_prompt: Literal["cut", "error"] = "cut",
        num_workers: int = 0,
        num_proc: int | None = None,
        cache_dir: str | None = None,
        seed: int = 42,
        name_or_path: str | None = None,
        gguf_file: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        for option, value, least in (
            ("batch_size", batch_size, 1),
            ("tokens_per_batch", tokens_per_batch, 1),
            ("val_batch_size", val_batch_size, 1),
            ("max_prompt_length", max_prompt_length, 1),
            ("max_response_length", max_response_length, 1),
            ("num_workers", num_workers, 0),
            ("num_proc", num_proc, 1),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"data.{option}", f"must be at least {least}, got {value}")
        if batch_size is not None and tokens_per_batch is not None:
            raise UserError(
                "data.tokens_per_batch", f"cannot be given beside data.batch_size {batch_size}; set one of them to null"
            )
        if not 0 <= val_share < 1:
            raise UserError("data.val_share", f"must be from 0 to below 1, got {val_share}")
        self.paths: dict[str, str | None] = {
            "train": train_path,
            "val": val_path,
            "test": test_path,
            "predict": predict_path,
        }
        self.source_language = canonical_language(source_language, "data.source_language")
        self._asked = None if languages is None else canonical_languages(languages, "data.languages")
        if self._asked is not None and self.source_language not in self._asked:
            raise UserError(
                "data.languages",
                f"lacks the source language '{self.source_language}'; add it or set data.source_language",
            )
        self.val_share = val_share
        self.batch_size = 1 if batch_size is None else batch_size
        self.tokens_per_batch = tokens_per_batch
        self.val_batch_size = val_batch_size
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.on_long_prompt: Literal["cut", "error"] = on_long_prompt
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.cache_dir = Path(expanded(str(default_cache_dir() if cache_dir is None else cache_dir), "data.cache_dir"))
        self.seed = seed
        self._tokenizer_options = {
            "name_or_path": name_or_path,
            "gguf_file": gguf_file,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
        self.with_rejected = True
        """Whether batches have rows of rejected responses. A model that needs none sets it to False."""
        self.responses_in: ResponsesIn = "source"
        """In which languages training batches have rows with responses. The model sets it, too."""
        self.with_translations = True
        """Whether any training step runs translations."""
        self.layout = Layout()
        """How the rows of a step are laid out; the model says what its attention can run."""
        self.with_mismatched = False
        """Whether batches have rows of mismatched responses. An objective with them sets it to True."""
        self.languages: tuple[str, ...] = ()
        """Languages of the data, the source language first."""
        self.kind: DataKind = "single"
        """What responses the examples have."""
        self.pad_id = 0
        self._chat: ChatTokenizer | None = None
        self._tables: dict[str, Dataset] = {}
        self._rows: dict[str, list[int]] = {}
        self._mismatches: dict[str, Mismatches | None] = {}

    # ---- from files to tables -----------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Read, check and tokenise, on one process; the others then find the tables in the cache."""
        self._load(self._needed_paths())

    def setup(self, stage: str) -> None:
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise UserError("trainer.overfit_batches", "is not supported; give a small data.train_path instead")
        # Lightning's own sampler would divide by the processes what is already this process's share.
        if self.trainer is not None and self.trainer._accelerator_connector.use_distributed_sampler:
            raise UserError(
                "trainer.use_distributed_sampler",
                "is not supported: examples are already divided among the processes; leave it out, or set it to false",
            )
        self._load(self._needed_paths())
        for split in ("train", "val", "test", "predict"):
            if split in self._tables and split not in self._rows:  # a second command may come with the same data
                self._rows[split] = list(range(len(self._tables[split])))
        if "train" in self._tables and "val" not in self._tables:
            self._rows["train"], self._rows["val"] = self._split()
            self._tables["val"] = self._tables["train"]
        if "predict" not in self._tables and "val" in self._tables:
            self._rows["predict"], self._tables["predict"] = self._rows["val"], self._tables["val"]
        if stage == "predict" and not self._rows.get("predict"):
            raise UserError("data.predict_path", "is not set, and there are no validation rows to take instead")
        if stage == "validate" and not self._rows.get("val"):
            raise UserError("data.val_path", "is not set and data.val_share holds out no rows: nothing to validate")

    def _needed_paths(self) -> dict[str, str]:
        """The paths that the trainer's command needs (all that are set, without a trainer)."""
        command = str(self.trainer.state.fn.value) if self.trainer is not None and self.trainer.state.fn else None
        needed = {
            "fit": ["train", "val"],
            "validate": ["val"] if self.paths["val"] else ["train"],
            "test": ["test"],
            "predict": ["predict"] if self.paths["predict"] else ["val"] if self.paths["val"] else ["train"],
        }.get(command or "", list(self.paths))
        if command is not None and needed[0] != "val" and self.paths[needed[0]] is None:
            raise UserError(
                f"data.{needed[0]}_path", "is not set; give a file, a saved dataset, hf://owner/name, or 'sample'"
            )
        return {split: path for split in needed if (path := self.paths[split]) is not None}

    def _load(self, paths: dict[str, str]) -> None:
        missing = {split: path for split, path in paths.items() if split not in self._tables}
        if not missing:
            return
        for split, path in missing.items():
            locate(path, f"data.{split}_path")
        with scratch_folder(self.cache_dir, "reading") as folder:
            spools = {
                split: Spool.write(
                    parse_rows(read_rows(path, f"data.{split}_path"), self.source_language, path), folder / split
                )
                for split, path in missing.items()
            }
            first = next(iter(spools.values()))
            if not self.languages:
                self.languages = self._choose_languages(first.languages)
                self.kind = first.kind
            for split, spool in spools.items():
                if spool.kind != self.kind:
                    raise UserError(
                        f"data.{split}_path",
                        f"{missing[split]} has {KIND_NAMES[spool.kind]}, the other data "
                        f"{KIND_NAMES[self.kind]}; give data of one kind",
                    )
            chat = self._chat_tokenizer()
            for split, spool in spools.items():
                name = Path(missing[split]).name
                table = tokenised_table(spool, self.languages, chat, self.cache_dir, self.num_proc, name)
                self._tables[split] = table
                self._remark_on_responses(table)
                self._remark_on_cuts(table)

    def _choose_languages(self, found: Collection[str]) -> tuple[str, ...]:
        if self._asked is not None:
            for language in self._asked:
                if language not in found:
                    raise UserError(
                        "data.languages", f"no row has a prompt in '{language}' (found: {', '.join(found)})"
                    )
        chosen = found if self._asked is None else self._asked
        return (self.source_language, *(language for language in chosen if language != self.source_language))

    def _chat_tokenizer(self) -> ChatTokenizer:
        if self._chat is None:
            # Imported here: transformers takes seconds, and a wrong file should be told before that.
            from lightning_mlc.sources import ModelSource, load_tokenizer

            if self._tokenizer_options["name_or_path"] is None:
                raise UserError("model.name_or_path", "is not set; the tokenizer comes from there")
            tokenizer = load_tokenizer(ModelSource(**self._tokenizer_options))  # type: ignore[arg-type]
            self._chat = ChatTokenizer(tokenizer, self.max_prompt_length, self.max_response_length, self.on_long_prompt)
            self.pad_id = int(tokenizer.pad_token_id or 0)
        return self._chat

    @rank_zero_only
    def _remark_on_responses(self, table: Dataset) -> None:
        empty = _flagged(table, table.data.column("empty_response"))
        if len(empty):
            told = _some(len(empty), table[empty[:SOME]]["where"])
            logger.warning("%d examples have an empty response, which teaches silence: %s", len(empty), told)

    @rank_zero_only
    def _remark_on_cuts(self, table: Dataset) -> None:
        cut = _flagged(table, greater(list_value_length(table.data.column("cut_prompts")), 0))
        if len(cut):
            first = table[cut[:SOME]]
            names = [
                f"{where} ({', '.join(languages)})"
                for where, languages in zip(first["where"], first["cut_prompts"], strict=True)
            ]
            logger.warning(
                "%d examples have a prompt longer than data.max_prompt_length=%d tokens, which was cut: %s",
                len(cut),
                self.max_prompt_length,
                _some(len(cut), names),
            )
        responses = _flagged(table, table.data.column("cut_response"))
        if len(responses):
            logger.warning(
                "%d examples have a response longer than data.max_response_length=%d tokens, which was cut: %s",
                len(responses),
                self.max_response_length,
                _some(len(responses), table[responses[:SOME]]["where"]),
            )

    def _split(self) -> tuple[list[int], list[int]]:
        """Rows to train on and rows held out. Rows with the same source prompt stay on one side."""
        table = self._tables["train"]
        if self.val_share == 0:
            return list(range(len(table))), []
        # Groups are numbered in the order in which they come, and only numbers are held.
        prompts = table.data.column("same_prompt").to_numpy()
        _, first, group_of = np.unique(prompts, return_index=True, return_inverse=True)
        sizes = np.bincount(group_of)
        by_appearance = np.argsort(first)
        order = by_appearance[np.random.default_rng(self.seed).permutation(len(first))]
        wanted = max(1, round(self.val_share * len(table)))
        taken = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
        is_held_out = np.isin(group_of, order[:taken])
        if is_held_out.all():
            raise UserError(
                "data.val_share",
                f"{self.paths['train']} has too few different prompts to hold any out; "
                "give data.val_path or set data.val_share to 0",
            )
        return np.flatnonzero(~is_held_out).tolist(), np.flatnonzero(is_held_out).tolist()

    # ---- from tables to batches ---------------------------------------------------------------------

    def plan_steps(self, translations: bool) -> None:
        """Look at what training steps cost, before a model is loaded.

        Args:
            translations: Whether any step runs translations.

        Raises:
            UserError: An example alone has more than ``tokens_per_batch`` tokens, or there are fewer examples than
                processes.
        """
        self.with_translations = translations
        counts = self._counts("train")
        costs = self._costs(counts)
        self._require_room(costs)
        if translations:
            self._remark_on_expensive_languages(counts.relative_to_source(), costs.sum(0) / costs.sum())
        processes = self._data_parallel.size
        if len(costs) < processes:
            raise UserError(
                "data.train_path",
                f"{self.paths['train']} has {len(costs)} examples to train on, fewer than the "
                f"{processes} processes; give more data or lower trainer.devices",
            )

    def highest_token(self) -> int:
        """Highest token id in any split that is set up, padding included."""
        return max(self.pad_id, *(highest_token(table) for table in self._tables.values()))

    def longest_sequence(self) -> int:
        """Most tokens of a prompt with one response, in any split that is set up."""
        return max((prompt + max(chosen, rejected) for prompt, chosen, rejected in self._longest()), default=0)

    def longest_row(self) -> int:
        """Most tokens that a prompt has with all of its responses, in any split that is set up; no row is longer."""
        return max((sum(tokens) for tokens in self._longest()), default=0)

    def _longest(self) -> list[tuple[int, int, int]]:
        """Most tokens of a prompt, of a chosen response and of a rejected one, in each table of a split."""
        tables = {id(table): table for table in self._tables.values()}  # splits may share one
        counts = [TokenCounts.of(table, len(self.languages)) for table in tables.values()]
        return [
            (int(c.prompts.max(initial=0)), int(c.chosen.max(initial=0)), int(c.rejected.max(initial=0)))
            for c in counts
        ]

    def _require_room(self, costs: np.ndarray) -> None:
        totals = costs.sum(1)
        if self.tokens_per_batch is None or totals.max() <= self.tokens_per_batch:
            return
        too_long = int((totals > self.tokens_per_batch).sum())
        worst = int(totals.argmax())
        where = self._tables["train"][self._rows["train"][worst]]["where"]
        dearest = [f"{self.languages[i]} {costs[worst, i]}" for i in np.argsort(-costs[worst])[:3] if costs[worst, i]]
        raise UserError(
            "data.tokens_per_batch",
            f"{self.tokens_per_batch} is less than the {totals[worst]} tokens of {where} alone "
            f"(most in {', '.join(dearest)}; {too_long} examples have too many); raise it to {totals[worst]}, "
            "lower data.max_prompt_length or data.max_response_length, or drop languages (data.languages)",
        )

    @rank_zero_only
    def _remark_on_expensive_languages(self, factors: np.ndarray, shares: np.ndarray) -> None:
        expensive = [int(index) for index in np.argsort(-np.nan_to_num(factors)) if factors[index] >= EXPENSIVE]
        if expensive:
            logger.warning(
                "prompts in %s take several times as many tokens as the same prompts in %s with this tokenizer, and "
                "each step pays for them; drop languages (data.languages), run translations on fewer steps "
                "(model.consistency.every_n_steps), or take a model whose tokenizer covers them better",
                ", ".join(
                    f"{self.languages[i]} ({factors[i]:.1f} times, {shares[i]:.0%} of a step's tokens)"
                    for i in expensive
                ),
                self.source_language,
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        sampler: TrainingBatches
        sizes = self._sizes("train")
        if trainer is None:
            sampler = TrainingBatches(sizes, self._cut(Division()))
        else:
            if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
                raise UserError(
                    "trainer.callbacks",
                    "GradientAccumulationScheduler is not supported, the totals of a step are "
                    "planned ahead; use trainer.accumulate_grad_batches",
                )
            division = self._division
            sampler = TrainingBatches(
                sizes, self._cut(division), division, limit=trainer.limit_train_batches, progress=self._progress
            )
        return self._loader("train", sampler, self._collator().training)

    def micro_batches_of_epoch(self) -> int:
        """How many micro-batches each process trains on in an epoch."""
        division = self._division
        limit = None if self.trainer is None else self.trainer.limit_train_batches
        return len(plan_epoch(self._cut(division)(0), self._sizes("train"), division, limit))

    def order_digest(self) -> str:
        """A digest of what, with seed, budget and processes, the order of the training examples follows from.

        These are the rows of the table; under a budget of tokens also what each costs, which length limits, languages,
        objective and consistency terms change.
        """
        sha = hashlib.sha256(np.asarray(self._rows["train"], np.int64).tobytes())
        if self.tokens_per_batch is not None:
            sha.update(np.asarray(self._costs(self._counts("train")).sum(1), np.int64).tobytes())
        return sha.hexdigest()[:20]

    @property
    def _data_parallel(self) -> DataParallel:
        return DataParallel() if self.trainer is None else DataParallel.of(self.trainer)

    @property
    def _division(self) -> Division:
        """Among whom training is divided."""
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return Division(accumulate, self._data_parallel.size, self._data_parallel.rank)

    def _cut(self, division: Division) -> Cut:
        if self.tokens_per_batch is None:
            return ByExamples(len(self._rows["train"]), self.batch_size, division, self.seed)
        costs = self._costs(self._counts("train"))
        return ByTokens(costs.sum(1), self.tokens_per_batch, division, self.seed)

    def _costs(self, counts: TokenCounts) -> np.ndarray:
        return counts.in_step(self.with_rejected, self.responses_in, self.with_translations)

    def _progress(self) -> tuple[int, int]:
        """The current epoch and how many of its micro-batches are done, also right after a resumption."""
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        micro_batches: Any = loop.epoch_loop.batch_progress
        if micro_batches.is_last_batch:
            # A checkpoint of an epoch's end: Lightning counts the epoch as done only after it has asked for batches.
            epochs: Any = loop.epoch_progress.current
            return int(epochs.started), 0
        return self.trainer.current_epoch, int(micro_batches.current.processed)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        return self._evaluation_loader("val", self._collator().evaluation) if self._rows.get("val") else []

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader("test", self._collator().evaluation)

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader("predict", self._collator().prediction)

    def is_repeat(self, split: Split, batch_idx: int) -> bool:
        """Whether this process's evaluation batch ``batch_idx`` of ``split`` repeats one of another process."""
        share = self._data_parallel
        return batch_idx * share.size + share.rank >= -(-len(self._rows[split]) // self.val_batch_size)

    def check_mismatches(self) -> None:
        """Refuse data without mismatched responses, for an objective that needs them.

        Raises:
            UserError: Some example has none.
        """
        for split in self._tables:
            if split != "predict" and self._mismatches_of(split) is None:
                raise UserError(
                    f"data.{split}_path",
                    "each row needs another one with a different prompt and a different response, "
                    "which model.objective compares it with; add such rows, or choose another objective",
                )

    def _mismatches_of(self, split: str) -> Mismatches | None:
        """For all rows of the table of ``split``; only an objective that needs them pays for them."""
        table = self._tables[split]
        fingerprint = table_fingerprint(table)
        if fingerprint not in self._mismatches:
            columns = (table.data.column(name).to_numpy() for name in ("prompt_text", "chosen_text", "rejected_text"))
            self._mismatches[fingerprint] = mismatches(*columns)
        return self._mismatches[fingerprint]

    # ---- what a pass over all responses needs (see `lightning_mlc.reference`) -------------------------

    def keys(self, split: Split) -> list[int]:
        """The keys (``Batch.keys``) of the examples of ``split``; none where the command has no such data."""
        return self._rows.get(split, [])

    def fingerprint(self, split: Split) -> str:
        """The fingerprint of the examples and of all that their tokens depend on."""
        return table_fingerprint(self._tables[split])

    def scoring_loader(self, split: Split, in_source: bool, missing: Collection[int]) -> DataLoader[Batch]:
        """This process's share of some batches of responses in which all examples of the keys ``missing`` are.

        They are in all languages, or ``in_source`` alone. What is not training data is batched as in evaluation,
        so that a model gives the very same scores there.
        """
        share = self._data_parallel
        collator, rows = self._collator(), self._rows[split]
        batches = EvaluationBatches(self._sizes(split), self._scored_together(split))
        wanted = [batch for batch in batches if any(rows[index] in missing for index in batch.indices)]
        collate = collator.source_responses if in_source else collator.evaluation
        return self._loader(split, wanted[share.rank :: share.size], collate)

    def describe(self, split: Split, in_source: bool) -> dict[str, str]:
        """What the scores of :meth:`scoring_loader` depend on beside the model, by names for messages."""
        return {
            "data": self.fingerprint(split),
            "max_prompt_length": str(self.max_prompt_length),
            "max_response_length": str(self.max_response_length),
            "languages": self.languages[0] if in_source else ", ".join(self.languages),
            "responses": "chosen and rejected" if self.with_rejected else "chosen",
            "mismatched": "yes" if self.with_mismatched else "no",
            "layout": "packed" if self.layout.packed else "padded",
            "examples per batch": str(self._scored_together(split)),
        }

    def _scored_together(self, split: Split) -> int:
        return SCORING_EXAMPLES if split == "train" else self.val_batch_size

    def _collator(self) -> Collator:
        return Collator(self.languages, self.pad_id, self.with_rejected, self.layout, self.responses_in)

    def _sizes(self, split: Split) -> Sizes:
        counts = self._counts(split)
        return Sizes(
            response_tokens=counts.chosen[:, 0],
            groups=((counts.prompts > 0).sum(1) > 1).astype(int),
            chosen=(counts.chosen[:, 0] > 0).astype(int),
            rejected=(counts.rejected[:, 0] > 0).astype(int),
        )

    def _counts(self, split: Split) -> TokenCounts:
        return TokenCounts.of(self._tables[split], len(self.languages)).take(self._rows[split])

    def _evaluation_loader(self, split: Split, collate: Callable[..., Batch]) -> DataLoader[Batch]:
        share = self._data_parallel
        sampler = EvaluationBatches(self._sizes(split), self.val_batch_size, share.size, share.rank)
        return self._loader(split, sampler, collate)

    def _loader(
        self,
        split: Split,
        sampler: TrainingBatches | EvaluationBatches | list[MicroBatch],
        collate: Callable[..., Batch],
    ) -> DataLoader[Batch]:
        return DataLoader(
            _MicroBatches(
                self._tables[split],
                self._rows[split],
                collate,
                self._mismatches_of(split) if self.with_mismatched and split != "predict" else None,
            ),
            sampler=sampler,
            batch_size=None,  # the sampler yields whole micro-batches
            num_workers=self.num_workers,
            persistent_workers=False,  # or workers would keep the plan of the first epoch
            pin_memory=torch.cuda.is_available(),
        )


class _MicroBatches(torch.utils.data.Dataset[Batch]):
    """Looks micro-batches up in a table."""

    def __init__(
        self, table: Dataset, rows: list[int], collate: Callable[..., Batch], mismatches: Mismatches | None
    ) -> None:
        self._table = table
        self._rows = rows
        self._collate = collate
        self._mismatches = mismatches

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        keys = [self._rows[index] for index in micro_batch.indices]
        examples: list[Any] = [self._table[key] for key in keys]
        if self._mismatches is not None:
            for key, example in zip(keys, examples, strict=True):
                other, response = self._mismatches.of(key)
                example["mismatched"] = self._table[other][response]
        return self._collate(examples, keys, micro_batch.normalizers)


def _flagged(table: Dataset, flags: pyarrow.ChunkedArray) -> np.ndarray:
    """The rows of ``table`` where ``flags`` are true."""
    return np.flatnonzero(flags.to_numpy())


def _some(count: int, first: list[str]) -> str:
    """The ``first`` names of so many, and how many more there are."""
    return ", ".join(first) + (f" and {count - len(first)} more" if count > len(first) else "")
