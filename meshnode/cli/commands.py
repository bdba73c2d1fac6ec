"""The commands of `mesh`: arguments in, exit codes out. Nothing outside this package prints."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from discovery.grants import Role
from meshnode.cli.demo import demo
from meshnode.cli.discover import discover
from meshnode.cli.doctor import doctor
from meshnode.cli.engine import engine_group
from meshnode.cli.logs import log_defect, log_nowhere
from meshnode.cli.members import invites, leave, members, remove, revoke
from meshnode.cli.models import models
from meshnode.cli.node import relay, serve, worker
from meshnode.cli.peers import peers, ping
from meshnode.cli.plan import plan
from meshnode.cli.pull import pull
from meshnode.cli.settings import home_option, take_invocation
from meshnode.cli.shown import shown
from meshnode.cli.trace import trace
from meshnode.cli.views import give_up_output
from meshnode.config import DEFAULT_INVITE_USES, parse_duration
from meshnode.control import ask_node
from meshnode.errors import INTERRUPTED_EXIT_CODE, MeshError
from meshnode.nurseries import leading_error
from meshnode.operator_key import load_or_make_key
from meshnode.state import default_home, home_beside_node

INTERNAL_ERROR_EXIT_CODE = 1


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mesh-llm-node", prog_name="mesh")
def cli() -> None:
    """A few ordinary machines as one computer for large language models."""


@cli.command()
@home_option
@click.option("--role", type=click.Choice([role.value for role in Role]), default="peer")
@click.option("--expires", default="24h", help="Lifetime, like 30m, 2h or 7d.")
@click.option("--uses", type=click.IntRange(1, 1000), default=DEFAULT_INVITE_USES)
@click.option("--mesh", help="A mesh's id, or 'own' (default: the one that has other members).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def invite(
    home: Path | None, role: str, expires: str, uses: int, mesh: str | None, as_json: bool
) -> None:
    """Print a new invite to the running node's mesh."""
    lifetime_s = parse_duration(expires)
    request = {"op": "invite", "role": role, "lifetime_s": lifetime_s, "uses": uses, "mesh": mesh}
    answer = ask_node(home or default_home(), request)
    click.echo(json.dumps(answer) if as_json else answer["token"])


@cli.command()
@click.argument("code", nargs=-1, required=True)
@home_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def accept(code: tuple[str, ...], home: Path | None, as_json: bool) -> None:
    """Let in a machine that found no way here: CODE is what it printed (meshr1…)."""
    answer = ask_node(home or default_home(), {"op": "accept", "code": "".join(code)})
    text = f"the other machine is heard at {answer['address']}; it joins now"
    click.echo(json.dumps(answer) if as_json else text)


@cli.command()
@home_option
def key(home: Path | None) -> None:
    """Print the operator's key, which programs need to take models' bytes over HTTP."""
    click.echo(load_or_make_key(home_beside_node(home or default_home())))


@cli.command()
@home_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(home: Path | None, as_json: bool) -> None:
    """Show what the running node does: peers, layers, speed."""
    answer = ask_node(home or default_home(), {"op": "status"})
    click.echo(json.dumps(answer, indent=None if as_json else 2))


for command in (invites, revoke, members, remove, leave, peers, ping):
    cli.add_command(command)
cli.add_command(worker)
cli.add_command(serve)
cli.add_command(relay)
cli.add_command(engine_group, "engine")
cli.add_command(demo)
cli.add_command(discover)
cli.add_command(doctor)
cli.add_command(plan)
cli.add_command(pull)
cli.add_command(models)
cli.add_command(trace)


def run(arguments: Sequence[str]) -> int:
    """Runs one command; its exit code, of `meshnode.errors`."""
    log_nowhere()

    def command() -> Any:
        own, invocation = take_invocation(arguments)
        return cli.main(own, "mesh", standalone_mode=False, obj=invocation)

    return _run(command)


def _run(command: Callable[[], Any]) -> int:
    try:
        result = command()
    except BaseExceptionGroup as group:
        return _report(_leading_error(group))
    except BaseException as error:
        return _report(error)
    return result if isinstance(result, int) else 0


def _leading_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What to tell of several failures: an interrupt, else the first error for users."""
    return KeyboardInterrupt() if group.subgroup(KeyboardInterrupt) else leading_error(group)


def _is_of_our_output(error: OSError) -> bool:
    """Whether it was raised while something was shown, which click's `echo` does for everyone."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code is click.echo.__code__ for frame in frames)


def _report(error: BaseException) -> int:
    if isinstance(error, MeshError):
        click.echo(f"mesh: {shown(str(error))}", err=True)
        return error.exit_code
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return INTERRUPTED_EXIT_CODE
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else INTERNAL_ERROR_EXIT_CODE
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()  # whoever read our output has gone; say nothing more
        return INTERNAL_ERROR_EXIT_CODE
    if isinstance(error, OSError) and _is_of_our_output(error):
        return _report(give_up_output(error))
    path = log_defect(error)
    where = f"with {path}" if path else "(its log could not be written: is the disk full?)"
    click.echo(
        f"mesh: internal error ({type(error).__name__}); this is a defect of mesh: please report "
        f"it {where}",
        err=True,
    )
    return INTERNAL_ERROR_EXIT_CODE
