"""What joins several machines, and how long a sum of all of them takes.

MLX communicates on the CPU. So a sum waits until the GPU has handed its part over, then
for the others, then until the GPU goes on: a fixed time, beside which the bytes of a
few rows count little. The figures were published by others; nothing was measured here:

- the hand-over: 180 us, and 4 us with MLX_METAL_FAST_SYNCH, on an M3 Ultra (mlx issue
  4438); 150 and 16 us with a sum of two processes, on an M3 Max (mlx pull
  request 1773);
- RDMA over Thunderbolt 5 by JACCL, fast hand-over included: 30 us and 6.2 GB/s on M3
  Ultra and M5 Max (oMLX, docs/experimental), 25.5 us and up to 8 GB/s on M4 Pro
  (mlx-jaccl-cluster);
- TCP over Thunderbolt: 300 us a message (Geerling, "1.5 TB of VRAM on Mac Studio");
  0.38 ms and more there and back (exo issue 2295). Its bandwidth is assumed.

Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Link:
    """What joins machines.

    Attributes:
        name: For a reader.
        hand_over_s: From the GPU to the CPU and back, of each sum.
        latency_s: Of a message.
        bandwidth: Bytes a second, one way.
        is_ring: Whether machines speak to their neighbours only. Otherwise each one
            speaks to all others at once.
    """

    name: str
    hand_over_s: float
    latency_s: float
    bandwidth: float
    is_ring: bool = False

    def sum_s(self, num_bytes: float, size: int) -> float:
        """Time of a sum of all machines.

        Args:
            num_bytes: Of what each one adds.
            size: Number of machines; 1 takes no time.
        """
        if size == 1:
            return 0.0
        # Around a ring go parts of the sum, then parts of the result.
        messages = 2 * (size - 1) if self.is_ring else 1
        sent = num_bytes * messages / (size if self.is_ring else 1)
        return self._s(messages, sent)

    def gather_s(self, num_bytes: float, size: int) -> float:
        """Time until every machine has what each of them had.

        Args:
            num_bytes: Of what each one had.
            size: Number of machines; 1 takes no time.
        """
        if size == 1:
            return 0.0
        messages = size - 1 if self.is_ring else 1
        return self._s(messages, num_bytes * messages)

    def _s(self, messages: int, num_bytes: float) -> float:
        sent_s = num_bytes / self.bandwidth
        return self.hand_over_s + messages * self.latency_s + sent_s


JACCL = Link("JACCL", hand_over_s=180e-6, latency_s=26e-6, bandwidth=6.2e9)
JACCL_FAST = replace(JACCL, name="JACCL, fast synch", hand_over_s=4e-6)
RING = Link("ring", hand_over_s=180e-6, latency_s=300e-6, bandwidth=3e9, is_ring=True)
LINKS = (JACCL_FAST, JACCL, RING)


def link_of(*, has_rdma: bool, has_fast_synch: bool) -> Link:
    """What joins machines of these settings.

    Args:
        has_rdma: Whether they speak by RDMA over Thunderbolt; otherwise by TCP.
        has_fast_synch: Whether ``MLX_METAL_FAST_SYNCH`` is on.
    """
    link = JACCL if has_rdma else RING
    if not has_fast_synch:
        return link
    name = f"{link.name}, fast synch"
    return replace(link, name=name, hand_over_s=JACCL_FAST.hand_over_s)
