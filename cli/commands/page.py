"""The options of `regrow page`."""

from __future__ import annotations

from cli.arguments import Commands, add_command, runs_option


def add_parser(commands: Commands) -> None:
    page = commands.add_parser("page", help="the gateway's page", description="The page that `regrow serve` shows.")
    kinds = page.add_subparsers(title="commands", metavar="COMMAND", required=True)
    token = add_command(
        kinds,
        "token",
        "cli.page:token",
        "show the page's token, for pausing and stopping there",
        "With it come the addresses of open pages. For another token remove RUNS/.gateway/page-token and start `serve` anew.",
    )
    runs_option(token)
