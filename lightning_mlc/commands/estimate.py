"""``lightning-mlc estimate``: takes the options of ``fit``, and prints a table of the memory that it needs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_mlc.commands.precision_option import print_on_first, settle
from lightning_mlc.commands.training import TrainingCLI, make_cli
from lightning_mlc.data.batches import Batch
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.distributed.sharding import require_supported
from lightning_mlc.models.layers import AUTO
from lightning_mlc.training.memory import GB, GPUS, RESERVED, Estimate, Setup, Way, cells, estimate_largest, setup_of
from lightning_mlc.training.module import AlignmentModule


class EstimateCLI(TrainingCLI):
    """Reads a configuration as ``fit`` does, and runs nothing."""

    def before_instantiate_classes(self) -> None:
        """Without the checks of ``fit``, because nothing is written."""
        self._precision_line = settle(self.config[self.subcommand], runs=False)

    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model = self.instantiated("model")
        self.datamodule = self.instantiated("data")
        print_on_first(self._precision_line)

    def run_subcommand(self, subcommand: str) -> None:
        module, data = self.model, self.datamodule
        assert isinstance(module, AlignmentModule)
        assert isinstance(data, MultilingualData)
        require_supported(self.config_init[subcommand].trainer.strategy)
        setup = setup_of(self.config_init[subcommand].trainer)
        data.prepare_data()
        data.setup("fit")
        data.plan_rows(module.losses.row_plan)
        data.check_steps()
        if module.consistency.layer == AUTO:
            print_on_first("layer: fit chooses it (auto); the estimate takes the last one, which needs the most memory")
        found, batch, way = estimate_largest(module, data, setup)
        show(found, batch, setup, way, str(module.source))


def show(found: Estimate, batch: Batch, setup: Setup, way: Way, name: str) -> None:
    """Print ``found`` as a table."""
    console = Console()
    every = (*batch.responses, *batch.translations, *batch.prompts, *batch.mismatched)
    tokens = sum(rows.num_tokens for rows in every)
    console.print(f"{name}: {found.parameters / 1e6:,.1f} M parameters, {found.trained / 1e6:,.1f} M trained")
    console.print(
        f"{setup.processes} process{'es' if setup.processes > 1 else ''}, {setup.strategy}, {setup.precision}; "
        f"micro-batch of {len(batch)}: {tokens} tokens, {cells(batch)} with padding; {way}"
    )
    table = Table("on each GPU", "GB", box=None, header_style="bold", pad_edge=False)
    table.columns[1].justify = "right"
    for part, size in found.parts.items():
        table.add_row(part, f"{size / GB:.2f}")
    table.add_row("while gradients are computed", f"{sum(found.parts.values()) / GB:.2f}", style="bold")
    table.add_row("while the optimizer runs", f"{found.optimizer_step / GB:.2f}", style="bold")
    console.print(table)
    fitting = [gpu for gpu, size in GPUS.items() if found.fits(size)]
    console.print(f"fits, with {RESERVED:.0%} kept free: {', '.join(fitting) or 'none of ' + ', '.join(GPUS)}")


def run(args: Sequence[str]) -> None:
    """Print the estimate for the configuration in ``args``, which are options of ``fit``.

    Raises:
        UserError: Something the user gave is wrong.
    """
    make_cli(["fit", *args], EstimateCLI)
