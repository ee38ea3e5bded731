"""The subcommands of ``lightning-mlc``: one module each, with its options and what it prints."""
