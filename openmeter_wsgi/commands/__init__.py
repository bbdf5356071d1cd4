"""The subcommands: check the configuration; deliver a spool, put it in order."""
