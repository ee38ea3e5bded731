"""Each function and class of ``lightning_internals`` against the installed Lightning.

A test fails if Lightning renames what a function uses, or changes its meaning.
"""

from __future__ import annotations

import ast
import csv
import functools
import importlib
import inspect
import re
import signal
import textwrap
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector
from torch import Tensor, distributed
from torch.utils.data import DataLoader

import lightning_mlc
from lightning_mlc import lightning_internals as internals
from lightning_mlc.lightning_internals import CheckpointHooks, CommandLine, MetricsLoggerHooks, MetricsWriterHooks

BATCHES = 4


class Model(BoringModel):
    """A linear layer, trained on ``BATCHES`` batches of one row. It logs a loss in training and validation."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("seen", loss)
        return loss

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(BATCHES, 32))

    def val_dataloader(self) -> Any:
        return DataLoader(torch.ones(2, 32))


class At(Callback):
    """Calls a function at a hook of the trainer."""

    def __init__(self, hook: str, call: Callable[..., Any]) -> None:
        def run(trainer: Trainer, module: LightningModule, *arguments: Any) -> None:
            call(trainer, *arguments)

        setattr(self, hook, run)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    chosen = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **chosen,
    )


def fit(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    made = trainer(folder, *callbacks, **options)
    made.fit(Model())
    return made


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


# ---- loops ------------------------------------------------------------------------------------------


def test_a_window_ends_where_an_optimizer_step_follows(tmp_path: Path) -> None:
    steps = [0]
    expected, found = [], []

    def begin(trainer: Trainer, _batch: Any, batch_idx: int) -> None:
        steps[0] = trainer.global_step

    def end(trainer: Trainer, _outputs: Any, _batch: Any, batch_idx: int) -> None:
        expected.append(trainer.global_step > steps[0])
        found.append(internals.ends_window(trainer, batch_idx))

    fit(tmp_path, At("on_train_batch_start", begin), At("on_train_batch_end", end), accumulate_grad_batches=3)
    assert found == expected == [False, False, True, True]


def test_the_micro_batch_of_the_epoch(tmp_path: Path) -> None:
    expected, found = [], []

    def start(trainer: Trainer, _batch: Any, batch_idx: int) -> None:
        expected.append(batch_idx)
        found.append(internals.batch_of_epoch(trainer))

    fit(tmp_path, At("on_train_batch_start", start), max_epochs=2)
    assert found == expected == [0, 1, 2, 3, 0, 1, 2, 3]


class Seen(Logger):
    """Notes the steps at which Lightning passes it metrics of training."""

    name, version = "seen", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "seen" in metrics and step is not None:
            self.steps.append(step)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def test_logs_are_written_where_lightning_writes_them(tmp_path: Path) -> None:
    found: list[int] = []
    logger = Seen()

    def start(trainer: Trainer, _batch: Any, batch_idx: int) -> None:
        if internals.writes_logs(trainer) and internals.ends_window(trainer, batch_idx):
            found.append(trainer.global_step)

    options = {"log_every_n_steps": 2, "max_epochs": 2, "accumulate_grad_batches": 2}
    fit(tmp_path, At("on_train_batch_start", start), logger=logger, **options)
    assert found == logger.steps == [1, 3]


def test_the_checkpoint_of_a_run_is_known_before_it_is_loaded(tmp_path: Path) -> None:
    found: list[Path | None] = []

    class Looks(Model):
        def setup(self, stage: str) -> None:
            found.append(internals.checkpoint_to_load(self.trainer))

    made, path = trainer(tmp_path), tmp_path / "own.ckpt"
    made.fit(Looks())
    made.save_checkpoint(path)
    made.validate(Looks(), ckpt_path=path, verbose=False)
    made.fit(Looks())
    assert found == [None, path, None]
    assert internals.checkpoint_to_load(made) is None  # no command is running


def test_time_is_reported_to_the_profiler(tmp_path: Path) -> None:
    def start(trainer: Trainer, *_: Any) -> None:
        with internals.profiled(trainer, "part"):
            pass

    made = fit(tmp_path, At("on_train_batch_start", start), profiler="simple")
    assert len(made.profiler.recorded_durations["[Step]part"]) == BATCHES  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"val_check_interval": 2}, [False, True, False, True]),
        ({"val_check_interval": 1.0}, [False, False, False, True]),
        ({"limit_val_batches": 0}, [False] * 4),
    ],
)
def test_validation_follows_where_it_does(options: dict[str, Any], expected: list[bool], tmp_path: Path) -> None:
    events: list[str] = []
    said: list[bool] = []

    def end(trainer: Trainer, *_: Any) -> None:
        events.append("batch")
        said.append(internals.validation_follows(trainer))

    validation = At("on_validation_start", lambda trainer: events.append("validation"))
    fit(tmp_path, At("on_train_batch_end", end), validation, num_sanity_val_steps=0, **options)
    followed = [
        after == "validation" for event, after in zip(events, [*events[1:], ""], strict=True) if event == "batch"
    ]
    assert said == followed == expected


def test_validation_by_time_is_not_foreseen(tmp_path: Path) -> None:
    said: list[bool] = []
    end = At("on_train_batch_end", lambda trainer, *_: said.append(internals.validation_follows(trainer)))
    fit(tmp_path, end, val_check_interval=timedelta(microseconds=1), check_val_every_n_epoch=None, max_steps=2)
    assert said == [False, False]


def test_epoch_and_batches_done(tmp_path: Path) -> None:
    found: list[tuple[int, int]] = []

    def start(trainer: Trainer, _batch: Any, batch_idx: int) -> None:
        if batch_idx < BATCHES - 1:  # fetching the last batch requests the next epoch
            found.append(internals.epoch_and_batches_done(trainer))

    fit(tmp_path, At("on_train_batch_start", start), max_epochs=2)
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(("at", "expected"), [(2, (0, 2)), (BATCHES, (1, 0))])
def test_epoch_and_batches_done_when_a_resumed_run_asks_for_batches(
    at: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    def save(trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == at:
            trainer.save_checkpoint(tmp_path / "at.ckpt")

    # A hook at the end of a batch saves before the batch counts as completed, as Lightning's own checkpoints do.
    fit(tmp_path, At("on_train_batch_end", save), max_epochs=2)
    found: list[tuple[int, int]] = []

    class Asked(Model):
        def train_dataloader(self) -> Any:
            found.append(internals.epoch_and_batches_done(self.trainer))
            return super().train_dataloader()

    trainer(tmp_path, max_epochs=2).fit(Asked(), ckpt_path=tmp_path / "at.ckpt", weights_only=True)
    assert found == [expected]


def test_counts_are_equal_between_batches(tmp_path: Path) -> None:
    done = fit(tmp_path)
    counts: Any = done.fit_loop.epoch_loop.batch_progress.total
    ended = deepcopy(counts)
    internals.set_counts(counts, 0)
    assert counts == type(counts)()  # all of them, if Lightning counts anything else
    internals.set_counts(counts, BATCHES)
    assert counts == ended


def test_a_run_rewound_to_its_step_repeats_the_batches_of_the_next(tmp_path: Path) -> None:
    def stop(trainer: Trainer, _outputs: Any, _batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:  # the first of the second step
            internals.rewind_to_step(trainer)
            trainer.save_checkpoint(tmp_path / "rewound.ckpt")
            raise KeyError

    with pytest.raises(KeyError):
        fit(tmp_path, At("on_train_batch_end", stop), accumulate_grad_batches=2)
    trained: list[int] = []
    note = At("on_train_batch_start", lambda trainer, batch, batch_idx: trained.append(batch_idx))
    resumed = trainer(tmp_path, note, accumulate_grad_batches=2)
    resumed.fit(Model(), ckpt_path=tmp_path / "rewound.ckpt", weights_only=True)
    assert trained == [2, 3]
    assert resumed.global_step == 2


def test_a_run_rewound_in_validation_runs_it_from_its_beginning(tmp_path: Path) -> None:
    def stop(trainer: Trainer, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == 1:
            internals.rewind_to_step(trainer)
            trainer.save_checkpoint(tmp_path / "rewound.ckpt")
            raise KeyError

    with pytest.raises(KeyError):
        fit(tmp_path, At("on_validation_batch_start", stop), val_check_interval=2, num_sanity_val_steps=0)
    events: list[str] = []
    train = At("on_train_batch_start", lambda trainer, batch, batch_idx: events.append(f"train {batch_idx}"))
    val = At("on_validation_batch_start", lambda trainer, batch, batch_idx, *_: events.append(f"val {batch_idx}"))
    resumed = trainer(tmp_path, train, val, val_check_interval=2, num_sanity_val_steps=0)
    resumed.fit(Model(), ckpt_path=tmp_path / "rewound.ckpt", weights_only=True)
    assert events == ["val 0", "val 1", "train 2", "train 3", "val 0", "val 1"]


def test_restarted_batches_are_asked_for_again(tmp_path: Path) -> None:
    begun: list[str] = []

    class Rows(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            begun.append("")
            yield from torch.ones(2, 32)

    def restart(trainer: Trainer) -> None:
        before = len(begun)
        internals.restart_batches(trainer)
        assert len(begun) == before + 1

    made = trainer(tmp_path, At("on_train_start", restart), limit_val_batches=0)
    made.fit(Model(), DataLoader(Rows(), batch_size=1))
    assert made.global_step == 2
    assert len(begun) == 2


class Steps(Logger):
    """Records the numbers of the steps for which something is logged."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int | None] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "seen" in metrics:
            self.steps.append(step)


def test_logs_are_numbered_by_the_optimizer_step(tmp_path: Path) -> None:
    def start(trainer: Trainer, *_: Any) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = 70  # a count that is ahead
        internals.number_logs_by_step(trainer)

    steps = Steps()
    fit(tmp_path, At("on_train_batch_start", start), logger=steps, log_every_n_steps=1)
    assert steps.steps == [0, 1, 2, 3]


# ---- signals ----------------------------------------------------------------------------------------


def test_handlers_are_set_after_lightnings_and_restored_at_the_end(tmp_path: Path) -> None:
    noted: list[int] = []
    before = signal.getsignal(signal.SIGTERM)

    def listen() -> None:
        signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))

    def start(trainer: Trainer, _batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            signal.raise_signal(signal.SIGTERM)

    add = At("on_fit_start", lambda trainer: internals.after_signal_handlers(trainer, listen))
    done = fit(tmp_path, add, At("on_train_batch_start", start))
    assert noted == [signal.SIGTERM]
    assert not done.received_sigterm  # Lightning's own handler was replaced
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_signal_is_broadcast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor", lambda loop: asked.append(""))

    def advance(trainer: Trainer) -> None:
        with pytest.MonkeyPatch.context() as patch:  # Lightning asks whether there are several processes
            patch.setattr(distributed, "is_initialized", lambda: True)
            patch.setattr(Trainer, "world_size", 2)
            patch.setattr(type(trainer.fit_loop._data_fetcher), "__next__", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                trainer.fit_loop.epoch_loop.advance(trainer.fit_loop._data_fetcher)

    start = At("on_train_epoch_start", advance)
    fit(tmp_path, start, limit_val_batches=0)
    assert asked == [""]
    fit(tmp_path, start, At("on_fit_start", internals.stop_signal_broadcast), limit_val_batches=0)
    assert asked == [""]


# ---- processes --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_process")
def test_the_share_of_the_examples(tmp_path: Path) -> None:
    assert internals.examples_share(trainer(tmp_path)) is None
    assert internals.examples_share(trainer(tmp_path, strategy="ddp")) == (1, 0)


def test_a_sampler_is_added_where_the_option_says_so(tmp_path: Path) -> None:
    for option in (True, False):
        made = trainer(tmp_path, use_distributed_sampler=option)
        assert internals.adds_distributed_sampler(made) is option
    # The trainer decides by this value.
    assert "use_distributed_sampler" in inspect.getsource(_DataConnector)


def test_ddp_says_whether_it_finds_unused_parameters(tmp_path: Path) -> None:
    for name, expected in (("ddp", False), ("ddp_find_unused_parameters_true", True)):
        strategy = trainer(tmp_path, strategy=name).strategy
        assert isinstance(strategy, DDPStrategy)
        assert internals.finds_unused_parameters(strategy) is expected


@pytest.mark.usefixtures("one_process")
def test_the_mesh_has_the_data_parallel_size_that_was_set(tmp_path: Path) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=7, tensor_parallel_size=1)
    trainer(tmp_path, strategy=strategy).strategy.connect(Model())
    internals.set_data_parallel_size(strategy, 1)
    strategy.setup_environment()
    assert strategy.device_mesh["data_parallel"].size() == 1
    internals.set_data_parallel_size(strategy, 7)
    with pytest.raises(RuntimeError):
        strategy.setup_environment()


@pytest.mark.usefixtures("one_process")
def test_processes_connect_by_the_backend_that_was_set() -> None:
    strategy = ModelParallelStrategy()
    internals.set_backend(strategy, "cpu:gloo,cuda:nccl")
    assert strategy.process_group_backend == "cpu:gloo,cuda:nccl"


def test_a_module_is_moved_but_for_what_stays() -> None:
    module = Model()
    module.register_buffer("kept", torch.zeros(1))
    kept = module.get_buffer("kept")
    internals.move_except(module, torch.device("meta"), stays=lambda tensor: tensor is kept)
    assert module.layer.weight.device.type == "meta"
    assert module.get_buffer("kept").device.type == "cpu"
    assert module.device.type == "meta"


# ---- checkpoints ------------------------------------------------------------------------------------


class Noted(CheckpointHooks):
    """Records the methods that Lightning has called."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(dirpath=folder, filename="step={step}", auto_insert_metric_name=False, **options)
        self.called: list[str] = []

    def write_best(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        self.called.append("best")
        assert {"epoch", "step"} <= metrics.keys()
        super().write_best(trainer, metrics)

    def write_last(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        self.called.append("last")
        super().write_last(trainer, metrics)

    def write(self, trainer: Trainer, path: str) -> None:
        self.called.append(Path(path).name)
        super().write(trainer, path)

    def may_remove(self, trainer: Trainer, previous: str, current: str) -> bool:
        self.called.append(f"{Path(previous).name} removed: {super().may_remove(trainer, previous, current)}")
        return super().may_remove(trainer, previous, current)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_lightning_saves_by_the_public_hooks(tmp_path: Path) -> None:
    noted = Noted(tmp_path, every_n_train_steps=2, save_last="link")
    fit(tmp_path, noted, enable_checkpointing=True, limit_val_batches=0)
    assert noted.called[:5] == ["best", "step=2.ckpt", "last", "best", "step=4.ckpt"]
    assert "step=2.ckpt removed: True" in noted.called
    assert names(tmp_path) == {"step=4.ckpt", "last.ckpt"}


def test_a_checkpoint_is_not_written_where_a_hook_does_nothing(tmp_path: Path) -> None:
    class Silent(Noted):
        def write(self, trainer: Trainer, path: str) -> None:
            pass

    fit(tmp_path / "run", Silent(tmp_path / "run", every_n_train_steps=2), enable_checkpointing=True)
    assert not (tmp_path / "run").exists() or names(tmp_path / "run") == set()


def test_what_can_be_saved_and_when(tmp_path: Path) -> None:
    noted = Noted(tmp_path, every_n_train_steps=100, save_on_exception=True)
    found: dict[str, Any] = {}

    def sanity(trainer: Trainer) -> None:
        if trainer.sanity_checking:
            found["before training"] = noted.can_save(trainer), noted.can_save_on_exception(trainer)

    def end(trainer: Trainer, _outputs: Any, _batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            found["metrics"] = set(noted.known_metrics(trainer))
            found["in training"] = noted.can_save(trainer), noted.can_save_on_exception(trainer)
            noted.save_now(trainer)
            found["saved"] = noted.can_save(trainer), noted.can_save_on_exception(trainer)
        if batch_idx == 1:
            found["next step"] = noted.can_save(trainer), noted.can_save_on_exception(trainer)
            noted.mark_saved(trainer.global_step, str(tmp_path / "elsewhere.ckpt"))
            found["marked"] = noted.can_save(trainer), noted.can_save_on_exception(trainer)

    fit(tmp_path, noted, At("on_validation_end", sanity), At("on_train_batch_end", end), enable_checkpointing=True)
    assert {"epoch", "step", "seen"} <= found.pop("metrics")
    no, yes = (False, False), (True, True)
    assert found == {"before training": no, "in training": yes, "saved": no, "next step": yes, "marked": no}
    assert "step=1.ckpt" in noted.called


# ---- the command line -------------------------------------------------------------------------------


class Commands(CommandLine):
    called: ClassVar[list[Any]] = []

    def make_trainer(self, options: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        self.called.append(options["max_epochs"])
        return super().make_trainer({**options, "logger": False, "enable_checkpointing": False}, callbacks)

    def method_keywords(self, subcommand: str) -> dict[str, Any]:
        return {"verbose": False}

    def run_subcommand(self, subcommand: str) -> None:
        self.called.append(subcommand)
        super().run_subcommand(subcommand)


def command(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Commands, dict[str, Any]]:
    """The command line after it has run, and the arguments of its call of the trainer."""
    Commands.called.clear()
    given: dict[str, Any] = {}

    @functools.wraps(Trainer.validate)  # the command line has an option for each argument
    def validate(_trainer: Trainer, **keywords: Any) -> None:
        given.update(keywords)

    monkeypatch.setattr(Trainer, "validate", validate)
    return Commands(Model, args=list(arguments), save_config_callback=None), given


def test_lightning_runs_a_subcommand_by_the_public_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    made, given = command("validate", "--trainer.max_epochs=3", monkeypatch=monkeypatch)
    assert Commands.called == [3, "validate"]
    assert given["verbose"] is False
    assert "ckpt_path" in given
    assert made.instantiated("model") is made.model
    assert made.subcommand_parser("validate").parse_args(["--trainer.max_epochs=4"]).trainer.max_epochs == 4


def test_a_checkpoint_does_not_override_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "x.ckpt"
    torch.save({"hyper_parameters": {"wrong": 1}, "state_dict": {}}, checkpoint)
    command("validate", f"--ckpt_path={checkpoint}", monkeypatch=monkeypatch)
    monkeypatch.delattr(CommandLine, "_parse_ckpt_path")
    with pytest.raises(SystemExit):
        command("validate", f"--ckpt_path={checkpoint}", monkeypatch=monkeypatch)


# ---- metrics.csv ------------------------------------------------------------------------------------


class Writer(MetricsWriterHooks):
    def continue_file(self) -> None:
        self.metrics_keys = ["loss", "step"]


class Metrics(MetricsLoggerHooks):
    def make_writer(self) -> Writer:
        return Writer(self.log_dir)


def test_metrics_are_appended_to_the_file_of_an_earlier_run(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        logger = Metrics(tmp_path, name="", version="")
        assert isinstance(logger.experiment, Writer)
        assert logger.experiment is logger.experiment
        logger.log_metrics({"loss": value}, step=int(value))
        logger.save()
    with (tmp_path / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"loss": "1.0", "step": "1"}, {"loss": "2.0", "step": "2"}]
    assert type(MetricsLoggerHooks(tmp_path / "other").experiment) is ExperimentWriter


# ---- nothing of this elsewhere ----------------------------------------------------------------------

OURS = sorted(Path(lightning_mlc.__file__).parent.rglob("*.py"))
OF_LIGHTNING = re.compile(r"trainer|loop|strategy|connector|fetcher|pl_module|callback")


def private_names(source: str) -> set[str]:
    """Names with one leading underscore that ``source`` defines as methods, or reads or sets on ``self``."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            names.add(node.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_no_other_module_touches_a_private_attribute_of_a_lightning_object() -> None:
    found = [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"
        for path in OURS
        if path.name != "lightning_internals.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and OF_LIGHTNING.search(ast.unparse(node.value).removeprefix("self."))
        and not ast.unparse(node.value).startswith("super()")
    ]
    assert found == []


def test_no_other_class_uses_a_private_name_of_its_lightning_base() -> None:
    checked = []
    for path in OURS:
        module = ".".join(path.relative_to(Path(lightning_mlc.__file__).parents[1]).with_suffix("").parts)
        # The plug-in of Axolotl cannot be imported where that is not installed, and knows nothing of Lightning.
        if module.endswith(("__main__", "lightning_internals", "plugins.axolotl")):
            continue
        for _, kind in inspect.getmembers(importlib.import_module(module.removesuffix(".__init__")), inspect.isclass):
            bases = [base for base in kind.__mro__ if base.__module__.startswith("lightning.")]
            if kind.__module__ == module and bases:
                own = private_names(textwrap.dedent(inspect.getsource(kind)))
                theirs = set().union(*(private_names(textwrap.dedent(inspect.getsource(base))) for base in bases))
                checked.append(kind.__name__)
                assert own & theirs == set(), kind
    assert {"AlignmentModule", "MultilingualData", "Checkpoint", "TrainingCLI", "FSDP2", "MetricsFile"} <= set(checked)
