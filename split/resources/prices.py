"""Prices of the resources, in money."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """The price table: placeholders for an hour of a device, a kilowatt-hour and a gigabyte sent."""

    device_hour: float = 0.05
    kilowatt_hour: float = 0.30
    gigabyte_sent: float = 0.09
    currency: str = "USD"

    def cost(self, hours: float, joules: float, bytes_sent: int) -> float:
        """The cost of hours of one device, with the energy that it took and the bytes that it sent."""
        return hours * self.device_hour + joules / 3.6e6 * self.kilowatt_hour + bytes_sent / 1e9 * self.gigabyte_sent
