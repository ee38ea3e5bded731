"""The LightningDataModule: files in, batches out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_mlc.data.batches import Batch
from lightning_mlc.data.collation import Collator
from lightning_mlc.data.costs import Extent, TokenCounts, highest_token, require_room
from lightning_mlc.data.languages import canonical_language, canonical_languages
from lightning_mlc.data.loading import TableLoader, by_split, named
from lightning_mlc.data.lookup import Collate, MicroBatches
from lightning_mlc.data.mismatches import Mismatches, mismatches
from lightning_mlc.data.option_checks import (
    require_at_least,
    require_one_each,
    require_one_size,
    require_share,
    require_source,
    require_supported,
)
from lightning_mlc.data.order import TrainingOrder
from lightning_mlc.data.records import DataKind
from lightning_mlc.data.remarks import warn_of_expensive_languages
from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.row_plan import RowPlan
from lightning_mlc.data.sampling import EvaluationBatches, MicroBatch, Sizes, TrainingBatches, plan_epoch
from lightning_mlc.data.splits import hold_out, to_answer
from lightning_mlc.data.spool import Spool
from lightning_mlc.data.tables import default_cache_dir, table_fingerprint
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.data.windows import Division
from lightning_mlc.errors import UserError
from lightning_mlc.files.paths import expanded
from lightning_mlc.lightning_internals import epoch_and_batches_done
from lightning_mlc.processes import DataParallel

Split = Literal["train", "val", "test", "predict"]
EVALUATED: tuple[Split, ...] = ("val", "test")
"""Splits on which a model is measured."""


class MultilingualData(LightningDataModule):
    """Prompts in several languages, with responses in one of them.

    Args:
        train_path: Training data: a JSONL, JSON, CSV or Parquet file, a folder of ``datasets.save_to_disk``,
            ``hf://owner/name?split=train``, or ``sample`` for the data that ships with the package. A list
            of these trains as one, each in its own layout. The other paths may be lists, too.
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
        chat_template: Chat template in place of the tokenizer's.
    """

    inspect: Callable[[Sequence[str], Spool], None] | None = None
    """Is called with the paths and the examples of each table that is built, and not for those of the cache."""

    def __init__(
        self,
        train_path: str | list[str] | None = None,
        val_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
        predict_path: str | list[str] | None = None,
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
        chat_template: str | None = None,
    ) -> None:
        super().__init__()
        require_at_least({"batch_size": batch_size, "tokens_per_batch": tokens_per_batch}, 1)
        require_at_least({"val_batch_size": val_batch_size, "num_proc": num_proc}, 1)
        require_at_least({"max_prompt_length": max_prompt_length, "max_response_length": max_response_length}, 1)
        require_at_least({"num_workers": num_workers, "seed": seed}, 0)
        require_one_size(batch_size, tokens_per_batch)
        require_share(val_share)
        self.paths = by_split(train=train_path, val=val_path, test=test_path, predict=predict_path)
        self.source_language = canonical_language(source_language, "data.source_language")
        self._asked = None if languages is None else canonical_languages(languages, "data.languages")
        require_source(self.source_language, self._asked)
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
        self._tokenizer_of: tuple[Any, ...] = (name_or_path, gguf_file, revision, trust_remote_code, chat_template)
        self.plan = RowPlan()
        """Which rows a step runs; see :meth:`plan_rows`."""
        self.layout = Layout()
        """How rows are padded or packed. The model sets it as soon as it has been tried."""
        self.languages: tuple[str, ...] = ()
        """Languages of the data, the source language first."""
        self.kind: DataKind = "single"
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
        if self.trainer is not None:
            require_supported(self.trainer)
        self._answered: dict[str, list[int]] = {}
        self._load(self._needed_paths())
        for split in ("train", "val", "test", "predict"):
            if split in self._tables and split not in self._rows:  # a second command may come with the same data
                self._rows[split] = list(range(len(self._tables[split])))
        if "train" in self._tables and "val" not in self._tables:
            self._rows["train"], self._rows["val"] = hold_out(
                self._tables["train"], self.val_share, self.seed, named(self.paths["train"])
            )
            self._tables["val"] = self._tables["train"]
        if "predict" not in self._tables and "val" in self._tables:
            self._rows["predict"], self._tables["predict"] = self._rows["val"], self._tables["val"]
        if stage == "predict" and not self._rows.get("predict"):
            raise UserError("data.predict_path", "is not set, and there are no validation rows to take instead")
        if stage == "validate" and not self._rows.get("val"):
            raise UserError("data.val_path", "is not set and data.val_share holds out no rows: nothing to validate")

    def _needed_paths(self) -> dict[str, tuple[str, ...]]:
        """The paths that the trainer's command needs (all that are set, without a trainer)."""
        command = str(self.trainer.state.fn.value) if self.trainer is not None and self.trainer.state.fn else None
        needed = {
            "fit": ["train", "val"],
            "validate": ["val"] if self.paths["val"] else ["train"],
            "test": ["test"],
            "predict": ["predict"] if self.paths["predict"] else ["val"] if self.paths["val"] else ["train"],
        }.get(command or "", list(self.paths))
        if command is not None and needed[0] != "val" and not self.paths[needed[0]]:
            raise UserError(
                f"data.{needed[0]}_path", "is not set; give a file, a saved dataset, hf://owner/name, or 'sample'"
            )
        return {split: paths for split in needed if (paths := self.paths[split])}

    def _load(self, paths: Mapping[str, tuple[str, ...]]) -> None:
        missing = {split: own for split, own in paths.items() if split not in self._tables}
        if not missing:
            return
        loader = TableLoader(
            self.source_language, self._asked, self._chat_tokenizer, self.cache_dir, self.num_proc, self.inspect
        )
        tables, self.languages, self.kind = loader.load(missing, self.languages, self.kind)
        self._tables |= tables

    def _chat_tokenizer(self) -> ChatTokenizer:
        if self._chat is None:
            # Imported here: transformers takes seconds, and a wrong file should be reported before that.
            from lightning_mlc.sources import ModelSource, load_tokenizer

            if self._tokenizer_of[0] is None:
                raise UserError("model.name_or_path", "is not set; the tokenizer comes from there")
            tokenizer = load_tokenizer(ModelSource(*self._tokenizer_of))
            self._chat = ChatTokenizer(tokenizer, self.max_prompt_length, self.max_response_length, self.on_long_prompt)
            self.pad_id = int(tokenizer.pad_token_id or 0)
        return self._chat

    # ---- from tables to batches ---------------------------------------------------------------------

    def plan_rows(self, plan: RowPlan) -> None:
        """Take the ``plan`` of the model, before any batch is made.

        Raises:
            UserError: The plan needs mismatched responses, and some example has none; or it needs prompts of both
                kinds to answer, and there are none of one kind.
        """
        self.plan = plan
        evaluated = [split for split in EVALUATED if plan.answered and self._rows.get(split)]
        self._answered = {
            split: to_answer(self._tables[split], self._rows[split], plan.answered, split) for split in evaluated
        }
        if not plan.mismatched:
            return
        for split in self._tables:
            if split != "predict" and self._mismatches_of(split) is None:
                raise UserError(
                    f"data.{split}_path",
                    "each row needs another one with a different prompt and a different response, "
                    "which model.objective compares it with; add such rows, or choose another objective",
                )

    def check_steps(self) -> None:
        """Check the costs of training steps, before a model is loaded.

        Raises:
            UserError: An example alone has more than ``tokens_per_batch`` tokens, or there are fewer examples than
                processes.
        """
        counts = self._counts("train")
        costs = counts.in_step(self.plan)
        if self.tokens_per_batch is not None:
            require_room(costs, self.tokens_per_batch, self.languages, self._where)
        if self.plan.translations:
            warn_of_expensive_languages(self.languages, counts.relative_to_source(), costs.sum(0) / costs.sum())
        require_one_each(len(costs), self.share.size, named(self.paths["train"]))

    def _where(self, index: int) -> str:
        """File and row of the training example ``index``."""
        return str(self._tables["train"][self._rows["train"][index]]["where"])

    def extent(self) -> Extent:
        """The largest numbers of tokens in any split that is set up."""
        tables = {id(table): table for table in self._tables.values()}  # splits may share one
        return Extent.of(tables.values(), len(self.languages))

    def highest_token(self) -> int:
        """Highest token id in any split that is set up, padding included."""
        return max(self.pad_id, *(highest_token(table) for table in self._tables.values()))

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        sampler: TrainingBatches
        sizes = self.sizes("train")
        if trainer is None:
            sampler = TrainingBatches(sizes, self._order().cut(Division()))
        else:
            division = self._division
            progress = partial(epoch_and_batches_done, trainer)
            sampler = TrainingBatches(
                sizes, self._order().cut(division), division, limit=trainer.limit_train_batches, progress=progress
            )
        return self.loader("train", sampler, self.collator().training)

    def micro_batches_of_epoch(self) -> int:
        """Number of micro-batches that each process trains on in an epoch."""
        division = self._division
        limit = None if self.trainer is None else self.trainer.limit_train_batches
        return len(plan_epoch(self._order().cut(division)(0), self.sizes("train"), division, limit))

    def order_digest(self) -> str:
        """See :meth:`~lightning_mlc.data.order.TrainingOrder.digest`."""
        return self._order().digest()

    def _order(self) -> TrainingOrder:
        budget = self.tokens_per_batch
        costs = None if budget is None else self._counts("train").in_step(self.plan).sum(1)
        return TrainingOrder(self._rows["train"], self.batch_size, budget, costs, self.seed)

    @property
    def share(self) -> DataParallel:
        """This process's share of the examples."""
        return DataParallel() if self.trainer is None else DataParallel.of(self.trainer)

    @property
    def _division(self) -> Division:
        """How training examples are divided into micro-batches and among processes."""
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return Division(accumulate, self.share.size, self.share.rank)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        return self._evaluation_loaders("val") if self._rows.get("val") else []

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader("predict", self.collator().prediction)

    def is_repeat(self, split: Split, batch_idx: int) -> bool:
        """Whether this process's evaluation batch ``batch_idx`` of ``split`` repeats one of another process."""
        return batch_idx * self.share.size + self.share.rank >= -(-len(self._rows[split]) // self.val_batch_size)

    def _mismatches_of(self, split: str) -> Mismatches | None:
        """For all rows of the table of ``split``; only an objective that needs them pays for them."""
        table = self._tables[split]
        fingerprint = table_fingerprint(table)
        if fingerprint not in self._mismatches:
            names = ("prompt_text", "chosen_text", "rejected_text")
            self._mismatches[fingerprint] = mismatches(*(table.data.column(name).to_numpy() for name in names))
        return self._mismatches[fingerprint]

    def keys(self, split: Split) -> list[int]:
        """The keys (``Batch.keys``) of the examples of ``split``; none where the command has no such data."""
        return self._rows.get(split, [])

    def fingerprint(self, split: Split) -> str:
        """The fingerprint of the examples and of all that their tokens depend on."""
        return table_fingerprint(self._tables[split])

    def collator(self) -> Collator:
        """Makes the batches of every split."""
        return Collator(self.languages, self.pad_id, self.plan, self.layout)

    def sizes(self, split: Split) -> Sizes:
        """Sizes of the examples of ``split``, from which the normalizers of a step follow."""
        return self._counts(split).sizes

    def _counts(self, split: Split) -> TokenCounts:
        return TokenCounts.of(self._tables[split], len(self.languages)).take(self._rows[split])

    def _evaluation_loaders(self, split: Split) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """A loader of the examples to measure; if the plan has prompts to answer, a second one of these."""
        measured = self._evaluation_loader(split, self.collator().evaluation)
        if split not in self._answered:
            return measured
        return [measured, self._evaluation_loader(split, self.collator().prediction, self._answered[split])]

    def _evaluation_loader(
        self, split: Split, collate: Collate, examples: Sequence[int] | None = None
    ) -> DataLoader[Batch]:
        share = self.share
        sampler = EvaluationBatches(self.sizes(split), self.val_batch_size, share.size, share.rank, examples)
        return self.loader(split, sampler, collate)

    def loader(
        self,
        split: Split,
        sampler: TrainingBatches | EvaluationBatches | list[MicroBatch],
        collate: Collate,
    ) -> DataLoader[Batch]:
        """Loads the micro-batches of ``split`` that ``sampler`` gives."""
        return DataLoader(
            MicroBatches(
                self._tables[split],
                self._rows[split],
                collate,
                self._mismatches_of(split) if self.plan.mismatched and split != "predict" else None,
            ),
            sampler=sampler,
            batch_size=None,  # the sampler yields whole micro-batches
            num_workers=self.num_workers,
            persistent_workers=False,  # or workers would keep the plan of the first epoch
            pin_memory=torch.cuda.is_available(),
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        # Lightning's own waits for the device once for each tensor. On Apple GPUs that is necessary.
        return batch.to(device, non_blocking=device.type != "mps")
