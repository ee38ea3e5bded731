"""The MLC loss in somebody else's LightningModule."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_rows, save_model
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_mlc.errors import UserError
from lightning_mlc.plugins import MLCRegularizer
from lightning_mlc.plugins.lightning import MLCModuleMixin

ROWS = example_rows(12)
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), attention_dropout=0.0)


class Theirs(LightningModule):
    """Plain fine-tuning on token ids, with a mean over the batch; it knows nothing of MLC."""

    def __init__(self, folder: str, batch_size: int = 4, optimizer: str = "SGD") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForCausalLM.from_pretrained(folder)

    def training_step(self, batch: Tensor) -> Any:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("objective", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return getattr(torch.optim, self.hparams["optimizer"])(self.parameters(), lr=0.05)

    def train_dataloader(self) -> Any:
        rows = torch.randint(0, 256, (16, 12), generator=torch.Generator().manual_seed(0))
        of = self.trainer.world_size if self._trainer is not None else 1
        # Two processes divide each step as one process with twice the batch would have it.
        turns = DistributedSampler(range(16), of, self.global_rank, shuffle=False)
        return DataLoader(rows, sampler=turns, batch_size=self.hparams["batch_size"])


class WithMLC(MLCModuleMixin, Theirs):
    """As the documentation has it."""


def regularizer(folder: Path, **options: Any) -> MLCRegularizer:
    defaults = {"weight": 10.0, "extractor_dim": 16, "prompts_per_step": 4}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return MLCRegularizer([row["prompt"] for row in ROWS], tokenizer, **{**defaults, **options})


def with_mlc(kind: Any, *arguments: Any, **options: Any) -> Any:
    """A module of ``kind`` that has the loss with these options."""
    module = kind(*arguments)
    module.mlc = regularizer(Path(arguments[0]), **options)
    return module


def trainer(out: Path, **options: Any) -> Trainer:
    defaults = {"max_steps": 4, "log_every_n_steps": 1, "enable_checkpointing": False, "logger": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=out,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{**defaults, **options},
    )


def weights(module: LightningModule) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def of_model(module: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.model.parameters()])


def fitted(module: Any, out: Path, ckpt_path: str | None = None, **options: Any) -> Any:
    trainer(out, **options).fit(module, ckpt_path=ckpt_path)
    return module


def test_without_a_weight_nothing_changes(folder: Path, tmp_path: Path) -> None:
    plain = fitted(Theirs(str(folder)), tmp_path)
    off = fitted(with_mlc(WithMLC, str(folder), weight=0.0), tmp_path)
    none = fitted(WithMLC(str(folder)), tmp_path)
    on = fitted(with_mlc(WithMLC, str(folder)), tmp_path)
    assert torch.equal(of_model(off), of_model(plain))
    assert torch.equal(of_model(none), of_model(plain))
    assert (of_model(on) - of_model(plain)).abs().max() > 1e-3


def test_one_step_is_the_sum_of_both_gradients(folder: Path, tmp_path: Path) -> None:
    module = fitted(with_mlc(WithMLC, str(folder)), tmp_path, max_steps=1)
    twin, mlc = Theirs(str(folder)), regularizer(folder)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    batch = next(iter(twin.train_dataloader()))
    (twin.model(input_ids=batch, labels=batch).loss + mlc.loss(twin.model, 0)).backward()
    optimizer.step()
    torch.testing.assert_close(of_model(module), of_model(twin), rtol=0, atol=1e-6)


@pytest.mark.parametrize("extractor", ["frozen", "linear"])
@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_accumulation_changes_nothing(
    batch: int, accumulation: int, extractor: Any, folder: Path, tmp_path: Path
) -> None:
    options = {"extractor": extractor, "every_n_steps": 2}
    whole = fitted(with_mlc(WithMLC, str(folder), **options), tmp_path)
    module = with_mlc(WithMLC, str(folder), batch, **options)
    fitted(module, tmp_path, accumulate_grad_batches=accumulation)
    torch.testing.assert_close(weights(module), weights(whole), rtol=0, atol=2e-6)


def test_a_trained_extractor_is_trained_and_a_frozen_one_is_not(folder: Path, tmp_path: Path) -> None:
    for extractor, moves in (("linear", True), ("frozen", False)):
        module = with_mlc(WithMLC, str(folder), extractor=extractor)
        module.mlc.prepare(module.model)
        before = [parameter.detach().clone() for parameter in module.mlc.parameters()]
        fitted(module, tmp_path)
        after = list(module.mlc.parameters())
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)) is not moves


@pytest.mark.parametrize("options", [{}, {"extractor": "linear"}, {"center": True}])
def test_a_resumed_run_is_bitwise_the_same(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """It stops at the end of an epoch, because Lightning begins an epoch's batches anew elsewhere."""

    def make() -> WithMLC:
        return with_mlc(WithMLC, str(folder), 2, "AdamW", **options)

    keep = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "max_steps": -1}
    whole = fitted(make(), tmp_path, max_epochs=2, logger=CSVLogger(tmp_path / "whole"), **keep)
    saving = ModelCheckpoint(tmp_path / "first", save_last=True)
    fitted(make(), tmp_path, max_epochs=1, callbacks=[saving], **keep)
    ckpt = str(tmp_path / "first" / "last.ckpt")
    resumed = fitted(make(), tmp_path, ckpt, max_epochs=2, logger=CSVLogger(tmp_path / "rest"), **keep)
    assert torch.equal(weights(resumed), weights(whole))
    assert len(rows(tmp_path / "whole")) == 8
    assert rows(tmp_path / "rest") == rows(tmp_path / "whole")[4:]


def rows(folder: Path) -> list[dict[str, str]]:
    """What a logger wrote of the loss."""
    (file,) = folder.rglob("metrics.csv")
    found = list(csv.DictReader(file.open()))
    return [{name: cell for name, cell in row.items() if name.startswith("mlc/")} for row in found]


def test_a_run_is_not_resumed_with_other_options(folder: Path, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_last=True)
    module = with_mlc(WithMLC, str(folder))
    fitted(module, tmp_path, enable_checkpointing=True, callbacks=[saving])
    other = with_mlc(WithMLC, str(folder), layer=1)
    with pytest.raises(UserError, match=r"^layer: is 1, but was -1 in the checkpoint"):
        fitted(other, tmp_path, ckpt_path=str(tmp_path / "last.ckpt"), max_steps=6)


def test_a_checkpoint_has_no_prompts_and_loads_by_lightnings_method(folder: Path, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_last=True)
    module = with_mlc(WithMLC, str(folder), extractor="linear")
    fitted(module, tmp_path, enable_checkpointing=True, callbacks=[saving])
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["hyper_parameters"] == {"folder": str(folder), "batch_size": 4, "optimizer": "SGD"}
    again = WithMLC.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(of_model(again), of_model(module))


def test_what_is_logged(folder: Path, tmp_path: Path) -> None:
    """Means since the last log, of the steps that have the loss."""
    seen: list[float] = []

    class Spy(MLCRegularizer):
        def _note(self, losses: Tensor, *rest: Any) -> None:
            seen.append(float(losses.detach().mean()))
            super()._note(losses, *rest)

    mlc = regularizer(folder)
    mlc.__class__ = Spy
    module = WithMLC(str(folder))
    module.mlc = mlc
    fitted(module, tmp_path, logger=CSVLogger(tmp_path / "logs"), log_every_n_steps=2)
    found = rows(tmp_path / "logs")
    both = ("explained_variance", "min_cosine", "between_prompts")
    names = {"loss", "excess", *both, *(f"raw/{name}" for name in both)}
    assert found[0].keys() == {f"mlc/{name}" for name in names}
    assert [float(row["mlc/loss"]) for row in found] == pytest.approx([sum(seen[:2]) / 2, sum(seen[2:]) / 2])


class Itself(MLCModuleMixin, Theirs):
    """Has a step of its own in the class that has the mixin, which calls the one above it."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch), "more": batch_idx}


class Below(WithMLC):
    def training_step(self, batch: Tensor) -> Any:
        return super().training_step(batch)


class Late(MLCModuleMixin, Theirs):
    """Makes its model where Lightning wants it for large models."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(self.hparams["folder"])
        super().configure_model()


class Elsewhere(MLCModuleMixin, Theirs):
    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.policy = self.model
        del self.model

    def mlc_model(self) -> Any:
        return self.policy

    def training_step(self, batch: Tensor) -> Any:
        return self.policy(input_ids=batch, labels=batch).loss


@pytest.mark.parametrize("kind", [Itself, Below, Late, Elsewhere])
def test_other_ways_to_write_a_module(kind: Any, folder: Path, tmp_path: Path) -> None:
    """Each has the loss, and once."""
    options = {"extractor": "linear"}
    expected = fitted(with_mlc(WithMLC, str(folder), **options), tmp_path)
    found = fitted(with_mlc(kind, str(folder), **options), tmp_path)
    torch.testing.assert_close(weights(found).sort().values, weights(expected).sort().values, rtol=0, atol=0)


class Skips(MLCModuleMixin, Theirs):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return None if batch_idx % 2 else self.model(input_ids=batch, labels=batch).loss


def test_a_skipped_batch_is_skipped(folder: Path, tmp_path: Path) -> None:
    module = fitted(with_mlc(Skips, str(folder)), tmp_path, max_epochs=1, max_steps=-1)
    assert torch.isfinite(weights(module)).all()


class Manual(MLCModuleMixin, Theirs):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor) -> Any:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.manual_backward(loss)
        self.optimizers().step()
        return {"text": "no loss"}


class OnlyTheModel(MLCModuleMixin, Theirs):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


class Lost(MLCModuleMixin, Theirs):
    def training_step(self, batch: Tensor) -> Any:
        return [self.model(input_ids=batch, labels=batch).loss]


class Nowhere(Theirs):
    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.policy = self.model
        del self.model


class NowhereWithMLC(MLCModuleMixin, Nowhere):
    pass


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Manual, {}, "automatic_optimization: is off"),
        (OnlyTheModel, {"extractor": "linear"}, "extractor: 'linear' is not in the optimizer"),
        (Lost, {}, "training_step: must return a loss or a mapping with 'loss', got list"),
        (NowhereWithMLC, {}, "mlc_model: NowhereWithMLC has no attribute 'model'"),
    ],
)
def test_what_cannot_have_the_loss_is_one_line(
    kind: Any, options: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        fitted(with_mlc(kind, str(folder), **options), tmp_path)
    assert str(error.value).startswith(message)


TWO = """
import json, sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_lightning import *

folder, out, options = Path({folder!r}), Path({out!r}), json.loads({options!r})
module = with_mlc(WithMLC, str(folder), 2, **options)
fitted(module, out, strategy="ddp", devices=2, logger=CSVLogger(out / "logs"))
if module.global_rank == 0:
    torch.save(weights(module), out / "weights.pt")
"""


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("options", [{}, {"extractor": "linear", "every_n_steps": 2, "prompts_per_step": 1}])
def test_two_processes_equal_one(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """With one prompt in a step, one process has none."""
    path = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT / "kernels"), str(ROOT)]
    script = TWO.format(path=path, folder=str(folder), out=str(tmp_path), options=json.dumps(options))
    file = tmp_path / "two.py"
    file.write_text(script)
    subprocess.run([sys.executable, str(file)], check=True, cwd=tmp_path, timeout=600)
    one = with_mlc(WithMLC, str(folder), 4, **options)
    fitted(one, tmp_path, logger=CSVLogger(tmp_path / "one"))
    torch.testing.assert_close(torch.load(tmp_path / "weights.pt"), weights(one), rtol=0, atol=2e-6)
    for left, right in zip(rows(tmp_path / "logs"), rows(tmp_path / "one"), strict=True):
        assert {name: float(cell) for name, cell in left.items() if cell} == pytest.approx(
            {name: float(cell) for name, cell in right.items() if cell}, abs=1e-4
        )
