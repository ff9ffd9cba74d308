"""A module for each command of `regrow`: its name, its options, and which function runs it; `add_parser` adds them."""
