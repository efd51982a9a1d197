"""Runs a job on the hosts of a hostfile, for launch/dtrain.sh, torchrun.sh, deepspeed.sh and mpirun.sh.

    python dtrain/commands/launch.py torchrun hostfiles/cluster --config configs/cola.yaml

dtrain itself starts a single-node launcher on every host over ssh, instead of leaving that to DeepSpeed's pdsh or to
the user. Therefore every host is checked before anything starts, a failure on one host ends the job on all hosts, and
the exit code and the message are dtrain's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As in main.py. Started by path and not by -m, which would search the user's folder first, maybe another checkout.
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
from dtrain.cluster.hostfile import Host, read_hostfile, select_hosts
from dtrain.cluster.launcher_commands import LaunchPlan
from dtrain.cluster.preflight import ROOT, HostProbe, check_hosts, choose_master, host_addresses, probe_hosts
from dtrain.cluster.run_job import MultiHostJob, run_job
from dtrain.cluster.ssh import is_local
from dtrain.commands.arguments import Parser, parse
from dtrain.config.load import load_config
from dtrain.console import log
from dtrain.errors import ConfigError, DtrainError, TopologyError

LAUNCHERS = ("dtrain", "torchrun", "deepspeed", "mpirun")

MAIN = ROOT / "dtrain" / "main.py"

DRY_RUN_PORT = 29500
"""Shown by a dry run in place of the free port that a real run finds on the first host."""


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line.

    Returns:
        This program's options. In addition: `rest`, dtrain's arguments, which are all unknown ones and all after `--`;
        `program`, this program's name; `options`, the names of its options.

    Raises:
        ConfigError: an option is wrong.
    """
    parser = Parser(
        prog=f"launch/{argv[0] if argv and argv[0] in LAUNCHERS else '<dtrain|torchrun|deepspeed|mpirun>'}.sh",
        description="Starts dtrain on the hosts of a hostfile, and exits with the job's exit code.",
        epilog="All other arguments, and all after --, are passed to dtrain: --config FILE, section.key=value, a command.",
    )
    parser.add_argument("launcher", choices=LAUNCHERS, help=argparse.SUPPRESS)
    parser.add_argument("hostfile", type=Path, help="hosts and slots, such as hostfiles/cluster")
    parser.add_argument(
        "--include", default="", metavar="HOST[:SLOT,..][@..]", help="use only these hosts, or some of their slots"
    )
    parser.add_argument("--exclude", default="", metavar="HOST[:SLOT,..][@..]", help="use all hosts except these")
    parser.add_argument("--export", action="append", default=[], metavar="NAME", help="set a variable on every host")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="the master's port; default: a free port")
    parser.add_argument("--dry-run", action="store_true", help="print the commands without starting them")
    parser.add_argument("--nnodes", metavar="MIN:MAX", help="torchrun: an elastic job, which needs at least MIN hosts")
    parser.add_argument(
        "--max-restarts",
        type=int,
        metavar="N",
        help="torchrun or dtrain: restart up to N times; default 0, with spare hosts their number",
    )
    launcher_words, rest = list(argv), []
    if "--" in launcher_words:
        at = launcher_words.index("--")
        launcher_words, rest = launcher_words[:at], launcher_words[at + 1 :]
    options, unknown = parser.parse_known_args(launcher_words)
    options.rest = [*unknown, *rest]
    options.program, options.options = parser.prog, parser.long_options()
    return options


def build_plan(options: argparse.Namespace, env: Mapping[str, str]) -> LaunchPlan:
    """Returns the plan without what only a probe of the hosts can tell.

    Raises:
        ConfigError: the hostfile, an option, or an argument of dtrain is wrong.
    """
    if options.hostfile.suffix in (".yaml", ".yml"):
        raise ConfigError(
            f"the hostfile is missing: the first argument is {options.hostfile}. "
            f"Usage: {options.program} HOSTFILE --config {options.hostfile}; hostfiles/cluster is an example."
        )
    hosts = select_hosts(read_hostfile(options.hostfile), include=options.include, exclude=options.exclude)
    unset = [name for name in options.export if name not in env]
    if unset:
        raise ConfigError(f"--export {unset[0]}: this variable is not set here. Set it, or remove the option.")
    if options.master_port is not None and not 0 < options.master_port < 65536:
        raise ConfigError(f"--master-port {options.master_port} is not a port: use 1 to 65535.")
    if options.launcher == "mpirun" and (partial := [host.name for host in hosts if host.devices is not None]):
        raise ConfigError(
            f"mpirun cannot select single slots: include or exclude all slots of {partial[0]}, or use launch/torchrun.sh."
        )
    if options.nnodes and options.launcher != "torchrun":
        own = " dtrain.sh goes on with all hosts that are left: use --max-restarts alone." * (
            options.launcher == "dtrain"
        )
        raise ConfigError(f"--nnodes needs launch/torchrun.sh.{own}")
    if options.max_restarts and options.launcher not in ("dtrain", "torchrun"):
        raise ConfigError(
            f"--max-restarts needs launch/dtrain.sh or torchrun.sh: {options.launcher} does not restart a job."
        )
    hosts, max_restarts = _with_spares(hosts, options)
    arguments = parse(options.rest, program=options.program, launcher_options=options.options)
    if arguments.ranks is not None:
        raise ConfigError(
            "--ranks is for one machine without a hostfile. Remove it: the hostfile has the number of ranks."
        )
    exit_file = None
    if arguments.command != "goodput":
        config = load_config(arguments.config, arguments.overrides, command=arguments.command)
        exit_file = Path.cwd() / config.run_dir / "exit.json"
    return LaunchPlan(
        hosts=hosts,
        script=MAIN,
        arguments=options.rest,
        folder=Path.cwd(),
        exit_file=exit_file,
        env=launcher_commands.forwarded_env(env, options.export),
        address=hosts[0].name if len(hosts) > 1 else "127.0.0.1",
        port=options.master_port or DRY_RUN_PORT,
        job_id=secrets.token_hex(16),
        name=f"dtrain-{secrets.token_hex(4)}",
        host_range=_parse_nnodes(options.nnodes, len(hosts)),
        max_restarts=max_restarts,
        fixed_port=options.master_port,
    )


def _with_spares(hosts: Sequence[Host], options: argparse.Namespace) -> tuple[list[Host], int]:
    """Returns the hosts of the job, those in use before the spare ones, and the number of restarts.

    Raises:
        ConfigError: no host is left to run the job, or the number of restarts is wrong.
    """
    active, spares = [each for each in hosts if not each.is_spare], [each for each in hosts if each.is_spare]
    if not active:
        raise ConfigError(
            "all selected hosts are spare. Select one that runs the job, or remove `spare` in the hostfile."
        )
    if spares and options.launcher != "dtrain":
        names = ", ".join(host.name for host in spares)
        log.warning("Only launch/dtrain.sh uses spare hosts, so %s will not take part.", names)
        spares = []
    max_restarts = len(spares) if options.max_restarts is None else options.max_restarts
    if max_restarts < 0:
        raise ConfigError(f"--max-restarts {max_restarts} is not a number of restarts: it must be at least 0.")
    if spares and not max_restarts:
        raise ConfigError(
            f"{spares[0].name} is a spare host, which --max-restarts 0 never uses. Remove one of the two."
        )
    return [*active, *spares], max_restarts


def _parse_nnodes(text: str | None, hosts: int) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= hosts:
        raise ConfigError(
            f"--nnodes {text} is not MIN:MAX with 1 <= MIN <= MAX <= {hosts}, the number of selected hosts. Example: 1:{hosts}"
        )
    return int(match[1]), int(match[2])


def apply_probes(plan: LaunchPlan, probes: Sequence[HostProbe], *, port: int | None) -> LaunchPlan:
    """Returns the plan with what the probes found: the master's address and port, and the threads of each rank.

    Raises:
        TopologyError: the master has no usable address, or the port is in use.
    """
    address, free_port = choose_master(probes)
    if port is not None and not probes[0].facts["port_is_free"]:
        raise TopologyError(
            f"{probes[0].host}: port {port} is in use there. Is another or an older job still running? "
            "Without --master-port a free port is chosen."
        )
    threads = min(threads_per_rank(probe, host) for probe, host in zip(probes, plan.hosts, strict=True))
    # The same number on all hosts, because it affects the order of floating-point sums. torchrun would set 1.
    env = {"OMP_NUM_THREADS": str(threads), **plan.env}
    return replace(plan, address=address, port=port or free_port, env=env, addresses=host_addresses(probes))


def threads_per_rank(probe: HostProbe, host: Host) -> int:
    """Returns how many physical cores each rank on a host has, within a container's CPU limit."""
    cores, limit = int(probe.facts["cores"]), probe.facts["cpu_limit"]
    return max((cores if limit is None else min(cores, int(limit))) // host.slots, 1)


def build_job(launcher: str, plan: LaunchPlan, hostfile: Path) -> MultiHostJob:
    """Returns the commands of all hosts.

    Args:
        hostfile: a file with the selected hosts, for mpirun.
    """
    match launcher:
        case "dtrain":
            return launcher_commands.dtrain(plan)
        case "torchrun":
            return launcher_commands.torchrun(plan)
        case "deepspeed":
            return launcher_commands.deepspeed(plan)
        case _:
            local_host = next((host.name for host in plan.hosts if is_local(host.name)), "localhost")
            return launcher_commands.mpirun(plan, local_host, hostfile)


def format_commands(job: MultiHostJob, exported: Sequence[str]) -> str:
    """Returns the commands as a user would type them. Hides values that are secret, or were exported and so may be."""
    lines = []
    for command in job.commands:
        is_hidden = {name: name in exported or launcher_commands.is_secret(name) for name in command.env}
        values = {name: "..." if is_hidden[name] else value for name, value in command.env.items()}
        env = [f"{name}={shlex.quote(value)}" for name, value in sorted(values.items())]
        words = " ".join(["cd", shlex.quote(str(job.folder)), "&&", *env, shlex.join(command.argv)])
        lines.append(f"{command.host}$ {words}")
    return "\n".join(lines)


def launch(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Runs the job and returns its exit code.

    Raises:
        DtrainError: the job was not started.
    """
    options = read_arguments(argv)
    plan = build_plan(options, env)
    with TemporaryDirectory(prefix="dtrain-launch-") as temp_folder:
        hostfile = Path(temp_folder) / "hosts"
        hostfile.write_text("".join(f"{host.name} slots={host.slots}\n" for host in plan.hosts), encoding="utf-8")
        if options.dry_run:
            job = build_job(options.launcher, plan, hostfile)
            log.info("%s", format_commands(job, options.export))
            if job.rounds is not None:
                log.info(
                    "These launchers wait for orders of this script. Typed by hand, each would start a job on its host alone."
                )
            return 0
        names = [host.name for host in plan.hosts]
        probes = probe_hosts(names, folder=plan.folder, env=plan.env, request={"port": options.master_port})
        for warning in check_hosts(probes, folder=plan.folder):
            log.warning("%s", warning)
        job = build_job(options.launcher, apply_probes(plan, probes, port=options.master_port), hostfile)
        log.info("%s", format_commands(job, options.export))
        sys.stdout.flush()
        outcome = run_job(job)
    if outcome.code:
        log.error("%s", outcome.message)
    return outcome.code


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Runs the program and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # text of a model may not fit the terminal's encoding
    console.configure_logging(rank=0, world_size=1)
    try:
        return launch(argv, env)
    except DtrainError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(130)  # does not wait for hosts that have not answered; their ssh ends with this process


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
