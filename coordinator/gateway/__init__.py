"""Models for any OpenAI client: `make_app` over what generates, `serve` to listen."""

from coordinator.gateway.api import make_app
from coordinator.gateway.models import ServedModel
from coordinator.gateway.server import Serving, serve

__all__ = ["ServedModel", "Serving", "make_app", "serve"]
