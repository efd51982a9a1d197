"""A job on the hosts of a hostfile: what launch/torchrun.sh, launch/deepspeed.sh and launch/mpirun.sh run.

    python dtrain/commands/launch.py torchrun hostfiles/cluster --config configs/cola.yaml

dtrain starts one launcher of a single node on every host over ssh by itself, rather than leaving the way there to
DeepSpeed's pdsh or to the user: so every host is looked at before anything starts, an end anywhere is the end
everywhere, and the exit code and message are dtrain's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As in main.py. By path rather than by -m, which would put the user's folder first: another checkout, perhaps.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import io
import os
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory

from dtrain import console
from dtrain.cluster import launcher_commands
from dtrain.cluster.hostfile import Host, choose, read_hostfile
from dtrain.cluster.preflight import ROOT, Look, check, look_at, master_of
from dtrain.cluster.run_job import Job, run_job
from dtrain.cluster.ssh import is_here
from dtrain.commands.arguments import Parser, list_options, parse
from dtrain.config.load import load_config
from dtrain.console import log
from dtrain.errors import ConfigError, DtrainError, TopologyError

LAUNCHERS = ("torchrun", "deepspeed", "mpirun")

MAIN = ROOT / "dtrain" / "main.py"

USUAL_PORT = 29500
"""Stands in a dry run for the free one that a look at the first host finds."""


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """This program's own options, and in `rest` dtrain's: all that is not known here, and all after `--`.

    `program` and `options` are its name and the names of its options.

    Raises:
        ConfigError: an option that cannot be.
    """
    parser = Parser(
        prog=f"launch/{argv[0] if argv and argv[0] in LAUNCHERS else '<torchrun|deepspeed|mpirun>'}.sh",
        description="Starts dtrain on the hosts of a hostfile, and ends with the job's exit code.",
        epilog="Everything else goes to dtrain: --config FILE, section.key=value, a command such as evaluate; all after --, too.",
        allow_abbrev=False,
    )
    parser.add_argument("launcher", choices=LAUNCHERS, help=argparse.SUPPRESS)
    parser.add_argument("hostfile", type=Path, help="hosts and slots, such as hostfiles/cluster")
    parser.add_argument(
        "--include", default="", metavar="HOST[:SLOT,..][@..]", help="only these hosts, or slots of them"
    )
    parser.add_argument("--exclude", default="", metavar="HOST[:SLOT,..][@..]", help="all but these")
    parser.add_argument("--export", action="append", default=[], metavar="NAME", help="a variable to set on every host")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="where ranks meet; default: one that is free")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and start nothing")
    parser.add_argument("--nnodes", metavar="MIN:MAX", help="torchrun: an elastic job, which goes on with MIN hosts")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N", help="torchrun: starts again so often")
    own, rest = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, rest = own[:at], own[at + 1 :]
    found, unknown = parser.parse_known_args(own)
    found.rest = [*unknown, *rest]
    found.program, found.options = parser.prog, list_options(parser)
    return found


def plan_of(given: argparse.Namespace, env: Mapping[str, str]) -> launcher_commands.Plan:
    """What is to be started, as far as it is known before a look at the hosts.

    Raises:
        ConfigError: the hostfile, an option, or dtrain's own arguments are wrong.
    """
    if given.hostfile.suffix in (".yaml", ".yml"):
        raise ConfigError(
            f"the hostfile is missing: {given.hostfile} stands where it belongs. "
            f"{given.program} HOSTFILE --config {given.hostfile}; hostfiles/cluster shows one."
        )
    hosts = choose(read_hostfile(given.hostfile), include=given.include, exclude=given.exclude)
    missing = [name for name in given.export if name not in env]
    if missing:
        raise ConfigError(f"--export {missing[0]}: there is no such variable here. Set it, or leave the option out.")
    if given.master_port is not None and not 0 < given.master_port < 65536:
        raise ConfigError(f"--master-port {given.master_port} is not a port: 1 to 65535.")
    if given.launcher == "mpirun" and (chosen := [host.name for host in hosts if host.devices is not None]):
        raise ConfigError(
            f"mpirun knows how many ranks a host has, not which slots: of {chosen[0]}, name all or none with --include and "
            "--exclude, or use launch/torchrun.sh."
        )
    if given.launcher != "torchrun" and (given.nnodes or given.max_restarts):
        raise ConfigError(f"--nnodes and --max-restarts are torchrun's: {given.launcher} starts a job once.")
    arguments = parse(given.rest, program=given.program, launcher_options=given.options)
    note = None
    if arguments.command != "goodput":
        config = load_config(arguments.config, arguments.overrides, command=arguments.command)
        note = Path.cwd() / config.run_dir / "exit.json"
    return launcher_commands.Plan(
        hosts=hosts,
        script=MAIN,
        arguments=given.rest,
        folder=Path.cwd(),
        note=note,
        env=launcher_commands.travelling(env, given.export),
        address=hosts[0].name if len(hosts) > 1 else "127.0.0.1",
        port=given.master_port or USUAL_PORT,
        job_id=secrets.token_hex(16),
        name=f"dtrain-{secrets.token_hex(4)}",
        nodes=_nodes(given.nnodes, len(hosts)),
        max_restarts=given.max_restarts,
    )


def _nodes(text: str | None, hosts: int) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= hosts:
        raise ConfigError(
            f"--nnodes {text}: the least and the largest number of hosts, from 1 to the {hosts} that take part, such as 1:{hosts}."
        )
    return int(match[1]), int(match[2])


def with_looks(plan: launcher_commands.Plan, looks: Sequence[Look], *, port: int | None) -> launcher_commands.Plan:
    """The plan with what a look at the hosts has found: where the ranks meet, and how many threads each may have.

    Raises:
        TopologyError: no address, or the port is taken.
    """
    address, free = master_of(looks)
    if port is not None and not looks[0].found["port_is_free"]:
        raise TopologyError(
            f"{looks[0].host}: port {port} is taken there. Is another job, or an old one, still running? "
            "Leave --master-port out to have a free one chosen."
        )
    threads = min(threads_on(look, host) for look, host in zip(looks, plan.hosts, strict=True))
    # Equal on all hosts, so that sums are; torchrun would set 1.
    env = {"OMP_NUM_THREADS": str(threads), **plan.env}
    return replace(plan, address=address, port=port or free, env=env)


def threads_on(look: Look, host: Host) -> int:
    """Of each rank there: physical cores, as far as a container may use them."""
    cores, limit = int(look.found["cores"]), look.found["cpu_limit"]
    return max((cores if limit is None else min(cores, int(limit))) // host.slots, 1)


def job_of(launcher: str, plan: launcher_commands.Plan, hostfile: Path) -> Job:
    """The commands. hostfile: where mpirun is to find the hosts that take part."""
    match launcher:
        case "torchrun":
            return launcher_commands.torchrun(plan)
        case "deepspeed":
            return launcher_commands.deepspeed(plan)
        case _:
            here = next((host.name for host in plan.hosts if is_here(host.name)), "localhost")
            return launcher_commands.mpirun(plan, here, hostfile)


def shown(job: Job, exported: Sequence[str]) -> str:
    """The commands as one would type them; values that are secret, or may be since they were exported, are left out."""
    lines = []
    for part in job.parts:
        is_hidden = {name: name in exported or launcher_commands.is_secret(name) for name in part.env}
        values = {name: "..." if is_hidden[name] else value for name, value in part.env.items()}
        env = [f"{name}={shlex.quote(value)}" for name, value in sorted(values.items())]
        words = " ".join(["cd", shlex.quote(str(job.folder)), "&&", *env, shlex.join(part.argv)])
        lines.append(f"{part.host}$ {words}")
    return "\n".join(lines)


def launch(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Runs the job; gives its exit code.

    Raises:
        DtrainError: it was not started.
    """
    given = read_arguments(argv)
    plan = plan_of(given, env)
    with TemporaryDirectory(prefix="dtrain-launch-") as place:
        hostfile = Path(place) / "hosts"
        hostfile.write_text("".join(f"{host.name} slots={host.slots}\n" for host in plan.hosts), encoding="utf-8")
        if given.dry_run:
            log.info("%s", shown(job_of(given.launcher, plan, hostfile), given.export))
            return 0
        names = [host.name for host in plan.hosts]
        looks = look_at(names, folder=plan.folder, env=plan.env, wants={"port": given.master_port})
        for warning in check(looks, folder=plan.folder):
            log.warning("%s", warning)
        job = job_of(given.launcher, with_looks(plan, looks, port=given.master_port), hostfile)
        log.info("%s", shown(job, given.export))
        sys.stdout.flush()
        result = run_job(job)
    if result.code:
        log.error("%s", result.message)
    return result.code


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """The program; gives its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a model writes may not fit the terminal's encoding
    console.configure_logging(rank=0, world_size=1)
    try:
        return launch(argv, env)
    except DtrainError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(130)  # hosts that have not answered yet are not waited for; their ssh ends with this process


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
