"""How far a command is: bars on a terminal, plain lines elsewhere, and the bars of other libraries."""
