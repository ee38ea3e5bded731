"""The subcommands of ``lightning-mlc``. Each has a module, with its options and the lines that it prints."""
