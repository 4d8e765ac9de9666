"""An emulated network link, for tests, benchmarks and the demo: a TCP proxy with a rate, delay, jitter, loss and cuts.

All connections share one bottleneck in each direction: a short queue, served in the order of arrival at the link's
rate, then a delay line. A full queue is not read into, so a slow link stops the writer. It is a model of the path and
not of TCP: congestion windows, headers and acknowledgements are not in it.
"""

from isthmus.coordinator.emulation.proxy import EmulatedLink
from isthmus.coordinator.emulation.run import LinkProcess, LinkThread, link_process
from isthmus.coordinator.emulation.spec import Address, Cut, LinkSpec, Pair, parse_rate, parse_share, parse_time

__all__ = [
    "Address",
    "Cut",
    "EmulatedLink",
    "LinkProcess",
    "LinkSpec",
    "LinkThread",
    "Pair",
    "link_process",
    "parse_rate",
    "parse_share",
    "parse_time",
]
