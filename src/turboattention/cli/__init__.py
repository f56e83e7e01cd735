"""The command line: one file a command, and the helpers they share."""
