"""`optimum-mla`, a program of its own with the commands that `optimum-cli` has from this package.

It loads no other plugin, so it starts faster and prints nothing of theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from optimum.commands.base import CommandInfo, RootOptimumCLICommand

from optimum.commands.register.register_mla import REGISTER_COMMANDS

PREFIX = "mla-"


def main(words: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        words: The command and its arguments; None takes those of the process. The prefix of the command may be left
            out: `convert` stands for `mla-convert`.
    """
    root = RootOptimumCLICommand("optimum-mla")
    for command in REGISTER_COMMANDS:
        info = command.COMMAND
        root.register_subcommand(CommandInfo(info.name, info.help, subcommand_class=command))
    words = list(sys.argv[1:] if words is None else words)
    if words and PREFIX + words[0] in [command.COMMAND.name for command in REGISTER_COMMANDS]:
        words[0] = PREFIX + words[0]
    args = root.parser.parse_args(words)
    if not hasattr(args, "func"):
        root.parser.print_help()
        raise SystemExit(1)
    args.func(args).run()


if __name__ == "__main__":
    main()
