"""``fit``, ``validate``, ``test`` and ``predict``: a LightningCLI around this package's module and data."""

from __future__ import annotations

import argparse
import logging
import pkgutil
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_mlc.checkpoints.finding import checkpoint_files, checkpoint_folder, require_room
from lightning_mlc.checkpoints.saving import AtomicCheckpointIO, Checkpoint
from lightning_mlc.commands.options import explain
from lightning_mlc.commands.precision_option import PrecisionTrainer, print_on_first, settle
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.distributed.sharding import require_supported
from lightning_mlc.errors import Interrupted, UserError, moved
from lightning_mlc.files.paths import expand_all, expanded
from lightning_mlc.lightning_internals import CommandLine
from lightning_mlc.lint.remark import remark
from lightning_mlc.objectives import Objective, Sum
from lightning_mlc.processes import is_first, lost_another
from lightning_mlc.training.callbacks import EvaluationReport, PredictionWriter, Progress, ValidateAtMaxSteps
from lightning_mlc.training.metrics_file import MetricsFile
from lightning_mlc.training.model_line import ModelLine
from lightning_mlc.training.module import AlignmentModule
from lightning_mlc.training.resumption import ExactResume
from lightning_mlc.training.run_folder import CONFIG, RunFolder, give_back
from lightning_mlc.training.signals import EndWhenAsked
from lightning_mlc.training.speed import Speed

OBJECTIVE = "model.objective"
NOISE = ("Tip", "GPU available", "TPU available", "Loading `train_dataloader` to estimate")
"""Beginnings of lines of Lightning that are advertisements, or that our line about the model replaces."""
TOKENIZER_OPTIONS = ("name_or_path", "gguf_file", "revision", "trust_remote_code", "chat_template")


class SaveConfig(SaveConfigCallback):
    """Writes the complete configuration of a ``fit`` into its folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Overrides Lightning: write nothing until training starts, so that a refused run leaves no folder."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, folder / CONFIG, skip_none=False, overwrite=True)


class TrainingCLI(CommandLine):
    """Lightning's command line, with one ``out`` folder per run and its whole configuration in YAML."""

    _begins = True
    """Whether the run starts without a checkpoint."""
    _is_new = True
    """Whether its folder must be new."""

    def __init__(self, args: list[str], **options: Any) -> None:
        self._asked = args[0]
        super().__init__(AlignmentModule, MultilingualData, args=args, **options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning calls it on the instance
        """Only the subcommand of this call, because collecting the options of all four takes four times as long."""
        settled = {"verbose", "weights_only", "return_predictions"}
        return {self._asked: LightningCLI.subcommands()[self._asked] | settled}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--out",
            type=str,
            default="runs/mlc",
            help="Folder for everything that the run writes. It must be new for fit.",
        )
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "step={step}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": "link",
                "checkpoint.save_on_exception": True,
                "checkpoint.enable_version_counter": False,
                "model.objective": {"class_path": "lightning_mlc.objectives.DPO"},
            }
        )
        parser.link_arguments("out", "trainer.default_root_dir")
        parser.link_arguments("out", "checkpoint.dirpath", compute_fn=checkpoint_folder)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        for option in TOKENIZER_OPTIONS:
            parser.link_arguments(f"model.{option}", f"data.{option}")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Lightning's own method warns about arguments that are given from Python, as they always are here.
        assert isinstance(args, list)
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            raise self._explain(error, args) from error
        expand_all(self.config[self.config.subcommand])
        _require_classes(self.config[self.config.subcommand])
        if isinstance(self.config[self.config.subcommand].seed_everything, bool):
            raise UserError("seed_everything", "give a number, so that the run can be repeated")

    def _explain(self, error: argparse.ArgumentError, args: list[str]) -> UserError:
        command = f"lightning-mlc {args[0]}"
        found = explain(error, [self.subcommand_parser(args[0])], command)
        if found.option == "model.name_or_path" and "--model.name_or_path" not in args:
            return UserError(found.option, f"is not set; give it, or a configuration: {command} --config FILE")
        return found

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        out = Path(config.out)
        if self.subcommand == "fit" and is_first() and not config.trainer.fast_dev_run:
            if config.ckpt_path is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise UserError(
                    "out",
                    f"{out} exists and is not an empty folder; give another --out, "
                    "or continue that run with --ckpt_path last",
                )
            require_room(out, 0)
        self._is_new = config.ckpt_path is None
        words = (None, "last", "best", "hpc", "registry", *(("auto",) if self.subcommand == "fit" else ()))
        if config.ckpt_path not in words and not Path(config.ckpt_path).exists():
            raise UserError("ckpt_path", f"there is no file {config.ckpt_path}; `fit` writes them to {out}/checkpoints")
        if config.ckpt_path in ("last", "auto"):
            found = checkpoint_files(out)
            if not found and config.ckpt_path == "last":
                raise UserError("ckpt_path", f"there is no checkpoint in {checkpoint_folder(str(out))}")
            config.ckpt_path = str(found[-1].resolve()) if found else None
            if not found and is_first():
                _require_clearable(out)
        self._begins = config.ckpt_path is None
        self._precision_line = settle(config)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:  # Lightning refuses options of the checkpoint
            raise UserError("checkpoint", " ".join(str(error).split())) from error
        except (ValueError, UserError) as error:
            # For an option that may be null, jsonargparse wraps our error into several lines of its own.
            own = error if isinstance(error, UserError) else error.__cause__
            if not isinstance(own, UserError):
                raise
            objective = self.config[self.subcommand].model.objective
            if own.is_within(OBJECTIVE) and objective is not None:
                # The parts of a sum are made before the sum, and do not know their place in it.
                build_objective(objective)
            raise own from None
        self.instantiated("data").inspect = partial(remark, self.config_init[self.subcommand].data.source_language)
        print_on_first(self._precision_line)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        options = config.trainer
        if options.logger in (None, True) and not options.fast_dev_run:
            kwargs["logger"] = self.subcommand == "fit" and MetricsFile(config.out)
        plugins = options.plugins if isinstance(options.plugins, list) else [options.plugins] if options.plugins else []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        callbacks = list(options.callbacks or [])
        own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        callbacks += [ModelLine(), EndWhenAsked(), EvaluationReport(), ExactResume(int(config.seed_everything))]
        if self.subcommand == "fit":
            callbacks += [ValidateAtMaxSteps(), Speed()]
            if not options.fast_dev_run:  # such a run writes nothing
                callbacks.insert(0, RunFolder(self._is_new, self._begins))
        if options.enable_progress_bar is not False and not own_bar:
            callbacks.append(Progress())  # after the callbacks whose figures it shows
        if self.subcommand == "predict":
            callbacks.append(PredictionWriter())
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def make_trainer(self, options: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if options["fast_dev_run"]:  # such a run writes nothing
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        require_supported(options["strategy"])
        try:
            return super().make_trainer(options, callbacks)
        except (TypeError, ValueError, MisconfigurationException) as error:  # Lightning refuses the options
            raise UserError("trainer", " ".join(str(error).split())) from error

    def method_keywords(self, subcommand: str) -> dict[str, Any]:
        keywords = {"weights_only": True}  # a checkpoint is data, not code
        if subcommand in ("validate", "test"):
            keywords["verbose"] = False  # the report shows the numbers
        if subcommand == "predict":
            keywords["return_predictions"] = False  # a callback writes them to a file
        return keywords


def _require_clearable(out: Path) -> None:
    """Raises:
    UserError: ``out`` is neither empty nor the folder of a run that ended before its first checkpoint.
    """
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / CONFIG).is_file():
        raise UserError(
            "out", f"{out} is not empty and not the folder of a run, because it has no {CONFIG}; give another --out"
        )


def build_objective(node: Namespace, option: str = OBJECTIVE) -> Objective:
    """The objective that ``node`` of a configuration describes.

    Raises:
        UserError: A value in it is not allowed. The error is for ``option`` or an option below it, such as
            ``model.objective.objectives[1].beta``.
    """
    kind = pkgutil.resolve_name(node.class_path)
    options = dict(node.get("init_args") or {})
    if issubclass(kind, Sum):
        parts = enumerate(options["objectives"])
        options["objectives"] = [build_objective(part, f"{option}.objectives[{index}]") for index, part in parts]
    with moved(OBJECTIVE, option):
        objective: Objective = kind(**options)
    return objective


def _require_classes(config: Any, option: str = "") -> None:
    """Refuse a function in the place of a class, because jsonargparse would call it, even ``os.system``.

    Raises:
        UserError: A ``class_path`` is not a class.
    """
    if isinstance(config, list):
        for index, part in enumerate(config):
            _require_classes(part, f"{option}[{index}]")
    if not isinstance(config, Namespace | dict):
        return
    path = config.get("class_path")
    if isinstance(path, str) and not isinstance(pkgutil.resolve_name(path), type):
        raise UserError(option, f"{path} is not a class; give the name of a class")
    for name, part in vars(config).items() if isinstance(config, Namespace) else config.items():
        _require_classes(part, f"{option}.{name}" if option else str(name))


def shipped_configs() -> dict[str, Path]:
    """The configurations in the package, by name."""
    folder = Path(str(files("lightning_mlc"))) / "configs"
    if not folder.is_dir():  # a clone of the repository that is not installed
        folder = Path(__file__).parents[2] / "configs"
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def _with_shipped_configs(args: Sequence[str]) -> list[str]:
    """``args``, where ``--config NAME`` becomes the path of a shipped configuration if there is no file ``NAME``."""
    resolved = list(args)
    for index, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option not in ("-c", "--config"):
            continue
        position = index if equals else index + 1
        if not equals:
            if position >= len(args):
                continue
            value = args[position]
        value = expanded(value, "--config")
        if Path(value).is_file():
            resolved[position] = f"{option}={value}" if equals else value
            continue
        name = value.removeprefix("configs/").removesuffix(".yaml")
        shipped = shipped_configs()
        if name not in shipped:
            raise UserError(
                "--config",
                f"there is no file {value}; give a file, or one of the shipped configurations: {', '.join(shipped)}",
            )
        resolved[position] = f"{option}={shipped[name]}" if equals else str(shipped[name])
    return resolved


def _with_torch_optimizers(args: Sequence[str]) -> list[str]:
    """``args``, where a bare name of an optimizer means that of PyTorch, even if other libraries have one."""
    resolved = list(args)
    for index, arg in enumerate(args):
        option, equals, name = arg.partition("=")
        if option != "--model.optimizer" or (not equals and index + 1 >= len(args)):
            continue
        name = name if equals else args[index + 1]
        if name.isidentifier() and hasattr(torch.optim, name):
            position, prefix = (index, f"{option}=") if equals else (index + 1, "")
            resolved[position] = f"{prefix}torch.optim.{name}"
    return resolved


def run(args: Sequence[str]) -> TrainingCLI:
    """Parse ``args`` (the subcommand first) and run the command.

    Raises:
        UserError: Something the user gave is wrong.
        Interrupted: The run was stopped by a signal, after it has written a checkpoint.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*is not supported by the model summary.*")
    warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer` in `LightningModule`.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    # There are no validation data, as asked.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero.*")
    # Our sampler resumes where the checkpoint ended.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*Couldn't infer the batch indices.*")
    warnings.filterwarnings("ignore", message=".*activation_checkpointing_enable.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not record.getMessage().lstrip("💡 ").startswith(NOISE)
    )
    try:
        return make_cli(args)
    except SIGTERMException as error:  # Lightning would exit as if the run were done
        interrupted = Interrupted(None, "stopped by a signal; continue with the same command and --ckpt_path last")
        interrupted.is_shared = True
        raise interrupted from error
    except RuntimeError as error:
        if not lost_another(error):
            raise
        raise UserError(
            None,
            "another process of the run has ended, so this one stops too; see the message of that process for the "
            "reason, and continue with the same command and --ckpt_path last",
        ) from error
    finally:
        give_back()


def make_cli(args: Sequence[str], kind: type[TrainingCLI] = TrainingCLI) -> TrainingCLI:
    """Make the command line ``kind`` from ``args`` (the subcommand first), and run it."""
    return kind(
        _with_torch_optimizers(_with_shipped_configs(args)),
        seed_everything_default=42,
        save_config_callback=SaveConfig,
        trainer_class=PrecisionTrainer,
        trainer_defaults={
            "use_distributed_sampler": False,
            "num_sanity_val_steps": -1,
            "log_every_n_steps": 1,
            "enable_model_summary": False,  # see `ModelLine`
        },
        auto_configure_optimizers=False,
        # Raise errors, so that they are reported in one line. argparse would print hundreds of lines of usage first.
        parser_kwargs={
            "exit_on_error": False,
            args[0]: {"prog": f"lightning-mlc {args[0]}", "exit_on_error": False},
        },
    )
