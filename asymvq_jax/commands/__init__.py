"""The subcommands of `asymvq`, one thin module each.

A command is a frozen dataclass of options and a function that does the work:

    @dataclass(frozen=True, kw_only=True)
    class Convert:
        \"\"\"Convert weights.\"\"\"           # the help's first lines

        # What to write; must not exist.   # the option's help: meaning, unit, and a default that is not a value
        out: str

    def work(options: Convert) -> None:    # may return an exit code
        from asymvq_jax.convert.convert import convert   # all that imports jax, so that --help is quick
        ...

    main = command("asymvq convert", Convert, work)

`work` first checks all paths and values, then computes, then writes through `files.outputs`, whole or not at all. What
the user can mend is raised as a `UserError`, which `command` prints as one line. A choice is a `Literal`, an option
without a value a `bool` that is False, and the fields of a configuration come with `config: str` and
`settings: Settings`. Options have one vocabulary: --checkpoint (ours), --plain (the decoder that came with the
encoder), --image, --mask, --latent, --out, --config, --json. `asymvq_jax.__main__` lists the commands.
"""
