"""The subcommands about a spool: deliver it, look into it, put it in order."""
