"""The benchmark's results at a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyllama.bench.results import PeerResult, Profile, Results


def show(console: Console, found: Results) -> None:
    """The run, the machine's limits, the peers' speeds or profiles, and who was left out."""
    machine, read = found.run.machine, found.bandwidth
    libraries = [name for name in ("torch", "transformers", "llama_cpp_python") if machine[name]]
    console.print(Text(str(found.run), "bold"))
    console.print(Text(", ".join(f"{name} {machine[name]}" for name in libraries)))
    console.print(Text(found.run.command))
    limits = [f"reads {number(read.median / 1e9)} GB/s ±{read.spread:.0%}"]
    limits += [f"{dtype} product {number(r.median / 1e9)} GFLOP/s" for dtype, r in found.products.items()]
    console.print(Text(f"measured limits: {', '.join(limits)}\n"))
    if found.peers:
        show_speeds(console, found)
    for profile in found.profiles:
        show_profile(console, profile, read.median)
    for name, reason in found.left_out.items():
        console.print(Text(f"{name} is left out: {reason}"))


def show_speeds(console: Console, found: Results) -> None:
    """One row for each peer."""
    figures, shares = found.figures, list(found.peers[0].bandwidth_shares)[:1]
    loads = ["load, s", "with imports, s", "peak GB"] if any(peer.load for peer in found.peers) else []
    shared = any(peer.sharing for peer in found.peers)
    made = table("tokens/s", *["threads"] * shared, *figures, *("of read bandwidth" for _ in shares), *loads)
    for peer in found.peers:
        row = [threads(peer)] * shared + [speed(peer, figure) for figure in figures]
        row += [f"{peer.bandwidth_shares[figure]:.0%}" for figure in shares]
        if load := peer.load:
            peak = "" if load.peak_bytes is None else f"{load.peak_bytes / 1e9:.2f}"
            row += [f"{load.seconds:.2f}", f"{load.with_imports:.2f}", peak]
        made.add_row(peer.name, *row)
    console.print(made)
    console.print("\nmedians of rounds in turn; in brackets the slowest round")
    if shares:
        console.print(f"of read bandwidth: {shares[0]}; load: from the files to a first token")
    if shared:
        show_sharing(console, found)


def show_sharing(console: Console, found: Results) -> None:
    """What sharing costs each peer that ranks share."""
    made = table("in collectives", *found.figures, "kB received", "MB read")
    for peer in found.peers:
        if about := peer.sharing:
            decode = next(iter(peer.bandwidth_shares))
            made.add_row(
                peer.name,
                *(span([100 * share for share in about.in_collectives[f]], "%") for f in found.figures),
                f"{about.received[decode] / 1e3:,.1f}",
                span([read / 1e6 for read in about.bytes_read]),
            )
    console.print("", made)
    console.print("\nthreads: those of one process, or ranks \u00d7 threads of each")
    starting = "" if found.run.device == "cpu" else "; on a GPU, of starting them"
    console.print(f"in collectives: share of a rank's time, waiting included{starting}")
    console.print("received: by a rank, for a token in decoding; read: by a rank, of the weight files")


def span(values: Sequence[float], unit: str = "") -> str:
    """The ranks' least and largest value: `258 to 280`; one number where they are the same."""
    return " to ".join(dict.fromkeys(f"{value:,.0f}" for value in (min(values), max(values)))) + unit


def show_profile(console: Console, found: Profile, bandwidth: float) -> None:
    """Time and bytes of every operation, and how long reading the bytes takes at least."""
    needed = sum(operation.bytes for operation in found.operations)
    console.print(
        Text(
            f"{found.peer}, a token at {found.context:,} of context: {found.seconds * 1e3:.2f} ms; reading "
            f"its {needed / 1e6:,.0f} MB at {bandwidth / 1e9:.1f} GB/s takes "
            f"{needed / bandwidth * 1e3:.2f} ms",
            "bold",
        )
    )
    made = table("operation", "ms", "share", "MB to read", "reading takes, ms")
    for operation in found.operations:
        size = operation.bytes
        made.add_row(
            operation.name,
            f"{operation.seconds * 1e3:.3f}",
            f"{operation.seconds / found.watched_seconds:.1%}",
            *([f"{size / 1e6:.2f}", f"{size / bandwidth * 1e3:.3f}"] if size else ["", ""]),
        )
    made.add_row("a step with the clock", f"{found.watched_seconds * 1e3:.3f}")
    console.print(made, "")


def table(first: str, *heads: str) -> Table:
    """A plain table: names on the left, figures on the right."""
    made = Table(header_style="underline", box=None, padding=(0, 1, 0, 0))
    made.add_column(first, no_wrap=True)
    for head in heads:
        made.add_column(head, justify="right")
    return made


def threads(peer: PeerResult) -> str:
    """Of one process `2`, of two ranks with one each `2 \u00d7 1`."""
    return f"{peer.sharing.ranks} \u00d7 {peer.threads}" if peer.sharing else str(peer.threads)


def speed(peer: PeerResult, figure: str) -> str:
    """The median, of decoding also the slowest round: `27.5 (25.1)`."""
    rate = peer.speeds.get(figure)
    if rate is None:
        return ""
    slowest = f"\N{NO-BREAK SPACE}({number(rate.slowest)})" if figure in peer.bandwidth_shares else ""
    return f"{number(rate.median)}{slowest}"


def number(value: float) -> str:
    """Three digits: 6.58, 71.3, 274."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
