"""Progress of a command: bars on a terminal, plain lines elsewhere, and the bars of other libraries."""
