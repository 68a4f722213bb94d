"""One file per subcommand, thin: options in, checks, one call, output."""
